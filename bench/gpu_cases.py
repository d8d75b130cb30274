"""The ops at the sizes at which they are measured on a GPU, and what each stands against.

Each stands against the composition of torch calls that a skilled user would write. Tensors are made on torch's default
device; on "meta" they hold nothing, and a case is its sizes and its floor alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from transferops import ops
from transferops.ops.moments import Precision
from transferops.ops.prediction import composed_prediction

MULTIPROCESSORS = 132  # of an H200


def padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass
class Case:
    """One op on one input: calls that return what is compared, and the work that cannot be avoided."""

    name: str
    sizes: dict[str, int]
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    bytes_moved: int
    operations: float
    rate: str = "float64"  # which matrix rate bounds the operations
    done: float | None = None  # operations of our route, where they are others
    expected_rate: str | None = None  # what they are expected at (EXPECTED_RATES of gpu.py), where it is not `rate`
    bytes_before: int = 0  # moved by a pass of its own before the operations


def class_moments_case(
    samples: int, dim: int, classes: int, dtype: torch.dtype = torch.float32, precision: Precision = "float64"
) -> Case:
    features = (torch.randn(samples, dim) + 1).to(dtype)
    labels = torch.randint(classes, (samples,))

    def theirs() -> Tensor:
        centred = features - features.mean(0)
        features.new_zeros(classes, dim).index_add_(0, labels, centred)
        return centred.T @ centred

    def reference() -> Tensor:
        centred = features.double() - features.double().mean(0)
        return centred.T @ centred

    # The kernels' routes (csrc/kernels/cuda/gram_narrow.cu): wide features are rounded to a copy of 16 bits first.
    size = features.element_size()
    rounded = precision == "bfloat16" and size > 2 and dim >= (768 if size == 4 else 320)
    read = 2 if rounded else size

    return Case(
        f"class_moments {str(dtype).removeprefix('torch.')} in {precision}",
        {"N": samples, "D": dim, "C": classes},
        lambda: ops.class_moments(features, labels, classes, precision=precision, validate=False).gram,
        theirs,
        reference,
        2 * features.nbytes,
        float(samples) * dim * dim,
        precision,
        expected_rate=f"gram of {read} bytes" if precision in ("tf32", "bfloat16") else None,
        bytes_before=samples * dim * (size + 2) if rounded else 0,
    )


def norm_moments_case(samples: int, dim: int) -> Case:
    features = torch.randn(samples, dim) + 1
    shift = features.double().mean(0)

    def composed(x: Tensor, mean: Tensor) -> Tensor:
        centred = x - mean
        norm = centred.square().sum(1)
        return torch.cat([norm @ centred, norm.square().sum().unsqueeze(0)])

    def ours() -> Tensor:
        moments = ops.norm_moments(features, shift, validate=False)
        return torch.cat([moments.cubic, moments.quartic.unsqueeze(0)])

    return Case(
        "norm_moments",
        {"N": samples, "D": dim},
        ours,
        lambda: composed(features, shift.float()),
        lambda: composed(features.double(), shift),
        features.nbytes,
        0.0,
    )


def sample_gram_case(samples: int, dim: int) -> Case:
    features = torch.randn(samples, dim) + 1

    def composed(x: Tensor) -> Tensor:
        centred = x - x.mean(0)
        return centred @ centred.T

    return Case(
        "sample_gram",
        {"N": samples, "D": dim},
        lambda: ops.sample_gram(features, validate=False).gram,
        lambda: composed(features),
        lambda: composed(features.double()),
        2 * features.nbytes,
        float(samples) ** 2 * dim,
    )


def gradients_of(inputs: Tensor, outputs: Tensor, window: tuple[int, int, int] | None) -> Tensor:
    """Per-sample gradients [N, O, I] of a linear layer, or [N, O, I * kernel^2] of a convolution."""
    if window is None:
        return outputs.mT @ inputs
    kernel, stride, padding = window
    return outputs.flatten(2) @ F.unfold(inputs, kernel, 1, padding, stride).mT


@dataclass(frozen=True)
class LayerSize:
    """What csrc/kernels/cuda/fisher_routes.cu decides by, and the operations of the route on an H200."""

    samples: int
    positions: int
    columns: int
    rows: int
    half: bool  # of a 16-bit type
    linear: bool

    def route(self, quantity: str, directions: int) -> tuple[float, str]:
        """Operations, of whole waves of blocks where they are few, and the rate they are expected at."""
        n, t, i, o = self.samples, self.positions, self.columns, self.rows
        edge, depth = (128, 32) if self.half else (64, 16)
        rate = "bfloat16" if self.half else "float32"
        if self.linear and t == 1 and quantity != "projection":
            return (n * (i + o), rate) if quantity == "norm" else (2.0 * n * i * o, "float32")
        if quantity == "projection":
            return self.projection_route(directions)
        tiles = 2.0 * n * padded(t, depth) * padded(o, 128) * padded(i, edge)
        if quantity == "diagonal" and self.half and i > edge:  # as all cases here are aligned and fit
            return 2.0 * n * max(padded(t, 16), 32) * padded(o, 128) * padded(i, edge), "bfloat16 in wide tiles"
        if quantity == "norm":
            packed = max(edge // t, 1)
            across = -(-packed * t // edge)
            blocks = padded(-(-n // packed) * across * (across + 1) // 2, MULTIPROCESSORS)
            return min(tiles, 2.0 * blocks * edge**2 * (padded(i, depth) + padded(o, depth))), rate
        return tiles, rate

    def projection_route(self, directions: int) -> tuple[float, str]:
        """Dot products count as the positions that take as long; the cheapest in slabs of a tile of 128 x 64."""
        n, t, i, o = self.samples, self.positions, self.columns, self.rows
        depth = 32 if self.half else 16
        tiles = 2.0 * n * (padded(t, depth) + directions * depth / 2) * padded(o, 128) * padded(i, 64)
        rate = "bfloat16 with directions" if self.half else "float32"
        options = [(tiles / depth, tiles, rate)]
        if self.half:  # as all cases here are aligned, and their directions fit
            own = min(directions, 2)
            wide = 2.0 * n * (padded(t, 16) + 6 * own + 24 * (directions - own)) * padded(o, 128) * padded(i, 128)
            options.append((wide / 48, wide, "bfloat16"))
        if self.linear and t <= 128:
            blocks = padded(-(-n // (128 // t)) * directions * -(-o // 64), MULTIPROCESSORS)
            contraction = 2.0 * blocks * 128 * 64 * padded(i, 16)
            options.append((contraction / 16, contraction, "float32"))
        _, operations, rate = min(options)
        return operations, rate


def fisher_case(
    quantity: str,
    layer: str,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    dtype: torch.dtype,
    window: tuple[int, int, int] | None = None,
    directions: int = 5,
) -> Case:
    """The diagonal, the projection or the norm of a layer's per-sample gradients."""
    a, b = (torch.randn(shape).to(dtype) for shape in (inputs, outputs))
    samples = inputs[0]
    rows, columns = gradients_of(a[:1], b[:1], window).shape[1:]
    positions = b[0].numel() // rows
    kernel = [] if window is None else [window[0]] * 2
    shape = (rows, columns) if window is None else (rows, inputs[1], *kernel)
    moves = torch.randn(directions if quantity == "projection" else 0, *shape).to(dtype)
    kind = "linear" if window is None else "conv"
    name = f"{kind}_grad_norm" if quantity == "norm" else f"{kind}_fisher_{quantity}"
    call = getattr(ops, name)
    rest = () if window is None else (kernel, window[1], window[2])

    def ours() -> Tensor:
        result: Tensor = call(a, b, moves, *rest) if quantity == "projection" else call(a, b, *rest)
        return result.flatten()

    def reduced(gradients: Tensor, moves: Tensor) -> Tensor:
        if quantity == "diagonal":
            return gradients.square().sum(0).flatten()
        if quantity == "projection":
            return (gradients.flatten(1) @ moves.flatten(1).T).flatten()
        return gradients.square().flatten(1).sum(1)

    def theirs() -> Tensor:
        if window is None and positions == 1 and quantity == "diagonal":
            return (b[:, 0].square().T @ a[:, 0].square()).flatten()
        if window is None and positions <= 8 and quantity == "projection":
            return torch.stack([((a @ move.T) * b).sum((1, 2)) for move in moves], 1).flatten()
        if window is None and positions * (rows + columns) < 2 * rows * columns and quantity == "norm":
            return ((a @ a.mT) * (b @ b.mT)).sum((1, 2))
        return reduced(gradients_of(a, b, window), moves)

    def reference() -> Tensor:
        parts = [
            reduced(gradients_of(x.double(), y.double(), window), moves.double())
            for x, y in zip(a.split(8), b.split(8))
        ]
        return torch.stack(parts).sum(0) if quantity == "diagonal" else torch.cat(parts)

    sizes = {"N": samples, "T": positions, "I": columns, "O": rows}
    direct = 2.0 * rows * columns
    operations = min(direct, float(positions * (rows + columns))) if quantity == "norm" else direct
    short = str(dtype).removeprefix("torch.")
    layer_size = LayerSize(samples, positions, columns, rows, dtype == torch.bfloat16, window is None)
    done, expected_rate = layer_size.route(quantity, directions)
    return Case(
        f"{name} {layer} {short}",
        sizes | ({"K": directions} if quantity == "projection" else {}),
        ours,
        theirs,
        reference,
        a.nbytes + b.nbytes + moves.nbytes + (4 * rows * columns if quantity == "diagonal" else 0),
        operations * samples * positions,
        "float32" if expected_rate == "float32" else short,  # also of what is float32 for 16-bit types
        done,
        expected_rate,
    )


def layer_cases(cut: Callable[[int], int]) -> Iterator[Callable[[], Case]]:
    """Makers for the layers of ViT-B/16, BERT-base and ResNet; one and few positions."""

    def shape(*sizes: int) -> tuple[int, ...]:
        return tuple(map(cut, sizes))

    for dtype in (torch.float32, torch.bfloat16):
        for quantity in ("diagonal", "projection", "norm"):
            yield partial(fisher_case, quantity, "ViT-B/16 fc1", shape(64, 197, 768), shape(64, 197, 3072), dtype)
        yield partial(fisher_case, "diagonal", "BERT-base fc1", shape(32, 512, 768), shape(32, 512, 3072), dtype)
        for channels, size in ((256, 8), (512, 4)):
            signal = shape(256, channels, size, size)
            for quantity in ("diagonal", "projection", "norm"):
                yield partial(fisher_case, quantity, f"3x3 at {size}x{size}", signal, signal, dtype, (3, 1, 1))
        for positions, samples in ((1, 4096), (8, 512)):
            signal = shape(samples, positions, 1024)
            for quantity in ("diagonal", "projection", "norm"):
                yield partial(fisher_case, quantity, f"T={positions}", signal, signal, dtype)


def softmax_gram_case(samples: int, classes: int, directions: int) -> Case:
    logits = torch.randn(samples, classes)
    tangents = torch.randn(directions, samples, classes)

    def composed(z: Tensor, t: Tensor) -> Tensor:
        p = z.softmax(1)
        centred = (t - (t * p).sum(2, keepdim=True)) * p.sqrt()
        return torch.einsum("knc,lnc->kl", centred, centred)

    return Case(
        "softmax_fisher_gram",
        {"N": samples, "C": classes, "K": directions},
        lambda: ops.softmax_fisher_gram(logits, tangents),
        lambda: composed(logits, tangents),
        lambda: composed(logits.double(), tangents.double()),
        logits.nbytes + tangents.nbytes,
        0.0,
    )


def gradient_lists(tensors: int, weights: int, lists: int) -> list[list[Tensor]]:
    return [[torch.randn(weights) for _ in range(tensors)] for _ in range(lists)]


def expectation_case(tensors: int, weights: int) -> Case:
    """An update of mean and squares by one gradient; every call starts from the moments that the call before left."""
    gradients, means, squares, their_means, their_squares = gradient_lists(tensors, weights, 5)
    for mine, theirs in ((means, their_means), (squares, their_squares)):
        torch._foreach_copy_(theirs, mine)
    start = [x.double() for x in means]

    def ours() -> Tensor:
        ops.gradient_expectation_(means, squares, gradients, 1_000_000)
        return means[0]

    def theirs() -> Tensor:
        apart = torch._foreach_sub(gradients, their_means)
        torch._foreach_add_(their_means, apart, alpha=1 / 1_000_001)
        torch._foreach_addcmul_(their_squares, apart, torch._foreach_sub(gradients, their_means))
        return their_means[0]

    return Case(
        "gradient_expectation_",
        {"tensors": tensors, "weights": tensors * weights},
        ours,
        theirs,
        lambda: start[0] + (gradients[0].double() - start[0]) / 1_000_001,
        20 * tensors * weights,
        0.0,
    )


def expectation_gram_case(tensors: int, weights: int, lists: int) -> Case:
    """An update of one mean of several by one gradient, without squares, and the Gram matrix of the means."""
    means, theirs = (gradient_lists(tensors, weights, lists) for _ in range(2))
    (gradient,) = gradient_lists(tensors, weights, 1)
    for mine, other in zip(means, theirs):
        torch._foreach_copy_(other, mine)
    count = 1_000_000

    def composed(lists_of: list[list[Tensor]]) -> Tensor:
        torch._foreach_lerp_(lists_of[0], gradient, 1 / (count + 1))
        entries = [torch.stack([torch.dot(x, y) for x, y in zip(a, b)]).sum() for a in lists_of for b in lists_of]
        return torch.stack(entries).view(lists, lists)

    def reference() -> Tensor:
        rows = [torch.cat(row).double() for row in means]
        rows[0] += (torch.cat(gradient).double() - rows[0]) / (count + 1)
        return torch.stack([torch.stack([torch.dot(x, y) for y in rows]) for x in rows])

    return Case(
        "gradient_expectation_gram_",
        {"tensors": tensors, "weights": tensors * weights, "K": lists},
        lambda: ops.gradient_expectation_gram_(means, None, [gradient], [count]),
        lambda: composed(theirs),
        reference,
        4 * (lists + 2) * tensors * weights,
        0.0,
    )


def prediction_case(samples: int, source_classes: int, classes: int) -> Case:
    """LEEP's empirical prediction, which is a composition of torch calls on a GPU: ours and theirs are one."""
    probabilities = torch.rand(samples, source_classes).softmax(1)
    labels = torch.randint(classes, (samples,))

    def composed(x: Tensor) -> Tensor:
        return composed_prediction(x, labels, classes)[0]

    return Case(
        "empirical_prediction",
        {"N": samples, "C_s": source_classes, "C": classes},
        lambda: torch.ops.transferops.empirical_prediction(probabilities, labels, classes)[0],
        lambda: composed(probabilities),
        lambda: composed(probabilities.double()),
        2 * probabilities.nbytes,
        0.0,
    )


def gradient_gram_case(tensors: int, weights: int, lists: int) -> Case:
    rows = gradient_lists(tensors, weights, lists)

    def composed(lists_of: list[list[Tensor]]) -> Tensor:
        entries = [torch.stack([torch.dot(x, y) for x, y in zip(a, b)]).sum() for a in lists_of for b in lists_of]
        return torch.stack(entries).view(lists, lists)

    return Case(
        "gradient_gram",
        {"tensors": tensors, "weights": tensors * weights, "K": lists},
        lambda: ops.gradient_gram(rows),
        lambda: composed(rows),
        lambda: composed([[x.double() for x in row] for row in rows]),
        4 * lists * tensors * weights,
        0.0,
    )


def weighted_gram_case(count: int, weights: int) -> Case:
    directions, base = torch.randn(count, weights), torch.randn(weights)
    scale = torch.rand(weights)

    def composed(rows: Tensor, factor: Tensor, origin: Tensor) -> Tensor:
        apart = rows - origin
        return (apart * factor) @ apart.T

    return Case(
        "weighted_gram",
        {"K": count, "P": weights},
        lambda: ops.weighted_gram(directions, scale, base),
        lambda: composed(directions, scale, base),
        lambda: composed(directions.double(), scale.double(), base.double()),
        directions.nbytes + base.nbytes + scale.nbytes,
        0.0,
    )


def gradient_fisher_case(samples: int, weights: int, count: int) -> Case:
    gradients, directions = torch.randn(samples, weights), torch.randn(count, weights)

    def composed(rows: Tensor, moves: Tensor) -> Tensor:
        products, squares = rows @ moves.T, rows.square()
        return torch.cat([(products.T @ products / samples).flatten(), squares.mean(0), squares.sum(1)])

    def ours() -> Tensor:
        gram, diagonal, norms = ops.gradient_fisher_gram(gradients, directions)
        return torch.cat([gram.flatten(), diagonal, norms])

    return Case(
        "gradient_fisher_gram",
        {"N": samples, "P": weights, "K": count},
        ours,
        lambda: composed(gradients, directions),
        lambda: composed(gradients.double(), directions.double()),
        gradients.nbytes + directions.nbytes + 4 * weights,
        0.0,
    )


def all_cases(cut: Callable[[int], int] = int) -> Iterator[Callable[[], Case]]:
    """Makers of a case of every op and size; ``cut`` makes large sizes smaller."""
    for samples, dim, classes in ((1_000_000, 512, 100), (1_000_000, 2048, 1000), (100_000, 4096, 1000)):
        sizes = (cut(samples), cut(dim), cut(classes))
        for precision in ("float64", "float32", "tf32", "bfloat16"):
            yield partial(class_moments_case, *sizes, precision=precision)
        yield partial(norm_moments_case, *sizes[:2])
    yield partial(sample_gram_case, cut(4000), cut(32768))
    sizes = (cut(200_000), cut(2048), cut(1000))
    yield partial(class_moments_case, *sizes, torch.float64)
    for precision in ("float64", "bfloat16"):
        yield partial(class_moments_case, *sizes, torch.bfloat16, precision)
    yield partial(prediction_case, cut(1_000_000), cut(1000), cut(100))
    yield from layer_cases(cut)
    for classes, samples in ((1000, 65536), (50257, 2048)):
        yield partial(softmax_gram_case, cut(samples), cut(classes), 8)
    tensors = cut(160)
    for weights in (160_000, 5_000_000):  # to each of 160 tensors: 25.6 million in all, as in ResNet-50, and more
        yield partial(expectation_case, tensors, cut(weights))
    for lists in (2, 8):
        yield partial(expectation_gram_case, tensors, cut(1_000_000), lists)
    for lists in (2, 4, 8, 16):
        yield partial(gradient_gram_case, tensors, cut(160_000), lists)
    yield partial(gradient_gram_case, tensors, cut(1_000_000), 8)
    for count in (5, 16):
        yield partial(weighted_gram_case, count, cut(25_000_000))
    yield partial(gradient_fisher_case, cut(64), cut(25_000_000), 5)
