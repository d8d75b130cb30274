"""Fuzz targets of transferops.scores and transferops.compat.

Each score is compared with its formula in float64 where the problem is well conditioned. On any other it must be a
finite number in its range, the same for the same numbers as a contiguous float64 tensor with labels 0 .. C-1, the same
in two batches, and, where it is said to be free of scale, the same for features times a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import reference
import torch
from cases import Spec, array, arrays, as_given, dtype_of, is_finite, label_array, labels, tensor
from hypothesis import strategies as st
from outcomes import Refusal, agreed, outcome, refused, target
from torch import Tensor

from transferops import scores
from transferops.compat import logme, tllib, transformer_ranker

Reference = Callable[..., "float | None"]
ROWS = st.sampled_from([0, 1, 2, 3, 5, 8, 13, 24, 40])
COLUMNS = st.sampled_from([0, 1, 1, 2, 3, 4, 8, 15])


# References: from float64 features [N, D] and classes 0 .. C-1 [N]; None where the problem is too ill-conditioned.


def _condition(x: Tensor) -> float:
    values = torch.linalg.svdvals(x)
    return float(values[0] / values[-1]) if float(values[-1]) > 0 else math.inf


def h_score(x: Tensor, y: Tensor, *, regularized: bool = False, chance_corrected: bool = False, **_: Any) -> Any:
    samples, dim = x.shape
    classes = len(y.unique())
    if classes < 2 or samples < 3:
        return None
    if regularized:
        scale = float((x - x.mean(0)).abs().max())
        fine = scale > 0 and samples > 2 and dim > 1
        return reference.published_regularized_h_score(x / scale, y) if fine else None
    if samples <= dim + 1 or _condition((x - x.mean(0)) / x.std(0)) > 1e3:
        return None
    value = reference.projection_h_score(x, y)
    if chance_corrected:
        return (classes - 1) * (1 - (1 - value / (classes - 1)) * (samples - 1) / (samples - 1 - dim))
    return value


def log_me(x: Tensor, y: Tensor) -> Any:
    """The evidence over a fine grid of lambda = alpha / beta; flat at its maximum."""
    outputs = y.unsqueeze(1) if y.is_floating_point() else torch.nn.functional.one_hot(y).double()
    samples = len(x)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    if samples <= x.shape[1] or not len(s) or _condition(x) > 1e3:
        return None
    s = s.square() / s[0] ** 2
    grid = torch.logspace(-14, 14, 2801, dtype=torch.float64).unsqueeze(1)
    total = []
    for output in outputs.mT:
        along = (u.mT @ output).square()
        left = float(output.square().sum() - along.sum())
        if left < 1e-6 * float(output.square().sum()):
            return None
        misfit = left + (along * grid / (grid + s)).sum(1)
        evidence = torch.log(samples / misfit) / 2 + torch.log(grid / (grid + s)).sum(1) / (2 * samples)
        total.append(float(evidence.max()) - 0.5 - math.log(2 * math.pi) / 2)
    return sum(total) / len(total)


def trans_rate(x: Tensor, y: Tensor, *, eps: float = 1e-4, relative: bool = True) -> Any:
    x = x - x.mean(0)
    samples, dim = x.shape
    power = float(x.square().sum())
    if power == 0:
        return 0.0
    distortion = eps * (power / (samples * dim) if relative else 1.0)

    def rate(rows: Tensor) -> float:
        matrix = torch.eye(dim, dtype=torch.float64) + rows.mT @ rows / (len(rows) * distortion)
        return float(torch.linalg.slogdet(matrix)[1]) / 2

    if power / distortion > 1e12:
        return None
    within = sum(float((y == c).sum()) / samples * rate(x[y == c]) for c in y.unique())
    return rate(x) - within


def gbc(x: Tensor, y: Tensor, *, covariance: str = "diagonal", components: int | None = 64) -> Any:
    samples, dim = x.shape
    classes = [x[y == c] for c in y.unique()]
    if dim > 1 or samples < 4 or min(map(len, classes)) < 3:
        return None  # of one feature: then there is nothing to choose in the principal components
    total = 0.0
    for i, a in enumerate(classes):
        for j, b in enumerate(classes):
            if i != j:
                va, vb = float(a.var(correction=0)), float(b.var(correction=0))
                if min(va, vb) < 1e-12 * float(x.var()):
                    return None
                distance = float(a.mean() - b.mean()) ** 2 / (va + vb) * 2 / 8
                total -= math.exp(-distance - math.log((va + vb) / 2 / math.sqrt(va * vb)) / 2)
    return total


def knn(x: Tensor, y: Tensor, *, neighbors: int = 1, metric: str = "cosine") -> Any:
    """None where two distances are too close to tell apart."""
    points = torch.nn.functional.normalize(x) if metric == "cosine" else x - x.mean(0)
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    ordered, order = distance.sort(1)
    if len(x) > 2 and bool((ordered[:, 1:-1] - ordered[:, :-2] < 1e-3 * ordered[:, -2:-1]).any()):
        return None
    hits = []
    for row, label in zip(y[order[:, :neighbors]].tolist(), y.tolist()):
        hits.append(max(dict.fromkeys(row), key=row.count) == label)
    return sum(hits) / len(hits)


def parc(x: Tensor, y: Tensor, *, components: int | None = 32) -> Any:
    from scipy import stats

    if components is not None or len(x) < 4 or x.shape[1] < 3 or len(y.unique()) in (1, len(x)):
        return None
    spread = x.std(0, correction=0)
    if float(spread.min()) < 1e-6 * float(x.abs().max()):
        return None
    near = np.corrcoef(((x - x.mean(0)) / spread).numpy())
    pairs = np.triu_indices(len(x), 1)
    distances = np.sort(near[pairs])
    if (np.diff(distances) < 1e-9).any():
        return None
    return 100 * float(stats.spearmanr(-near[pairs], (y[pairs[0]] != y[pairs[1]]).double().numpy()).statistic)


def no_reference(x: Tensor, y: Tensor, **_: Any) -> None:
    """Compared with its formula in test_scores_published.py; here by what holds of any problem."""


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
        h_score,
        lambda n, c: -math.inf,
        lambda n, c: (c - 1) * n / max(n - 1, 1) + 1e-6,
        options={"regularized": [False, True], "chance_corrected": [False, False, True], "standardize": [False, True]},
    ),
    "log_me": Kind(scores.log_me, scores.LogMe, log_me, lambda n, c: -math.inf, lambda n, c: math.inf, tolerance=1e-3),
    "trans_rate": Kind(
        scores.trans_rate,
        scores.TransRate,
        trans_rate,
        lambda n, c: -1e-6,
        lambda n, c: math.inf,
        options={"eps": [1e-4, 1e-2, 1.0]},
    ),
    "knn": Kind(
        scores.knn,
        scores.Knn,
        knn,
        lambda n, c: 0,
        lambda n, c: 1,
        options={"neighbors": [1, 1, 2, 5], "metric": ["cosine", "euclidean"]},
        needs=lambda n, c, options: n > options["neighbors"],
    ),
    "gbc": Kind(
        scores.gbc,
        scores.Gbc,
        gbc,
        lambda n, c: -c * (c - 1) - 1e-6,
        lambda n, c: 0,
        options={"covariance": ["diagonal", "spherical"], "components": [None, 1, 64]},
    ),
    "parc": Kind(
        scores.parc,
        scores.Parc,
        parc,
        lambda n, c: -100.0001,
        lambda n, c: 100.0001,
        options={"components": [None, 2, 32]},
    ),
    "sfda": Kind(
        scores.sfda,
        scores.Sfda,
        no_reference,
        lambda n, c: -math.inf,
        lambda n, c: 1,
        scale_free=False,
        options={"log": [True, False], "strength": [5.0, 0.1]},
    ),
    "etran": Kind(
        scores.etran,
        scores.Etran,
        no_reference,
        lambda n, c: -math.inf,
        lambda n, c: math.inf,
        scale_free=False,
        options={"strength": [5.0]},
    ),
    "n_leep": Kind(
        scores.n_leep,
        scores.NLeep,
        no_reference,
        lambda n, c: -math.inf,
        lambda n, c: 0,
        options={"components_per_class": [1, 2], "variance": [0.8, 0.5]},
        needs=lambda n, c, options: n >= max(c * options["components_per_class"], 2),
    ),
}


@st.composite
def _labelled(draw: Any, kind: Kind | None = None) -> Spec:
    samples, dim = draw(ROWS), draw(COLUMNS)
    return {
        "features": draw(arrays((samples, dim))),
        "labels": draw(labels(samples)),
        "cut": draw(st.integers(0, max(samples, 1))),
        "power": draw(st.integers(-20, 20)),
        "options": {name: draw(st.sampled_from(values)) for name, values in (kind.options if kind else {}).items()},
    }


def _refusable(features: Any, targets: Any, *, regression: bool = False) -> tuple[str, ...]:
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
    wrong = _refusable(features, targets, regression=regression)
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
    # 16-bit and 32-bit features carry their own rounding, below which directions are cut and outside of float64 not.
    plain = outcome(kind.function, x, y, **options)
    assert abs(plain - result) <= 1e-3 * size, (plain, result)
    scale = float(x.abs().max())
    expected = kind.formula(x / scale if kind.scale_free and scale > 0 else x, y, **options)
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
        target(*names, specs=_labelled(kind))(lambda spec, kind=kind: _feature_score(kind, spec))


_register()


@target("scores.score_all", "scores.ScoreCollection", specs=_labelled())
def score_all(spec: Spec) -> str:
    features, targets = array(spec["features"]), label_array(spec["labels"])
    names = ["h_score", "log_me", "trans_rate", "gbc"]
    result = outcome(scores.score_all, features, targets, names)
    wrong = _refusable(features, targets)
    if wrong:
        return refused(result, *wrong)
    assert list(result) == names
    for name in names:
        alone = outcome(getattr(scores, name), as_given(features), as_given(targets))
        assert result[name] == alone or abs(result[name] - alone) <= 1e-6 * (1 + abs(alone)), name
    return "agreed"


@target("scores.FeatureMoments", "scores.MomentsAccumulator", specs=_labelled())
def moments_accumulator(spec: Spec) -> str:
    """Batches give the moments of all samples, about their mean."""
    features, targets = array(spec["features"]), label_array(spec["labels"])
    cut = spec["cut"]
    collected = scores.MomentsAccumulator(norms=True)
    result = outcome(collected.update, features[:cut], targets[:cut])
    if not isinstance(result, Refusal):
        result = outcome(collected.update, features[cut:], targets[cut:])
    if isinstance(result, Refusal):
        return refused(result, *_refusable(features, targets))
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


# Scores of outputs and labels


@st.composite
def _probabilities(draw: Any) -> Spec:
    samples = draw(ROWS)
    return {
        "logits": draw(arrays((samples, draw(COLUMNS)), exponents=st.integers(-3, 2))),
        "labels": draw(labels(samples)),
        "spoil": draw(st.sampled_from([None, None, None, None, "sum", "sign"])),
    }


def _leep(function: Any, spec: Spec) -> str:
    logits, targets = as_given(array(spec["logits"])), label_array(spec["labels"])
    p = logits.double().softmax(1).to(logits.dtype)
    if spec["spoil"] == "sum":
        p = p * 1.5
    elif spec["spoil"] == "sign" and p.shape[1] > 1:
        p = torch.cat([p[:, :1] + 0.5, p[:, 1:-1], p[:, -1:] - 0.5], 1)
    result = outcome(function, p, targets)
    wrong = ["labels"] if dtype_of(targets).startswith("float") or len(targets) != len(p) else []
    exact = p.double()
    sums = p.shape[1] * torch.finfo(p.dtype).eps + 1.1e-4
    if not p.numel() or not is_finite(p) or bool((exact < 0).any()) or float((exact.sum(1) - 1).abs().max()) > sums:
        wrong.append("source_probabilities")
    if wrong:
        return refused(result, *wrong)
    if isinstance(result, Refusal) and logits.dtype in (torch.float16, torch.bfloat16):
        return refused(result, "source_probabilities")  # rounding that sums to more than is allowed
    y = tensor(targets).unique(return_inverse=True)[1]
    joint = torch.nn.functional.one_hot(y).double().mT @ exact
    mass = joint.sum(0)
    conditional = joint / torch.where(mass > 0, mass, 1)
    expected = float((conditional[y] * exact).sum(1).log().mean())
    if math.isinf(expected):
        return "agreed"
    return agreed(result, (min(expected, 0.0), 1e-9 if p.dtype == torch.float64 else 2e-5 * (1 + abs(expected))))


target("scores.leep", "scores.Leep", specs=_probabilities())(lambda spec: _leep(scores.leep, spec))
target("compat.tllib.leep", "compat.tllib.log_expected_empirical_prediction", specs=_probabilities())(
    lambda spec: _leep(tllib.leep, spec)
)


@st.composite
def _label_pairs(draw: Any) -> Spec:
    samples = draw(ROWS)
    return {"source": draw(labels(samples)), "labels": draw(labels(samples))}


def _nce(function: Any, spec: Spec) -> str:
    source, targets = label_array(spec["source"]), label_array(spec["labels"])
    result = outcome(function, source, targets)
    wrong = [name for name, x in (("source_labels", source), ("labels", targets)) if dtype_of(x).startswith("float")]
    if len(source) != len(targets):
        wrong.append("labels")
    elif not len(source):
        wrong.append("source_labels")
    if wrong:
        return refused(result, *wrong)
    z, y = (tensor(x).unique(return_inverse=True)[1] for x in (source, targets))
    joint = torch.nn.functional.one_hot(z).double().mT @ torch.nn.functional.one_hot(y).double()
    value = torch.xlogy(joint, joint / joint.sum(1, keepdim=True)).sum() / len(z)
    return agreed(result, (float(value), 1e-12 * (1 + abs(float(value)))))


target("scores.nce", "scores.Nce", specs=_label_pairs())(lambda spec: _nce(scores.nce, spec))
target("compat.tllib.nce", "compat.tllib.negative_conditional_entropy", specs=_label_pairs())(
    lambda spec: _nce(tllib.nce, spec)
)


@st.composite
def _logits(draw: Any) -> Spec:
    return {"logits": draw(arrays((draw(ROWS), draw(COLUMNS)))), "temperature": draw(st.sampled_from([1.0, 0.1, 50.0]))}


@target("scores.energy", "scores.Energy", specs=_logits())
def energy(spec: Spec) -> str:
    logits, t = array(spec["logits"]), spec["temperature"]
    result = outcome(scores.energy, logits, temperature=t)
    if not tensor(logits).numel() or not is_finite(logits):
        return refused(result, "logits")
    value = float((t * (tensor(logits) / t).logsumexp(1)).mean())
    return agreed(result, (value, 1e-12 * (float(tensor(logits).abs().max()) + t * 4)))


@st.composite
def _two_domains(draw: Any) -> Spec:
    dim, samples, others = draw(COLUMNS), draw(ROWS), draw(ROWS)
    dtype = (draw(st.sampled_from(["float32", "float64"])),)
    small = st.integers(-3, 3)
    return {
        "source": draw(arrays((others, dim), dtypes=dtype, exponents=small)),
        "source_labels": draw(labels(others)),
        "features": draw(arrays((samples, dim), dtypes=dtype, exponents=small)),
        "labels": draw(labels(samples)),
        "regularization": draw(st.sampled_from([None, 0.1, 10.0])),
    }


@target("scores.otce", "scores.Otce", specs=_two_domains())
def otce(spec: Spec) -> str:
    """Between - ln C and 0; the exact coupling's cost is the least there is: that of no other coupling is below."""
    source, targets = (
        (array(spec["source"]), label_array(spec["source_labels"])),
        (
            array(spec["features"]),
            label_array(spec["labels"]),
        ),
    )
    result = outcome(scores.otce, *source, *targets, regularization=spec["regularization"])
    wrong = [*_refusable(*targets), *(x for x in _refusable(*source) for x in (x, f"source_{x}"))]
    if wrong:
        return refused(result, *wrong)
    assert isinstance(result, float), result
    assert -math.log(len(tensor(targets[1]).unique())) - 1e-6 <= result <= 1e-9, result
    if spec["regularization"] is None:
        found = scores.Otce(*source, regularization=None).update(*targets).details().parts
        a, b = tensor(source[0]), tensor(targets[0])
        independent = float(torch.cdist(a, b).square().mean())
        assert -1e-9 <= found["domain_difference"] <= independent * (1 + 1e-6) + 1e-9 * float(a.square().sum() + 1)
    return "agreed"


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
    wrong = {name for x in features for name in _refusable(x, targets)}
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


# Task embeddings and gradient expectations


@st.composite
def _embeddings(draw: Any) -> Spec:
    size = draw(st.integers(0, 6))
    return {
        "embeddings": [draw(arrays((size,), exponents=st.integers(-30, 30))) for _ in range(3)],
        "negative": draw(st.sampled_from([False] * 9 + [True])),
    }


def _distance(a: Tensor, b: Tensor) -> float:
    total = a + b
    shared = total > 0
    a, b = a[shared] / total[shared], b[shared] / total[shared]
    return 1 - float(a.dot(b) / (a.norm() * b.norm()))


@target("scores.task_distance", "scores.asymmetric_task_distance", specs=_embeddings())
def task_distance(spec: Spec) -> str:
    values = [array(x) for x in spec["embeddings"]]
    if not spec["negative"]:
        values = [abs(x) for x in values]
    result = outcome(scores.task_distance, *values[:2])
    both = outcome(scores.asymmetric_task_distance, *values)
    exact = [tensor(x) for x in values]
    fine = [is_finite(x) and bool((x >= 0).all()) and bool((x > 0).any()) for x in exact]
    if not all(fine[:2]):
        refused(both, "first", "second")
        return refused(result, "first", "second")
    a, b, c = exact
    agreed(result, (_distance(a, b), 1e-9))
    if fine[2]:
        agreed(both, (_distance(a, b) - 0.15 * _distance(a, c), 1e-9))
    return "agreed"


@st.composite
def _expectations(draw: Any) -> Spec:
    shapes = draw(st.lists(st.sampled_from([(), (0,), (1,), (3,), (2, 5)]), min_size=1, max_size=3))
    plain = ("plain", "transposed", "every other", "shifted")
    return {name: [draw(arrays(shape, layouts=plain)) for shape in shapes] for name in ("source", "target")}


@target("scores.pge_gap", "scores.pge_cosine", specs=_expectations())
def pge_gap(spec: Spec) -> str:
    source, other = ([array(x) for x in spec[name]] for name in ("source", "target"))
    gap, cosine = outcome(scores.pge_gap, source, other), outcome(scores.pge_cosine, source, other)
    a, b = (torch.cat([tensor(x).flatten() for x in part]) for part in (source, other))
    if not all(is_finite(x) and bool((x != 0).any()) for x in (a, b)):
        refused(cosine, "source_expectation", "target_expectation")
        return refused(gap, "source_expectation", "target_expectation")
    expected = float((a - b).norm() / (a.norm() * b.norm()))
    agreed(gap, (expected, 1e-7 * (1 / float(a.norm()) + 1 / float(b.norm()))))
    return agreed(cosine, (float(a.dot(b) / (a.norm() * b.norm())), 1e-9))


@st.composite
def _parts(draw: Any) -> Spec:
    numbers = st.floats(-1e30, 1e30)
    return {"parts": draw(st.lists(st.tuples(numbers, numbers), max_size=5))}


@target("scores.etran_ranking", specs=_parts())
def etran_ranking(spec: Spec) -> str:
    details = {
        str(i): scores.ScoreDetails(0.0, 1, 1, 1, parts={"energy": a, "classification": b})
        for i, (a, b) in enumerate(spec["parts"])
    }
    result = outcome(scores.etran_ranking, details)
    if not details:
        return refused(result, "details")
    values = np.array(spec["parts"], dtype=np.float64)
    spread = np.ptp(values, axis=0)
    scaled = np.divide(values - values.min(0), spread, out=np.zeros_like(values), where=spread > 0)
    return agreed(np.array(list(result.values())), (scaled.sum(1), 1e-12))


# Other packages' signatures


@st.composite
def _compat(draw: Any) -> Spec:
    return {**draw(_labelled()), "regression": draw(st.booleans()), "k": draw(st.integers(1, 4))}


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
