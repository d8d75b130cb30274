"""A layer's Fisher quantities in extended precision, with bounds on the rounding error of the kernels."""

from __future__ import annotations

import numpy as np
from fisher_emulator import DIAGONAL_WAYS, Layer

# A bound is a first-order one; this covers the rest.
SLACK = 1.01


def patches(layer: Layer) -> np.ndarray:
    """The inputs under the window, [samples, groups, positions, channels * kernel elements]."""
    x, b = layer.decoded()
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in layer.padding)])
    out = b.shape[2:]
    columns = []
    for tap in np.ndindex(*layer.kernel):
        begin = [k * d for k, d in zip(tap, layer.dilation)]
        slices = (slice(i, i + s * (n - 1) + 1 if n else i, s) for i, s, n in zip(begin, layer.stride, out))
        columns.append(x[(slice(None), slice(None), *slices)])
    samples, channels = x.shape[:2]
    width = channels // layer.groups * len(columns)
    stacked = np.stack(columns, 2).reshape(samples, layer.groups, width, int(np.prod(out)))
    return stacked.swapaxes(2, 3)


def unit(type: str) -> float:
    return 2.0**-53 if type == "float64" else 2.0**-24


def gradient_error(type: str, positions: int) -> float:
    """The error of a gradient's element over sum_t |b_t a_t|.

    float64: a chain of fused multiply-adds. 16-bit types: exact products; every step of 16 positions rounds towards
    zero once, 2 u. float32: a number is high + low + at most 2 u of it, low * low is dropped (2^-11 squared), so 8 u
    for a product; each of the six products of a slab of 16 rounds towards zero; the sums of slabs are added to nearest.
    """
    if type == "float64":
        return (positions + 1) * unit(type)
    if type == "float32":
        return (8 + 6 * 2 + -(-positions // 16)) * unit(type)
    return -(-positions // 16) * 2 * unit(type)


def operands(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """Inputs under the window and output gradients, [samples, groups, positions, channels of a group]."""
    _, b = layer.decoded()
    samples, channels = b.shape[:2]
    b = b.reshape(samples, layer.groups, channels // layer.groups, int(np.prod(b.shape[2:])))
    return patches(layer).astype(np.longdouble), b.swapaxes(2, 3).astype(np.longdouble)


def as_stored(directions: np.ndarray, type: str) -> np.ndarray:
    return directions.astype("float64" if type == "float64" else "float32").astype(np.longdouble)


def gradients(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """G_n [samples, *weight] and the error of each element, both in extended precision."""
    if "gradients" not in layer.cache:
        a, b = operands(layer)
        shape = (len(a), *layer.weight_shape)
        error = gradient_error(layer.type, a.shape[2]) * (abs(b).swapaxes(2, 3) @ abs(a))
        layer.cache["gradients"] = (b.swapaxes(2, 3) @ a).reshape(shape), error.reshape(shape)
    return layer.cache["gradients"]


def ghost_norm(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """The norms from products between positions, whose elements have errors as those of a gradient with channels in the
    place of positions. Then a product; a chain of a thread's columns (at most 8), 2 shuffles, the warps and turns of a
    sample's positions (at most 4 each) and 5 shuffles; tiles are added in double, and two roundings more.
    """
    a, b = operands(layer)
    products = [x @ x.swapaxes(2, 3) for x in (a, b)]
    errors = [gradient_error(layer.type, x.shape[3]) * (abs(x) @ abs(x).swapaxes(2, 3)) for x in (a, b)]
    value = products[0] * products[1]
    tolerance = (abs(products[0]) + errors[0]) * (abs(products[1]) + errors[1]) - abs(value)
    tolerance += (1 + 8 + 2 + 4 * 4 + 5 + 2) * unit(layer.type) * (abs(value) + tolerance)
    return value.sum(axis=(1, 2, 3)), SLACK * tolerance.sum(axis=(1, 2, 3))


def contraction(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """The products of a linear layer's positions with the directions, in float32 for 16-bit types; sums as those of
    ``ghost_norm``."""
    a, b = operands(layer)
    d = as_stored(layer.directions, layer.type)
    count, (groups, rows) = len(d), b.shape[1:4:2]
    d = d.reshape(count, 1, groups, rows, -1).swapaxes(3, 4)
    type = "float64" if layer.type == "float64" else "float32"
    moved, error = a @ d, gradient_error(type, a.shape[3]) * (abs(a) @ abs(d))
    tolerance = (error + (1 + 8 + 2 + 4 * 4 + 5 + 2) * unit(layer.type) * (abs(moved) + error)) * abs(b)
    return (moved * b).sum(axis=(2, 3, 4)).T, SLACK * tolerance.sum(axis=(2, 3, 4)).T


def expected(function: str, layer: Layer) -> list[tuple[np.ndarray, np.ndarray]]:
    """(value, tolerance) of the output of ``function``; norms and projections as from tiles of gradients.

    The last term of each tolerance is the longest chain of additions: of the samples; or of a thread's elements (at
    most 24, four of them side by side), 5 shuffles, 8 warps, the tiles of a slot (at most 8 here; slots are added in
    double), and two roundings more.
    """
    if function == "ghost_norm":
        return [ghost_norm(layer)]
    if function == "contraction":
        return [contraction(layer)]
    gradient, error = gradients(layer)
    u = unit(layer.type)
    is_diagonal = function in ("diagonal", *DIAGONAL_WAYS)
    if is_diagonal and layer.inputs.stored.shape[1:4] == (1, 1, 1):
        # One position: a sum of products of squares, each rounded once; otherwise as the elements of a gradient whose
        # positions are the samples, in float32 for 16-bit types too. All terms are positive.
        type = "float64" if layer.type == "float64" else "float32"
        value = (gradient**2).sum(axis=0)
        return [(value, SLACK * (gradient_error(type, len(gradient)) + 2 * u) * value)]
    if is_diagonal:
        largest = (abs(gradient) + error) ** 2
        tolerance = (2 * abs(gradient) + error) * error + (len(gradient) + 2) * u * largest
        return [((gradient**2).sum(axis=0), SLACK * tolerance.sum(axis=0))]
    chain = (24 + 5 + 8 + 8 + 2) * u
    axes = tuple(range(1, gradient.ndim))
    if function in ("norm", "tile_norm"):
        tolerance = (2 * abs(gradient) + error) * error + chain * (abs(gradient) + error) ** 2
        return [((gradient**2).sum(axis=axes), SLACK * tolerance.sum(axis=axes))]
    d = as_stored(layer.directions, layer.type)
    weights = int(np.prod(layer.weight_shape))
    d, gradient, error = (x.reshape(len(x), weights) for x in (d, gradient, error))
    tolerance = (error + chain * (abs(gradient) + error)) @ abs(d).T
    return [(gradient @ d.T, SLACK * tolerance)]
