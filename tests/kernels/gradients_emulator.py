"""The gradients kernels in the emulation, the Python side of gradients_harness.cpp, and their reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from emulator import HERE, KERNELS, ORDERS, TYPES, Emulator, decode, encode

SOURCES = (
    *(KERNELS / f"{name}.cu" for name in ("expectation", "gradient_gram", "gradient_fisher")),
    HERE / "gradients_harness.cpp",
)


@dataclass(frozen=True)
class Layout:
    padding: int = 0  # elements between rows
    displacement: int = 0  # of the first element from an aligned address


@dataclass(frozen=True)
class Moments:
    """Gradients [samples, size] of every tensor, stored, and moments that hold `count` gradients."""

    gradients: tuple[np.ndarray, ...]
    means: tuple[np.ndarray, ...]
    squares: tuple[np.ndarray, ...]  # none if not wanted
    count: int
    type: str = "float32"
    layout: Layout = Layout()

    @classmethod
    def random(cls, sizes, samples, count, type="float32", state="float32", squares=True, seed=0, **layout) -> Moments:
        random = np.random.default_rng([len(sizes), seed])
        gradients = tuple(encode(random.normal(size=(samples, size)) + 1, type) for size in sizes)
        fill = (lambda size: random.normal(size=size)) if count else (lambda size: np.full(size, np.nan))
        means = tuple(fill(size).astype(state) for size in sizes)
        deviations = tuple(abs(fill(size)).astype(state) for size in sizes) if squares else ()
        return cls(gradients, means, deviations, count, type, Layout(**layout))


@dataclass(frozen=True)
class Expectations:
    """Lists of moments of the same tensors; those beyond `updated` are means alone, without gradients."""

    lists: tuple[Moments, ...]
    updated: int

    @classmethod
    def random(cls, sizes, samples, counts, beyond=0, **options) -> Expectations:
        """Counts of the lists that take gradients, each one less than the one before."""
        lists = [Moments.random(sizes, samples, count, seed=k, **options) for k, count in enumerate(counts)]
        lists += [Moments.random(sizes, 0, 5, seed=9 + k, **{**options, "squares": False}) for k in range(beyond)]
        return cls(tuple(lists), len(counts))


@dataclass(frozen=True)
class Gram:
    """Rows [K, size] of every segment, stored, perhaps a base and weights."""

    rows: tuple[np.ndarray, ...]
    bases: tuple[np.ndarray, ...] = ()
    weights: tuple[np.ndarray, ...] = ()
    type: str = "float32"
    layout: Layout = Layout()

    @classmethod
    def random(cls, count, sizes, type="float32", base=False, weights=False, **layout) -> Gram:
        random = np.random.default_rng(count)
        rows = tuple(encode(random.normal(size=(count, size)), type) for size in sizes)
        bases = tuple(encode(random.normal(size=size), type) for size in sizes) if base else ()
        compute = "float64" if type == "float64" else "float32"
        scale = tuple(random.normal(size=size).astype(compute) for size in sizes) if weights else ()
        return cls(rows, bases, scale, type, Layout(**layout))


@dataclass(frozen=True)
class Samples:
    """Per-sample gradients [N, P], stored, and directions [K, P]."""

    gradients: np.ndarray
    directions: np.ndarray
    type: str = "float32"
    layout: Layout = Layout()

    @classmethod
    def random(cls, samples, columns, count, type="float32", **layout) -> Samples:
        random = np.random.default_rng(samples)
        compute = "float64" if type == "float64" else "float32"
        gradients = encode(random.normal(size=(samples, columns)), type)
        return cls(gradients, random.normal(size=(count, columns)).astype(compute), type, Layout(**layout))


class GradientsEmulator(Emulator):
    def run(self, x, *, multiprocessors: int = 4, order: str = "forward", seed: int = 0) -> tuple[np.ndarray, ...]:
        """The outputs; raises EmulationError where the process dies."""
        like, lists = (x.lists[0] if isinstance(x, Expectations) else x), 0
        layout = like.layout
        if isinstance(x, Moments):
            state = x.means[0].dtype.name if x.means else "float32"
            sizes = [mean.size for mean in x.means]
            samples = len(x.gradients[0]) if x.gradients else 0
            function, numbers = int(state == "float64"), (samples, x.count, int(bool(x.squares)))
            arrays, outputs = [], []
            for i, gradient in enumerate(x.gradients):
                own = [x.means[i], x.squares[i]] if x.squares else [x.means[i]]
                arrays += [gradient, *own]
                outputs += [((sizes[i],), state)] * len(own)
        elif isinstance(x, Expectations):
            first, beyond = x.lists[0], len(x.lists) - x.updated
            state, squares = first.means[0].dtype.name, int(bool(first.squares))
            sizes, lists = [mean.size for mean in first.means], len(x.lists)
            function, numbers = (
                4 + int(state == "float64"),
                (len(first.gradients[0]), first.count, squares + 2 * beyond),
            )
            arrays, outputs = [], []
            for i, size in enumerate(sizes):
                for k, each in enumerate(x.lists):
                    arrays += [each.gradients[i]] if k < x.updated else []
                    moments = [each.means[i], *([each.squares[i]] if each.squares else [])]
                    arrays += moments
                    outputs += [((size,), state)] * len(moments)
            outputs.append(((lists, lists), "float64"))
        elif isinstance(x, Gram):
            sizes, rows = [part.shape[1] for part in x.rows], len(x.rows[0]) if x.rows else 1
            function, numbers = 2, (rows, 0, int(bool(x.bases)) + 2 * int(bool(x.weights)))
            optional = [part for part in (x.bases, x.weights) if part]
            arrays = [array for group in zip(x.rows, *optional) for array in group]
            outputs = [((rows, rows), "float64")]
        else:
            (samples, columns), count = x.gradients.shape, len(x.directions)
            function, sizes, numbers = 3, [columns], (samples, count, 0)
            arrays = [x.gradients, x.directions]
            outputs = [((count, count), "float64"), ((columns,), x.directions.dtype.name), ((samples,), "float64")]
        header = [function, TYPES.index(like.type), ORDERS.index(order), seed, len(sizes), *numbers]
        header += [layout.displacement, layout.padding, multiprocessors, lists]
        return self.call("gradients", header, [np.array(sizes, np.int64), *arrays], outputs)


def expected(x) -> list[tuple[np.ndarray, np.ndarray]]:
    """(value, tolerance) of every output, in extended precision: first-order bounds, and 1 % for the rest."""
    if isinstance(x, Moments):
        return [pair for i in range(len(x.means)) for pair in _expected_moments(x, i)]
    if isinstance(x, Expectations):
        return _expected_expectations(x)
    double = 2.0**-53
    if isinstance(x, Gram):
        count = len(x.rows[0]) if x.rows else 1
        value, absolute = np.zeros((2, count, count), np.longdouble)
        for i, part in enumerate(x.rows):
            rows = decode(part, x.type).astype(np.longdouble)
            rows = rows - decode(x.bases[i], x.type) if x.bases else rows
            weights = x.weights[i].astype(np.longdouble) if x.weights else np.ones(rows.shape[1])
            value += (rows * weights) @ rows.T
            absolute += (abs(rows) * abs(weights)) @ abs(rows).T
        terms = sum(part.shape[1] for part in x.rows)
        return [(value, 1.01 * (terms + 5) * double * absolute)]
    rows, moves = decode(x.gradients, x.type).astype(np.longdouble), x.directions.astype(np.longdouble)
    samples, columns = rows.shape
    products, absolute = rows @ moves.T, abs(rows) @ abs(moves).T
    error = 1.01 * (2 * columns + samples + 2) * double * (absolute.T @ absolute) / samples
    diagonal, norms = (rows**2).mean(axis=0), (rows**2).sum(axis=1)
    rounding = double if x.type == "float64" else 2.0**-24
    return [
        (products.T @ products / samples, error),
        (diagonal, 1.01 * ((samples + 2) * double + rounding) * diagonal),
        (norms, 1.01 * (columns + 1) * double * norms),
    ]


def _expected_expectations(x: Expectations) -> list[tuple[np.ndarray, np.ndarray]]:
    """Products of means that are each within their tolerance, summed."""
    references, means = [], []
    for i in range(len(x.lists[0].means)):
        found = [_expected_moments(each, i) for each in x.lists]
        references += [pair for pairs in found for pair in pairs]
        means.append([pairs[0] for pairs in found])
    count = len(x.lists)
    gram, error = np.zeros((2, count, count), np.longdouble)
    terms = sum(own[0][0].size for own in means) + 5
    for own in means:
        values, tolerances = (np.stack([pair[part] for pair in own]) for part in (0, 1))
        absolute = abs(values) + tolerances
        gram += values @ values.T
        error += absolute @ absolute.T - abs(values) @ abs(values).T + 1.01 * terms * 2.0**-53 * absolute @ absolute.T
    return [*references, (gram, error)]


def _expected_moments(x: Moments, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Six roundings a step, each of a number at most twice the largest gradient or mean; their square for squares."""
    values = decode(x.gradients[index], x.type).astype(np.longdouble)
    samples, size = values.shape
    state = x.means[index].dtype.name
    unit = 2.0**-53 if state == "float64" else 2.0**-24
    mean = x.means[index].astype(np.longdouble) if x.count else np.zeros(size, np.longdouble)
    square = np.zeros(size, np.longdouble)
    if x.squares and x.count:
        square = x.squares[index].astype(np.longdouble)
    largest = np.maximum(abs(values).max(axis=0, initial=0), abs(mean))
    for n, value in enumerate(values):
        apart = value - mean
        mean = mean + apart / (x.count + n + 1)
        square = square + apart * (value - mean)
    step = 12 * samples * unit
    references = [(mean, step * largest)]
    if x.squares:
        references.append((square, step * (square + 4 * samples * largest**2)))
    return references
