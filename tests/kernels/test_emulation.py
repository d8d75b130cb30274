"""The emulation finds what it promises: in small kernels, and in the real ones with one mistake put in."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from emulator import (
    CENTRING,
    HARNESS,
    HERE,
    KERNELS,
    NO_COMPILER,
    ORDERS,
    ROOT,
    EmulationError,
    Emulator,
    compile_object,
    link,
)
from moments_reference import disagreement, expected
from test_cuda_moments import make_features

pytestmark = pytest.mark.skipif(NO_COMPILER is not None, reason=NO_COMPILER or "")

# ---- small kernels ----


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    program = link(folder / "probes", compile_object(folder / "probes.o", HERE / "probes.cu"))

    def run(name: str, order: str = "forward") -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, name, str(ORDERS.index(order))], capture_output=True, text=True)

    return run


def numbers(process):
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return np.array([float(line) for line in process.stdout.split()])


@pytest.mark.parametrize("order", ORDERS)
def test_barrier(probe, order):
    assert np.array_equal(numbers(probe("reverse", order))[:64], np.arange(64)[::-1])


def test_missing_barrier_shows_as_nan_in_some_order(probe):
    assert any(np.isnan(numbers(probe("reverse without barrier", order))[:64]).any() for order in ORDERS)


def test_unwritten_shared_memory_is_nan(probe):
    assert np.isnan(numbers(probe("unwritten"))[:64]).all()


def test_thread_orders(probe):
    forward, backward, shuffled = (numbers(probe("ranks", order))[:64] for order in ORDERS)
    assert np.array_equal(forward, np.arange(64))
    assert np.array_equal(backward, np.arange(64)[::-1])
    assert np.array_equal(np.sort(shuffled), np.arange(64))
    assert not np.array_equal(shuffled, forward)


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles(probe, order):
    warp = np.array([496 + 1000 * 5, 496 + 32 * 32 + 1000 * 37])
    assert np.array_equal(numbers(probe("shuffles", order))[:64], warp.repeat(32))


@pytest.mark.parametrize("order", ORDERS)
def test_matrix_product(probe, order):
    k = np.arange(8)
    a, b = 8 * np.arange(16)[:, None] + k, k[:, None] + 100 * np.arange(8)
    assert np.array_equal(numbers(probe("product", order)).reshape(16, 8), a @ b)


@pytest.mark.parametrize("name", ["beyond shared", "beyond output"])
def test_access_beyond_the_end(probe, name):
    process = probe(name)
    assert process.returncode != 0
    assert "heap-buffer-overflow" in process.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "half at barrier": r"divergence.* 32 wait at __syncthreads, 0 at a .* 32 have returned",
        "two barriers": r"divergence.*different __syncthreads",
        "barrier against collective": r"divergence.* 33 wait at __syncthreads, 31 at a .* 0 have returned",
        "lane missing": r"divergence.* 0 wait at __syncthreads, 62 at a .* 2 have returned",
        "different collectives": r"divergence in a warp",
        "partial mask": r"partial mask 0000ffff",
    }.items(),
)
@pytest.mark.parametrize("order", ORDERS)
def test_divergence(probe, name, message, order):
    process = probe(name, order)
    assert process.returncode == 70
    assert re.search(message, process.stderr)


@pytest.mark.parametrize(("name", "error"), [("too many threads", 9), ("too much shared memory", 1)])
def test_impossible_launches(probe, name, error):
    assert probe(name).stdout == f"error {error}\n"


def test_large_shared_memory_is_requested(probe):
    assert np.isnan(numbers(probe("much shared memory"))[0])


# ---- mutants of the real kernels ----


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    position: int  # of what is replaced
    old: str
    new: str


def find_mutants() -> list[Mutant]:
    mutants = []
    for file in ("moments.cu", "device.h"):
        text = (KERNELS / file).read_text()
        for match in re.finditer(r"__sync(?:threads|warp)\(\);", text):
            line = text.count("\n", 0, match.start()) + 1
            mutants.append(Mutant(f"no barrier in {file}:{line}", file, match.start(), match.group(), ";"))
    for name, file, old, new in OFF_BY_ONE:
        text = (KERNELS / file).read_text()
        assert text.count(old) == 1, f"{name}: expected one {old!r} in {file}, found {text.count(old)}"
        mutants.append(Mutant(name, file, text.index(old), old, new))
    return mutants


OFF_BY_ONE = [
    (
        "vectors: a load beyond the width",
        "device.h",
        "if (v < width) vectors[i]",
        "if (v <= width) vectors[i]",
    ),
    ("vectors: a store beyond the width", "device.h", "if (v + 1 < width)", "if (v + 1 <= width)"),
    ("columns: one more", "moments.cu", "min(columns - column,", "min(columns - column + 1,"),
    ("partials: one more", "moments.cu", "p < end; ++p", "p <= end; ++p"),
    (
        "sums: shared memory too small",
        "moments.cu",
        "kSumWarps * kWarp * sizeof",
        "(kSumWarps * kWarp - 1) * sizeof",
    ),
    ("class sums: a row too many", "moments.cu", "if (first + r >= length)", "if (first + r > length)"),
    ("class sums: a class ends late", "moments.cu", "first + r == class_end)", "first + r == class_end + 1)"),
    ("class sums: a tail taken for whole", "moments.cu", "(class_end > length)", "(class_end > length + 1)"),
    (
        "class sums: a column too many",
        "moments.cu",
        "column >= x.columns) return;",
        "column > x.columns) return;",
    ),
    ("gram: a row too many", "moments.cu", "slab_row(i) < height &&", "slab_row(i) <= height &&"),
    ("gram: an element beyond the matrix", "moments.cu", "column + e < size", "column + e <= size"),
    ("gram: the diagonal left out", "moments.cu", "row <= column + e", "row < column + e"),
    (
        "gram: shared memory too small",
        "moments.cu",
        "2 * 2 * kDoubles * sizeof",
        "(2 * 2 * kDoubles - 5) * sizeof",
    ),
    ("gram: a slab missing", "moments.cu", "number < end; ++number", "number < end - 1; ++number"),
    ("gram: the other slab's buffer", "moments.cu", "(number % 2 * 2 +", "((number + 1) % 3 % 2 * 2 +"),
    ("norms: a row too many", "moments.cu", "if (part + r >= count)", "if (part + r > count)"),
    ("norms: one buffer for two batches", "moments.cu", "/ kNormRows % 2 *", "/ kNormRows % 1 *"),
]


@cache
def cases() -> list[tuple]:
    """(function, features, arguments, references): every loop and every tail of every kernel."""
    labels = np.repeat([0, 3, 4, 6], [70, 1, 57, 140])
    found = []
    for function, shape, arguments in [
        ("class_sums", (1, 268, 67), {"labels": labels, "classes": 8}),
        ("gram", (1, 83, 35), {"multiprocessors": 1}),
        ("gram", (1, 150, 131), {"multiprocessors": 64}),
        ("sample_gram", (1, 33, 71), {"multiprocessors": 1}),
        ("norm_moments", (1, 71, 35), {}),
        ("norm_moments", (1, 512 * 16 * 2 + 3, 2), {}),
        ("class_sums", (1, 268, 96), {"labels": labels, "classes": 4100}),
    ]:
        features = make_features(shape, "float32")
        references = expected(function, features, arguments.get("labels"), arguments.get("classes", 0))
        found.append((function, features, arguments, references))
    return found


def symptom(emulator: Emulator) -> str | None:
    """The first thing that is wrong with the kernels in any thread order, or None."""
    for function, features, arguments, references in cases():
        for order in ORDERS:
            try:
                wrong = disagreement(emulator.run(function, features, order=order, **arguments), references)
            except EmulationError as error:
                wrong = str(error)
            if wrong:
                return f"{function} {features.stored.shape}, {order}: {wrong}"
    return None


MUTANTS = find_mutants()


@pytest.fixture(scope="module")
def symptoms(tmp_path_factory) -> dict[str, str | None]:
    """The symptom of every mutant, and of the kernels as they are ("none")."""
    folder = tmp_path_factory.mktemp("mutants")
    harness = compile_object(folder / "harness.o", HARNESS, "-DFLOAT_ONLY")
    centring = compile_object(folder / "centring.o", CENTRING)

    def examine(index: int, mutant: Mutant | None) -> str | None:
        copy = folder / str(index) / "cuda"
        shutil.copytree(KERNELS, copy)
        shutil.copy(ROOT / "csrc" / "kernels" / "scalar.h", copy.parent)
        if mutant:
            text = (copy / mutant.file).read_text()
            end = mutant.position + len(mutant.old)
            (copy / mutant.file).write_text(text[: mutant.position] + mutant.new + text[end:])
        moments = copy / "moments.cu"
        # One type is enough, and compiles faster.
        others = re.compile(r"^TRANSFEROPS_INSTANTIATE\((?!float\)).*\n", re.MULTILINE)
        moments.write_text(others.sub("", moments.read_text()))
        compiled = compile_object(copy / "moments.o", moments, "-Wno-error", includes=copy)
        with Emulator(link(copy / "program", compiled, harness, centring)) as emulator:
            return symptom(emulator)

    with ThreadPoolExecutor(2) as pool:
        found = pool.map(examine, range(len(MUTANTS) + 1), [None, *MUTANTS])
        return dict(zip(["none", *(mutant.name for mutant in MUTANTS)], found, strict=True))


def test_the_kernels_as_they_are_have_no_symptom(symptoms):
    assert symptoms["none"] is None


def test_every_barrier_has_a_mutant():
    assert sum(mutant.name.startswith("no barrier") for mutant in MUTANTS) >= 4


@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS])
def test_mutants_are_caught(symptoms, name):
    assert symptoms[name] is not None
