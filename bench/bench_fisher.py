"""Fisher information of three networks against a plain training step's forward and backward pass, and torch.func.

The floor of every row is that forward and backward pass, with weight gradients, on the same batch in the same run.
The first peer is the per-sample gradient by torch.func, vmap(grad(functional_call)), a chunk of samples at a time (the
best of the chunk sizes given); for the exact Gram matrix it is the K forward-mode derivatives under vmap. Then the
libraries of fisher_peers.py, as far as they are installed (fisher_peers.txt); one that gives a wrong value or leaves
parameters out is timed, but not the best peer.

Values: the relative error of the result against float64 per-sample gradients of the first samples.

    python bench/run.py bench/bench_fisher.py

spends most of its minutes in the peers on the convolutional network.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import fisher_peers
import pytest
import torch
from fisher_peers import Peer, Task
from harness import interleaved_minimum, peak_megabytes
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from transferops.fisher import FisherInformation, softmax_fisher_gram

FLOOR = "forward + backward"
CHECKED = 4  # samples for the error
DIRECTIONS = 5


class Block(nn.Module):
    """The basic block of a ResNet with GroupNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(32, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(32, outputs)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(32, outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    stages = [Block(a, b, s) for i, o, t in STAGES for a, b, s in ((i, o, t), (o, o, 1))]
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


STAGES = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))


class Encoder(nn.Module):
    """A pre-norm transformer block with fused attention."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


class VisionTransformer(nn.Module):
    """Patches of 4 x 4 from 32 x 32 images: 64 tokens of width 256, four blocks, learned positions, mean pooling."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*[Encoder(width) for _ in range(4)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    # name: model, shape of a batch, chunk sizes of the peer
    "mlp": (mlp, (256, 784), (16, 64)),
    "resnet18": (resnet18, (64, 3, 32, 32), (16,)),
    "vit": (VisionTransformer, (32, 3, 32, 32), (32,)),
}


class Problem:
    """A model, a batch, and the contenders on them."""

    def __init__(self, name: str) -> None:
        make, shape, self.chunks = MODELS[name]
        torch.manual_seed(0)
        self.model = make().eval()
        self.inputs, self.targets = torch.randn(shape), torch.randint(10, shape[:1])
        self.parameters = {n: p.detach() for n, p in self.model.named_parameters()}
        self.directions = [{n: torch.randn_like(p) for n, p in self.parameters.items()} for _ in range(DIRECTIONS)]
        self.sizes = {"samples": shape[0], "parameters": sum(p.numel() for p in self.parameters.values())}

    def task(self, samples: int | None = None) -> Task:
        return Task(self.model, self.inputs[:samples], self.targets[:samples], self.directions)

    def batches(self, samples: int | None = None) -> list[tuple[Tensor, Tensor]]:
        return [(self.inputs[:samples], self.targets[:samples])]

    def step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(self.inputs), self.targets, reduction="sum").backward()
        self.model.zero_grad(set_to_none=True)

    def per_sample(self, chunk: int, keep: Callable[[dict[str, Tensor]], None]) -> None:
        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.model, parameters, (x[None],)), y[None])

        gradients = vmap(grad(loss), in_dims=(None, 0, 0))
        with sdpa_kernel(SDPBackend.MATH):
            for x, y in zip(self.inputs.split(chunk), self.targets.split(chunk)):
                keep(gradients(self.parameters, x, y))

    def peer_diagonal(self, chunk: int) -> dict[str, Tensor]:
        total = {n: torch.zeros_like(p) for n, p in self.parameters.items()}

        def keep(gradients: dict[str, Tensor]) -> None:
            for n, g in gradients.items():
                total[n] += g.square().sum(0)

        self.per_sample(chunk, keep)
        return total

    def peer_gram(self, chunk: int) -> Tensor:
        theta = {n: torch.stack([d[n] for d in self.directions]).flatten(1) for n in self.parameters}
        total = torch.zeros(DIRECTIONS, DIRECTIONS)

        def keep(gradients: dict[str, Tensor]) -> None:
            scores = sum(g.flatten(1) @ theta[n].T for n, g in gradients.items())
            total.addmm_(scores.T, scores)

        self.per_sample(chunk, keep)
        return total

    def peer_exact_gram(self) -> Tensor:
        stacked = {n: torch.stack([d[n] for d in self.directions]) for n in self.parameters}

        def push(tangent: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            def run(p: dict[str, Tensor]) -> Tensor:
                return functional_call(self.model, p, (self.inputs,))

            return jvp(run, (self.parameters,), (tangent,))

        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            outputs, tangents = vmap(push)(stacked)
        return softmax_fisher_gram(outputs[0], tangents)

    def explicit(self) -> tuple[FisherInformation, list[tuple[Tensor, Tensor]], list[dict[str, Tensor]]]:
        """The per-sample loop in float64 on the first samples: chunk size 1, one sample per batch, by autograd."""
        model = copy.deepcopy(self.model).double()
        batches = [(self.inputs[n : n + 1].double(), self.targets[n : n + 1]) for n in range(CHECKED)]
        rows: list[dict[str, Tensor]] = []
        for x, y in batches:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            rows.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return FisherInformation(model), batches, rows


def record(
    benchmark: Any,
    ours: Callable[[], object],
    plain: dict[str, Callable[[], object]],
    libraries: dict[str, Peer],
    problem: Problem,
    check: Callable[[Any], tuple[float, int]],
    error: float,
) -> None:
    """One row: as harness.compare, the floor being a contender of its own.

    ``plain`` are the peers in plain torch; ``check`` is as :func:`fisher_peers.prepare` takes it.
    """
    prepared = fisher_peers.prepare(libraries, problem.task(), problem.task(CHECKED), check)
    peers = {**plain, **prepared.calls}
    contenders = {"ours": ours, FLOOR: problem.step, **peers, **prepared.others}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries' hooks
        seconds = interleaved_minimum(contenders, seconds=1.5, slow=2)
        megabytes = {name: peak_megabytes(call) for name, call in contenders.items()}
    best = min(peers, key=lambda name: seconds[name])
    benchmark.extra_info.update(
        sizes=problem.sizes,
        threads=torch.get_num_threads(),
        seconds=seconds,
        megabytes=megabytes,
        failed=prepared.failed,
        best_peer=best,
        times_faster=seconds[best] / seconds["ours"],
        floor_seconds=seconds[FLOOR],
        times_floor=seconds["ours"] / seconds[FLOOR],
        values={"relative error": error},
    )
    benchmark.pedantic(ours, rounds=1)


def gram_check(expected: Tensor) -> Callable[[Tensor], tuple[float, int]]:
    """Of Gram matrices summed over the first samples; parameters that do not count show in the error."""
    return lambda found: (float((found.double() / CHECKED - expected).norm() / expected.norm()), 0)


@pytest.mark.parametrize("name", MODELS)
def test_empirical_diagonal(benchmark: Any, name: str) -> None:
    problem = Problem(name)
    fisher = FisherInformation(problem.model, "empirical")
    _, _, rows = problem.explicit()
    expected = {n: sum(g[n] ** 2 for g in rows) / CHECKED for n in problem.parameters}

    def check(found: dict[str, Tensor]) -> tuple[float, int]:
        errors = [float((v / CHECKED - expected[n]).norm() / expected[n].norm()) for n, v in found.items()]
        return max(errors), len(expected) - len(found)

    error, _ = check({n: v * CHECKED for n, v in fisher.diagonal(problem.batches(CHECKED)).items()})
    plain = {f"torch.func, chunk {c}": (lambda c=c: problem.peer_diagonal(c)) for c in problem.chunks}
    record(benchmark, lambda: fisher.diagonal(problem.batches()), plain, fisher_peers.DIAGONAL, problem, check, error)


@pytest.mark.parametrize("name", MODELS)
def test_empirical_gram(benchmark: Any, name: str) -> None:
    problem = Problem(name)
    fisher = FisherInformation(problem.model, "empirical")
    _, _, rows = problem.explicit()
    scores = torch.tensor([[float(sum((g[n] * d[n]).sum() for n in g)) for d in problem.directions] for g in rows])
    check = gram_check((scores.T @ scores).double() / CHECKED)
    error, _ = check(fisher.gram(problem.directions, problem.batches(CHECKED)) * CHECKED)
    plain = {f"torch.func, chunk {c}": (lambda c=c: problem.peer_gram(c)) for c in problem.chunks}
    record(
        benchmark,
        lambda: fisher.gram(problem.directions, problem.batches()),
        plain,
        fisher_peers.EMPIRICAL_GRAM,
        problem,
        check,
        error,
    )


@pytest.mark.parametrize("name", MODELS)
def test_exact_gram(benchmark: Any, name: str) -> None:
    problem = Problem(name)
    fisher = FisherInformation(problem.model)
    reference, batches, _ = problem.explicit()
    check = gram_check(reference.gram([{n: v.double() for n, v in d.items()} for d in problem.directions], batches))
    error, _ = check(fisher.gram(problem.directions, problem.batches(CHECKED)) * CHECKED)
    plain = {"torch.func jvp under vmap": problem.peer_exact_gram}
    record(
        benchmark,
        lambda: fisher.gram(problem.directions, problem.batches()),
        plain,
        fisher_peers.EXACT_GRAM,
        problem,
        check,
        error,
    )
