"""GPU benchmarks: CUDA events, median, inputs several times the L2, random data. Called by bench/gpu.sh.

    python bench/gpu.py --output DIRECTORY              measure, a row at a time, into DIRECTORY/gpu-NAME.json
    python bench/gpu.py --output DIRECTORY --steps FILE add the exit statuses of other steps to that file
    python bench/gpu.py --dry-run                       the whole flow with small sizes on the CPU, written nowhere: no
                                                        figure of it means anything
    python bench/gpu.py --plan                          the table of docs/gpu.md: floors and predictions for an H200

The cases of gpu_cases.py stand against torch in the same run, and against their floor: bytes over the measured copy
bandwidth or operations over the measured matrix rate, the larger. Errors are relative, in the Frobenius norm, to
float64 on the same device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_cases import Case, all_cases
from gpu_models import vision_transformer_calls
from run import environment

from transferops import ops
from transferops.scores import h_score

SECONDS = 1.0  # for the repeats of a call
DATASHEET_COPY = 4.3e12  # bytes per second, measured elsewhere
# Operations per second that the kernels' comments expect: of mma.sync, or of L2 where that is less.
EXPECTED_RATES = {
    "float64": 67e12,
    "float32": 110e12,
    "bfloat16": 350e12,
    "bfloat16 in wide tiles": 470e12,  # of 128 x 256
    "bfloat16 with directions": 240e12,  # tiles of 128 x 64
    "gram of 8 bytes": 90e12,
    "gram of 4 bytes": 235e12,
    "gram of 2 bytes": 470e12,
}


@dataclass(frozen=True)
class Meter:
    """Times calls and counts their memory on a device."""

    device: str

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def milliseconds(self, call: Callable[[], object]) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def median(self, call: Callable[[], object]) -> float:
        """Milliseconds over 5 to 30 repeats, fewer of a slow call, after two that warm up."""
        call()
        once = self.milliseconds(call)
        repeats = max(5, min(30, int(SECONDS * 1e3 / max(once, 1e-3)))) if self.on_gpu else 1
        times = sorted(self.milliseconds(call) for _ in range(repeats))
        return times[len(times) // 2]

    def peak_mebibytes(self, call: Callable[[], object]) -> float | None:
        """Most device memory allocated during a call, beyond what was allocated before it."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def copy_bandwidth(self, elements: int) -> float:
        """Bytes per second of a large copy on the device, read and written counted."""
        source = torch.randn(elements, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.median(lambda: target.copy_(source)) * 1e3

    def matrix_rate(self, dtype: torch.dtype, size: int, tf32: bool = False) -> float:
        """Operations per second of a square product."""
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            return 2 * size**3 / self.median(lambda: left @ right) * 1e3
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


def measure(case: Case, meter: Meter, bandwidth: float, rates: dict[str, float]) -> dict[str, Any]:
    """One row of the report."""
    reference = case.reference()
    errors = {
        name: float((call().double() - reference).norm() / reference.norm())
        for name, call in (("ours", case.ours), ("torch", case.theirs))
    }
    del reference
    ours, theirs = meter.median(case.ours), meter.median(case.theirs)
    floor = max(case.bytes_moved / bandwidth, case.operations / rates[case.rate]) * 1e3
    return {
        "name": case.name,
        "sizes": case.sizes,
        "milliseconds": {"ours": ours, "torch": theirs},
        "times_faster": theirs / ours,
        "floor_milliseconds": floor,
        "times_floor": ours / floor,
        "predicted_milliseconds": predicted_milliseconds(case),
        "error": errors,
        "mebibytes": {"ours": meter.peak_mebibytes(case.ours), "torch": meter.peak_mebibytes(case.theirs)},
    }


def predicted_milliseconds(case: Case) -> float:
    """On an H200, by bytes or by the operations of our route at the expected rate."""
    rate = EXPECTED_RATES[case.expected_rate or case.rate]
    operations = case.operations if case.done is None else case.done
    return (case.bytes_before / DATASHEET_COPY + max(case.bytes_moved / DATASHEET_COPY, operations / rate)) * 1e3


def plan() -> str:
    """A Markdown table of all cases, for which no tensor is filled."""
    lines = ["| case | sizes | MB | GFLOP | predicted ms | bound by |", "|---|---|---:|---:|---:|---|"]
    for make in all_cases():
        with torch.device("meta"):
            case = make()
            sizes = " ".join(f"{name}={size}" for name, size in case.sizes.items())
            operations = case.operations if case.done is None else case.done
            predicted = predicted_milliseconds(case)
            bound = "memory" if predicted <= case.bytes_moved / DATASHEET_COPY * 1e3 else "arithmetic"
            lines.append(
                f"| {case.name} | {sizes} | {case.bytes_moved / 1e6:,.0f} | {operations / 1e9:,.0f} "
                f"| {predicted:.3g} | {bound} |"
            )
    return "\n".join(lines)


def graph_milliseconds(meter: Meter) -> dict[str, float]:
    """Small Fisher steps called and replayed from a CUDA graph: launches that nothing waits for can be captured."""
    with torch.device(meter.device):
        inputs, outputs = torch.randn(32, 64, 256), torch.randn(32, 64, 256)
        directions = torch.randn(5, 256, 256)
        logits, tangents = torch.randn(256, 100), torch.randn(5, 256, 100)

    def step() -> list[torch.Tensor]:
        return [
            ops.linear_fisher_diagonal(inputs, outputs),
            ops.linear_fisher_projection(inputs, outputs, directions),
            ops.softmax_fisher_gram(logits, tangents),
        ]

    called = {"called": meter.median(step)}
    if not meter.on_gpu:
        return called
    want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    if not all(torch.equal(x, y) for x, y in zip(want, found)):
        raise RuntimeError("a replayed CUDA graph gives other results than the calls")
    return called | {"replayed": meter.median(graph.replay)}


def h_score_milliseconds(meter: Meter, samples: int, dim: int, classes: int) -> dict[str, float]:
    features = torch.randn(samples, dim, device=meter.device)
    labels = torch.randint(classes, (samples,), device=meter.device)
    return {
        "plain": meter.median(lambda: h_score(features, labels)),
        "regularized": meter.median(lambda: h_score(features, labels, True)),
    }


def model_rows(meter: Meter, dry: bool) -> dict[str, Any]:
    with torch.device(meter.device):
        calls = vision_transformer_calls(meter.device, dry)
    rows = {}
    for name, call in calls.items():
        rows[name] = {"milliseconds": meter.median(call), "mebibytes": meter.peak_mebibytes(call)}
        print(json.dumps({name: rows[name]}), flush=True)
    return rows


Record = Callable[[dict[str, Any]], None]


def measure_all(dry: bool, record: Record, late: Callable[[], bool]) -> None:
    """Hands the report to ``record`` after every measurement; what is ``late`` is left out and named."""
    meter = Meter("cpu" if dry else "cuda")

    def cut(size: int) -> int:
        return min(size, 40) if dry else size

    torch.manual_seed(0)
    bandwidth = meter.copy_bandwidth(1 << (10 if dry else 30))
    dtypes = {"float64": torch.float64, "float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
    rates = {name: meter.matrix_rate(dtype, 64 if dry else 8192, tf32=name == "tf32") for name, dtype in dtypes.items()}
    report: dict[str, Any] = {
        "environment": environment() | {"gpu": gpu_name(), "cuda": torch.version.cuda},
        "copy_bytes_per_second": bandwidth,
        "matrix_operations_per_second": rates,
        "benchmarks": [],
        "left_out": [],
    }
    others: dict[str, Callable[[], Any]] = {
        "ViT-B/16, 64 images, bfloat16": lambda: model_rows(meter, dry),
        "small Fisher steps, milliseconds": lambda: graph_milliseconds(meter),
        "h_score_milliseconds N=100000 D=1024 C=100": lambda: h_score_milliseconds(
            meter, 400 if dry else 100_000, 30 if dry else 1024, 100
        ),
    }
    for name, rows in others.items():
        if late():
            report["left_out"].append(name)
        else:
            report[name] = rows()
        record(report)
    for make in all_cases(cut):
        if late():
            with torch.device("meta"):
                case = make()
            report["left_out"].append(f"{case.name} {case.sizes}")
            continue
        with torch.device(meter.device):
            case = make()
        report["benchmarks"].append(measure(case, meter, bandwidth, rates))
        print(json.dumps(report["benchmarks"][-1]), flush=True)
        record(report)
        del case
        if meter.on_gpu:
            torch.cuda.empty_cache()
    record(report)


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def report_file(directory: Path) -> Path:
    return directory / f"gpu-{gpu_name().lower().replace(' ', '-')}.json"


def write(file: Path, report: dict[str, Any]) -> None:
    """Complete or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="directory of the JSON")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no measurement later than this")
    parser.add_argument("--steps", type=Path, help="file of name=exit status lines, added to the JSON that is there")
    parser.add_argument("--dry-run", action="store_true", help="small sizes on the CPU, nothing written")
    parser.add_argument("--plan", action="store_true", help="print floors and predictions and leave")
    arguments = parser.parse_args()
    if arguments.plan:
        print(plan())
        return
    end = time.monotonic() + arguments.seconds
    if arguments.dry_run:
        measure_all(True, lambda report: None, lambda: time.monotonic() > end)
        print("dry run: complete", file=sys.stderr)
        return
    if arguments.output is None:
        parser.error("needs --output")
    file = report_file(arguments.output)
    if arguments.steps:
        statuses = dict(line.split("=") for line in arguments.steps.read_text().split())
        report = json.loads(file.read_text()) if file.exists() else {}
        write(file, report | {"steps_exit_status": {name: int(code) for name, code in statuses.items()}})
        return
    if not torch.cuda.is_available():
        parser.error(f"needs a CUDA device; torch {torch.__version__} finds none")
    file.unlink(missing_ok=True)  # of another commit, perhaps
    measure_all(False, lambda report: write(file, report), lambda: time.monotonic() > end)
    print(f"written: {file.name}")


if __name__ == "__main__":
    main()
