"""What all scores share: updates, merging, saving, reduction over processes, and the report of a value.

A score is a formula over one of two collections: the rows themselves (:class:`~transferops.scores.rows.Rows`), or only
their moments (:class:`~transferops.scores.moments.MomentsAccumulator`). A score names its collection in ``_collection``
and gives its formula in ``_evaluate``, which sees the data through
:class:`~transferops.scores.features.FeatureSet` or as rows and returns :class:`ScoreDetails`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor
from typing_extensions import Self

from transferops._validate import describe, fail
from transferops.scores._warnings import warn


@dataclass(frozen=True)
class ScoreDetails:
    """A score and what it rests on.

    Attributes:
        value: the score.
        samples: N.
        classes: C, classes with at least one sample; 0 where labels play no part or are not classes.
        dimension: columns of the values as given; 0 for label-only scores.
        rank: directions of the features that entered; None where the score has no such notion.
        shrinkage: weight of the regularisation in [0, 1]; None where there is none.
        warnings: the text of every warning that ``compute`` issues.
        parts: further numbers the value is made of, by name.
    """

    value: float
    samples: int
    classes: int
    dimension: int
    rank: int | None = None
    shrinkage: float | None = None
    warnings: tuple[str, ...] = ()
    parts: dict[str, float] | None = None


class Collection(Protocol):
    """What a score keeps of the batches it has seen."""

    @property
    def samples(self) -> int: ...
    def update(self, values: Any, labels: Any, *, copy: bool = True) -> None: ...
    def merge(self, other: Any) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def all_reduce(self, group: Any = None) -> None: ...


class Score(ABC):
    """Base of the streaming scores.

    Class attributes:
        name: the function's name, and the key in :data:`transferops.scores.SCORES`.
        takes: what ``update`` takes beside labels: "features", "probabilities", "logits" or "source_labels".
        requires: the package it needs beyond torch and NumPy; None for most.
        higher_is_better: True throughout.

    After :meth:`fit`, ``score_`` holds the value.
    """

    name: ClassVar[str]
    takes: ClassVar[str] = "features"
    requires: ClassVar[str | None] = None
    higher_is_better: ClassVar[bool] = True

    score_: float

    def __init__(self) -> None:
        self._data = self._collection()

    @abstractmethod
    def _collection(self) -> Collection:
        """A new, empty collection of what the score needs."""

    @abstractmethod
    def _evaluate(self, data: Any) -> ScoreDetails:
        """The score of what the collection holds."""

    def _view(self, data: Any) -> Any:
        """What ``_evaluate`` gets from the collection."""
        return data

    @property
    def samples(self) -> int:
        """Samples seen so far."""
        return self._data.samples

    def update(self, values: Tensor | Any, labels: Tensor | Any) -> Self:
        """Add a batch. Arguments and errors as for the function; an empty batch, and one refused, change nothing."""
        self._data.update(values, labels)
        return self

    def merge(self, other: Self) -> Self:
        """Add all that ``other`` has seen, which is left as it is.

        Raises:
            ValueError: ``other`` is another score, has other options, or holds data of another shape or device.
        """
        wanted = self._options()
        if type(other) is not type(self) or other._options() != wanted:
            same = type(other) is type(self)
            theirs = other._options() if same else {}
            differing = [name for name in wanted if not same or theirs[name] != wanted[name]]
            expected = ", ".join(f"{name}={wanted[name]!r}" for name in differing)
            article = "an" if self.__class__.__name__[0] in "AEHIO" else "a"
            got = ", ".join(f"{name}={theirs[name]!r}" for name in differing) if same else describe(other)
            fail("other", f"{article} {self.__class__.__name__}" + (f" with {expected}" if expected else ""), got)
        self._data.merge(other._data)
        return self

    def compute(self) -> float:
        """The score of all samples seen so far.

        Raises:
            ValueError: there are none, or too few for the score.

        Warns:
            ScoreWarning: the value needs a caveat; ``details().warnings`` holds the same text.
        """
        return self._report(self.details(), stacklevel=3)

    def details(self) -> Any:
        """The score and what it rests on, as :class:`ScoreDetails`. Issues no warning."""
        if self.samples == 0:
            fail(self._values_name(), "at least one sample before the score is computed", "none")
        return self._evaluate(self._view(self._data))

    def reset(self) -> None:
        """Forget all samples."""
        self._data = self._collection()

    def fit(self, X: Any, y: Any) -> Self:
        """Score these samples alone, in the manner of scikit-learn: the value is then in ``score_``.

        Lists are taken too; otherwise as ``reset``, ``update``, ``compute``.
        """
        self.reset()
        self.update(*(np.asarray(value) if isinstance(value, (list, tuple)) else value for value in (X, y)))
        self.score_ = self._report(self.details(), stacklevel=3)
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that was seen, as tensors, numbers and strings in dicts and lists (``torch.save`` takes it as it is)."""
        return {"score": self.name, "options": self._options(), "data": self._data.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace what was seen by what ``state_dict`` of a score with the same options returned.

        Raises:
            ValueError: the state is another score's, or its options differ.
        """
        expected = {"score": self.name, "options": self._options()}
        got = {key: state.get(key) for key in expected} if isinstance(state, dict) else describe(state)
        if got != expected:
            fail("state", f"that of {expected}", f"{got}")
        data = self._collection()
        data.load_state_dict(state["data"])
        self._data = data

    def all_reduce(self, group: Any = None) -> Self:
        """Give every process of a torch.distributed group all that any of them has seen.

        Moments are summed; rows are gathered, in the order of the ranks.

        Args:
            group: a process group; None for the default one.

        Raises:
            ValueError: torch.distributed is not initialised, or the processes' samples differ in shape.
        """
        self._data.all_reduce(group)
        return self

    def _once(self, values: Any, labels: Any) -> float:
        """What the function of this score returns: no copy is made of what is not kept."""
        self._data.update(values, labels, copy=False)
        return self._report(self.details(), stacklevel=4)

    def _options(self) -> dict[str, Any]:
        """The options that two scores must share to be merged."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "score_"}

    def _values_name(self) -> str:
        return self.takes if self.takes in ("features", "logits", "source_labels") else "source_probabilities"

    @staticmethod
    def _report(details: ScoreDetails, *, stacklevel: int) -> float:
        for message in details.warnings:
            warn(message, stacklevel=stacklevel)
        return details.value
