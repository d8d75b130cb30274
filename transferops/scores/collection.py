"""Several scores over one pass: what they keep is kept once, what they compute in common is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Self

from transferops._validate import describe, fail
from transferops.scores.base import Score
from transferops.scores.features import FeatureScore, feature_collection, feature_set
from transferops.scores.moments import MomentsAccumulator
from transferops.scores.registry import SCORES
from transferops.scores.rows import Rows


class ScoreCollection:
    """Feature scores that share one collection of the samples, and the moments and Gram matrix made of it.

    Rows are kept only if one of the scores needs them; otherwise the memory is that of the moments, D x D.

    Args:
        scores: names from :data:`transferops.scores.SCORES` that take features, or scores with options of your own,
            by any name: ``{"h_score": HScore(), "regularized": HScore(regularized=True)}``. Default: every one that
            needs no further package.

    Raises:
        ValueError: a name is unknown or its score does not take features.

    Example:
        >>> scores = ScoreCollection(["h_score", "log_me"])
        >>> for features, labels in batches:
        ...     scores.update(features, labels)
        >>> scores.compute()
    """

    def __init__(self, scores: Iterable[str] | Mapping[str, FeatureScore] | None = None) -> None:
        if scores is None:
            scores = [name for name, cls in SCORES.items() if cls.takes == "features" and cls.requires is None]
        if not isinstance(scores, Mapping):
            scores = {name: _by_name(name) for name in scores}
        for name, score in scores.items():
            if not isinstance(score, FeatureScore) or score.keeps_targets:
                fail("scores", "scores of features and class labels", f"{name}: {describe(score)}")
            if score.samples:
                fail("scores", "scores that have seen no samples", f"{name} with {score.samples}")
        if not scores:
            fail("scores", "at least one score", "none")
        self._scores = dict(scores)
        self._norms = any(score.needs_norms for score in self._scores.values())
        self.reset()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the scores, in the order in which they were given."""
        return tuple(self._scores)

    @property
    def samples(self) -> int:
        """Samples seen so far."""
        return self._data.samples

    def update(self, features: Tensor | Any, labels: Tensor | Any) -> Self:
        """Add a batch: features [N, D], labels [N] integers. A batch that is refused changes nothing."""
        self._data.update(features, labels)
        return self

    def merge(self, other: ScoreCollection) -> Self:
        """Add all that ``other``, a collection of the same scores, has seen; ``other`` is left as it is.

        Raises:
            ValueError: ``other`` has other scores or options.
        """
        if not isinstance(other, ScoreCollection) or other._signature() != self._signature():
            fail("other", f"a ScoreCollection of {', '.join(self.names)} with the same options", describe(other))
        self._data.merge(other._data)  # type: ignore[arg-type]
        return self

    def compute(self) -> dict[str, float]:
        """Every score of all samples seen so far, with the warnings of each."""
        values = {}
        for name, details in self.details().items():
            values[name] = Score._report(details, stacklevel=3)
        return values

    def details(self) -> dict[str, Any]:
        """Every score and what it rests on. Issues no warning.

        Raises:
            ValueError: no sample has been seen.
        """
        if self.samples == 0:
            fail("features", "at least one sample before the scores are computed", "none")
        view = feature_set(self._data, norms=self._norms)
        return {name: score._evaluate(view) for name, score in self._scores.items()}

    def reset(self) -> None:
        """Forget all samples."""
        self._data = self._collection()

    def state_dict(self) -> dict[str, Any]:
        """All that was seen, as for one score."""
        return {"scores": self._signature(), "data": self._data.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace what was seen by what a collection of the same scores returned.

        Raises:
            ValueError: it is of other scores or options.
        """
        if not isinstance(state, dict) or state.get("scores") != self._signature():
            fail(
                "state", f"that of a ScoreCollection of {', '.join(self.names)} with the same options", describe(state)
            )
        data = self._collection()
        data.load_state_dict(state["data"])
        self._data = data

    def all_reduce(self, group: Any = None) -> Self:
        """Give every process of a torch.distributed group all that any of them has seen."""
        self._data.all_reduce(group)
        return self

    def _collection(self) -> Rows | MomentsAccumulator:
        rows = any(score.keeps_rows for score in self._scores.values())
        return feature_collection(rows=rows, norms=self._norms)

    def _signature(self) -> dict[str, Any]:
        return {name: [score.name, score._options()] for name, score in self._scores.items()}


def score_all(
    features: Tensor | Any, labels: Tensor | Any, names: Iterable[str] | Mapping[str, FeatureScore] | None = None
) -> dict[str, float]:
    """Several scores of features for labels, at little more than the cost of the slowest.

    Args:
        features: [N, D] float32, float64, float16 or bfloat16.
        labels: [N] integers of any values.
        names: as ``scores`` of :class:`ScoreCollection`.

    Returns:
        The scores by name; higher means more transferable for each, but scores of different names do not compare.

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: a name is unknown, shapes or devices disagree, no samples, or a feature is NaN or infinite.
    """
    collection = ScoreCollection(names)
    collection._data.update(features, labels, copy=False)
    values = {}
    for name, details in collection.details().items():
        values[name] = Score._report(details, stacklevel=3)
    return values


def _by_name(name: str) -> Any:
    if name not in SCORES or SCORES[name].takes != "features":
        known = ", ".join(key for key, cls in SCORES.items() if cls.takes == "features")
        fail("scores", f"names among {known}", describe(name))
    return SCORES[name]()
