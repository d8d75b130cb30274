"""Heads for a few labelled samples compared: adapted in closed form, as pretrained, and what else one would try."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transferops._validate import fail
from transferops.adapt.adapt_head import adapt_head
from transferops.adapt.head_layer import find_head, recording
from transferops.adapt.head_report import HeadReport
from transferops.adapt.head_solver import HeadSolver
from transferops.adapt.published import published_head
from transferops.fisher.batches import Batch
from transferops.fisher.modes import evaluation

ARMS = ("unadapted", "adapted", "ridge", "gradient", "pinv")
_BATCH = 512

Weights = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class FewShotResult:
    """One adaptation task.

    Attributes:
        accuracy: by arm, on the test samples.
        seconds: by arm, features given; those of "adapted" include taking the features.
        report: of the adapted head.
    """

    accuracy: dict[str, float]
    seconds: dict[str, float]
    report: HeadReport


def compare_heads(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    arms: Sequence[str] = ARMS,
    steps: int = 300,
    lr: float = 1e-3,
) -> FewShotResult:
    """Accuracy of each head on test samples, all on the same frozen features.

    Args:
        model: pretrained on the same classes, with a linear head.
        train: inputs and labels to adapt to.
        test: inputs and labels.
        arms: names in :data:`ARMS`: "unadapted" is the model as it is, "adapted" :func:`adapt_head`, "ridge" ridge
            regression without a prior, its penalty by leave-one-out, "gradient" full-batch Adam on the cross-entropy
            from the pretrained head, "pinv" the published pseudo-inverse.
        steps, lr: of "gradient".
    """
    for arm in arms:
        if arm not in ARMS:
            fail("arms", f"names among {', '.join(ARMS)}", repr(arm))
    features = head_inputs(model, train[0])
    test_features, test_labels = head_inputs(model, test[0]).double(), test[1]
    adapted: list[HeadReport] = []

    def adapt() -> Weights:
        changed, report = adapt_head(model, _batches(*train), keep_rows=None)
        adapted.append(report)
        return _head(changed, train[0])

    weight, bias = _head(model, train[0])

    def pinv() -> Weights:
        targets = F.one_hot(train[1], len(weight)).to(features) - 1 / len(weight)
        changed, offset = published_head(features, adapted[0].target_scale * targets, weight, bias)
        assert offset is not None
        return changed, offset

    solve: dict[str, Callable[[], Weights]] = {
        "unadapted": lambda: (weight, bias),
        "adapted": adapt,
        "ridge": lambda: HeadSolver(classes=len(weight), keep_rows=None).update(features, train[1]).solve(),
        "gradient": partial(_descend, weight, bias, features, train[1], steps, lr),
        "pinv": pinv,
    }
    accuracy, seconds = {}, {}
    for arm in ("adapted", *(arm for arm in arms if arm != "adapted")):
        start = time.perf_counter()
        w, b = solve[arm]()
        seconds[arm] = time.perf_counter() - start
        right = (test_features @ w.double().mT + b.double()).argmax(1) == test_labels
        accuracy[arm] = float(right.double().mean())
    return FewShotResult({arm: accuracy[arm] for arm in arms}, {arm: seconds[arm] for arm in arms}, adapted[0])


def pretrain(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    on_epoch: Callable[[float], None] | None = None,
) -> nn.Module:
    """Train a network on pooled source samples with Adam and cross-entropy, in place.

    Raises:
        RuntimeError: the loss is not finite.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        total = 0.0
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for index in order.tensor_split(math.ceil(len(labels) / batch_size)):
            loss = F.cross_entropy(model(inputs[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(loss.detach()) * len(index)
        if not math.isfinite(total):
            raise RuntimeError("the training diverged: its loss is not finite; a smaller learning rate may help")
        if on_epoch is not None:
            on_epoch(total / len(labels))
    return model.eval()


def head_inputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """What the last layer of a model sees, [N, p]."""
    found = find_head(model, Batch(0, inputs[:1], None, 1))
    parts = []
    with evaluation(model), torch.no_grad(), recording(found.module) as recorder:
        for block in torch.split(inputs, _BATCH):
            model(block)
            parts.append(found.rows(recorder.take(found.name)[0]))
    return torch.cat(parts)


def _head(model: nn.Module, inputs: Tensor) -> Weights:
    found = find_head(model, Batch(0, inputs[:1], None, 1))
    return found.weight, found.bias


def _batches(inputs: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(torch.split(inputs, _BATCH), torch.split(labels, _BATCH))


def _descend(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, steps: int, lr: float) -> Weights:
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(features @ weight.mT + bias, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return weight.detach(), bias.detach()
