"""What a training did and why: tables and pictures of one run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from transferops._atomic import replacing
from transferops._figures import save_figure
from transferops.otqms.akaike import akaike_shares
from transferops.otqms.allocation import allocate
from transferops.otqms.plots import figure, style
from transferops.otqms.records import EpochRecord, TrainingRun
from transferops.otqms.theory import target_only_risk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rule = Literal["quantity", "weight", "shares"]


@dataclass(frozen=True)
class SourceValue:
    """What one source is worth.

    Attributes:
        source: Its name.
        discrepancy: Its diagonal entry of A: how far it is from the target.
        predicted: Rise of the predicted risk when the source is left out, in nats; negative only where shares are
            not those of least risk (:func:`transferops.otqms.akaike.akaike_shares`).
        retrained: Rise of the kept validation loss when the training is repeated without the source, in nats;
            negative if the source harms. ``None`` if it was not repeated.
    """

    source: str
    discrepancy: float
    predicted: float
    retrained: float | None = None


@dataclass(frozen=True, eq=False)
class Report:
    """One training run, told.

    Attributes:
        run: The run.
        sources: The names of the sources, in the order of its Gram matrix.
        values: What each source is worth, the most helpful first; empty if no Gram matrix was computed.
        verdicts: In words, what the screening of the sources found (:func:`transferops.otqms.screening.screen`) and
            what the guard decided (:func:`transferops.otqms.guard.choose`); then why the target and
            each source have the share they have (:func:`transferops.otqms.akaike.explain_shares`), or which sources
            are of use (:func:`transferops.otqms.guard.judge_sources`). Empty without guard and Gram matrix.
    """

    run: TrainingRun
    sources: tuple[str, ...]
    values: tuple[SourceValue, ...]
    verdicts: tuple[str, ...] = ()

    def table(self) -> str:
        """Markdown: one row per epoch, then one per source."""
        run = self.run
        lines = [
            f"# {run.strategy}",
            "",
            f"Kept epoch {run.kept_epoch} of {len(run.epochs)}; {run.samples_per_epoch:.0f} samples per epoch; "
            f"{run.seconds:.2f} s, of which {run.allocation_seconds:.2f} s for decisions; "
            f"source models {run.source_model_seconds:.2f} s.",
            "",
            "| epoch | phase | samples | train loss | validation loss | accuracy | predicted risk | "
            + " | ".join(self.sources)
            + " |",
            "|" + "---|" * (7 + len(self.sources)),
        ]
        lines += [self._epoch_row(record) for record in run.epochs]
        if self.values:
            lines += ["", "| source | discrepancy | risk without it, predicted | loss without it, retrained |"]
            lines += ["|---|---|---|---|"]
            lines += [
                f"| {value.source} | {value.discrepancy:.3g} | {value.predicted:+.3g} | {_or_dash(value.retrained)} |"
                for value in self.values
            ]
        if self.verdicts:
            lines += ["", *(f"- {verdict}" for verdict in self.verdicts)]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write ``report.md`` and the pictures there are into a folder.

        Pictures: ``shares.png``, the share of the loss by epoch and source; ``risk.png``, predicted risk against
        the loss on validation samples or those watched; ``gram.png``, the last A as a heat map.

        Raises:
            ImportError: matplotlib is not installed.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        written = [place / "report.md"]
        with replacing(written[0]) as file:
            file.write(self.table().encode())
        drawings: list[tuple[str, Callable[[], Figure | None]]] = [
            ("shares.png", self._draw_shares),
            ("risk.png", self._draw_risk),
            ("gram.png", self._draw_gram),
        ]
        for name, draw in drawings:
            picture = draw()
            if picture is not None:
                save_figure(picture, place / name)
                written.append(place / name)
        return written

    def _epoch_row(self, record: EpochRecord) -> str:
        kept = "**" if record.epoch == self.run.kept_epoch else ""
        cells = [f"{kept}{record.epoch}{kept}", record.phase, str(record.samples), f"{record.train_loss:.4f}"]
        cells += [_or_dash(record.validation_loss), _or_dash(record.validation_accuracy)]
        cells.append(_or_dash(record.predicted_risk))
        for source in self.sources:
            share = record.shares.get(source, 0.0)
            cells.append(f"{record.quantities[source]} ({share:.0%})" if record.quantities[source] else "-")
        return "| " + " | ".join(cells) + " |"

    def _draw_shares(self) -> Figure | None:
        if not any(any(record.quantities.values()) for record in self.run.epochs):
            return None
        picture = figure(3.2)
        panel = picture.subplots()
        style(panel)
        epochs = [record.epoch for record in self.run.epochs]
        for source in self.sources:
            panel.plot(epochs, [100 * r.shares.get(source, 0.0) for r in self.run.epochs], ".-", label=source)
        target = [100 * (1 - sum(record.shares.values())) for record in self.run.epochs]
        panel.plot(epochs, target, ".--", color="black", label="target")
        panel.axvline(self.run.kept_epoch, color="grey", linewidth=0.8)
        panel.set_xlabel("epoch  (line: the kept one)")
        panel.set_ylabel("% of the loss")
        panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
        return picture

    def _draw_risk(self) -> Figure | None:
        both = [
            (r.epoch, r.predicted_risk, r.validation_loss)
            for r in self.run.epochs
            if r.predicted_risk is not None and r.validation_loss is not None
        ]
        if not both:
            return None
        picture = figure(3.2)
        panel = picture.subplots()
        style(panel)
        epochs, predicted, realised = zip(*both, strict=True)
        panel.plot(epochs, realised, ".-", label="loss on held-out samples")
        panel.plot(epochs, predicted, ".--", label="predicted risk (excess loss)")
        panel.set_xlabel("epoch")
        panel.set_ylabel("nats")
        panel.legend(frameon=False, fontsize=9)
        return picture

    def _draw_gram(self) -> Figure | None:
        if self.run.gram is None:
            return None
        picture = figure(5.0)
        panel = picture.subplots()
        image = panel.imshow(self.run.gram.numpy(), cmap="viridis")
        panel.set_xticks(range(len(self.sources)), self.sources, rotation=45, ha="right")
        panel.set_yticks(range(len(self.sources)), self.sources)
        panel.set_title("inner products of the sources' differences from the target (A)", loc="left", fontsize=10)
        picture.colorbar(image)
        return picture


def rule_of(run: TrainingRun) -> Rule:
    """How the run weighed its sources."""
    phases = {record.phase for record in run.epochs}
    return "shares" if "shares" in phases else "weight" if "weights" in phases else "quantity"


def leave_one_out(
    gram: torch.Tensor, target_samples: int, source_samples: Sequence[int], dimension: float, rule: Rule
) -> list[float]:
    """By how much the predicted risk rises without each source, in nats [derived].

    Args:
        gram: A, ``[K, K]``.
        target_samples: N0.
        source_samples: N_i.
        dimension: d.
        rule: "quantity" or "weight", see :func:`transferops.otqms.allocate`; "shares", see
            :func:`transferops.otqms.akaike.akaike_shares`.
    """
    matrix, available = gram.numpy(), np.array(source_samples, dtype=np.float64)

    def risk(kept: NDArray[np.int64]) -> float:
        if kept.size == 0:
            return float(target_only_risk(target_samples, dimension))
        problem = matrix[np.ix_(kept, kept)], target_samples, available[kept], dimension
        return akaike_shares(*problem).risk if rule == "shares" else allocate(*problem, mode=rule).risk

    everything = np.arange(len(available))
    full = risk(everything)
    rises = [risk(np.delete(everything, i)) - full for i in everything]
    return rises if rule == "shares" else [max(rise, 0.0) for rise in rises]


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
