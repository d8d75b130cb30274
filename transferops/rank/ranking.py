"""Which candidate suits the target best: several scores of each, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from transferops._validate import fail
from transferops.rank.extraction import Extraction
from transferops.scores import SCORES, HScore, ScoreCollection
from transferops.scores.base import Score

#: Shown beside every ranking: what a score has to beat.
BASELINES = ("parameters", "knn")
REGULARIZED = "h_score_regularized"


@dataclass(frozen=True)
class Ranked:
    """The scores of one candidate at one layer.

    Attributes:
        name: The candidate.
        layer: Where its features are from.
        scores: By name; higher promises more. NaN where a score could not be computed, with the reason in ``notes``.
        notes: What limits a score, in words, by its name.
    """

    name: str
    layer: str
    scores: dict[str, float]
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranking:
    """Candidates and their scores for one target.

    Attributes:
        target: Its name.
        samples: Target samples that the scores rest on.
        classes: Classes among them.
        rows: One per candidate and layer.
    """

    target: str
    samples: int
    classes: int
    rows: tuple[Ranked, ...]

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores."""
        return tuple(self.rows[0].scores)

    def order(self, score: str) -> tuple[Ranked, ...]:
        """The rows by one score, the most promising first; NaN last.

        Raises:
            ValueError: The score is unknown.
        """
        if score not in self.scores:
            fail("score", f"one of {', '.join(self.scores)}", repr(score))
        return tuple(sorted(self.rows, key=lambda row: -_number(row.scores[score])))

    def first(self, score: str) -> tuple[Ranked, ...]:
        """The row with the highest value of a score and those level with it; none if it is NaN throughout.

        Raises:
            ValueError: The score is unknown.
        """
        rows = self.order(score)
        highest = _number(rows[0].scores[score])
        return tuple(row for row in rows if _number(row.scores[score]) == highest > -math.inf)

    def mean_ranks(self) -> tuple[float, ...]:
        """The mean of each row's ranks over the scores (1 is best; level values share theirs), baselines left out.

        A plain way to read many scores at once, without a claim that it is the best one.
        """
        names = [name for name in self.scores if name not in BASELINES] or list(self.scores)
        values = torch.tensor([[_number(row.scores[name]) for name in names] for row in self.rows], dtype=torch.float64)
        above = (values.unsqueeze(0) > values.unsqueeze(1)).sum(1)
        level = (values.unsqueeze(0) == values.unsqueeze(1)).sum(1)
        return tuple((above + (level + 1) / 2).mean(1).tolist())


def default_scores() -> tuple[str, ...]:
    """Every score that needs no further package, plain H-score in its regularised form (target samples are few)."""
    names = [name for name, score in SCORES.items() if score.requires is None and score.takes in _INPUTS]
    return tuple(REGULARIZED if name == "h_score" else name for name in names)


def check_scores(names: Iterable[str], further: Iterable[str] = ()) -> list[str]:
    """The names of scores that a ranking can have.

    Args:
        names: To be checked.
        further: Names for the message that the caller takes beside these.

    Raises:
        ValueError: One is unknown, or there is none.
    """
    known = [REGULARIZED, *(name for name, score in SCORES.items() if score.takes in _INPUTS)]
    names = list(names)
    for name in names:
        if name not in known:
            fail("scores", f"names among {', '.join([*known, *further])}", repr(name))
    if not names:
        fail("scores", "at least one name", "none")
    return names


def rank_candidates(
    extractions: Mapping[str, Extraction],
    *,
    scores: Iterable[str] | None = None,
    parameters: Mapping[str, int] | None = None,
    extra: Mapping[str, Mapping[str, float]] | None = None,
    target: str = "target",
) -> Ranking:
    """Score what each candidate makes of the target's samples.

    Args:
        extractions: By candidate, of the same target samples; see :func:`transferops.rank.extract`.
        scores: Names from :data:`transferops.scores.SCORES`, or "h_score_regularized"; default
            :func:`default_scores`. The baselines are added.
        parameters: Number of parameters by candidate, shown as a baseline.
        extra: Further scores computed elsewhere: name, then value by candidate; higher promises more.
        target: Name of the target.

    Returns:
        One row per candidate and layer, in the order given.

    Raises:
        ValueError: No candidates, an unknown score, or candidates of different samples.
    """
    if not extractions:
        fail("extractions", "at least one candidate", "none")
    names = list(dict.fromkeys([*(default_scores() if scores is None else check_scores(scores)), "knn"]))
    labels = next(iter(extractions.values())).labels
    rows = []
    for candidate, extraction in extractions.items():
        if not torch.equal(extraction.labels, labels):
            fail("extractions", "the same target samples for every candidate", f"others for {candidate!r}")
        of_outputs = _scores_of_outputs(extraction, names)
        for layer, features in extraction.features.items():
            found = {**_scores_of_features(features, labels, names), **of_outputs}
            values = {name: found[name][0] for name in names if name not in BASELINES}
            values.update({name: float(by_candidate[candidate]) for name, by_candidate in (extra or {}).items()})
            values["knn"] = found["knn"][0]
            if parameters is not None:
                values["parameters"] = float(parameters[candidate])
            rows.append(Ranked(candidate, layer, values, {name: note for name, (_, note) in found.items() if note}))
    return Ranking(target, len(labels), len(torch.unique(labels)), tuple(rows))


def _scores_of_features(features: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, tuple[float, str]]:
    wanted: dict[str, Any] = {}
    for name in names:
        if name == REGULARIZED:
            wanted[name] = HScore(regularized=True)
        elif SCORES[name].takes == "features":
            wanted[name] = SCORES[name]()
    try:
        details = ScoreCollection(wanted).update(features, labels).details()
    except ValueError:  # one of them refuses the data: which one, and why, is a note, and the others stand
        return {name: _alone(score, features, labels) for name, score in wanted.items()}
    return {name: (float(found.value), "; ".join(found.warnings)) for name, found in details.items()}


def _scores_of_outputs(extraction: Extraction, names: Sequence[str]) -> dict[str, tuple[float, str]]:
    inputs = {
        "probabilities": lambda: extraction.outputs.double().softmax(1),
        "logits": lambda: extraction.outputs,
        "source_labels": lambda: extraction.outputs.argmax(1),
    }
    return {
        name: _alone(SCORES[name](), inputs[SCORES[name].takes](), extraction.labels)
        for name in names
        if name != REGULARIZED and SCORES[name].takes in inputs
    }


def _alone(score: Score, values: Tensor, labels: Tensor) -> tuple[float, str]:
    try:
        score.update(values, labels)
        found = score.details()
    except ValueError as error:
        return math.nan, str(error)
    return float(found.value), "; ".join(found.warnings)


_INPUTS = ("features", "probabilities", "logits", "source_labels")


def rounded(value: float) -> float:
    """To nine digits: values that differ less are level, as plain H-scores of few samples are, all of them C - 1."""
    return float(f"{value:.9g}")


def _number(value: float) -> float:
    return -math.inf if math.isnan(value) else rounded(value)
