"""What an adapted head is, in numbers, in words and as a picture."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from transferops.adapt.head_path import HeadPath
from transferops.adapt.head_plots import plot_path


@dataclass(frozen=True)
class ShiftBound:
    """The bound on the target residual before adaptation, from pairs of a source and a target sample [derived].

    rms(y~ - f(x~)) <= rms(y - f(x)) + rms(dy - J dx) + rms(f(x~) - f(x) - J dx); the last term is at most
    (H / 2) rms |dx|^2 for a curvature of at most H, and is measured here.

    Attributes:
        source: rms of y - f(x).
        first_order: rms of dy - J dx, J the model's derivative at x.
        remainder: rms of f(x~) - f(x) - J dx.
        curvature: largest 2 |f(x~) - f(x) - J dx| / |dx|^2 seen, the least H that covers the pairs.
        bound: the sum of the three.
        residual: rms of y~ - f(x~), what is bounded.
    """

    source: float
    first_order: float
    remainder: float
    curvature: float
    bound: float
    residual: float


@dataclass(frozen=True)
class HeadReport:
    """What :func:`transferops.adapt.adapt_head` did. Losses are mean squared residuals, summed over outputs.

    With labels as targets they are squared distances from outputs that are right by a margin of ``target_scale``, in
    units of that; where not all samples are kept as rows, or a sample has several positions, those of one-hot targets,
    the outputs divided by ``target_scale``.

    Attributes:
        layer: the adapted layer's path in the model.
        samples: target samples.
        positions: rows of the least-squares problem per sample.
        features, outputs: p and c.
        lam: the penalty.
        prior_share: the penalty is on the distance to this share of the pretrained head: 1, 1/2 or 0.
        chosen_by: how the penalty was chosen.
        target_scale: the margin, or factor of one-hot targets; 1 for targets that are numbers.
        loss_before, loss_after: on the samples at hand.
        held_out_before: of the pretrained head, which was fitted to none of the samples; the same as loss_before.
        held_out_after: on samples left out, the bias refitted too; NaN if it was not measured.
        accuracy_before, accuracy_after: share of right labels, of the pretrained head and on samples left out; NaN if
            targets are not labels, or samples have several positions.
        captured: 1 - loss_after / loss_before, the share of the residual that the new head takes up.
        degrees_of_freedom: effective, per output; the bias is counted where it is penalised.
        condition: of the system that was solved; infinite for lam = 0 without full rank.
        relative_change: |dW|_F / |W|_F.
        change: |dW|_F, dW being the change that the penalty is on.
        change_bound: |Q|_F / (2 sqrt lam), Q the residuals of the share of the prior, about their mean where the bias
            is free [derived].
        shift_bound: in "perturb" mode.
        path: what every penalty around that share gives; its losses are residuals from the targets.
    """

    layer: str
    samples: int
    positions: int
    features: int
    outputs: int
    lam: float
    prior_share: float
    chosen_by: str
    target_scale: float
    loss_before: float
    loss_after: float
    held_out_before: float
    held_out_after: float
    accuracy_before: float
    accuracy_after: float
    captured: float
    degrees_of_freedom: float
    condition: float
    relative_change: float
    change: float
    change_bound: float
    shift_bound: ShiftBound | None
    path: HeadPath = field(repr=False)

    def __str__(self) -> str:
        prior = {1.0: "the pretrained head", 0.0: "0 (the pretrained head does not help)"}.get(
            self.prior_share, f"{self.prior_share:g} times the pretrained head"
        )
        if math.isinf(self.lam):
            penalty = {1.0: "the pretrained head is kept as it is", 0.0: "nothing but the bias helps"}.get(
                self.prior_share, f"{prior} is best"
            )
            penalty += f", by {self.chosen_by}"
        else:
            penalty = f"lam = {self.lam:.3g}, chosen by {self.chosen_by}, around {prior}"
        rows = f"{self.samples} samples" + (f" x {self.positions} positions" if self.positions > 1 else "")
        lines = [
            f"{self.layer or 'model'}: {self.features} features, {self.outputs} outputs, {rows}",
            penalty,
            f"held-out loss {self.held_out_before:.4g} -> {self.held_out_after:.4g}, "
            f"on the samples at hand {self.loss_before:.4g} -> {self.loss_after:.4g} ({self.captured:.0%} captured)",
            f"{self.degrees_of_freedom:.1f} degrees of freedom per output, condition number {self.condition:.3g}",
            f"|dW|/|W| = {self.relative_change:.3g}; |dW| = {self.change:.3g}, at most {self.change_bound:.3g}",
        ]
        if not math.isnan(self.accuracy_after):
            lines.insert(2, f"held-out accuracy {self.accuracy_before:.1%} -> {self.accuracy_after:.1%}")
        if self.shift_bound is not None:
            bound = self.shift_bound
            lines.append(
                f"residual {bound.residual:.4g} <= {bound.bound:.4g} = source {bound.source:.4g} + first order "
                f"{bound.first_order:.4g} + remainder {bound.remainder:.4g}"
            )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The report without its path; numbers that are not finite become None, fit for JSON."""

        def plain(value: Any) -> Any:
            if isinstance(value, ShiftBound):
                return {name: plain(number) for name, number in vars(value).items()}
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name != "path"}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw losses and degrees of freedom over the penalty into a PNG."""
        plot_path(self.path, self.lam, self.loss_before if self.prior_share == 1 else None, path)
