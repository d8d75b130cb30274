"""The CUDA kernels of the moments family on the CPU, against extended precision."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import NO_COMPILER, ORDERS, TYPES, build, disagreement
from moments_emulator import NARROW, SOURCES, Features, MomentsEmulator
from moments_reference import UNIT, expected

FUNCTIONS = ("class_sums", "gram", "sample_gram", "norm_moments")

SHAPES = [  # sets, rows, columns
    (1, 1, 1),
    (1, 2, 7),
    (3, 7, 2),
    (2, 33, 65),
    (1, 65, 33),
    (1, 129, 1),
    (1, 1, 129),
    (2, 200, 136),
    (1, 136, 264),
    (1, 264, 24),
]
LAYOUTS = {  # columns, padding between rows, between sets, displacement; 16 bytes are 2, 4 or 8 elements
    "contiguous": (72, 0, 0, 0),
    "aligned strides": (72, 8, 16, 0),
    "odd row stride": (72, 1, 0, 0),
    "odd set stride": (72, 8, 3, 0),
    "misaligned": (72, 0, 0, 1),
    "odd columns": (71, 1, 0, 0),
    "odd everything": (71, 4, 3, 3),
}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The moments kernels on the CPU, under AddressSanitizer."""
    if NO_COMPILER:
        pytest.skip(NO_COMPILER)
    with MomentsEmulator(build(tmp_path_factory.mktemp("moments"), SOURCES)) as emulator:
        yield emulator


def make_features(shape, type, *, seed=0, shift=True, offset=10, **layout):
    """Values around ``offset`` with a shift near them: a forgotten or misplaced shift exceeds any tolerance."""
    random = np.random.default_rng(seed)
    means = random.normal(offset, 2, size=(shape[0], shape[2]))
    values = means[:, None, :] + random.normal(size=shape)
    near = means + 0.1 * random.normal(size=means.shape)
    return Features.of(values, type, shift=near if shift else None, **layout)


def make_labels(rows, classes, *, seed=0):
    return np.random.default_rng(seed).integers(0, classes, size=rows)


def check(emulator, function, features, **arguments):
    """Right in three thread orders, to the same last bit in all of them and when repeated: the outputs."""
    references = expected(function, features, arguments.get("labels"), arguments.get("classes", 0))
    results = [emulator.run(function, features, order=order, seed=1, **arguments) for order in ORDERS]
    results.append(emulator.run(function, features, order="shuffled", seed=2, **arguments))
    for outputs in results:
        assert disagreement(outputs, references) is None
        assert all(np.array_equal(a, b) for a, b in zip(outputs, results[0], strict=True))
    return results[0]


def arguments_of(function, rows):
    return {"labels": make_labels(rows, 5), "classes": 6} if function == "class_sums" else {}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_shapes(emulator, function, shape, type):
    check(emulator, function, make_features(shape, type), **arguments_of(function, shape[1]))


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_layouts(emulator, function, layout, type):
    columns, row_padding, set_padding, displacement = LAYOUTS[layout]
    rows, row_stride = 37, columns + row_padding
    features = make_features(
        (2, rows, columns),
        type,
        row_stride=row_stride,
        set_stride=rows * row_stride + set_padding,
        displacement=displacement,
    )
    check(emulator, function, features, **arguments_of(function, rows))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_without_a_shift(emulator, function):
    check(emulator, function, make_features((2, 40, 33), "float32", shift=False), **arguments_of(function, 40))


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0), (1, 0, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty(emulator, function, shape):
    outputs = check(emulator, function, make_features(shape, "float32"), **arguments_of(function, shape[1]))
    assert all((output == 0).all() for output in outputs)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_offsets_beyond_32_bits(emulator, function):
    """The memory is sparse: only the pages that are touched exist."""
    stride = 2**31 + 8
    features = make_features((2, 3, 16), "float16", row_stride=stride, set_stride=4 * stride)
    check(emulator, function, features, **arguments_of(function, 3))


CLASS_SIZES = {  # classes, labels; a chunk of rows is 64 here
    "one class": (1, np.zeros(1100, int)),
    "one class of many holds all rows": (9, np.full(1100, 4)),
    "first and last class": (7, np.repeat([0, 6], [63, 65])),
    "classes end where chunks end": (4, np.repeat([0, 1, 2, 3], 64)),
    "empty classes at chunk ends": (12, np.repeat([1, 4, 5, 9], [64, 1, 63, 128])),
    "one row per class": (200, np.arange(200)[::-1].copy()),
    "more classes than rows": (500, np.arange(150) * 3 + 7),
    "random": (33, make_labels(700, 33)),
}


@pytest.mark.parametrize("sizes", CLASS_SIZES)
@pytest.mark.parametrize("columns", [70, 72, 3])
def test_class_sizes(emulator, sizes, columns):
    classes, labels = CLASS_SIZES[sizes]
    features = make_features((1, len(labels), columns), "float32")
    check(emulator, "class_sums", features, labels=labels, classes=classes)


def test_more_classes_than_blocks(emulator):
    """Blocks of the second pass then take several groups of columns."""
    labels = np.repeat([5, 4199], [70, 200])
    check(emulator, "class_sums", make_features((1, 270, 70), "float32"), labels=labels, classes=4200)


@pytest.mark.parametrize("type", ["float32", "bfloat16"])
@pytest.mark.parametrize("function", ["class_sums", "norm_moments"])
def test_more_columns_than_a_block_takes(emulator, function, type):
    check(emulator, function, make_features((1, 19, 2120), type), **arguments_of(function, 19))


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize(("function", "shape"), [("gram", (333, 20)), ("sample_gram", (20, 333)), ("gram", (200, 140))])
def test_gram_splits(emulator, function, shape, sets):
    features = make_features((sets, *shape), "float64")
    whole = check(emulator, function, features, multiprocessors=1)
    assert emulator.workspace == 0
    split = check(emulator, function, features, multiprocessors=64)
    assert emulator.workspace > 0
    for (gram,) in (whole, split):
        assert np.array_equal(gram, gram.swapaxes(1, 2))


# ---- Gram matrices on the narrow tensor cores ----


@pytest.mark.parametrize(
    ("shape", "type"),
    [((1, 1, 1), "float32"), *((shape, type) for shape in ((1, 34, 136), (2, 9, 392)) for type in TYPES)],
    ids=str,
)
@pytest.mark.parametrize("function", NARROW)
def test_narrow_shapes(emulator, function, shape, type):
    (gram,) = check(emulator, function, make_features(shape, type))
    assert np.array_equal(gram, gram.swapaxes(1, 2))


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize(("type", "least"), [("float32", 768), ("float64", 320)])
def test_narrow_rounded_ahead(emulator, type, least, more, sets):
    """From so many columns on features are copied as bfloat16, 32 rows to a block; with fewer nothing is."""
    columns = least + more
    features = make_features((sets, 43, columns), type, offset=4000)
    (gram,) = check(emulator, "bfloat16_gram", features, multiprocessors=1)
    assert emulator.workspace == sets * 43 * -(-columns // 8) * 2
    assert np.array_equal(gram, gram.swapaxes(1, 2))
    emulator.run("bfloat16_gram", make_features((1, 1, least - 1), type), multiprocessors=1)
    assert emulator.workspace == 0


def test_narrow_rounded_ahead_and_split(emulator):
    check(emulator, "bfloat16_gram", make_features((1, 700, 320), "float64"), multiprocessors=64)
    assert emulator.workspace > 700 * 320 / 4


def test_narrow_rounded_ahead_from_odd_places(emulator):
    place = {"row_stride": 773, "set_stride": 9 * 773 + 3, "displacement": 3}
    check(emulator, "bfloat16_gram", make_features((2, 9, 770), "float32", **place))
    (gram,) = check(emulator, "bfloat16_gram", make_features((1, 0, 800), "float32"))
    assert (gram == 0).all()


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("layout", ["aligned strides", "odd everything"])
def test_narrow_layouts(emulator, layout, type):
    """What is read is the same in all three."""
    columns, row_padding, set_padding, displacement = LAYOUTS[layout]
    stride = columns + row_padding
    place = {"row_stride": stride, "set_stride": 21 * stride + set_padding, "displacement": displacement}
    check(emulator, "float32_gram", make_features((2, 21, columns), type, **place))


@pytest.mark.parametrize("function", NARROW)
def test_narrow_splits_and_runs(emulator, function):
    """Several runs of rows and a part of one in a block; then few in each of many blocks."""
    tall = make_features((1, 2085, 3), "float32")
    check(emulator, function, tall, multiprocessors=1)
    assert emulator.workspace == 0
    for features in (tall, make_features((1, 700, 40), "float32")):
        check(emulator, function, features, multiprocessors=64)
        assert emulator.workspace > 0


@pytest.mark.parametrize("type", ["float32", "float64"])
@pytest.mark.parametrize("function", NARROW)
def test_narrow_rounding_is_that_of_the_distance_from_the_shift(emulator, function, type):
    """At the size of the features themselves it would exceed the tolerance."""
    check(emulator, function, make_features((1, 70, 9), type, offset=4000))


@pytest.mark.parametrize("function", NARROW)
def test_narrow_without_rows_or_shift(emulator, function):
    (gram,) = check(emulator, function, make_features((2, 0, 5), "float32"))
    assert (gram == 0).all()
    check(emulator, function, make_features((1, 20, 5), "float32", shift=False, offset=0))


@pytest.mark.parametrize("function", NARROW)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
def test_narrow_shows_what_is_not_finite(emulator, function, value):
    """Also the NaN of all bits that a GPU's arithmetic makes."""
    values = np.ones((1, 5, 3), np.float32)
    values[0, 2, 1] = np.array(0x7FFFFFFF, np.uint32).view(np.float32) if value is np.nan else value
    (gram,) = emulator.run(function, Features(values))
    assert not np.isfinite(gram[0, 1]).any()
    assert not np.isfinite(gram[0, :, 1]).any()
    assert np.isfinite(gram[0, 0, 0])


# ---- norm moments ----


def test_norm_moments_of_many_rows(emulator):
    """More rows than 512 batches of 16: the chunks have several, the last one an odd number of rows."""
    check(emulator, "norm_moments", make_features((1, 512 * 16 * 2 + 5, 3), "float32"))


@pytest.mark.parametrize("type", ["float16", "bfloat16"])
def test_every_16_bit_pattern_is_converted_exactly(emulator, type):
    """Each row is a class of its own: the sums are the values, subnormals, infinities and NaN too."""
    stored = np.arange(2**16, dtype=np.uint16).reshape(1, 512, 128)
    features = Features(stored, type)
    (sums,) = emulator.run("class_sums", features, labels=np.arange(512), classes=512)
    assert np.array_equal(sums, features.values, equal_nan=True)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("offset", [0, 1000])
def test_centred_class_sums(emulator, offset, type):
    """Means and class sums about them keep their digits beside a common offset."""
    random = np.random.default_rng(0)
    sets, rows, columns, classes = 2, 300, 37, 9
    labels = random.choice([0, 2, 3, 7], size=rows)
    features = Features.of(offset + random.normal(size=(sets, rows, columns)), type)
    x = features.values.astype(np.longdouble)
    distance = abs(x - x[:, :1])
    for order in ORDERS:
        sizes, sums, means = emulator.run("centred_class_sums", features, labels=labels, classes=classes, order=order)
        assert np.array_equal(sizes, np.bincount(labels, minlength=classes))
        mean_tolerance = 2 * UNIT * abs(x).max() + (rows + 2) * UNIT * distance.mean(axis=1)
        assert (abs(means - x.mean(axis=1)) <= mean_tolerance).all()
        for label in range(classes):
            members = labels == label
            value = (x[:, members] - means[:, None]).sum(axis=1)
            terms = distance[:, members] + distance.max(axis=1, keepdims=True)
            assert (abs(sums[:, label] - value) <= (rows + 4) * UNIT * terms.sum(axis=1)).all()


def test_centred_class_sums_of_nothing(emulator):
    features = Features.of(np.zeros((2, 0, 5)))
    outputs = emulator.run("centred_class_sums", features, labels=np.zeros(0, int), classes=3)
    assert all((output == 0).all() for output in outputs)
