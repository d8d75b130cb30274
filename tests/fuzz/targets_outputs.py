"""Fuzz targets of transferops.scores: scores of outputs and labels, of two domains, of embeddings and gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from cases import Spec, array, arrays, as_given, dtype_of, is_finite, label_array, labels, tensor
from hypothesis import strategies as st
from outcomes import Refusal, agreed, outcome, refused, target
from targets_scores import COLUMNS, ROWS, refusable
from torch import Tensor

from transferops import scores
from transferops.compat import tllib


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
    wrong = [*refusable(*targets), *(x for x in refusable(*source) for x in (x, f"source_{x}"))]
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
