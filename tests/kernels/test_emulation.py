"""The emulation finds in small kernels what it promises; the twins of the tensor cores do what is said of them."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
from emulator import HERE, NO_COMPILER, ORDERS, compile_object, link

pytestmark = pytest.mark.skipif(NO_COMPILER is not None, reason=NO_COMPILER or "")


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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["product of float16", "product of bfloat16"])
def test_matrix_product_of_16_bits(probe, name, order):
    """Loaded by load_transposed."""
    k = np.arange(16)
    a, b = np.arange(16)[:, None] - k, k[:, None] + 16 * np.arange(8)
    assert np.array_equal(numbers(probe(name, order)).reshape(16, 8), a @ b)


def test_matrix_product_of_tf32_sees_11_bits_and_rounds_towards_zero(probe):
    products = numbers(probe("product of tf32")).reshape(16, 8)
    k, row = np.arange(8), np.arange(16)[:, None]
    b = k[:, None] + 100 * np.arange(8)
    exact = (row + k) @ b  # the 12th bits that the probe adds are not seen
    assert np.array_equal(products[:, 1:], exact[:, 1:])
    # +-1 with 3/8 of a unit in the last place, towards zero
    assert (products[:, 0] == np.where(row[:, 0] % 2, -1, 1)).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "arrived"),
    {"copies": 2, "copies of which one is waited for": 1, "copies of which none is waited for": 0}.items(),
)
def test_copies_arrive_when_they_are_waited_for(probe, name, arrived, order):
    """Even threads copy in the first group, odd ones in the second; until then their targets are NaN."""
    thread = np.arange(64)
    expected = np.where(thread < 32, thread // 2 * 2 + 1, 0.0)
    assert np.array_equal(
        numbers(probe(name, order))[:64], np.where(thread % 2 < arrived, expected, np.nan), equal_nan=True
    )


@pytest.mark.parametrize(
    ("name", "message"),
    {"copy misaligned": "misaligned address", "copy forgotten": "returned before its copies"}.items(),
)
def test_wrong_copies(probe, name, message):
    process = probe(name)
    assert process.returncode == 70
    assert re.search(message, process.stderr)


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
