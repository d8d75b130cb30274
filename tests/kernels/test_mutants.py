"""Every mistake put into the kernels is noticed, and the kernels as they are show none.

One in 48 of them is tried, all with TRANSFEROPS_MUTANTS=all (`make mutants`).
"""

from __future__ import annotations

import numpy as np
import pytest
from emulator import NO_COMPILER
from fisher_mutants import FISHER_FAMILIES
from gradients_emulator import SOURCES as GRADIENTS_SOURCES
from gradients_emulator import Expectations, GradientsEmulator, Gram, Moments, Samples
from gradients_emulator import expected as gradients_expected
from moments_emulator import NARROW, MomentsEmulator
from moments_emulator import SOURCES as MOMENTS_SOURCES
from moments_reference import expected as moments_expected
from mutants import Case, Family, tried
from softmax_fisher_emulator import SOURCES as SOFTMAX_SOURCES
from softmax_fisher_emulator import SoftmaxEmulator
from softmax_fisher_emulator import expected as softmax_expected
from test_cuda_moments import make_features
from test_cuda_softmax_fisher import make_batch

pytestmark = pytest.mark.skipif(NO_COMPILER is not None, reason=NO_COMPILER or "")

# ---- moments ----

MOMENTS_CHANGES = (
    (
        "vectors: a load beyond the width",
        "device.h",
        "if (v < width) vectors[i]",
        "if (v <= width) vectors[i]",
    ),
    ("vectors: a store beyond the width", "device.h", "if (v + 1 < width)", "if (v + 1 <= width)"),
    ("columns: one more", "device.h", "min(size - begin,", "min(size - begin + 1,"),
    ("partials: one more", "device.h", "p < end; ++p) sum", "p <= end; ++p) sum"),
    ("partials: a column too many", "moments.cu", "exists = column < columns;", "exists = column <= columns;"),
    ("sums: shared memory too small", "device.h", "kSumThreads * sizeof", "(kSumThreads - 1) * sizeof"),
    ("class sums: a row too many", "moments.cu", "if (first + r >= length)", "if (first + r > length)"),
    ("class sums: a class ends late", "moments.cu", "first + r == class_end)", "first + r == class_end + 1)"),
    ("class sums: a tail taken for whole", "moments.cu", "(class_end > length)", "(class_end > length + 1)"),
    (
        "class sums: a column too many",
        "moments.cu",
        "column >= x.columns) return;",
        "column > x.columns) return;",
    ),
    ("gram: a row too many", "gram.cu", "slab_row(i) < height &&", "slab_row(i) <= height &&"),
    ("gram: an element beyond the matrix", "gram_tiles.h", "column + e < size", "column + e <= size"),
    ("gram: the diagonal left out", "gram_tiles.h", "row <= column + e", "row < column + e"),
    (
        "gram: shared memory too small",
        "gram.cu",
        "2 * 2 * kDoubles * sizeof",
        "(2 * 2 * kDoubles - 5) * sizeof",
    ),
    ("gram: a slab missing", "fragments.h", "number < end; ++number", "number < end - 1; ++number"),
    (
        "gram: tall tiles left out",
        "gram_tiles.h",
        "(column + 1) * (column + 1) / 4",
        "column * (column + 1) / 4",
    ),
    (
        "gram: fragments of a finish left out",
        "gram.cu",
        "Tile::kFragmentRows * Tile::kFragmentColumns / 4",
        "Tile::kFragmentRows",
    ),
    ("gram: the other slab's buffer", "gram.cu", "(number % 2 * 2 +", "((number + 1) % 3 % 2 * 2 +"),
    ("narrow: a row too many", "gram_narrow.cu", "row(i) < height &&", "row(i) <= height &&"),
    ("narrow: the low half of the shift lost", "gram_narrow.cu", "- high - low", "- high"),
    (
        "narrow: the other operand's shift",
        "gram_narrow.cu",
        "right_slab(number), origins + Shape::kRows",
        "right_slab(number), origins",
    ),
    ("narrow: not all origins", "gram_narrow.cu", "i < Layout::kColumns; i +=", "i < Shape::kRows; i +="),
    ("narrow: runs before forgotten", "gram_narrow.cu", "if (!first_run) total = pair;", ""),
    ("narrow: sums of a run kept", "gram_narrow.cu", "sums[m][n][2 * h + e] = 0;", ""),
    (
        "narrow: shared memory too small",
        "gram_narrow.cu",
        "2 * (Left::kBytes + Right::kBytes);",
        "2 * (Left::kBytes + Right::kBytes) - 80;",
    ),
    ("rounded: rows of a flight left out", "gram_narrow.cu", "first += kRoundFlight", "first += 2 * kRoundFlight"),
    ("rounded: the first set's shift", "gram_narrow.cu", "shift[set * x.columns + column + v]", "shift[column + v]"),
    ("norms: a row too many", "moments.cu", "if (part + r >= count)", "if (part + r > count)"),
    ("norms: one buffer for two batches", "moments.cu", "/ kNormRows % 2 *", "/ kNormRows % 1 *"),
)


def moments_cases() -> list[Case]:
    labels = np.repeat([0, 3, 4, 6], [70, 1, 57, 140])
    cases = []
    for function, shape, arguments in [
        ("class_sums", (1, 268, 67), {"labels": labels, "classes": 8}),
        ("gram", (1, 83, 35), {"multiprocessors": 1}),
        ("gram", (1, 150, 131), {"multiprocessors": 64}),
        ("sample_gram", (1, 33, 71), {"multiprocessors": 1}),
        ("float32_gram", (1, 83, 35), {"multiprocessors": 1}),
        ("tf32_gram", (1, 150, 387), {"multiprocessors": 64}),
        ("tf32_gram", (1, 2060, 3), {"multiprocessors": 1}),
        ("tf32_gram", (1, 700, 40), {"multiprocessors": 64}),
        ("float32_gram", (1, 1030, 3), {"multiprocessors": 1}),
        ("bfloat16_gram", (2, 19, 768), {"multiprocessors": 1}),
        ("norm_moments", (1, 71, 35), {}),
        ("norm_moments", (1, 512 * 16 * 2 + 3, 2), {}),
        ("class_sums", (1, 268, 96), {"labels": labels, "classes": 4100}),
    ]:
        features = make_features(shape, "float32", offset=4000 if function in NARROW else 10)

        def run(emulator, order, function=function, features=features, arguments=arguments):
            return emulator.run(function, features, order=order, **arguments)

        references = moments_expected(function, features, arguments.get("labels"), arguments.get("classes", 0))
        cases.append(Case(f"{function} {shape}", run, references))
    return cases


# ---- Fisher information of a softmax ----

SOFTMAX_CHANGES = (
    ("a class too many", "softmax_fisher.cu", "i * kWarp < left)", "i * kWarp <= left)"),
    ("a probability too many", "softmax_fisher.cu", "if (c < x.classes) {", "if (c <= x.classes) {"),
    ("a direction too many", "softmax_fisher.cu", "(direction < x.directions &&", "(direction <= x.directions &&"),
    ("a class missing in the scale", "softmax_fisher.cu", "c < x.classes; c +=", "c < x.classes - 1; c +="),
    ("a larger logit not noticed", "softmax_fisher.cu", "sum * exponential(most - logit) + 1", "sum + 1"),
    ("a warp missing in the scale", "softmax_fisher.cu", "other < kWarps &&", "other < kWarps - 1 &&"),
    ("chunks do not meet", "softmax_fisher.cu", "lane == 0 ? meeting * apart : 0.0", "0.0"),
    ("means not carried", "softmax_fisher.cu", "means[r] + share * apart : mean", "mean : mean"),
    ("weights not carried", "softmax_fisher.cu", "before += weight;", "before = weight;"),
    ("weights carried too far", "softmax_fisher.cu", "if (chunk == 0) before = 0;", ""),
    ("a step of 8 classes missing", "softmax_fisher.cu", "ceil_div(classes, 8)) + 1", "classes / 8) + 1"),
    (
        "a share of the classes missing",
        "softmax_fisher.cu",
        "turn < P::kShares; ++turn",
        "turn < P::kShares - 1; ++turn",
    ),
    ("shared memory too small", "softmax_fisher.cu", "P::kRoots + P::kSlab *", "P::kRoots - 40 + P::kSlab *"),
    (
        "an element beyond the matrix",
        "softmax_fisher.cu",
        "row <= column && column < directions",
        "row <= column && column <= directions",
    ),
    (
        "pairs of tiles out of order",
        "softmax_fisher.cu",
        "int right_tile = 0, left_tile = blockIdx.y;  // pairs",
        "int right_tile = 1, left_tile = blockIdx.y;  // pairs",
    ),
)


def softmax_cases() -> list[Case]:
    cases = []
    for shape, multiprocessors in [
        ((3, 3, 17), 1),
        ((8, 3, 401), 1),
        ((2, 2, 1030), 4),
        ((16, 2, 200), 4),
        ((33, 2, 70), 1),
        ((66, 1, 65), 1),
    ]:
        batch = make_batch(shape, row_padding=1)

        def run(emulator, order, batch=batch, multiprocessors=multiprocessors):
            return emulator.run(batch, multiprocessors=multiprocessors, order=order)

        cases.append(Case(str(shape), run, softmax_expected(batch)))
    return cases


# ---- gradients ----

GRADIENTS_CHANGES = (
    ("a tensor too early", "list_gram.h", "first_chunks[middle] <= chunk", "first_chunks[middle] < chunk"),
    ("moments: what was there before the first", "expectation.cu", "if (count == 0) continue;", ""),
    (
        "moments: an element beyond the tensor",
        "expectation.cu",
        "if (v >= width[u]) continue;",
        "if (v > width[u]) continue;",
    ),
    (
        "moments: a table too long",
        "expectation.cu",
        "table->count < kMostTensors &&",
        "table->count <= kMostTensors &&",
    ),
    ("expectations: what was there before the first", "expectation.cu", "table.counts[k] > 0", "table.counts[k] >= 0"),
    ("expectations: an element too many", "expectation.cu", "place + v >= rows[k].size", "place + v > rows[k].size"),
    ("expectations: a table too long", "expectation.cu", "count < Table::kSegments &&", "count <= Table::kSegments &&"),
    (
        "gram: an element beyond the matrix",
        "gradient_gram.cu",
        "row <= column && column < rows",
        "row <= column && column <= rows",
    ),
    (
        "gram: a weight beyond the tensor",
        "gradient_gram.cu",
        "width - w * kWeights, aligned",
        "width + 1 - w * kWeights, aligned",
    ),
    ("fisher: a sample too many", "gradient_fisher.cu", "sample < x.samples ? width", "sample <= x.samples ? width"),
    (
        "fisher: one set of sums for two turns",
        "gradient_fisher.cu",
        "row += kSampleRows, turn ^= 1",
        "row += kSampleRows",
    ),
    ("fisher: chunks before forgotten", "gradient_fisher.cu", "chunk == blockIdx.x ? 0.0 : *target", "0.0"),
    (
        "fisher: shared memory too small",
        "gradient_fisher.cu",
        "2 * kWarps * kFisherParts *",
        "(2 * kWarps * kFisherParts - 1) *",
    ),
)


def gradients_cases() -> list[Case]:
    cases = []
    for name, x, multiprocessors in [
        ("moments", Moments.random([4, 0, 37, 4100], 2, 0), 4),
        ("later moments", Moments.random([4, 37], 2, 3), 4),
        ("many tensors", Moments.random([1] * 449, 1, 1), 4),
        ("expectations", Expectations.random([4, 0, 37, 4100], 2, [1, 0], 1, squares=False), 4),
        ("many tensors of expectations", Expectations.random([1] * 181, 1, [1]), 4),
        ("gram", Gram.random(3, [1030, 8], base=True, weights=True), 4),
        ("gram of tiles", Gram.random(9, [4096 * 2 + 5], base=True), 1),
        ("fisher", Samples.random(3, 17, 9), 4),
        ("fisher of chunks", Samples.random(49, 2300, 2), 1),
    ]:

        def run(emulator, order, x=x, multiprocessors=multiprocessors):
            return emulator.run(x, multiprocessors=multiprocessors, order=order)

        cases.append(Case(name, run, gradients_expected(x)))
    return cases


# ---- all families ----

FAMILIES = {
    "moments": Family(
        MOMENTS_SOURCES,
        ("moments.cu", "gram_narrow.cu", "fragments.h", "device.h"),
        MOMENTS_CHANGES,
        MomentsEmulator,
        moments_cases,
    ),
    **FISHER_FAMILIES,
    "gradients": Family(
        GRADIENTS_SOURCES,
        ("gradient_fisher.cu", "list_gram.h"),
        GRADIENTS_CHANGES,
        GradientsEmulator,
        gradients_cases,
        others=("double",),  # means in float64
    ),
    "softmax": Family(SOFTMAX_SOURCES, ("softmax_fisher.cu",), SOFTMAX_CHANGES, SoftmaxEmulator, softmax_cases),
}
TRIED = tried(FAMILIES)


@pytest.fixture(scope="module")
def symptoms(tmp_path_factory):
    """By family, then by mutant."""
    found = {}

    def of(family: str) -> dict[str, str | None]:
        if family not in found:
            found[family] = FAMILIES[family].symptoms(tmp_path_factory.mktemp(family), TRIED[family])
        return found[family]

    return of


@pytest.mark.parametrize("family", TRIED)
def test_the_kernels_as_they_are_have_no_symptom(symptoms, family):
    assert symptoms(family)["none"] is None


@pytest.mark.parametrize(
    ("family", "barriers"), [("moments", 5), ("fisher", 7), ("wide", 5), ("gradients", 2), ("softmax", 5)]
)
def test_every_barrier_has_a_mutant(family, barriers):
    names = [mutant.name for mutant in FAMILIES[family].mutants()]
    assert sum(name.startswith("no barrier") for name in names) >= barriers


@pytest.mark.parametrize(
    ("family", "name"), [(family, mutant.name) for family, mutants in TRIED.items() for mutant in mutants]
)
def test_mutants_are_caught(symptoms, family, name):
    assert symptoms(family)[name] is not None
