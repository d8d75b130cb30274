"""The CUDA kernels of a layer's Fisher information on the CPU, against extended precision."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import NO_COMPILER, ORDERS, TYPES, EmulationError, build, disagreement
from fisher_emulator import DIAGONAL_WAYS, FUNCTIONS, SOURCES, WAYS, WIDE_PROJECTION, FisherEmulator, Layer, Signal
from fisher_reference import expected


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The kernels on the CPU, under AddressSanitizer."""
    if NO_COMPILER:
        pytest.skip(NO_COMPILER)
    with FisherEmulator(build(tmp_path_factory.mktemp("fisher"), SOURCES)) as emulator:
        yield emulator


def linear_layer(shape, type="float32", *, count=2, seed=0, inputs=None, grad_outputs=None, **window):
    """A linear layer of (samples, positions, I, O)."""
    samples, positions, columns, rows = shape
    random = np.random.default_rng(seed)
    signals = [
        Signal.of(random.normal(size=(samples, 1, 1, positions, channels)), type, **(layout or {}))
        for channels, layout in ((columns, inputs), (rows, grad_outputs))
    ]
    groups = window.get("groups", 1)
    directions = random.normal(size=(count, rows, columns // groups, 1, 1, 1))
    return Layer(*signals, type, directions=directions, **window)


def conv_layer(
    samples,
    channels,
    size,
    kernel,
    type="float32",
    *,
    count=2,
    stride=(1, 1, 1),
    padding=(0, 0, 0),
    dilation=(1, 1, 1),
    groups=1,
    **layout,
):
    """A convolution of ``channels`` (I, O); sizes are padded to three dimensions in front."""
    random = np.random.default_rng(0)
    out = tuple(
        max((n + 2 * p - d * (k - 1) - 1) // s + 1, 0) for n, k, s, p, d in zip(size, kernel, stride, padding, dilation)
    )
    inputs = Signal.of(random.normal(size=(samples, *size, channels[0])), type, **layout)
    grads = Signal.of(random.normal(size=(samples, *out, channels[1])), type, **layout)
    directions = random.normal(size=(count, channels[1], channels[0] // groups, *kernel))
    return Layer(inputs, grads, type, kernel, stride, padding, dilation, groups, directions)


def unused_inputs_layer():
    """A convolution whose last slice of inputs is under no window, and not a number."""
    layer = conv_layer(2, (3, 2), (3, 2, 3), (2, 2, 2), stride=(2, 1, 1))
    layer.inputs.stored[:, 2] = 0
    expected("norm", layer)  # in the cache
    layer.inputs.stored[:, 2] = np.nan
    return layer


def check(emulator, function, layer, orders=ORDERS, **arguments):
    """Right in three thread orders, to the same last bit in all of them: the output."""
    references = expected(function, layer)
    results = [emulator.run(function, layer, order=order, seed=1, **arguments) for order in orders]
    for outputs in results:
        assert disagreement(outputs, references) is None
        assert np.array_equal(outputs[0], results[0][0])
    return results[0][0]


SHAPES = [  # samples, positions, I, O
    (1, 1, 1, 1),
    (3, 2, 3, 17),
    (2, 17, 65, 3),
    (2, 33, 17, 129),
    (1, 16, 129, 2),
    (17, 3, 2, 1),
]


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", ["diagonal", *WAYS])
def test_linear_shapes(emulator, function, shape, type):
    check(emulator, function, linear_layer(shape, type))


LAYOUTS = {  # channels, padding of rows, of samples, displacement; 16 bytes are 2, 4 or 8 elements
    "contiguous": (72, 0, 0, 0),
    "aligned strides": (72, 8, 16, 0),
    "odd row stride": (72, 1, 0, 0),
    "odd sample stride": (72, 8, 3, 0),
    "misaligned": (72, 0, 0, 1),
    "odd channels": (71, 1, 0, 0),
}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_layouts(emulator, layout, type):
    """Of either operand; what is read is the same in all epilogues."""
    channels, row_padding, sample_padding, displacement = LAYOUTS[layout]
    arguments = {"row_padding": row_padding, "sample_padding": sample_padding, "displacement": displacement}
    for way in ("tile_norm", "ghost_norm"):
        check(emulator, way, linear_layer((2, 5, channels, 9), type, inputs=arguments))
        check(emulator, way, linear_layer((2, 5, 9, channels), type, grad_outputs=arguments))
    check(emulator, "contraction", linear_layer((2, 5, channels, 9), type, inputs=arguments))


@pytest.mark.parametrize("type", TYPES)
def test_norm_at_one_position(emulator, type):
    """A product of two norms, of rows of several accesses per lane, and of groups."""
    check(emulator, "norm", linear_layer((19, 1, 71, 1032), type))
    layout = {"row_padding": 1, "sample_padding": 2, "displacement": 1}
    check(emulator, "norm", linear_layer((5, 1, 12, 8), type, groups=4, grad_outputs=layout))


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("multiprocessors", [1, 16])
def test_diagonal_at_one_position(emulator, type, multiprocessors):
    """A product of squares: several slabs of 16 samples and a part of one, in one block and in several."""
    for shape in ((16, 1, 64, 8), (37, 1, 71, 131)):
        check(emulator, "diagonal", linear_layer(shape, type), multiprocessors=multiprocessors)
    layout = {"row_padding": 1, "sample_padding": 2, "displacement": 1}
    check(emulator, "diagonal", linear_layer((5, 1, 12, 8), type, groups=4, inputs=layout))


def test_linear_groups(emulator):
    check(emulator, "diagonal", linear_layer((2, 5, 24, 16), groups=4))
    for way in WAYS:
        check(emulator, way, linear_layer((2, 5, 9, 6), groups=3))


CONVOLUTIONS = {  # samples, (I, O), size, kernel, window
    "1d": (3, (2, 3), (1, 1, 9), (1, 1, 3), {"padding": (0, 0, 1)}),
    "2d": (2, (3, 5), (1, 6, 7), (1, 3, 3), {"padding": (0, 1, 1)}),
    "3d": (2, (2, 3), (3, 4, 5), (2, 3, 2), {"padding": (1, 1, 0)}),
    "stride": (2, (3, 4), (1, 9, 8), (1, 3, 2), {"stride": (1, 2, 3), "padding": (0, 1, 0)}),
    "dilation": (2, (3, 4), (1, 9, 9), (1, 3, 3), {"dilation": (1, 2, 3), "padding": (0, 2, 3)}),
    "groups": (2, (6, 4), (1, 5, 5), (1, 2, 2), {"groups": 2}),
    "depthwise": (1, (5, 10), (1, 4, 4), (1, 3, 3), {"groups": 5, "padding": (0, 1, 1)}),
    "everything": (
        3,
        (4, 6),
        (5, 6, 7),
        (2, 3, 2),
        {"stride": (2, 1, 2), "padding": (1, 2, 1), "dilation": (2, 1, 3), "groups": 2},
    ),
    "mostly padding": (1, (2, 2), (1, 1, 1), (1, 3, 3), {"padding": (0, 2, 2)}),
    "point": (2, (17, 9), (1, 3, 3), (1, 1, 1), {}),
    "strided point": (2, (3, 4), (1, 5, 5), (1, 1, 1), {"stride": (1, 2, 2)}),
    "many columns": (1, (15, 2), (1, 3, 3), (1, 3, 3), {"padding": (0, 1, 1)}),
}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(emulator, case, type):
    samples, channels, size, kernel, window = CONVOLUTIONS[case]
    layer = conv_layer(samples, channels, size, kernel, type, **window)
    check(emulator, "diagonal", layer)
    for function in ("tile_projection", "tile_norm", "ghost_norm"):
        check(emulator, function, layer, orders=["shuffled"])


def test_unused_inputs_do_not_matter(emulator):
    layer = unused_inputs_layer()
    for function in ("diagonal", "tile_projection", "tile_norm", "ghost_norm"):
        check(emulator, function, layer)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolution_layouts(emulator, layout, type):
    channels, row_padding, sample_padding, displacement = LAYOUTS[layout]
    arguments = {"row_padding": row_padding, "sample_padding": sample_padding, "displacement": displacement}
    layer = conv_layer(2, (channels, 5), (1, 2, 2), (1, 2, 3), type, padding=(0, 1, 1), **arguments)
    for way in ("tile_norm", "ghost_norm"):
        check(emulator, way, layer)


@pytest.mark.parametrize("type", TYPES)
def test_convolution_groups_of_whole_vectors(emulator, type):
    layer = conv_layer(2, (24, 16), (1, 3, 3), (1, 2, 2), type, groups=2)
    for function in ("diagonal", "ghost_norm"):
        check(emulator, function, layer)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty(emulator, function, shape):
    assert (check(emulator, function, linear_layer(shape)) == 0).all()


def test_no_directions(emulator):
    assert check(emulator, "projection", linear_layer((3, 4, 5, 6), count=0)).shape == (3, 0)


def test_window_larger_than_the_input(emulator):
    layer = conv_layer(2, (3, 4), (1, 2, 2), (1, 3, 3))
    assert layer.grad_outputs.stored.size == 0
    for function in FUNCTIONS:
        assert (check(emulator, function, layer) == 0).all()


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("count", [1, 7, 17])
def test_more_directions_than_a_block_holds(emulator, count, type):
    for way in ("tile_projection", "contraction"):
        check(emulator, way, linear_layer((2, 3, 5, 130), type, count=count))


@pytest.mark.parametrize("function", ["diagonal", "tile_norm", "tile_projection"])
def test_splits_of_the_samples(emulator, function):
    """Split or not, with an odd number of samples in each split: the same but for rounding."""
    layer = linear_layer((7, 40, 70, 40))
    check(emulator, function, layer, multiprocessors=1)
    check(emulator, function, layer, multiprocessors=64)
    if function == "diagonal":
        assert emulator.workspace == 7 * 70 * 40 / 2


@pytest.mark.parametrize("function", ["tile_projection", "tile_norm"])
def test_more_tiles_than_slots(emulator, function):
    """A block then takes several tiles; with one multiprocessor there are at most four slots."""
    layer = linear_layer((3, 2, 64 * 3 + 1, 140), "float64")
    check(emulator, function, layer, multiprocessors=1)
    assert emulator.workspace == 4 * 3 * (2 if function == "tile_projection" else 1)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("shape", [(2, 200, 35, 3), (1, 129, 3, 20), (70, 2, 5, 18), (131, 1, 3, 2)], ids=str)
def test_ghost_norm_of_many_positions_and_of_many_samples(emulator, shape, type):
    """Tiles on the diagonal and above it; several samples to a tile, in several units."""
    check(emulator, "ghost_norm", linear_layer(shape, type), orders=["shuffled", "backward"])


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("shape", [(131, 1, 35, 3), (50, 3, 6, 130), (2, 128, 3, 2)], ids=str)
def test_contraction_of_many_samples(emulator, shape, type):
    check(emulator, "contraction", linear_layer(shape, type, count=3), orders=["shuffled", "backward"])


ROUTES = [  # function, (samples, positions, I, O), directions, multiprocessors, the way
    ("norm", (64, 4, 64, 64), 0, 4, "ghost_norm"),
    ("norm", (2, 70, 128, 64), 0, 4, "tile_norm"),
    ("norm", (3, 16, 200, 300), 0, 132, "tile_norm"),  # one block does not do what many can
    ("projection", (64, 1, 64, 64), 3, 4, "contraction"),
    ("projection", (16, 64, 64, 64), 3, 4, "tile_projection"),
]


WIDE_SHAPES = [  # samples, positions, I, O: up to 15 slabs of 32 positions, the last one whole, half or in part
    (3, 2, 8, 8),
    (9, 16, 264, 8),
    (5, 33, 136, 136),
    (7, 70, 264, 16),
    (3, 96, 384, 8),
    (4, 113, 256, 8),
    (3, 480, 8, 128),
    (2, 130, 520, 136),
]


@pytest.mark.parametrize("type", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", WIDE_SHAPES, ids=str)
@pytest.mark.parametrize("way", DIAGONAL_WAYS)
def test_diagonal_of_16_bits(emulator, way, shape, type):
    """All samples in one block and in blocks of their own."""
    layer = linear_layer(shape, type)
    for multiprocessors, order in ((1, "shuffled"), (16, "backward"), (3, "forward")):
        check(emulator, way, layer, [order], multiprocessors=multiprocessors)


WIDE_CONVOLUTIONS = {
    "one position": (5, (32, 8), (1, 3, 3), (1, 3, 3), {}),
    "2d": (3, (16, 24), (1, 6, 7), (1, 3, 3), {"padding": (0, 1, 1)}),
    "stride": (2, (8, 8), (1, 9, 8), (1, 3, 2), {"stride": (1, 2, 3), "padding": (0, 1, 0)}),
    "dilation": (2, (16, 8), (1, 9, 9), (1, 3, 3), {"dilation": (1, 2, 3), "padding": (0, 2, 3)}),
    "everything": (
        3,
        (32, 16),
        (5, 6, 7),
        (2, 3, 2),
        {"stride": (2, 1, 2), "padding": (1, 2, 1), "dilation": (2, 1, 3), "groups": 2},
    ),
    "mostly padding": (1, (32, 8), (1, 1, 1), (1, 3, 3), {"padding": (0, 2, 2)}),
    "row padding": (2, (16, 8), (1, 5, 5), (1, 3, 3), {"row_padding": 8, "sample_padding": 16}),
}


@pytest.mark.parametrize("type", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", WIDE_CONVOLUTIONS)
@pytest.mark.parametrize("way", DIAGONAL_WAYS)
def test_diagonal_of_16_bit_convolutions(emulator, way, case, type):
    samples, channels, size, kernel, window = WIDE_CONVOLUTIONS[case]
    layer = conv_layer(samples, channels, size, kernel, type, **window)
    check(emulator, way, layer, multiprocessors=1)
    check(emulator, way, layer, ["shuffled"], multiprocessors=16)


def test_wide_groups(emulator):
    layer = linear_layer((2, 35, 3 * 136, 48), "bfloat16", groups=3)
    check(emulator, "wide_diagonal", layer)
    check(emulator, WIDE_PROJECTION, layer)


@pytest.mark.parametrize("type", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), *WIDE_SHAPES], ids=str)
def test_wide_projection(emulator, shape, type):
    """On directions in registers, in shared memory as well, and in several chunks; samples as in the diagonal."""
    for count, multiprocessors, order in (
        (1, 1, "shuffled"),
        (2, 16, "backward"),
        (5, 3, "forward"),
        (11, 1, "shuffled"),
    ):
        layer = linear_layer(shape, type, count=count)
        check(emulator, WIDE_PROJECTION, layer, [order], multiprocessors=multiprocessors)


@pytest.mark.parametrize("type", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", WIDE_CONVOLUTIONS)
def test_wide_projection_of_convolutions(emulator, case, type):
    samples, channels, size, kernel, window = WIDE_CONVOLUTIONS[case]
    layer = conv_layer(samples, channels, size, kernel, type, count=5, **window)
    check(emulator, WIDE_PROJECTION, layer, multiprocessors=1)
    check(emulator, WIDE_PROJECTION, layer, ["shuffled"], multiprocessors=16)


@pytest.mark.parametrize("width", [32, 33, 712, 713, 1400])
def test_wide_projection_of_many_windows(emulator, width):
    """Of which the tables leave room for three directions in shared memory, two or one."""
    layer = conv_layer(2, (8, 8), (1, 2, width), (1, 1, 1), "float16", count=5)
    check(emulator, WIDE_PROJECTION, layer, ["shuffled"])


def test_wide_projection_of_more_tiles_than_slots(emulator):
    layer = linear_layer((3, 20, 4 * 128 + 8, 136), "float16", count=3)
    check(emulator, WIDE_PROJECTION, layer, multiprocessors=1)
    assert emulator.workspace == -(-4 * 3 * 3 // 2)


def test_wide_projection_keeps_samples_apart(emulator):
    layer = linear_layer((5, 20, 16, 8), "float16")
    layer.inputs.stored[2] = 0x7E00  # NaN
    (output,) = emulator.run(WIDE_PROJECTION, layer)
    assert np.isnan(output[2]).all()
    assert np.isfinite(np.delete(output, 2, axis=0)).all()


DIAGONAL_ROUTES = [  # (samples, positions, I, O), multiprocessors, the way
    ((11, 40, 264, 136), 4, "wide_diagonal"),
    ((3, 64, 256, 8), 4, "wide_diagonal"),  # as good as the other
    ((3, 64, 256, 8), 5, "tile_diagonal"),  # one block does not do what two can
]


def without_wide_tiles():
    """Layers whose operands are not aligned, or whose samples do not fit in shared memory."""
    for name, (channels, row_padding, sample_padding, displacement) in LAYOUTS.items():
        layout = {"row_padding": row_padding, "sample_padding": sample_padding, "displacement": displacement}
        if name not in ("contiguous", "aligned strides"):
            yield f"inputs: {name}", linear_layer((3, 5, channels, 16), "bfloat16", inputs=layout)
            yield f"grad_outputs: {name}", linear_layer((3, 5, 16, channels), "bfloat16", grad_outputs=layout)
    yield "odd channels of groups", linear_layer((3, 5, 24, 24), "bfloat16", groups=2)
    yield "many positions", linear_layer((1, 705, 8, 8), "float16")
    yield "many windows", conv_layer(1, (8, 8), (1, 2, 289), (1, 1, 1), "float16")
    yield "one position", linear_layer((3, 1, 16, 16), "bfloat16")
    yield "float32", linear_layer((3, 5, 16, 16))
    yield "float64", linear_layer((3, 5, 16, 16), "float64")
    yield "empty", linear_layer((0, 5, 16, 16), "bfloat16")


WITHOUT_WIDE_TILES = dict(without_wide_tiles())
WITH_WIDE_PROJECTION = {"many positions", "many windows", "one position"}  # all the same


@pytest.mark.parametrize("case", WITHOUT_WIDE_TILES)
def test_layers_without_wide_tiles(emulator, case):
    layer = WITHOUT_WIDE_TILES[case]
    with pytest.raises(EmulationError, match=r"CUDA error 1$"):
        emulator.run("wide_diagonal", layer)
    assert np.array_equal(check(emulator, "diagonal", layer), emulator.run("tile_diagonal", layer)[0])


NO_WIDE_PROJECTION = {name: layer for name, layer in WITHOUT_WIDE_TILES.items() if name not in WITH_WIDE_PROJECTION}
NO_WIDE_PROJECTION["more windows"] = conv_layer(1, (8, 8), (1, 2, 1401), (1, 1, 1), "float16")
NO_WIDE_PROJECTION["no directions"] = linear_layer((3, 5, 16, 16), "bfloat16", count=0)


@pytest.mark.parametrize("case", NO_WIDE_PROJECTION)
def test_layers_without_wide_projection(emulator, case):
    layer = NO_WIDE_PROJECTION[case]
    with pytest.raises(EmulationError, match=r"CUDA error 1$"):
        emulator.run(WIDE_PROJECTION, layer)
    check(emulator, "projection", layer)


def test_as_many_windows_as_fit(emulator):
    layer = conv_layer(2, (8, 8), (1, 2, 288), (1, 1, 1), "float16")
    check(emulator, "wide_diagonal", layer, ["shuffled"])


PROJECTION_ROUTES = [  # (samples, positions, I, O), directions, multiprocessors, the way
    ((5, 33, 264, 16), 5, 4, WIDE_PROJECTION),
    ((9, 40, 64, 136), 5, 4, "tile_projection"),  # half of a wide tile would be empty
    ((3, 64, 256, 8), 5, 12, "tile_projection"),  # one block does not do what two can
    ((40, 2, 136, 8), 2, 4, "contraction"),
]


@pytest.mark.parametrize(("shape", "count", "multiprocessors", "way"), PROJECTION_ROUTES)
def test_the_route_of_16_bit_projections_is_the_cheaper_way(emulator, shape, count, multiprocessors, way):
    layer = linear_layer(shape, "bfloat16", count=count)
    results = {}
    for function in ("projection", WIDE_PROJECTION, "tile_projection", "contraction"):
        results[function] = check(emulator, function, layer, ["forward"], multiprocessors=multiprocessors)
    taken = results.pop("projection")
    assert [name for name, result in results.items() if np.array_equal(result, taken)] == [way]


@pytest.mark.parametrize(("shape", "multiprocessors", "way"), DIAGONAL_ROUTES)
def test_the_route_of_the_diagonal_is_the_cheaper_way(emulator, shape, multiprocessors, way):
    """Told apart by the splits of the samples; the results are the same."""
    layer = linear_layer(shape, "bfloat16")
    spaces = {}
    for function in ("diagonal", *DIAGONAL_WAYS):
        check(emulator, function, layer, ["forward"], multiprocessors=multiprocessors)
        spaces[function] = emulator.workspace
    assert [taken for taken in DIAGONAL_WAYS if spaces[taken] == spaces["diagonal"]] == [way]


@pytest.mark.parametrize(("function", "shape", "count", "multiprocessors", "way"), ROUTES)
def test_the_route_is_the_cheaper_way(emulator, function, shape, count, multiprocessors, way):
    layer = linear_layer(shape, count=count)
    result = check(emulator, way, layer, orders=["forward"], multiprocessors=multiprocessors)
    workspace = emulator.workspace
    (taken,) = emulator.run(function, layer, multiprocessors=multiprocessors)
    assert np.array_equal(taken, result)
    assert emulator.workspace == workspace
    for other in WAYS:
        if function in other and other != way:
            assert not np.array_equal(emulator.run(other, layer, multiprocessors=multiprocessors)[0], result)


@pytest.mark.parametrize("function", ["diagonal", *WAYS, WIDE_PROJECTION])
def test_offsets_beyond_32_bits(emulator, function):
    """The memory is sparse: only the pages that are touched exist."""
    stride = 2**31 + 8
    layout = {"row_padding": stride - 16, "sample_padding": 8}
    layer = linear_layer((2, 2, 16, 16), "float16", inputs=layout, grad_outputs=layout)
    check(emulator, function, layer)


def test_positions_that_cancel(emulator):
    """The square of the sum, not the sum of the squares."""
    layer = linear_layer((2, 2, 5, 7))
    inputs, grads = layer.inputs.stored, layer.grad_outputs.stored
    inputs[..., 1, :] = inputs[..., 0, :]
    grads[..., 1, :] = -grads[..., 0, :]
    for function in ("diagonal", *WAYS):
        assert (check(emulator, function, layer) == 0).all()


def test_samples_are_kept_apart(emulator):
    """A sample's NaN is its own."""
    layer = linear_layer((5, 20, 6, 7))
    layer.inputs.stored[2] = np.nan
    for function in WAYS:
        (output,) = emulator.run(function, layer)
        assert np.isnan(output[2]).all()
        assert np.isfinite(np.delete(output, 2, axis=0)).all()


def test_float32_is_accurate_to_its_last_bits(emulator):
    """A product of the halves of a number only would be off by 2^-11."""
    layer = linear_layer((1, 1, 64, 64))
    (output,) = emulator.run("diagonal", layer)
    value, _ = expected("diagonal", layer)[0]
    assert (abs(output - value) <= 16 * 2.0**-24 * abs(value)).all()
