"""Scores of a model in training, for the callbacks of any framework."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from transferops._validate import check_positive_int
from transferops.rank.extraction import HEAD_INPUT, extract
from transferops.scores import ScoreCollection, score_all
from transferops.scores.features import FeatureScore


class ModelScores:
    """Transferability scores of a model's features for labelled data, by the name they are logged under.

    Args:
        batches: labelled batches as :func:`transferops.rank.extract` takes them, read once for each call.
        scores: as for :class:`transferops.scores.ScoreCollection`.
        layer: whose output is scored; "head input", the features that the last layer is given, by default.
        head: name of that last layer, if it is not the last linear or convolutional layer to run.
        prefix: of the names.
        every: epochs from one measurement to the next.

    Raises:
        ValueError: a score is unknown, or ``every`` is not positive.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        scores: Iterable[str] | Mapping[str, FeatureScore],
        layer: str,
        head: str | None,
        prefix: str,
        every: int,
    ) -> None:
        self._batches = batches
        self._scores = scores if isinstance(scores, Mapping) else tuple(scores)
        ScoreCollection(self._scores)  # refuses unknown names now, not after the first epoch
        self._layer = layer
        self._head = head
        self._prefix = prefix
        self._every = check_positive_int("every", every)

    def due(self, epoch: int) -> bool:
        """Whether to measure after ``epoch``, counted from 0."""
        return (epoch + 1) % self._every == 0

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The scores of the model as it is."""
        found = extract(model, self._batches, layers=(self._layer,), head=self._head)
        values = score_all(found.features[self._layer], found.labels, self._scores)
        return {self._prefix + name: value for name, value in values.items()}


DEFAULT_SCORES = ("h_score", "log_me")
DEFAULT_LAYER = HEAD_INPUT
