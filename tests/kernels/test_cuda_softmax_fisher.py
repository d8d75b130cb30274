"""The CUDA kernels of the Fisher information of a softmax on the CPU, against extended precision."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import NO_COMPILER, ORDERS, TYPES, build, disagreement
from softmax_fisher_emulator import SOURCES, Batch, SoftmaxEmulator, expected


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The kernels on the CPU, under AddressSanitizer."""
    if NO_COMPILER:
        pytest.skip(NO_COMPILER)
    with SoftmaxEmulator(build(tmp_path_factory.mktemp("softmax"), SOURCES)) as emulator:
        yield emulator


def make_batch(shape, type="float32", *, spread=3.0, shift=0.0, seed=0, **layout):
    """Logits and tangents of (directions, samples, classes)."""
    random = np.random.default_rng(seed)
    logits = spread * random.normal(size=shape[1:])
    return Batch.of(logits, shift + random.normal(size=shape), type, **layout)


def check(emulator, batch, **arguments):
    """Right in three thread orders, to the same last bit in all of them, symmetric: the output."""
    references = expected(batch)
    results = [emulator.run(batch, order=order, seed=1, **arguments) for order in ORDERS]
    for (gram,) in results:
        assert disagreement((gram,), references) is None
        assert np.array_equal(gram, results[0][0])
        assert np.array_equal(gram, gram.T)
    return results[0][0]


SHAPES = [  # directions, samples, classes; a chunk is 384, 192, 256 or 64 classes
    (1, 1, 1),
    (1, 1, 2),
    (2, 3, 10),
    (3, 17, 33),
    (5, 2, 385),
    (8, 1, 1025),
    (9, 2, 65),
    (16, 1, 400),
    (17, 2, 129),
    (32, 1, 300),
    (33, 1, 66),
    (64, 1, 130),
    (65, 1, 64),
    (129, 1, 17),
]


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(emulator, shape, type):
    check(emulator, make_batch(shape, type))


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("classes", [70, 1030])
def test_layouts(emulator, classes, type):
    layout = {"row_padding": 3, "direction_padding": 5, "displacement": 1}
    check(emulator, make_batch((3, 2, classes), type, **layout))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
def test_empty(emulator, shape):
    assert (check(emulator, make_batch(shape)) == 0).all()


def test_more_samples_than_blocks(emulator):
    """One multiprocessor holds two blocks: each takes several samples."""
    check(emulator, make_batch((4, 9, 20)), multiprocessors=1)


def test_a_common_shift_costs_no_digits(emulator):
    """A shift of all tangents by a power of two, and of all logits, changes nothing."""
    random = np.random.default_rng(0)
    logits = np.round(random.normal(size=(2, 900)), 3) * 8
    tangents = np.round(random.normal(size=(3, 2, 900)) * 16) / 16
    plain = check(emulator, Batch.of(logits, tangents))
    moved = check(emulator, Batch.of(logits, tangents + 4096))
    assert (abs(plain - moved) <= 1e-9 * abs(plain).max()).all()


def test_equal_tangents_cancel(emulator):
    """The softmax does not see what moves all logits alike."""
    batch = make_batch((2, 3, 800))
    batch.tangents[1] = 3.25
    gram = check(emulator, batch)
    assert (abs(gram[1]) <= 1e-15 * gram[0, 0]).all()


@pytest.mark.parametrize("classes", [40, 1500])
def test_extreme_logits(emulator, classes):
    """A certain class, masked classes (also in front), logits far apart."""
    batch = make_batch((2, 4, classes), spread=1)
    batch.logits[0, 7] = 300
    batch.logits[1, ::2] = -np.inf
    batch.logits[2] *= 30
    batch.logits[3, 1:] = -np.inf
    (gram,) = emulator.run(batch)
    finite = Batch(np.maximum(batch.logits, -1000), batch.tangents)
    assert disagreement((gram,), expected(finite)) is None


def test_positive_semidefinite(emulator):
    gram = check(emulator, make_batch((20, 3, 50)))
    assert np.linalg.eigvalsh(gram).min() >= -1e-12 * np.trace(gram)


def test_offsets_beyond_32_bits(emulator):
    """The memory is sparse: only the pages that are touched exist."""
    check(emulator, make_batch((2, 2, 5), "float16", row_padding=2**31, direction_padding=2**31))
