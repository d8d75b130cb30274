"""GPU benchmarks: CUDA events, median, inputs several times the L2, random data. Called by bench/gpu.sh.

Each op stands against the composition of torch calls that a skilled user would write, in the same run, and its floor:
bytes over the measured copy bandwidth or operations over the measured float64 matrix rate, the larger. Errors are
relative, in the Frobenius norm, to float64 on the GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from run import environment
from torch import Tensor
from torch.nn import functional as F

from transferops import ops
from transferops.scores import h_score


def median_milliseconds(call: Callable[[], object], repeats: int = 30) -> float:
    """Median over repeats, after three warm-up calls."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def peak_mebibytes(call: Callable[[], object]) -> float:
    """Most device memory allocated during a call, beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth() -> float:
    """Bytes per second of a large device-to-device copy, read and written counted."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_milliseconds(lambda: target.copy_(source)) * 1e3


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations per second of a large square product."""
    size = 8192
    left, right = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2 * size**3 / median_milliseconds(lambda: left @ right, 10) * 1e3


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
    rate: str = "float64"  # which of the measured matrix rates bounds the operations


def class_moments_case(samples: int, dim: int, classes: int, dtype: torch.dtype = torch.float32) -> Case:
    features = (torch.randn(samples, dim, device="cuda") + 1).to(dtype)
    labels = torch.randint(classes, (samples,), device="cuda")

    def theirs() -> Tensor:
        centred = features - features.mean(0)
        torch.zeros(classes, dim, device="cuda", dtype=dtype).index_add_(0, labels, centred)
        return centred.T @ centred

    def reference() -> Tensor:
        centred = features.double() - features.double().mean(0)
        return centred.T @ centred

    return Case(
        f"class_moments {str(dtype).removeprefix('torch.')}",
        {"N": samples, "D": dim, "C": classes},
        lambda: ops.class_moments(features, labels, classes, validate=False).gram,
        theirs,
        reference,
        2 * features.nbytes,
        float(samples) * dim * dim,
    )


def norm_moments_case(samples: int, dim: int) -> Case:
    features = torch.randn(samples, dim, device="cuda") + 1
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
    features = torch.randn(samples, dim, device="cuda") + 1

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
    a, b = (torch.randn(shape, device="cuda").to(dtype) for shape in (inputs, outputs))
    samples = inputs[0]
    rows, columns = gradients_of(a[:1], b[:1], window).shape[1:]
    positions = b[0].numel() // rows
    kernel = [] if window is None else [window[0]] * 2
    shape = (rows, columns) if window is None else (rows, inputs[1], *kernel)
    moves = torch.randn(directions if quantity == "projection" else 0, *shape, device="cuda").to(dtype)
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
    operations = 2.0 * rows * columns
    if quantity == "norm":
        operations = min(operations, float(positions * (rows + columns)))
    return Case(
        f"{name} {layer} {str(dtype).removeprefix('torch.')}",
        sizes | ({"K": directions} if quantity == "projection" else {}),
        ours,
        theirs,
        reference,
        a.nbytes + b.nbytes + moves.nbytes + (4 * rows * columns if quantity == "diagonal" else 0),
        operations * samples * positions,
        str(dtype).removeprefix("torch."),
    )


def layer_cases() -> Iterator[Case]:
    """The layers of ViT-B/16, BERT-base and ResNet; one and few positions."""
    for dtype in (torch.float32, torch.bfloat16):
        for quantity in ("diagonal", "projection", "norm"):
            yield fisher_case(quantity, "ViT-B/16 fc1", (64, 197, 768), (64, 197, 3072), dtype)
        yield fisher_case("diagonal", "BERT-base fc1", (32, 512, 768), (32, 512, 3072), dtype)
        for channels, size in ((256, 8), (512, 4)):
            shape = (256, channels, size, size)
            for quantity in ("diagonal", "projection", "norm"):
                yield fisher_case(quantity, f"3x3 at {size}x{size}", shape, shape, dtype, (3, 1, 1))
        for positions, samples in ((1, 4096), (8, 512)):
            shape = (samples, positions, 1024)
            for quantity in ("diagonal", "projection", "norm"):
                yield fisher_case(quantity, f"T={positions}", shape, shape, dtype)


def softmax_gram_case(samples: int, classes: int, directions: int) -> Case:
    logits = torch.randn(samples, classes, device="cuda")
    tangents = torch.randn(directions, samples, classes, device="cuda")

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
    return [[torch.randn(weights, device="cuda") for _ in range(tensors)] for _ in range(lists)]


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
    directions, base = torch.randn(count, weights, device="cuda"), torch.randn(weights, device="cuda")
    scale = torch.rand(weights, device="cuda")

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
    gradients, directions = torch.randn(samples, weights, device="cuda"), torch.randn(count, weights, device="cuda")

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


def cases() -> Iterator[Case]:
    for samples, dim, classes in ((1_000_000, 512, 100), (1_000_000, 2048, 1000), (100_000, 4096, 1000)):
        yield class_moments_case(samples, dim, classes)
        yield norm_moments_case(samples, dim)
    yield sample_gram_case(4000, 32768)
    for dtype in (torch.float64, torch.bfloat16):
        yield class_moments_case(200_000, 2048, 1000, dtype)
    yield from layer_cases()
    for classes, samples in ((1000, 65536), (50257, 2048)):
        yield softmax_gram_case(samples, classes, 8)
    for weights in (160_000, 5_000_000):  # to each of 160 tensors: 25.6 million in all, as in ResNet-50, and more
        yield expectation_case(160, weights)
    for lists in (2, 4, 8, 16):
        yield gradient_gram_case(160, 160_000, lists)
    yield gradient_gram_case(160, 1_000_000, 8)
    yield weighted_gram_case(5, 25_000_000)
    yield weighted_gram_case(16, 25_000_000)
    yield gradient_fisher_case(64, 25_000_000, 5)


def measure(case: Case, bandwidth: float, rates: dict[str, float]) -> dict[str, Any]:
    """One row of the report."""
    reference = case.reference()
    errors = {
        name: float((call().double() - reference).norm() / reference.norm())
        for name, call in (("ours", case.ours), ("torch", case.theirs))
    }
    del reference
    ours, theirs = median_milliseconds(case.ours), median_milliseconds(case.theirs)
    floor = max(case.bytes_moved / bandwidth, case.operations / rates[case.rate]) * 1e3
    return {
        "name": case.name,
        "sizes": case.sizes,
        "milliseconds": {"ours": ours, "torch": theirs},
        "times_faster": theirs / ours,
        "floor_milliseconds": floor,
        "times_floor": ours / floor,
        "error": errors,
        "mebibytes": {"ours": peak_mebibytes(case.ours), "torch": peak_mebibytes(case.theirs)},
    }


def h_score_milliseconds(samples: int, dim: int, classes: int, regularized: bool) -> float:
    features = torch.randn(samples, dim, device="cuda")
    labels = torch.randint(classes, (samples,), device="cuda")
    return median_milliseconds(lambda: h_score(features, labels, regularized), 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=Path, help="file of name=exit status lines of the steps before")
    parser.add_argument("--output", type=Path, required=True, help="directory for the JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"needs a CUDA device; torch {torch.__version__} finds none")

    bandwidth = copy_bandwidth()
    rates = {
        str(dtype).removeprefix("torch."): matrix_rate(dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }
    rows = []
    for case in cases():
        rows.append(measure(case, bandwidth, rates))
        print(json.dumps(rows[-1]), flush=True)
        del case
        torch.cuda.empty_cache()
    steps = dict(line.split("=") for line in arguments.steps.read_text().split()) if arguments.steps else {}
    gpu = torch.cuda.get_device_name()
    report = {
        "environment": environment() | {"gpu": gpu, "cuda": torch.version.cuda},
        "steps_exit_status": {name: int(code) for name, code in steps.items()},
        "copy_bytes_per_second": bandwidth,
        "matrix_operations_per_second": rates,
        "benchmarks": rows,
        "h_score_milliseconds N=100000 D=1024 C=100": {
            name: h_score_milliseconds(100_000, 1024, 100, regularized)
            for name, regularized in (("plain", False), ("regularized", True))
        },
    }
    target = arguments.output / f"gpu-{gpu.lower().replace(' ', '-')}.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {target.name}")


if __name__ == "__main__":
    main()
