"""How much memory the Fisher information takes, each figure from a process of its own (its peak resident set, Linux).

    python bench/run.py bench/bench_fisher_memory.py

- The empirical diagonal of a transformer of 100 million parameters on 8 sequences of 256 tokens: the bar is the peak of
  the same model's forward and backward pass plus twice the parameters.
- The Gram matrix of 50 directions on the vision transformer of bench_fisher.py, exact and empirical, directions kept in
  float32 and in bfloat16: the bar is 2 GB for all of it, directions included. The exact one of 5, 10 and 25, too: its
  time is to grow with their number.

A process imports, builds the model and runs one sample first, and takes its peak from there: what the libraries take at
their first use counts for nobody.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

SEQUENCES, TOKENS = 8, 256


def in_a_process(case: str) -> tuple[float, float]:
    """MiB at the peak beyond what was there before the case, and seconds."""
    done = subprocess.run([sys.executable, __file__, case], capture_output=True, text=True, check=True)
    megabytes, seconds = done.stdout.split()[-2:]
    return float(megabytes), float(seconds)


def record(
    benchmark: Any, ours: str, floor: str, sizes: dict[str, int], bar_megabytes: Callable[[float], float]
) -> None:
    """One row: our process beside the forward and backward pass in its own."""
    megabytes, seconds = {}, {}
    for name, case in (("ours", ours), ("forward + backward", floor)):
        megabytes[name], seconds[name] = in_a_process(case)
    bar = bar_megabytes(megabytes["forward + backward"])
    benchmark.extra_info.update(
        sizes=sizes,
        threads=1,
        seconds=seconds,
        megabytes=megabytes,
        best_peer="forward + backward",
        times_faster=seconds["forward + backward"] / seconds["ours"],
        floor_seconds=seconds["forward + backward"],
        times_floor=seconds["ours"] / seconds["forward + backward"],
        values={"bar, MiB": bar, "of the bar": megabytes["ours"] / bar},
    )
    benchmark.pedantic(lambda: None, rounds=1)
    assert megabytes["ours"] <= bar


def test_diagonal_of_a_transformer(benchmark: Any) -> None:
    parameters = 100_612_864
    record(
        benchmark,
        "transformer diagonal",
        "transformer step",
        {"parameters": parameters, "sequences": SEQUENCES, "tokens": TOKENS},
        lambda step: step + 2 * 4 * parameters / 2**20,
    )


@pytest.mark.parametrize(
    ("estimator", "dtype", "directions"),
    [
        *(("exact", "float32", count) for count in (5, 10, 25, 50)),
        ("exact", "bfloat16", 50),
        ("empirical", "float32", 50),
        ("empirical", "bfloat16", 50),
    ],
)
def test_gram_of_many_directions(benchmark: Any, estimator: str, dtype: str, directions: int) -> None:
    sizes = {"samples": 32, "parameters": 3191050, "directions": directions}
    record(benchmark, f"vit {estimator} {dtype} {directions}", "vit step", sizes, lambda step: 2e9 / 2**20)


def transformer(width: int = 768, layers: int = 12, tokens: int = 20_000) -> Any:
    """A causal language model: embedding, pre-norm blocks with fused attention, a head of a few classes per token."""
    from bench_fisher import Encoder
    from torch import nn

    blocks = [Encoder(width, 12) for _ in range(layers)]
    return nn.Sequential(nn.Embedding(tokens, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 256))


def run(case: str) -> tuple[float, float]:
    """The case in this process."""
    import torch
    from bench_fisher import VisionTransformer
    from torch.nn import functional as F

    from transferops.fisher import FisherInformation

    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, *what = case.split()
    if kind == "transformer":
        model, vocabulary = transformer().eval(), 20_000
        inputs = torch.randint(vocabulary, (SEQUENCES, TOKENS))
        targets = torch.randint(256, (SEQUENCES, TOKENS))
    else:
        model = VisionTransformer().eval()
        inputs, targets = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    parameters = sum(p.numel() for p in model.parameters())
    print(parameters, "parameters")

    def step(samples: int | None = None) -> None:
        outputs = model(inputs[:samples])
        F.cross_entropy(outputs.flatten(0, -2), targets[:samples].flatten(), reduction="sum").backward()
        model.zero_grad(set_to_none=True)

    def fisher(samples: int | None = None) -> None:
        batches = [(inputs[:samples], targets[:samples])]
        if what == ["diagonal"]:
            FisherInformation(model, "empirical").diagonal(batches)
        else:
            FisherInformation(model, what[0]).gram(directions, batches)

    def draw(count: int) -> list[dict[str, Any]]:
        dtype = getattr(torch, what[1])
        return [{n: torch.randn(p.shape, dtype=dtype) for n, p in model.named_parameters()} for _ in range(count)]

    call, many = step if what == ["step"] else fisher, what[2:]
    directions = draw(1) if many else []
    call(1)
    before = resident()
    directions = draw(int(many[0])) if many else []
    start = time.perf_counter()
    call()
    return peak() - before, time.perf_counter() - start


def resident() -> float:
    """MiB now; the model, its parameters and the libraries."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:")) / 1024


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(*run(" ".join(sys.argv[1:])))
