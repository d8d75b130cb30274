"""The CUDA kernels of the gradients family on the CPU, against extended precision."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import NO_COMPILER, ORDERS, TYPES, build, disagreement
from gradients_emulator import SOURCES, Expectations, GradientsEmulator, Gram, Moments, Samples, expected


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The kernels on the CPU, under AddressSanitizer."""
    if NO_COMPILER:
        pytest.skip(NO_COMPILER)
    with GradientsEmulator(build(tmp_path_factory.mktemp("gradients"), SOURCES)) as emulator:
        yield emulator


def check(emulator, x, **arguments):
    """Right in three thread orders, to the same last bit in all of them: the outputs."""
    references = expected(x)
    results = [emulator.run(x, order=order, seed=1, **arguments) for order in ORDERS]
    for outputs in results:
        assert disagreement(outputs, references) is None
        assert all(np.array_equal(a, b) for a, b in zip(outputs, results[0], strict=True))
    return results[0]


# ---- running moments ----


@pytest.mark.parametrize("state", ["float32", "float64"])
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(("samples", "count"), [(1, 0), (1, 7), (3, 0), (2, 5)])
def test_moments(emulator, samples, count, type, state):
    """Tensors of whole accesses, odd sizes, none, and of several chunks of 4096 weights."""
    check(emulator, Moments.random([4, 1, 0, 37, 1024, 4100, 8195], samples, count, type, state))


@pytest.mark.parametrize("layout", [{"padding": 3}, {"displacement": 1}, {"padding": 4}], ids=str)
def test_moments_that_are_not_aligned(emulator, layout):
    check(emulator, Moments.random([8, 1028], 2, 3, "float32", **layout))


def test_moments_without_squares(emulator):
    assert len(check(emulator, Moments.random([5, 64], 2, 1, squares=False))) == 2


def test_no_tensors_and_no_samples(emulator):
    assert check(emulator, Moments.random([], 1, 0)) == ()
    untouched = Moments.random([5], 0, 3)
    (mean, squares) = emulator.run(untouched)
    assert np.array_equal(mean, untouched.means[0])
    assert np.array_equal(squares, untouched.squares[0])


def test_more_tensors_than_a_launch_takes(emulator):
    """448 to a launch; empty ones take no place."""
    x = Moments.random([n % 3 for n in range(1000)], 1, 1)
    assert disagreement(emulator.run(x), expected(x)) is None


# ---- running moments and the Gram matrix of the means ----


@pytest.mark.parametrize("state", ["float32", "float64"])
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(("samples", "counts", "beyond"), [(1, [0], 0), (1, [4, 3], 1), (2, [1, 0, 0, 0, 0], 3)])
def test_expectation_gram(emulator, samples, counts, beyond, type, state):
    """Tiles of 4 and of 8 lists, whole and not; whole accesses, odd sizes, none, and several chunks."""
    x = Expectations.random([4, 37, 0, 1024, 4100], samples, counts, beyond, type=type, state=state)
    *_, gram = check(emulator, x)
    assert np.array_equal(gram, gram.T)


@pytest.mark.parametrize("layout", [{"padding": 3}, {"displacement": 1}, {"padding": 4}], ids=str)
def test_expectation_gram_that_is_not_aligned(emulator, layout):
    check(emulator, Expectations.random([8, 1028], 2, [3, 2], 1, **layout))


def test_expectation_gram_without_squares_or_samples(emulator):
    check(emulator, Expectations.random([5, 64], 2, [1, 0], squares=False))
    x = Expectations.random([5, 64], 0, [3, 2])
    first, *_ = emulator.run(x)
    assert np.array_equal(first, x.lists[0].means[0])
    assert disagreement(emulator.run(x), expected(x)) is None


def test_expectation_gram_of_more_than_a_launch_takes(emulator):
    """180 tensors of up to 4 lists, several chunks to a block, and more than 8 lists."""
    for x in (
        Expectations.random([n % 3 for n in range(400)], 1, [2, 1]),
        Expectations.random([4096 * 4 + 8, 12], 1, [2, 1]),
        Expectations.random([70, 12], 1, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
    ):
        assert disagreement(emulator.run(x, multiprocessors=1), expected(x)) is None


# ---- Gram matrices ----


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 17])
def test_gram(emulator, rows, type):
    (gram,) = check(emulator, Gram.random(rows, [3, 0, 1030, 16], type))
    assert np.array_equal(gram, gram.T)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("rows", [3, 11])
@pytest.mark.parametrize(("base", "weights"), [(True, False), (False, True), (True, True)])
def test_gram_with_base_and_weights(emulator, rows, type, base, weights):
    check(emulator, Gram.random(rows, [4100, 35], type, base, weights))


def test_gram_of_more_chunks_than_blocks(emulator):
    """One multiprocessor holds two blocks of 4096 weights: each takes several."""
    check(emulator, Gram.random(2, [4096 * 4 + 8, 12]), multiprocessors=1)
    check(emulator, Gram.random(9, [4096 * 2 + 5, 12]), multiprocessors=1)


def test_gram_that_is_not_aligned(emulator):
    check(emulator, Gram.random(3, [64, 40], displacement=1, base=True, weights=True))


def test_gram_of_more_segments_than_a_launch_takes(emulator):
    """256 to a launch, 128 for a pair of tiles."""
    for rows in (2, 9):
        x = Gram.random(rows, [n % 3 for n in range(300)])
        assert disagreement(emulator.run(x, multiprocessors=1), expected(x)) is None


def test_gram_of_nothing(emulator):
    (gram,) = check(emulator, Gram.random(3, [0, 0]))
    assert (gram == 0).all()


# ---- summaries of per-sample gradients ----


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(
    ("samples", "columns", "count"), [(1, 1, 1), (3, 16, 2), (16, 130, 8), (17, 1029, 9), (40, 65, 3), (2, 2056, 17)]
)
def test_fisher(emulator, samples, columns, count, type):
    check(emulator, Samples.random(samples, columns, count, type))


@pytest.mark.parametrize("type", TYPES)
def test_fisher_layouts(emulator, type):
    for layout in ({"padding": 3}, {"displacement": 1}, {"padding": 8}):
        check(emulator, Samples.random(5, 136, 3, type, **layout))


def test_fisher_of_more_chunks_than_blocks(emulator):
    """One multiprocessor holds two blocks of 1024 columns."""
    check(emulator, Samples.random(18, 5000, 2), multiprocessors=1)


def test_fisher_without_directions_or_columns(emulator):
    gram, _, norms = check(emulator, Samples.random(5, 20, 0))
    assert gram.shape == (0, 0)
    assert (norms > 0).all()
    gram, diagonal, norms = check(emulator, Samples.random(5, 0, 2))
    assert (gram == 0).all()
    assert (norms == 0).all()
    assert diagonal.shape == (0,)
