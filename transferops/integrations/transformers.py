"""Transferability scores in the log of Hugging Face's ``Trainer``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transferops.integrations._scoring import DEFAULT_LAYER, DEFAULT_SCORES, ModelScores
from transferops.scores.features import FeatureScore

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "transferops.integrations.transformers needs transformers: pip install transformers accelerate"
    ) from error

__all__ = ["ScoreCallback"]


class ScoreCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Adds transferability scores of labelled data to ``trainer.state.log_history`` after every epoch.

    The model is called in evaluation mode and without gradients. Loggers that ``report_to`` names do not see the
    scores, a callback having no access to them.

    Args:
        batches: labelled batches, such as a loader: mappings of the model's arguments with "labels", or pairs.
        scores: names from :data:`transferops.scores.SCORES` that take features, or named scores with options.
        layer: name of the submodule whose output is scored; by default the input of the last layer.
        head: name of that last layer, if it is not the last linear or convolutional layer to run.
        prefix: of the logged names: "transfer_h_score".
        every: epochs from one measurement to the next.

    Raises:
        ValueError: a score is unknown, or ``every`` is not positive. During training, as
            :func:`transferops.rank.extract`.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        scores: Iterable[str] | Mapping[str, FeatureScore] = DEFAULT_SCORES,
        *,
        layer: str = DEFAULT_LAYER,
        head: str | None = None,
        prefix: str = "transfer_",
        every: int = 1,
    ) -> None:
        self._measure = ModelScores(batches, scores, layer, head, prefix, every)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure and note."""
        if self._measure.due(round(state.epoch or 0) - 1):
            when: dict[str, Any] = {"epoch": state.epoch, "step": state.global_step}
            state.log_history.append(self._measure(kwargs["model"]) | when)
