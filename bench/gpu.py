"""GPU benchmarks: CUDA events, median, inputs several times the L2, random data. Called by bench/gpu.sh.

Each op stands against the best composition of torch calls that a skilled user would write, in the same run, and against
its floor: bytes over the measured copy bandwidth or operations over the measured float64 matrix rate, the larger.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from run import environment
from torch import Tensor

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


def torch_class_moments(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Float32 composition: centre, one product, index_add."""
    centred = features - features.mean(0)
    sums = torch.zeros(classes, features.shape[1], device="cuda").index_add_(0, labels, centred)
    return centred.T @ centred, sums


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


def peak_mebibytes(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=Path, help="file of name=exit status lines of the steps before")
    parser.add_argument("--output", type=Path, required=True, help="directory for the JSON")
    arguments = parser.parse_args()

    bandwidth = copy_bandwidth()
    rates = {str(dtype).removeprefix("torch."): matrix_rate(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    rows = []

    def row(name: str, sizes: dict[str, int], ours: Callable[[], object], theirs: Callable[[], object], moved: int, operations: float, error: float, their_error: float) -> None:
        milliseconds, other = median_milliseconds(ours), median_milliseconds(theirs)
        floor = max(moved / bandwidth, operations / rates["float64"]) * 1e3
        rows.append(
            {
                "name": name,
                "sizes": sizes,
                "milliseconds": milliseconds,
                "torch_milliseconds": other,
                "times_faster": other / milliseconds,
                "floor_milliseconds": floor,
                "times_floor": milliseconds / floor,
                "error": error,
                "torch_error": their_error,
                "mebibytes": peak_mebibytes(ours),
                "torch_mebibytes": peak_mebibytes(theirs),
            }
        )
        print(json.dumps(rows[-1]), flush=True)

    for samples, dim, classes in ((1_000_000, 512, 100), (1_000_000, 2048, 1000), (100_000, 4096, 1000)):
        features = torch.randn(samples, dim, device="cuda") + 1
        labels = torch.randint(classes, (samples,), device="cuda")
        centred = features.double() - features.double().mean(0)
        reference = centred.T @ centred
        del centred
        row(
            "class_moments",
            {"N": samples, "D": dim, "C": classes},
            lambda: ops.class_moments(features, labels, classes, validate=False),
            lambda: torch_class_moments(features, labels, classes),
            2 * features.nbytes,
            float(samples) * dim * dim,
            relative_error(ops.class_moments(features, labels, classes).gram, reference),
            relative_error(torch_class_moments(features, labels, classes)[0], reference),
        )
        shift = features.double().mean(0)

        def torch_norm_moments() -> tuple[Tensor, Tensor]:
            y = features - shift.float()
            norm = y.square().sum(1)
            return norm @ y, norm.square().sum()

        cubic = ops.norm_moments(features, shift).cubic
        row(
            "norm_moments",
            {"N": samples, "D": dim},
            lambda: ops.norm_moments(features, shift, validate=False),
            torch_norm_moments,
            features.nbytes,
            0.0,
            0.0,
            relative_error(torch_norm_moments()[0], cubic),
        )
    features = torch.randn(4000, 32768, device="cuda") + 1
    centred = features.double() - features.double().mean(0)
    reference = centred @ centred.T

    def torch_sample_gram() -> Tensor:
        y = features - features.mean(0)
        return y @ y.T

    row(
        "sample_gram",
        {"N": 4000, "D": 32768},
        lambda: ops.sample_gram(features, validate=False),
        torch_sample_gram,
        2 * features.nbytes,
        4000.0**2 * 32768,
        relative_error(ops.sample_gram(features).gram, reference),
        relative_error(torch_sample_gram(), reference),
    )

    features = torch.randn(100_000, 1024, device="cuda")
    labels = torch.randint(100, (100_000,), device="cuda")
    scores = {
        f"regularized={regularized}": median_milliseconds(lambda r=regularized: h_score(features, labels, r), 10)  # type: ignore[misc]
        for regularized in (False, True)
    }
    steps = dict(line.split("=") for line in arguments.steps.read_text().split()) if arguments.steps else {}
    report = {
        "environment": environment() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda},
        "steps_exit_status": {name: int(code) for name, code in steps.items()},
        "copy_bytes_per_second": bandwidth,
        "matrix_operations_per_second": rates,
        "benchmarks": rows,
        "h_score_milliseconds": {"N=100000, D=1024, C=100": scores},
    }
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    target = arguments.output / f"gpu-{name}.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {target.name}")


if __name__ == "__main__":
    main()
