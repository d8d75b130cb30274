"""Fuzz targets of transferops.compat: other packages' signatures of the scores here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cases import Spec, array, label_array, tensor
from hypothesis import strategies as st
from outcomes import Refusal, outcome, target
from targets_scores import labelled

from transferops import scores
from transferops.compat import logme, tllib, transformer_ranker


@st.composite
def _compat(draw: Any) -> Spec:
    return {**draw(labelled()), "regression": draw(st.booleans()), "k": draw(st.integers(1, 4))}


def _same(name: str, theirs: Callable[[Any, Any, Spec], float], ours: Callable[[Any, Any, Spec], float]) -> None:
    """A function of compat gives what the score gives, refusals included; some want classes from 0."""

    def check(spec: Spec) -> str:
        names = [abs(name) % 50 for name in spec["labels"]["names"]]
        features, targets = array(spec["features"]), label_array({**spec["labels"], "names": names})
        got, expected = outcome(theirs, features, targets, spec), outcome(ours, features, targets, spec)
        assert type(got) is type(expected), (got, expected)
        if isinstance(got, Refusal):
            return "refused"
        assert got == expected or abs(got - expected) <= 1e-9 * (1 + abs(expected)), (got, expected)
        return "agreed"

    target(f"compat.{name}", specs=_compat())(check)


def _log_me(x: Any, y: Any, spec: Spec) -> float:
    if spec["regression"]:
        y = tensor(y)
    return scores.LogMe(regression=spec["regression"]).update(x, y).compute()


_same("tllib.h_score", lambda x, y, s: tllib.h_score(x, y), lambda x, y, s: scores.h_score(x, y))
_same(
    "tllib.regularized_h_score",
    lambda x, y, s: tllib.regularized_h_score(x, y),
    lambda x, y, s: scores.h_score(x, y, True),
)
_same("tllib.transrate", lambda x, y, s: tllib.transrate(x, y), lambda x, y, s: scores.trans_rate(x, y, relative=False))
_same("tllib.log_maximum_evidence", lambda x, y, s: tllib.log_maximum_evidence(x, y, s["regression"]), _log_me)
_same("logme.LogME", lambda x, y, s: logme.LogME(s["regression"]).fit(x, y), _log_me)
_same("transformer_ranker.LogME", lambda x, y, s: transformer_ranker.LogME(s["regression"]).fit(x, y), _log_me)
_same(
    "transformer_ranker.HScore",
    lambda x, y, s: transformer_ranker.HScore().fit(x, y),
    lambda x, y, s: scores.h_score(x, y, True),
)
_same(
    "transformer_ranker.NearestNeighbors",
    lambda x, y, s: transformer_ranker.NearestNeighbors(k=s["k"]).fit(x, y),
    lambda x, y, s: scores.knn(x, y, neighbors=s["k"], metric="euclidean"),
)
