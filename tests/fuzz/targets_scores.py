"""Fuzz targets of transferops.scores: scores of features and labels.

Each score is compared with its formula in float64 where the problem is well conditioned. On any other it must be a
finite number in its range, the same for the same numbers as a contiguous float64 tensor with labels 0 .. C-1, the same
in two batches, and, where it is said to be free of scale, the same for features times a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import score_references as formulas
import torch
from cases import Spec, array, arrays, as_given, dtype_of, is_finite, label_array, labels, tensor
from hypothesis import strategies as st
from outcomes import Refusal, agreed, outcome, refused, target

from transferops import scores

Reference = Callable[..., "float | None"]
ROWS = st.sampled_from([0, 1, 2, 3, 5, 8, 13, 24, 40])
COLUMNS = st.sampled_from([0, 1, 1, 2, 3, 4, 8, 15])


@dataclass(frozen=True)
class Kind:
    """A score of features: its function and class, what its value is between, and its options."""

    function: Callable[..., float]
    streaming: Callable[..., Any]
    formula: Reference
    low: Callable[[int, int], float]
    high: Callable[[int, int], float]
    scale_free: bool = True
    options: dict[str, list[Any]] = field(default_factory=dict)
    needs: Callable[[int, int, dict[str, Any]], bool] = lambda samples, classes, options: True
    tolerance: float = 1e-5


KINDS = {
    "h_score": Kind(
        scores.h_score,
        scores.HScore,
        formulas.h_score,
        lambda n, c: -math.inf,
        lambda n, c: (c - 1) * n / max(n - 1, 1) + 1e-6,
        options={"regularized": [False, True], "chance_corrected": [False, False, True], "standardize": [False, True]},
    ),
    "log_me": Kind(
        scores.log_me, scores.LogMe, formulas.log_me, lambda n, c: -math.inf, lambda n, c: math.inf, tolerance=1e-3
    ),
    "trans_rate": Kind(
        scores.trans_rate,
        scores.TransRate,
        formulas.trans_rate,
        lambda n, c: -1e-6,
        lambda n, c: math.inf,
        options={"eps": [1e-4, 1e-2, 1.0]},
    ),
    "knn": Kind(
        scores.knn,
        scores.Knn,
        formulas.knn,
        lambda n, c: 0,
        lambda n, c: 1,
        options={"neighbors": [1, 1, 2, 5], "metric": ["cosine", "euclidean"]},
        needs=lambda n, c, options: n > options["neighbors"],
    ),
    "gbc": Kind(
        scores.gbc,
        scores.Gbc,
        formulas.gbc,
        lambda n, c: -c * (c - 1) - 1e-6,
        lambda n, c: 0,
        options={"covariance": ["diagonal", "spherical"], "components": [None, 1, 64]},
    ),
    "parc": Kind(
        scores.parc,
        scores.Parc,
        formulas.parc,
        lambda n, c: -100.0001,
        lambda n, c: 100.0001,
        options={"components": [None, 2, 32]},
    ),
    "sfda": Kind(
        scores.sfda,
        scores.Sfda,
        formulas.no_reference,
        lambda n, c: -math.inf,
        lambda n, c: 1,
        scale_free=False,
        options={"log": [True, False], "strength": [5.0, 0.1]},
    ),
    "etran": Kind(
        scores.etran,
        scores.Etran,
        formulas.no_reference,
        lambda n, c: -math.inf,
        lambda n, c: math.inf,
        scale_free=False,
        options={"strength": [5.0]},
    ),
    "n_leep": Kind(
        scores.n_leep,
        scores.NLeep,
        formulas.no_reference,
        lambda n, c: -math.inf,
        lambda n, c: 0,
        options={"components_per_class": [1, 2], "variance": [0.8, 0.5]},
        needs=lambda n, c, options: n >= max(c * options["components_per_class"], 2),
    ),
}


@st.composite
def labelled(draw: Any, kind: Kind | None = None) -> Spec:
    samples, dim = draw(ROWS), draw(COLUMNS)
    return {
        "features": draw(arrays((samples, dim))),
        "labels": draw(labels(samples)),
        "cut": draw(st.integers(0, max(samples, 1))),
        "power": draw(st.integers(-20, 20)),
        "options": {name: draw(st.sampled_from(values)) for name, values in (kind.options if kind else {}).items()},
    }


def refusable(features: Any, targets: Any, *, regression: bool = False) -> tuple[str, ...]:
    """The arguments that a score may complain about, given these."""
    wrong = []
    if features.shape[1] == 0 or len(features) == 0 or not is_finite(features):
        wrong.append("features")
    if len(features) != len(targets) or (dtype_of(targets).startswith("float") and not regression):
        wrong += ["labels", "features"]
    return tuple(wrong)


def _feature_score(kind: Kind, spec: Spec) -> str:
    features, targets, options = array(spec["features"]), label_array(spec["labels"]), spec["options"]
    result = outcome(kind.function, features, targets, **options)
    regression = dtype_of(targets) == "float32" and kind.function in (scores.log_me, scores.etran)
    wrong = refusable(features, targets, regression=regression)
    if options.get("chance_corrected") and options.get("regularized"):
        return refused(result, "chance_corrected")
    if wrong:
        return refused(result, *wrong)
    x, y = tensor(features), tensor(targets)
    samples, classes = len(x), len(y.unique())
    if not kind.needs(samples, classes, options):
        return refused(result, "features")
    if isinstance(result, Refusal) and options.get("chance_corrected") and samples <= x.shape[1] + 1:
        return refused(result, "features")
    assert isinstance(result, float), result
    assert math.isfinite(result), result
    if not regression:
        assert kind.low(samples, classes) <= result <= kind.high(samples, classes), result
        y = y.unique(return_inverse=True)[1]
    tame = spec["features"]["values"] == "normal" and spec["features"]["layout"] != "repeated"
    if not tame:
        return "agreed"
    size = 1 + abs(result)
    scale = float(x.abs().max())
    expected = kind.formula(x / scale if kind.scale_free and scale > 0 else x, y, **options)
    if kind.function is scores.knn and expected is None:  # whichever of those at one distance is called the nearest
        return "agreed"
    # 16-bit and 32-bit features carry their own rounding, below which directions are cut and outside of float64 not.
    plain = outcome(kind.function, x, y, **options)
    assert abs(plain - result) <= 1e-3 * size, (plain, result)
    if expected is not None:
        assert abs(plain - expected) <= kind.tolerance * size, (plain, expected)
    if kind.scale_free:
        scaled = outcome(kind.function, x * 2.0 ** spec["power"], y, **options)
        assert abs(scaled - plain) <= 1e-6 * size, (scaled, plain)
    streamed = {name: value for name, value in options.items() if name != "standardize"}
    if kind.function in (scores.log_me, scores.etran):
        streamed["regression"] = regression
    first, second = kind.streaming(**streamed), kind.streaming(**streamed)
    cut = spec["cut"]
    first.update(x[:cut], y[:cut])
    second.update(x[cut:], y[cut:])
    second.load_state_dict(second.state_dict())
    if not options.get("standardize"):
        merged = outcome(first.merge(second).compute)
        assert abs(merged - plain) <= 1e-6 * size, (merged, plain)
    return "agreed"


def _register() -> None:
    compat = {"h_score": ["compat.tllib.h_score"]}
    for name, kind in KINDS.items():
        names = [f"scores.{name}", f"scores.{kind.streaming.__name__}", *compat.get(name, [])]
        if name == "h_score":
            names.pop()
        target(*names, specs=labelled(kind))(lambda spec, kind=kind: _feature_score(kind, spec))


_register()


@target("scores.score_all", "scores.ScoreCollection", specs=labelled())
def score_all(spec: Spec) -> str:
    features, targets = array(spec["features"]), label_array(spec["labels"])
    names = ["h_score", "log_me", "trans_rate", "gbc"]
    result = outcome(scores.score_all, features, targets, names)
    wrong = refusable(features, targets)
    if wrong:
        return refused(result, *wrong)
    assert list(result) == names
    for name in names:
        alone = outcome(getattr(scores, name), as_given(features), as_given(targets))
        assert result[name] == alone or abs(result[name] - alone) <= 1e-6 * (1 + abs(alone)), name
    return "agreed"


@target("scores.FeatureMoments", "scores.MomentsAccumulator", specs=labelled())
def moments_accumulator(spec: Spec) -> str:
    """Batches give the moments of all samples, about their mean."""
    features, targets = array(spec["features"]), label_array(spec["labels"])
    cut = spec["cut"]
    collected = scores.MomentsAccumulator(norms=True)
    result = outcome(collected.update, features[:cut], targets[:cut])
    if not isinstance(result, Refusal):
        result = outcome(collected.update, features[cut:], targets[cut:])
    if isinstance(result, Refusal):
        return refused(result, *refusable(features, targets))
    if not len(features):
        return "agreed"
    found = collected.as_moments()
    x = tensor(features)
    centred = x - x.mean(0)
    steps = (len(x) + 16) * torch.finfo(torch.float64).eps
    size = x.abs().amax(0)
    error = steps * size
    bound = error.unsqueeze(1) * centred.abs().sum(0) + centred.abs().sum(0).unsqueeze(1) * error
    bound = 8 * (bound + len(x) * torch.outer(error, error) + steps * (centred.abs().mT @ centred.abs()))
    return agreed((found.gram, found.mean), (centred.mT @ centred, bound), (x.mean(0), 4 * error))


@st.composite
def _several_sources(draw: Any) -> Spec:
    sources, samples, dim = draw(st.integers(1, 3)), draw(ROWS), draw(st.integers(1, 4))
    dtype = (draw(st.sampled_from(["float32", "float64"])),)
    return {
        "features": [draw(arrays((samples, dim), dtypes=dtype)) for _ in range(sources)],
        "labels": draw(labels(samples)),
        "options": {"signed": draw(st.booleans()), "shrinkage": draw(st.sampled_from([0.0, 0.0, 0.5]))},
    }


@target("scores.multi_source_h_score", "scores.MultiSourceHScore", specs=_several_sources())
def multi_source_h_score(spec: Spec) -> str:
    features, targets, options = [array(x) for x in spec["features"]], label_array(spec["labels"]), spec["options"]
    result = outcome(scores.multi_source_h_score, features, targets, **options)
    wrong = {name for x in features for name in refusable(x, targets)}
    if wrong:
        return refused(result, *wrong)
    if isinstance(result, Refusal):  # a singular covariance, which only tame features surely do not have
        tame = all(
            x["values"] == "normal" and x["layout"] != "repeated" and x["exponent"] == 0 for x in spec["features"]
        )
        assert not (tame and len(targets) > 4 * sum(x.shape[1] for x in features)), result
        return refused(result, "features")
    weights, value = result
    classes = len(tensor(targets).unique())
    assert math.isclose(float(weights.abs().sum()), 1, rel_tol=1e-9)
    assert options["signed"] or float(weights.min()) >= 0
    assert -1e-9 <= value <= min(features[0].shape[1], classes - 1) + 1e-6, value
    return "agreed"
