"""GBC, PARC, N-LEEP, SFDA, ETran, energy, OTCE and Task2Vec against references written from the published formulas."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torch import Tensor, nn

from transferops.scores import (
    Etran,
    Otce,
    ScoreWarning,
    Sfda,
    asymmetric_task_distance,
    energy,
    etran,
    etran_ranking,
    gbc,
    knn,
    leep,
    n_leep,
    nce,
    otce,
    parc,
    sfda,
    task_distance,
    task_embedding,
)

CLASSES = 4


def problem(
    samples: int = 90, dim: int = 7, *, signal: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Classes of different sizes, features with different variances and an offset."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(samples) * 7 // 3 % (CLASSES + 1)).clamp(max=CLASSES - 1)
    means = signal * torch.randn(CLASSES, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, dim, generator=generator, dtype=torch.float64)
    return (0.3 * (noise + means[labels]) * torch.linspace(0.5, 2, dim) + 0.5).to(dtype), labels


def quiet(call: Callable[..., float], *arguments: Any, **options: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*arguments, **options)


def principal(features: Tensor, components: int) -> np.ndarray:
    x = features.double().numpy()
    x = x - x.mean(0)
    u, s, v = linalg.svd(x, full_matrices=False)
    sign = np.sign(np.take_along_axis(v, np.abs(v).argmax(1)[:, None], 1))[:, 0]
    rank = int((s > 1e-7 * s[0]).sum())
    return (u * s * sign)[:, : min(components, rank)]


# GBC


def gbc_by_definition(points: np.ndarray, labels: np.ndarray, spherical: bool) -> float:
    total = 0.0
    statistics = []
    for c in np.unique(labels):
        rows = points[labels == c]
        variance = rows.var(0)
        statistics.append((rows.mean(0), np.full_like(variance, variance.mean()) if spherical else variance))
    for i, (mean_i, var_i) in enumerate(statistics):
        for j, (mean_j, var_j) in enumerate(statistics):
            if i != j:
                pooled = np.diag((var_i + var_j) / 2)
                gap = mean_i - mean_j
                distance = gap @ np.linalg.inv(pooled) @ gap / 8
                determinants = np.prod(var_i) * np.prod(var_j)
                distance += 0.5 * math.log(np.linalg.det(pooled) / math.sqrt(determinants))
                total -= math.exp(-distance)
    return total


@pytest.mark.parametrize("covariance", ["diagonal", "spherical"])
@pytest.mark.parametrize(("samples", "dim", "components"), [(90, 7, 64), (90, 7, 3), (60, 80, 10), (90, 1, 64)])
def test_gbc_equals_its_definition(samples: int, dim: int, components: int, covariance: str) -> None:
    features, labels = problem(samples, dim)
    want = gbc_by_definition(principal(features, components), labels.numpy(), covariance == "spherical")
    value = quiet(gbc, features, labels, covariance=covariance, components=components)
    assert value == pytest.approx(want, rel=1e-9)


def test_gbc_of_coinciding_and_of_distant_classes() -> None:
    """The bounds: -C(C-1) if all classes are the same Gaussian, 0 if they are far apart."""
    block, _ = problem(40, 5)
    features, labels = torch.cat([block] * 3), torch.arange(3).repeat_interleave(40)
    assert quiet(gbc, features, labels) == pytest.approx(-6, rel=1e-12)
    assert quiet(gbc, features + 1e3 * labels.unsqueeze(1), labels) == pytest.approx(0, abs=1e-12)


def test_gbc_invariances() -> None:
    features, labels = problem()
    want = gbc(features, labels)
    rotation, _ = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1)).double())
    assert gbc(features @ rotation * 1e6 - 3, labels) == pytest.approx(want, rel=1e-8)


def test_gbc_class_of_one_sample_overlaps_with_none() -> None:
    features, labels = problem()
    labels[0] = 99
    with pytest.warns(ScoreWarning, match="1 of 5 classes have one sample"):
        value = gbc(features, labels)
    points = principal(features, 7)  # what is left without that class, in the same components
    want = gbc_by_definition(points[1:], labels.numpy()[1:], False)
    assert value == pytest.approx(want, rel=1e-9)


# PARC


def parc_by_definition(points: np.ndarray, labels: np.ndarray) -> float:
    scaled = (points - points.mean(0)) / points.std(0)
    far = 1 - np.corrcoef(scaled)
    other = 1 - np.corrcoef(np.eye(int(labels.max()) + 1)[labels])
    pairs = np.triu_indices(len(labels), 1)
    return 100 * float(stats.spearmanr(far[pairs], np.round(other[pairs], 9)).statistic)


@pytest.mark.parametrize(("samples", "dim", "components"), [(90, 7, None), (90, 7, 32), (90, 40, 5), (40, 60, 32)])
def test_parc_equals_its_definition(samples: int, dim: int, components: int | None) -> None:
    features, labels = problem(samples, dim)
    points = features.numpy() if components is None else principal(features, components)
    assert quiet(parc, features, labels, components=components) == pytest.approx(
        parc_by_definition(points, labels.numpy()), rel=1e-8
    )


def test_parc_with_ties() -> None:
    """Every sample twice: tied distances take their mean rank, as in scipy."""
    features, labels = problem(30, 6)
    features, labels = torch.cat([features, features]).round(decimals=1), torch.cat([labels, labels])
    want = parc_by_definition(features.numpy(), labels.numpy())
    assert quiet(parc, features, labels, components=None) == pytest.approx(want, rel=1e-3)


def test_parc_is_invariant_to_the_scale_of_single_features() -> None:
    features, labels = problem()
    scaled = features * torch.logspace(-5, 5, 7).double() + 7
    assert parc(scaled, labels, components=None) == pytest.approx(parc(features, labels, components=None), rel=1e-9)


def test_parc_without_contrast_is_zero_with_a_warning() -> None:
    features, labels = problem(20)
    for values, classes in ((features, labels * 0), (features, torch.arange(20)), (torch.ones(20, 3), labels)):
        with pytest.warns(ScoreWarning, match="all pairs of samples are equally far"):
            assert parc(values, classes) == 0
    with pytest.warns(ScoreWarning, match="1 samples are level over all components"):
        parc(torch.cat([features, features.mean(0, keepdim=True)]), torch.cat([labels, labels[:1]]), components=None)


# N-LEEP


@pytest.mark.parametrize(("samples", "dim"), [(200, 8), (60, 90)])
def test_n_leep_equals_leep_of_a_mixture(samples: int, dim: int) -> None:
    """With scikit-learn's own PCA; its scale and signs are free, which the mixture must not notice."""
    decomposition, mixture = pytest.importorskip("sklearn.decomposition"), pytest.importorskip("sklearn.mixture")
    features, labels = problem(samples, dim, signal=2.0)
    points = decomposition.PCA(n_components=0.8, svd_solver="full").fit_transform(features.numpy())
    points = points / np.sqrt(np.square(points).mean())
    model = mixture.GaussianMixture(2 * CLASSES, random_state=3).fit(points)
    want = leep(model.predict_proba(points), labels)
    assert n_leep(features, labels, components_per_class=2, seed=3) == pytest.approx(want, rel=1e-5)


def test_n_leep_is_at_most_zero_and_orders_by_signal() -> None:
    values = [n_leep(*problem(200, 6, signal=signal), components_per_class=2) for signal in (0.0, 1.0, 4.0)]
    assert values == sorted(values)
    assert values[-1] <= 0


# SFDA, ETran


def discriminant_by_definition(x: np.ndarray, y: np.ndarray, shrinkage: float | None) -> tuple[np.ndarray, float]:
    """Class probabilities by the generalised eigenvectors of the papers, all of them kept."""
    classes, dim = np.unique(y), x.shape[1]
    prior = np.array([np.mean(y == c) for c in classes])
    means = np.stack([x[y == c].mean(0) for c in classes])
    within = sum(p * np.cov(x[y == c].T, bias=True).reshape(dim, dim) for p, c in zip(prior, classes))
    if shrinkage is None:
        shrinkage = max(math.exp(-5 * np.linalg.eigvalsh(within)[-1]), 1e-10)
    total = np.cov(x.T, bias=True).reshape(dim, dim)
    shrink = [(1 - shrinkage) * s + shrinkage * np.trace(s) / dim * np.eye(dim) for s in (within, total)]
    _, vectors = linalg.eigh(shrink[1] - shrink[0], shrink[0])
    projected = means @ vectors @ vectors.T
    logits = x @ projected.T - 0.5 * np.diag(means @ projected.T) + np.log(prior)
    logits = np.exp(logits - logits.max(1, keepdims=True))
    return logits / logits.sum(1, keepdims=True), shrinkage


def sfda_by_definition(features: Tensor, labels: Tensor, log: bool) -> float:
    x, y = features.double().numpy(), labels.numpy()
    probability, shrinkage = discriminant_by_definition(x, y, None)
    soft = np.exp(probability) / np.exp(probability).sum(1, keepdims=True)
    own = soft[np.arange(len(y)), y][:, None]
    means = np.stack([x[y == c].mean(0) for c in range(CLASSES)])
    others = np.stack([np.delete(means, c, 0).mean(0) for c in range(CLASSES)])
    mixed = own * x + (1 - own) * others[y]
    final, _ = discriminant_by_definition(mixed, y, shrinkage)
    picked = final[np.arange(len(y)), y]
    return float((np.log(picked) if log else picked).mean())


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(("samples", "dim"), [(90, 7), (150, 30), (90, 1)])
@pytest.mark.parametrize("log", [True, False])
def test_sfda_equals_its_definition(samples: int, dim: int, log: bool, scale: float) -> None:
    features, labels = problem(samples, dim)
    value = quiet(sfda, features * scale, labels, log=log)
    assert value == pytest.approx(sfda_by_definition(features * scale, labels, log), rel=1e-7)


def test_sfda_invariances() -> None:
    """Shifts and rotations; not the scale, through which the published shrinkage is chosen."""
    features, labels = problem()
    want = sfda(features, labels)
    rotation, _ = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1)).double())
    assert sfda(features @ rotation + 100, labels) == pytest.approx(want, rel=1e-9)
    assert sfda(features * 10, labels) != pytest.approx(want, rel=1e-3)


def test_sfda_details() -> None:
    features, labels = problem()
    details = Sfda().update(features, labels).details()
    assert details.parts["probability"] == pytest.approx(sfda(features, labels, log=False), rel=1e-12)
    assert 0 < details.shrinkage < 1


@pytest.mark.parametrize("score", [sfda, etran])
def test_discriminant_special_cases_warn(score: Callable[..., float]) -> None:
    features, labels = problem(30, 3)
    with pytest.warns(ScoreWarning, match="all samples are of one class"):
        assert math.isfinite(score(features, labels * 0))
    with pytest.warns(ScoreWarning, match="every feature is constant"):
        assert math.isfinite(score(torch.ones(30, 3), labels))
    with pytest.warns(ScoreWarning, match="the samples of each class coincide"):
        apart = score(torch.eye(3).repeat(10, 1), torch.arange(30) % 3)
    assert math.isfinite(apart)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(score(*problem(20, 40)))  # N < D


@pytest.mark.parametrize(("samples", "dim"), [(90, 7), (150, 30)])
def test_etran_classification_equals_its_definition(samples: int, dim: int) -> None:
    features, labels = problem(samples, dim)
    x, y = features.numpy(), labels.numpy()
    probability, _ = discriminant_by_definition(x, y, None)
    details = Etran().update(features, labels).details()
    assert details.parts["classification"] == pytest.approx(probability[np.arange(len(y)), y].mean(), rel=1e-8)
    assert details.parts["energy"] == pytest.approx(np.log(np.exp(x).sum(1)).mean(), rel=1e-12)
    assert quiet(etran, features, labels) == pytest.approx(sum(details.parts.values()), rel=1e-12)


def test_etran_classification_is_not_the_nearest_mean() -> None:
    """Two classes told apart by a small feature beside a large noisy one: the nearest mean, as released, misses it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    features = torch.randn(400, 2, generator=generator).double() * torch.tensor([3.0, 0.05])
    features[:, 1] += 0.3 * labels
    details = Etran().update(features, labels).details()
    means = torch.stack([features[labels == c].mean(0) for c in (0, 1)])
    released = (features @ means.mT - means.square().sum(1) / 2).softmax(1).gather(1, labels.unsqueeze(1)).mean()
    assert details.parts["classification"] > 0.95
    assert released < 0.65


@pytest.mark.parametrize(("samples", "dim", "outputs"), [(60, 7, 2), (20, 30, 1)])
def test_etran_regression_equals_its_definition(samples: int, dim: int, outputs: int) -> None:
    features, _ = problem(samples, dim)
    targets = torch.randn(samples, outputs, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fitted = features.numpy() @ np.linalg.pinv(features.numpy()) @ targets.numpy()
    details = Etran(regression=True).update(features, targets).details()
    assert details.parts["regression"] == pytest.approx(-np.square(fitted - targets.numpy()).mean(), abs=1e-9)
    assert etran(features, targets) == pytest.approx(details.value)


def test_etran_ranking_brings_parts_to_one_scale() -> None:
    details = {name: Etran().update(*problem(signal=signal)).details() for name, signal in (("a", 0.1), ("b", 2.0))}
    ranking = etran_ranking(details)
    for name, other in (("a", "b"), ("b", "a")):
        want = sum(details[name].parts[part] > details[other].parts[part] for part in ("energy", "classification"))
        assert ranking[name] == want


# Energy


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_energy_equals_its_definition(temperature: float) -> None:
    logits = problem(50, 9)[0] * 10
    want = np.mean([temperature * math.log(sum(math.exp(z / temperature) for z in row)) for row in logits.tolist()])
    assert quiet(energy, logits, temperature=temperature) == pytest.approx(want, rel=1e-12)
    assert quiet(energy, logits.float() + 1e4) == pytest.approx(quiet(energy, logits.float()) + 1e4, rel=1e-7)


# OTCE


def test_otce_of_the_exact_coupling() -> None:
    """Target samples are source samples, moved a little and shuffled: they must be matched one to one."""
    pytest.importorskip("ot")
    features, labels = problem(40, 5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    target = features[order] + 1e-3
    target_labels = (torch.arange(40) // 3) % 3
    score = Otce(features, labels, regularization=None)
    details = score.update(target[:10], target_labels[:10]).update(target[10:], target_labels[10:]).details()
    assert details.value == pytest.approx(nce(labels[order], target_labels), rel=1e-9)
    assert details.parts["domain_difference"] == pytest.approx(5e-6, rel=1e-6)
    value = otce(features, labels, target, target_labels, regularization=None, coefficients=(-2.0, -0.5, 3.0))
    assert value == pytest.approx(3 - 2 * 5e-6 + 0.5 * details.value, rel=1e-9)


def test_otce_of_the_entropic_coupling() -> None:
    pytest.importorskip("ot")
    source, source_labels = problem(30, 4)
    target, labels = problem(20, 4, seed=1)
    cost = torch.cdist(source, target).square()
    plan = torch.exp(-cost / 0.5)
    for _ in range(2000):  # Sinkhorn's own iteration
        plan = plan / plan.sum(1, keepdim=True) / 30
        plan = plan / plan.sum(0, keepdim=True) / 20
    joint = torch.stack(
        [torch.stack([plan[source_labels == a][:, labels == b].sum() for b in range(4)]) for a in range(4)]
    )
    want = float((torch.special.xlogy(joint, joint / joint.sum(1, keepdim=True))).sum())
    details = Otce(source, source_labels, regularization=0.5).update(target, labels).details()
    assert details.value == pytest.approx(want, rel=1e-6)
    assert details.parts["domain_difference"] == pytest.approx(float((plan * cost).sum()), rel=1e-6)


def test_otce_against_another_source_cannot_be_merged() -> None:
    source, labels = problem(12, 3)
    score = Otce(source, labels).update(source, labels)
    with pytest.raises(ValueError, match="other: expected an Otce with source="):
        score.merge(Otce(source + 1, labels))
    with pytest.raises(ValueError, match="state: expected that of"):
        Otce(source, labels + 1).load_state_dict(score.state_dict())
    twin = Otce(source, labels)
    twin.load_state_dict(score.state_dict())
    assert twin.merge(score).samples == 24


# Task2Vec


def test_task_distances_equal_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, trivial = (torch.rand(30, generator=generator, dtype=torch.float64) for _ in range(3))

    def distance(x: Tensor, y: Tensor) -> float:
        u, v = (x / (x + y)).numpy(), (y / (x + y)).numpy()
        return 1 - float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))

    assert task_distance(a, b) == pytest.approx(distance(a, b), rel=1e-12)
    assert task_distance(a, b) == pytest.approx(task_distance(b, a), rel=1e-12)
    assert task_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert asymmetric_task_distance(a, b, trivial) == pytest.approx(
        distance(a, b) - 0.15 * distance(a, trivial), rel=1e-12
    )
    scales = torch.logspace(-9, 9, 30, dtype=torch.float64)  # per entry: what a filter's own scale must not do
    assert task_distance(a * scales, b * scales) == pytest.approx(task_distance(a, b), rel=1e-12)
    silent = torch.cat([a, torch.zeros(5).double()]), torch.cat([b, torch.zeros(5).double()])
    assert task_distance(*silent) == pytest.approx(task_distance(a, b), rel=1e-12)


@pytest.mark.parametrize("estimator", ["empirical", "exact"])
def test_task_embedding_equals_per_sample_gradients(estimator: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(12, 6).double(), torch.arange(12) % 3
    body = ["0.weight", "0.bias", "2.weight"]
    want = []
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameters[name]) for name in body}
    for n in range(12):
        logp = model(x[n : n + 1]).log_softmax(1)[0]
        for c in range(3):
            weight = float(c == y[n]) if estimator == "empirical" else float(logp[c].detach().exp())
            grads = torch.autograd.grad(logp[c], [parameters[name] for name in body], retain_graph=True)
            for name, grad in zip(body, grads):
                total[name] += weight * grad.square() / 12
    want = torch.cat([total[name].mean(1) for name in ("0.weight", "2.weight")])
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    got = task_embedding(model, batches, body=body, estimator=estimator)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


# Random labels: no score may see signal where there is none.


def test_scores_of_random_labels() -> None:
    """Means over draws within 4 standard errors of what holds without signal."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(80) % 2
    draws = [torch.randn(80, 3, generator=generator).double() for _ in range(60)]
    values = np.array([[parc(x, labels), gbc(x, labels), knn(x, labels, metric="euclidean")] for x in draws])
    error = values.std(0, ddof=1) / math.sqrt(len(draws))
    assert abs(values[:, 0].mean()) < 4 * error[0]
    # Two Gaussians with the same parameters, estimated from n each: E[D] ~ (k/4 + k/8) / n for k directions, n = 40
    # (mean gap: |gap|^2 / 8 with variance 2/n; log ratio of variances: (2/n + 2/n) / 16 each).
    overlap = -values[:, 1].mean() / 2
    assert 1 - overlap == pytest.approx(3 * (1 / 4 + 1 / 4) / 40, rel=0.25)
    # The nearest of the 79 others is as likely of the own class as any of them: 39 are.
    assert abs(values[:, 2].mean() - 39 / 79) < 4 * error[2]
