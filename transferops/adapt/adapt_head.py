"""Adapt a model to new data through its last layer, in closed form."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from transferops._validate import check_positive_int, describe, fail
from transferops.adapt.head_choice import Choice, choose
from transferops.adapt.head_layer import Head, find_head, recording
from transferops.adapt.head_report import HeadReport, ShiftBound
from transferops.adapt.head_solver import HeadSolver
from transferops.fisher.batches import Batch
from transferops.fisher.modes import evaluation, function_transforms


def adapt_head(
    model: nn.Module,
    batches: Iterable[Any],
    head: str | None = None,
    *,
    lam: float | None = None,
    mode: str = "exact",
    folds: int = 5,
    keep_rows: int | None = 4096,
    target_scale: float | str = "auto",
) -> tuple[nn.Module, HeadReport]:
    """Replace the last linear or convolutional layer by the best one for new data, near the one it had.

    Layer variational analysis (arXiv 2302.01798) in its ridge form [derived]. The layer's input is captured in
    evaluation mode, batch by batch, and folded into the sums of a :class:`HeadSolver`; neither inputs nor features are
    kept beyond what that class says. The penalty is chosen on samples left out: leave-one-out for one row per sample;
    where a sample has several rows (the positions of a convolution or a sequence), cross-validation with whole samples
    in the folds, since leaving out one position of an image would leave out nothing. The head as it was is among the
    candidates, and so is ridge regression towards 0, for pretrained heads that do not help.

    With labels, as long as all samples fit into ``keep_rows``, the targets are not one-hot but the nearest outputs that
    are right by a margin of ``target_scale``, so that a sample that the head gets right by far asks for no change; the
    bias is penalised too; and half of the pretrained head is a third candidate to stay near to [derived].

    Args:
        model: as it is; it is not changed.
        batches: what a data loader yields: (inputs, targets), targets in the shape of the outputs, or integer labels;
            or a mapping with targets as "labels". In "perturb" mode (source inputs, source targets, inputs, targets),
            pair by pair, numbers as targets.
        head: path of the layer in the model; found by running the first batch if left out.
        lam: the penalty around the pretrained head, in units of the sum of squares; chosen if left out. 0 is the
            nearest least-squares head.
        mode: "exact" fits the targets; "perturb" fits y~ to first order [paper]: the model's output at the target
            input is replaced by f(x) + J dx, with dx the difference of a pair and J dx from one forward-mode
            derivative. For comparison: with target inputs at hand "exact" needs no pairs and no approximation.
        folds: for the cross-validation, dealt to samples in turn.
        keep_rows, target_scale: of the :class:`HeadSolver`.

    Returns:
        A copy of the model with the adapted layer (its bias added if it had none), and a :class:`HeadReport`.

    Raises:
        TypeError, ValueError: an argument is not as described; the model's outputs are not those of a linear or
            convolutional layer; there are no samples, or too few to choose a penalty.
    """
    if mode not in ("exact", "perturb"):
        fail("mode", "'exact' or 'perturb'", describe(mode))
    check_positive_int("folds", folds, minimum=2)
    if lam is not None and (isinstance(lam, (bool, str)) or not lam >= 0):
        fail("lam", "a number of at least 0", describe(lam))
    adapted = copy.deepcopy(model)
    collected = _Collected(adapted, head, mode, folds, {"keep_rows": keep_rows, "target_scale": target_scale})
    for index, batch in enumerate(batches):
        collected.add(index, batch)
    if collected.layer is None:
        fail("batches", "at least one batch", "none")
    solvers = [solver for solver in collected.solvers if solver.samples]
    if len(solvers) == 1 and collected.layer.positions > 1 and lam is None:
        fail("batches", "at least two samples, to leave one out", f"{collected.samples}")
    choice = choose(solvers, lam)
    report = _report(collected, collected.layer, choice)
    if not choice.keeps_prior:
        collected.layer.set(choice.weight, choice.bias)
    return adapted, report


class _Collected:
    """Sums over batches, in one solver or one per fold."""

    def __init__(self, model: nn.Module, name: str | None, mode: str, folds: int, options: dict[str, Any]) -> None:
        self.model, self.name, self.mode, self.folds, self.options = model, name, mode, folds, options
        self.layer: Head | None = None
        self.solvers: list[HeadSolver] = []
        self.samples = 0
        self.squares = torch.zeros(4, dtype=torch.float64)
        self.curvature = 0.0
        first = next(model.parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device

    def add(self, index: int, raw: Any) -> None:
        pairs = None
        if self.mode == "perturb":
            if not isinstance(raw, (tuple, list)) or len(raw) != 4 or not all(isinstance(v, Tensor) for v in raw):
                expected = "four tensors: source inputs, source targets, inputs, targets"
                fail(f"batches[{index}]", expected, describe(raw), TypeError)
            source, source_targets, inputs, targets = raw
            if source.shape != inputs.shape or source_targets.shape != targets.shape:
                fail(f"batches[{index}]", "pairs of equal shapes", f"{list(source.shape)} and {list(inputs.shape)}")
            if not (targets.is_floating_point() and source_targets.is_floating_point()):
                fail(f"batches[{index}]", "numbers as targets in 'perturb' mode", describe(targets), TypeError)
            pairs = Batch.parse(index, (source, source_targets), self.device)
            raw = (inputs, targets)
        batch = Batch.parse(index, raw, self.device)
        if self.layer is None:
            self.layer = find_head(self.model, batch, self.name)
            count = self.folds if self.layer.positions > 1 else 1
            self.solvers = [HeadSolver(self.layer.weight, self.layer.bias, **self.options) for _ in range(count)]
        layer = self.layer
        with evaluation(self.model), torch.no_grad(), recording(layer.module) as recorder:
            outputs = batch.run(self.model)
            layer_inputs, layer_outputs = recorder.take(layer.name)
        features = layer.rows(layer_inputs)
        rows = layer.targets(batch.targets, layer_outputs)
        if pairs is not None:
            rows = rows.double() + layer.targets(self._correction(pairs, batch, outputs), layer_outputs).double()
        self._update(features, rows, batch.samples)

    def _update(self, features: Tensor, targets: Tensor, samples: int) -> None:
        if len(self.solvers) == 1:
            self.solvers[0].update(features, targets)
        else:
            fold = (self.samples + torch.arange(samples, device=features.device)) % len(self.solvers)
            fold = fold.repeat_interleave(len(features) // samples)
            for number, solver in enumerate(self.solvers):
                solver.update(features[fold == number], targets[fold == number])
        self.samples += samples

    def _correction(self, pairs: Batch, batch: Batch, outputs: Tensor) -> Tensor:
        """f(x~) - f(x) - J dx, which turns targets into those of which the first-order residual is left."""
        source, target = pairs.inputs, batch.inputs
        assert isinstance(source, Tensor)
        assert isinstance(target, Tensor)
        with evaluation(self.model), function_transforms(gradients=False):
            derivative: tuple[Any, ...] = jvp(lambda x: self.model(x), (source,), (target - source,))
        before, moved = derivative
        remainder: Tensor = outputs - before - moved
        y, y_target = pairs.targets.reshape(outputs.shape), batch.targets.reshape(outputs.shape)
        for position, values in enumerate((y - before, y_target - y - moved, remainder, y_target - outputs)):
            self.squares[position] += values.double().square().sum().cpu()
        distance = (target - source).double().flatten(1).square().sum(1)
        size = remainder.double().flatten(1).square().sum(1).sqrt()
        if bool((distance > 0).any()):
            self.curvature = max(self.curvature, float((2 * size / distance)[distance > 0].max()))
        return remainder

    def shift_bound(self) -> ShiftBound | None:
        if self.mode != "perturb":
            return None
        source, first, remainder, residual = (self.squares / self.samples).sqrt().tolist()
        return ShiftBound(source, first, remainder, self.curvature, source + first + remainder, residual)


def _report(collected: _Collected, layer: Head, choice: Choice) -> HeadReport:
    spectrum, lam = choice.path.spectrum, choice.lam
    s = spectrum.eigenvalues
    full = len(s) == len(spectrum.feature_mean)
    largest, smallest = (float(s[0]), float(s[-1]) if full else 0.0) if len(s) else (0.0, 0.0)
    change = float(torch.linalg.vector_norm(spectrum.change(lam)))
    total = 0.0 if choice.keeps_prior else float(torch.linalg.vector_norm(choice.weight - layer.weight.double()))
    size = float(torch.linalg.vector_norm(layer.weight.double()))
    residual = float(spectrum.residual_square.sum()) ** 0.5
    return HeadReport(
        layer=layer.name,
        samples=collected.samples,
        positions=layer.positions,
        features=layer.weight.shape[1],
        outputs=len(layer.weight),
        lam=lam,
        prior_share=choice.prior_share,
        chosen_by=choice.reason,
        target_scale=choice.path.target_scale,
        loss_before=choice.before,
        loss_after=choice.after,
        held_out_before=choice.before,
        held_out_after=choice.held_out,
        accuracy_before=choice.accuracy_before,
        accuracy_after=choice.accuracy,
        captured=1 - choice.after / choice.before if choice.before > 0 else 0.0,
        degrees_of_freedom=float((s * spectrum.shrinkage(lam)[:, 0]).sum()),
        condition=_condition(largest, smallest, lam),
        relative_change=total / size if size > 0 else math.inf if total else 0.0,
        change=change,
        change_bound=residual / (2 * math.sqrt(lam)) if lam > 0 else math.inf,
        shift_bound=collected.shift_bound(),
        path=choice.path,
    )


def _condition(largest: float, smallest: float, lam: float) -> float:
    if math.isinf(lam):
        return 1.0
    return (largest + lam) / (smallest + lam) if smallest + lam > 0 else math.inf
