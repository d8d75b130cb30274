"""Fuzz targets of the rest: heads, inheritance, ranking, splits, and Fisher information of a linear model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from cases import SEEDS, Spec, array, arrays, dtype_of, is_finite, label_array, labels, tensor
from hypothesis import strategies as st
from outcomes import Refusal, agreed, outcome, refused, target
from torch import Tensor, nn

from transferops import adapt, data, fisher, rank, scores

SMALL = st.integers(-3, 3)
ROWS = st.sampled_from([0, 1, 2, 3, 5, 9, 20])
WIDTH = st.sampled_from([1, 1, 2, 3, 6])


# Heads


@st.composite
def _head(draw: Any) -> Spec:
    samples, width, outputs = draw(ROWS), draw(WIDTH), draw(st.integers(1, 3))
    labelled = draw(st.booleans())
    return {
        "features": draw(arrays((samples, width), exponents=SMALL)),
        "targets": draw(labels(samples, classes=outputs, any_integers=draw(st.sampled_from([False] * 5 + [True]))))
        if labelled
        else draw(arrays((samples, outputs), exponents=SMALL)),
        "labelled": labelled,
        "prior": draw(st.one_of(st.none(), arrays((outputs, width), dtypes=("float32", "float64"), exponents=SMALL))),
        "outputs": outputs,
        "lam": draw(st.sampled_from([0.0, 1e-3, 1.0, 100.0, math.inf, -1.0, math.nan])),
        "cut": draw(st.integers(0, max(samples, 1))),
    }


def _least_squares(z: Tensor, y: Tensor, prior: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """W and b of least |y - W z - b|^2 + lam |W - prior|^2, by the least-squares problem with the penalty as rows."""
    mean, level = z.mean(0), y.mean(0)
    width = z.shape[1]
    rows = torch.cat([z - mean, math.sqrt(lam) * torch.eye(width, dtype=torch.float64)])
    goal = torch.cat([y - level - (z - mean) @ prior.mT, torch.zeros(width, y.shape[1], dtype=torch.float64)])
    weight = prior + torch.linalg.lstsq(rows, goal, driver="gelsd").solution.mT
    return weight, level - weight @ mean


@target("adapt.HeadSolver", "adapt.RecursiveHead", "adapt.k_fold_path", specs=_head())
def head_solver(spec: Spec) -> str:
    features, lam, outputs = array(spec["features"]), spec["lam"], spec["outputs"]
    targets = label_array(spec["targets"]) if spec["labelled"] else array(spec["targets"])
    prior = None if spec["prior"] is None else array(spec["prior"])
    solver = outcome(adapt.HeadSolver, prior, classes=outputs if spec["labelled"] else None, target_scale=1.0)
    if isinstance(solver, Refusal):
        assert not is_finite(prior)
        return refused(solver, "prior_weight")
    cut = spec["cut"]
    result = outcome(
        lambda: solver.update(features[:cut], targets[:cut]).update(features[cut:], targets[cut:]).solve(lam)
    )
    wrong = [] if lam >= 0 else ["lam"]
    if not len(features) or not is_finite(features):
        wrong += ["features", "weights", "targets"]
    z, y = tensor(features), tensor(targets)
    label_type = dtype_of(targets)
    if len(y) != len(z) or (not spec["labelled"] and not is_finite(targets)):
        wrong.append("targets")
    if spec["labelled"] and (
        label_type in ("bool", "float32") or (len(y) and (float(y.min()) < 0 or float(y.max()) >= outputs))
    ):
        wrong.append("targets")
    if wrong:
        return refused(result, *wrong)
    assert not isinstance(result, Refusal), result
    weight, bias = result
    assert bool(torch.isfinite(weight).all())
    assert bool(torch.isfinite(bias).all())
    if spec["labelled"]:
        y = torch.nn.functional.one_hot(y.long(), outputs).double() - 1 / outputs
    start = torch.zeros(outputs, z.shape[1], dtype=torch.float64) if prior is None else tensor(prior)
    centred = z - z.mean(0)
    values = torch.linalg.svdvals(centred)
    power = float(values[0] ** 2)
    if math.isinf(lam):
        return agreed((weight,), (start, 1e-12 * (1 + float(start.abs().max()))))
    if spec["features"]["values"] != "normal" or lam + float(values[-1] ** 2) * (len(z) > z.shape[1]) < 1e-5 * power:
        return "agreed"
    expected, level = _least_squares(z, y, start, lam)
    size = 1e-7 * (1 + float(expected.abs().max()) + float(start.abs().max()))
    agreed((weight, bias), (expected, size), (level, 1e-7 * (1 + float(level.abs().max() + (z.abs() * 1).max()))))
    if lam > 0 and len(z) > 3 and not spec["labelled"]:
        half = len(z) // 2
        first = adapt.HeadSolver(prior, target_scale=1.0).update(features[:half], targets[:half])
        follower = adapt.RecursiveHead(first, lam).update(features[half:], targets[half:])
        agreed((follower.weight,), (expected, 100 * size))
        second = adapt.HeadSolver(prior, target_scale=1.0).update(features[half:], targets[half:])
        path = adapt.k_fold_path([first, second], [lam])
        loss = 0.0
        for fit, held in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
            w, b = _least_squares(z[fit], y[fit], start, lam)
            loss += float((y[held] - z[held] @ w.mT - b).square().sum())
        found = float(path.held_out[0].sum())
        assert min(abs(found * factor - loss) for factor in (1, len(z), len(z) * outputs)) <= 1e-5 * (1 + loss)
    return "agreed"


@st.composite
def _published(draw: Any) -> Spec:
    samples, width, outputs = draw(ROWS), draw(WIDTH), draw(st.integers(1, 3))
    return {
        "features": draw(arrays((samples, width), exponents=SMALL)),
        "targets": draw(arrays((samples, outputs), exponents=SMALL)),
        "weight": draw(arrays((outputs, width), exponents=SMALL)),
        "bias": draw(st.one_of(st.none(), arrays((outputs,), exponents=SMALL))),
    }


@target("adapt.published_head", specs=_published())
def published_head(spec: Spec) -> str:
    values = {name: None if value is None else array(value) for name, value in spec.items()}
    result = outcome(adapt.published_head, **values)
    wrong = [name for name, value in values.items() if value is not None and not is_finite(value)]
    if dtype_of(values["features"]) in ("float16", "bfloat16") or not len(values["features"]):
        wrong += ["features", "targets"]
    # A number may leave the range of the features' dtype, in which all is computed.
    if wrong:
        return refused(result, *wrong)
    assert not isinstance(result, Refusal), result
    z, y, w = (tensor(values[name]) for name in ("features", "targets", "weight"))
    s = torch.linalg.svdvals(z)
    if dtype_of(values["features"]) == "float64" and values["bias"] is None and float(s[-1]) > 1e-4 * float(s[0]) > 0:
        expected = w + (torch.linalg.pinv(z) @ (y - z @ w.mT)).mT
        return agreed(result[:1], (expected, 1e-6 * (1 + float(expected.abs().max()))))
    return "agreed"


@st.composite
def _model_data(draw: Any) -> Spec:
    samples, width, classes = draw(st.sampled_from([0, 1, 2, 5, 12, 30])), draw(WIDTH), draw(st.integers(1, 3))
    return {
        "features": draw(arrays((samples, width), dtypes=("float32", "float64"), exponents=SMALL)),
        "labels": draw(labels(samples, classes=classes, any_integers=draw(st.sampled_from([False] * 5 + [True])))),
        "classes": classes,
        "seed": draw(SEEDS),
        "lam": draw(st.sampled_from([None, None, 0.0, 1.0, math.inf])),
        "estimator": draw(st.sampled_from(["exact", "empirical", "monte_carlo"])),
    }


def _linear(spec: Spec) -> tuple[nn.Linear, Tensor, Tensor, list[str]]:
    """A linear model, inputs, labels, and what is wrong with them."""
    features, targets = (
        torch.as_tensor(x.copy() if isinstance(x, np.ndarray) else x)
        for x in (
            array(spec["features"]),
            label_array(spec["labels"]),
        )
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec["seed"])
        model = nn.Linear(features.shape[1], spec["classes"]).to(features.dtype)
    wrong = []
    if not len(features) or not is_finite(features):
        wrong.append("batches")
    if (
        len(features) != len(targets)
        or targets.dtype == torch.bool
        or (len(targets) and not 0 <= int(targets.long().min()) <= int(targets.long().max()) < spec["classes"])
    ):
        wrong.append("labels")
    return model, features, targets, wrong


@target("adapt.adapt_head", specs=_model_data())
def adapt_head(spec: Spec) -> str:
    """The model is left alone; the new head is finite, and the report's held-out loss is no worse than it claims."""
    model, features, targets, wrong = _linear(spec)
    before = model.weight.detach().clone()
    result = outcome(adapt.adapt_head, model, [(features, targets)], lam=spec["lam"])
    assert torch.equal(before, model.weight)
    numbers = targets.dtype == torch.float32  # with one output, targets to be regressed on
    if isinstance(result, Refusal):
        few = len(features) < 2 or spec["lam"] is None
        assert wrong or few or numbers, result
        return "refused"
    assert not wrong or numbers, result
    adapted, report = result
    assert all(bool(torch.isfinite(p).all()) for p in adapted.parameters())
    assert report.loss_after >= 0
    return "agreed"


@target("fisher.FisherInformation", "fisher.Accumulator", "scores.task_embedding", specs=_model_data())
def fisher_information(spec: Spec) -> str:
    """Of a linear softmax model in closed form: the diagonal, the trace and a Gram matrix of random directions."""
    model, features, targets, wrong = _linear(spec)
    estimator = spec["estimator"]
    information = fisher.FisherInformation(model, estimator)
    batches = [(features, targets)] if estimator == "empirical" else [features]
    if estimator != "empirical":
        wrong = [name for name in wrong if name != "labels"]
    diagonal = outcome(information.diagonal, batches)
    if isinstance(diagonal, Refusal):
        assert wrong or (estimator == "empirical" and targets.dtype == torch.float32), diagonal
        return "refused"
    if not is_finite(features):
        assert not all(bool(torch.isfinite(x).all()) for x in diagonal.values()), "NaN in, and numbers out"
        return "agreed"
    if targets.dtype == torch.float32:
        return "agreed"
    assert not wrong, wrong
    x = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], 1)
    p = (features.double() @ model.weight.detach().double().mT + model.bias.detach().double()).softmax(1)
    if estimator == "empirical":
        residual = torch.nn.functional.one_hot(targets.long(), spec["classes"]).double() - p
        curvature = residual.unsqueeze(2) * residual.unsqueeze(1)
    else:
        curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    if estimator != "monte_carlo":
        full = torch.einsum("ncd,ni,nj->cidj", curvature, x, x) / len(x)
        expected = full.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1)
        size = float(x.square().sum(1).max())
        tolerance = (1e-4 if features.dtype == torch.float32 else 1e-9) * (1 + size)
        got = torch.cat([diagonal["weight"].double(), diagonal["bias"].double().unsqueeze(1)], 1)
        agreed((got,), (expected, tolerance))
        generator = torch.Generator().manual_seed(spec["seed"])
        moves = torch.randn(2, spec["classes"], x.shape[1], generator=generator, dtype=torch.float64)
        directions = [{"weight": m[:, :-1].to(features.dtype), "bias": m[:, -1].to(features.dtype)} for m in moves]
        gram = information.gram(directions, batches)
        agreed((gram,), (torch.einsum("kci,cidj,ldj->kl", moves, full, moves), tolerance * 40))
        parts = information.accumulate("trace")
        for begin in (0, len(x) // 2):
            part = slice(begin, len(x) if begin or len(x) < 2 else len(x) // 2)
            batch = features[part]
            parts.update([(batch, targets[part])] if estimator == "empirical" else [batch])
            if len(x) < 2:
                break
        assert abs(parts.compute() - float(expected.sum())) <= tolerance * expected.numel()
    embedding = scores.task_embedding(model, batches, body=["weight"], estimator=estimator)
    agreed((embedding,), (diagonal["weight"].double().mean(1), 1e-6 * (1 + float(diagonal["weight"].abs().max()))))
    return "agreed"


@st.composite
def _tangents(draw: Any) -> Spec:
    return {"tangents": draw(arrays((draw(st.integers(0, 4)), draw(ROWS), draw(WIDTH))))}


@target("fisher.tangent_gram", specs=_tangents())
def tangent_gram(spec: Spec) -> str:
    tangents = array(spec["tangents"])
    result = outcome(fisher.tangent_gram, tangents)
    if not isinstance(tangents, Tensor):
        return refused(result, "tangents")
    rows = tensor(tangents).flatten(1)
    size = rows.abs() @ rows.abs().mT
    return agreed((result,), (rows @ rows.mT, (rows.shape[1] + 8) * torch.finfo(torch.float64).eps * size))


# Inheritance


@st.composite
def _inheritance(draw: Any) -> Spec:
    return {
        "upstream": [draw(st.integers(1, 6)) for _ in range(4)],
        "target": [draw(st.integers(1, 6)) for _ in range(4)],
        "equal": draw(st.booleans()),
        "alpha": draw(st.sampled_from([0.0, 1.0, 0.5, 0.3, -0.1, 1.1, math.nan])),
        "granularity": draw(st.sampled_from(["element", "filter", "layer", "block", "channel"])),
        "select": draw(st.sampled_from(["random", "uniform", "magnitude", "best"])),
        "spoil": draw(st.sampled_from([None] * 9 + ["nan"])),
        "seed": draw(SEEDS),
    }


def _network(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


@target("adapt.inherit", "adapt.load_matching", "adapt.freeze", specs=_inheritance())
def inherit(spec: Spec) -> str:
    """alpha = 0 changes nothing, 1 copies all between equal networks; every other value is the one's or the other's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec["seed"])
        upstream = _network(spec["upstream"])
        model = _network(spec["upstream"] if spec["equal"] else spec["target"])
    if spec["spoil"]:
        with torch.no_grad():
            upstream[0].weight[0, 0] = math.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alpha, granularity, select = spec["alpha"], spec["granularity"], spec["select"]
    result = outcome(adapt.inherit, model, upstream.state_dict(), alpha, granularity, select, spec["seed"])
    after = model.state_dict()
    wrong = [] if 0 <= alpha <= 1 else ["alpha"]
    wrong += ["granularity"] if granularity == "channel" else []
    wrong += ["select"] if select == "best" else []
    if isinstance(result, Refusal):
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert wrong or spec["spoil"] or not spec["equal"], result
        return "refused"
    assert not wrong, wrong
    if alpha == 0:
        assert all(torch.equal(before[name], after[name]) for name in before)
    if alpha == 1 and spec["equal"]:
        assert all(torch.equal(after[name], value) for name, value in upstream.state_dict().items())
    if spec["equal"]:
        for name, value in upstream.state_dict().items():
            assert bool(((after[name] == before[name]) | (after[name] == value)).all()), name
    for item in result.tensors:
        assert 0 <= item.copied <= item.total
    adapt.freeze(model, result.masks)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(4, spec["upstream" if spec["equal"] else "target"][0])
    loss = model.train()(inputs).sum()
    if loss.requires_grad:
        loss.backward()
        optimizer.step()
    for name, mask in result.masks.items():
        value = model.state_dict()[name]
        if value.is_floating_point() and mask.dtype == torch.bool and mask.shape == value.shape:
            assert torch.equal(value[mask], kept[name][mask]), name
    loaded = outcome(adapt.load_matching, model, upstream.state_dict())
    assert isinstance(loaded, (Refusal, adapt.InheritanceReport))
    return "agreed"


# Effects and rankings


@st.composite
def _metrics(draw: Any) -> Spec:
    usual = st.sampled_from([[0.0, 1.0], [0.0, 0.5, 1.0], [1.0, 0.25, 0.0]])
    alphas = draw(st.one_of(usual, usual, st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=4)))
    return {
        "metrics": draw(
            arrays(
                (len(alphas), draw(st.sampled_from([2, 3, 5, 10, 1, 0]))),
                dtypes=("float64", "float32"),
                layouts=("plain", "numpy"),
                exponents=st.integers(-30, 30),
            )
        ),
        "alphas": alphas,
        "interval": draw(st.sampled_from(["t", "bootstrap"])),
        "confidence": draw(st.sampled_from([0.95, 0.95, 0.5, 0.5, 0.0, 1.0])),
    }


@target("adapt.paired_effects", "adapt.transfer_check", specs=_metrics())
def paired_effects(spec: Spec) -> str:
    """The mean difference, inside its interval, which is Student's; transfer_check reports the same."""
    from scipy import stats

    metrics, alphas = array(spec["metrics"]), spec["alphas"]
    options = {"confidence": spec["confidence"], "interval": spec["interval"]}
    result = outcome(adapt.paired_effects, metrics, alphas, **options, resamples=200)
    wrong = ["metrics"] if metrics.shape[1] < 2 or not is_finite(metrics) else []
    wrong += ["alphas"] if alphas.count(0.0) != 1 or len(set(alphas)) < max(len(alphas), 2) else []
    wrong += ["confidence"] if spec["confidence"] in (0.0, 1.0) else []
    if wrong:
        return refused(result, *wrong)
    assert not isinstance(result, Refusal), result
    values = tensor(metrics).numpy()
    rows = dict(zip(alphas, values))
    for effect in result:
        difference = rows[effect.alpha] - rows[0.0]
        size = float(np.abs(values).max())
        assert abs(effect.difference - difference.mean()) <= 1e-12 * size
        assert effect.low <= effect.difference + 1e-9 * size
        assert effect.difference <= effect.high + 1e-9 * size
        spread = float(difference.std(ddof=1))
        if spec["interval"] == "t" and spread > 1e-6 * max(size, 1e-300):
            error = (1 - spec["confidence"]) / (len(alphas) - 1)
            half = stats.t.ppf(1 - error / 2, len(difference) - 1) * spread / math.sqrt(len(difference))
            assert abs(effect.high - effect.difference - half) <= 1e-6 * half, (effect, half)
    checked = outcome(
        adapt.transfer_check,
        lambda alpha, seed: float(rows[alpha][seed]),
        alphas,
        range(values.shape[1]),
        **options,
    )
    assert not isinstance(checked, Refusal), checked
    for ours, theirs in zip(sorted(result, key=lambda e: e.alpha), sorted(checked.effects, key=lambda e: e.alpha)):
        assert ours.difference == theirs.difference
    return "agreed"


@st.composite
def _rankings(draw: Any) -> Spec:
    shape = draw(st.sampled_from([(2,), (3,), (7,), (2, 5), (1,), (0,), (3, 4)]))
    plain = {"dtypes": ("float64", "float32"), "layouts": ("plain", "numpy"), "exponents": st.integers(-30, 30)}
    return {
        "scores": draw(arrays(shape, **plain)),
        "accuracies": draw(arrays(shape, **plain)),
        "k": draw(st.integers(0, 4)),
    }


@target("rank.evaluate_ranking", "rank.compare_scores", specs=_rankings())
def evaluate_ranking(spec: Spec) -> str:
    found, accuracies, k = array(spec["scores"]), array(spec["accuracies"]), spec["k"]
    result = outcome(rank.evaluate_ranking, found, accuracies, k=k, resamples=20)
    compared = outcome(rank.compare_scores, {"score": found}, accuracies, k=k, resamples=20)
    wrong = [] if is_finite(found) else ["scores"]
    wrong += [] if is_finite(accuracies) else ["accuracies"]
    candidates = found.shape[-1]
    if candidates < 2:
        wrong += ["scores"]
    if not 1 <= k <= candidates:
        wrong += ["k"]
    if wrong:
        refused(compared, *wrong)
        return refused(result, *wrong)
    assert compared["score"].recall == result.recall
    for name, low, high in (("weighted_tau", -1, 1), ("pearson", -1, 1), ("recall", 0, 1)):
        value = getattr(result, name).value
        assert math.isnan(value) or low - 1e-9 <= value <= high + 1e-9, (name, value)
    tau = result.weighted_tau
    if math.isfinite(tau.low):
        assert -1 <= tau.low <= tau.value + 1e-9 <= tau.high + 2e-9 <= 1 + 2e-9, tau
    x, y = np.atleast_2d(tensor(found).numpy()), np.atleast_2d(tensor(accuracies).numpy())
    if spec["scores"]["values"] == spec["accuracies"]["values"] == "normal":
        expected = np.mean([np.corrcoef(a / np.abs(a).max(), b / np.abs(b).max())[0, 1] for a, b in zip(x, y)])
        assert abs(result.pearson.value - expected) <= 1e-6
        chosen = [b[np.argsort(-a, kind="stable")[:k]].max() / b.max() for a, b in zip(x, y)]
        if all(b.max() > 0 for b in y):
            assert abs(result.relative_accuracy.value - np.mean(chosen)) <= 1e-9 * (1 + np.abs(chosen).max())
    return "agreed"


@target("rank.extract", specs=_model_data())
def extract(spec: Spec) -> str:
    """The inputs of a linear model, its outputs and the labels, in order."""
    model, features, targets, _ = _linear(spec)
    half = len(features) // 2
    batches = [(features[:half], targets[:half]), (features[half:], targets[half:])]
    result = outcome(rank.extract, model, batches)
    if isinstance(result, Refusal):
        floating = targets.dtype == torch.float32
        assert len(features) != len(targets) or len(features) < 2 or floating or targets.dtype == torch.bool, result
        return "refused"
    assert torch.equal(result.features[rank.HEAD_INPUT].nan_to_num(), features.nan_to_num())
    assert torch.equal(result.labels, targets.long())
    return "agreed"


@st.composite
def _split(draw: Any) -> Spec:
    return {
        "labels": draw(st.lists(st.integers(0, 3), min_size=1, max_size=20)) + [1, 3] * draw(st.integers(0, 6)),
        "shots": draw(st.sampled_from([1, 1, 1, 2, 2, 3, 5, 0, -1])),
        "fraction": draw(st.sampled_from([0.2, 0.0, 0.2, 0.5, 0.9, 1.0, -0.1, math.nan])),
        "seed": draw(st.sampled_from([0, 1, 2, 3, -1])),
    }


@target("data.few_shot_split", specs=_split())
def few_shot_split(spec: Spec) -> str:
    """A partition; shots of every class in training and validation together."""
    y = torch.tensor(spec["labels"])
    domain = data.Domain("d", torch.arange(len(y), dtype=torch.float32).unsqueeze(1), y)
    result = outcome(data.few_shot_split, domain, spec["shots"], spec["fraction"], spec["seed"])
    least = int(torch.bincount(y)[torch.bincount(y) > 0].min())
    wrong = ["shots"] if spec["shots"] < 1 or least <= spec["shots"] else []
    wrong += [] if 0 <= spec["fraction"] < 1 else ["validation_fraction"]
    wrong += ["seed"] if spec["seed"] < 0 else []
    if wrong:
        return refused(result, *wrong)
    assert not isinstance(result, Refusal), result
    parts = [part for part in (result.train, result.validation, result.test) if part is not None]
    assert sorted(int(i) for part in parts for i in part.inputs[:, 0]) == list(range(len(y)))
    assert len(result.test) == len(y) - spec["shots"] * len(y.unique())
    return "agreed"
