"""The H-score against its definition, and every numeric and label trap that published implementations fall into."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from transferops import scores
from transferops.scores import HScore, ScoreWarning, h_score

CLASSES = 6


def problem(
    samples: int = 800,
    dim: int = 20,
    classes: int = CLASSES,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Class means one standard deviation apart, features mixed by a random matrix."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    means = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, dim, generator=generator, dtype=torch.float64)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return ((noise + means[labels]) @ mix).to(dtype), labels


def quiet(features: Tensor, labels: Tensor, **options: bool) -> float:
    """The score, requiring that no warning is issued."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return h_score(features, labels, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("samples", "dim"), [(800, 20), (100, 1), (500, 130), (60, 50)])
def test_equals_projection_identity(samples: int, dim: int, dtype: torch.dtype) -> None:
    features, labels = problem(samples, dim, dtype=dtype)
    if dtype.itemsize == 2:  # well-conditioned, or directions would drown in the rounding to 16 bits
        features = torch.randn(samples, dim, generator=torch.Generator().manual_seed(9)).to(dtype)
        features += labels.unsqueeze(1) * features[:1]
    value = quiet(features, labels)
    assert value == pytest.approx(reference.projection_h_score(features, labels), rel=1e-6)


@pytest.mark.parametrize(("samples", "dim"), [(400, 20), (60, 60), (50, 90), (200, 7)])
def test_regularized_equals_published_formula(samples: int, dim: int) -> None:
    """Both forms (D x D and N x N) against the formula taken literally."""
    features, labels = problem(samples, dim)
    assert quiet(features, labels, regularized=True) == pytest.approx(
        reference.published_regularized_h_score(features, labels), rel=1e-10
    )


def test_shrinkage_equals_scikit_learn() -> None:
    ledoit_wolf = pytest.importorskip("sklearn.covariance").ledoit_wolf
    features, labels = problem(90, 40)
    details = HScore(regularized=True).update(features, labels).details()
    assert details.shrinkage == pytest.approx(ledoit_wolf(features.numpy())[1], rel=1e-10)


@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 19, 20, 21, 100, 799])
def test_streaming_equals_one_pass(chunk: int, regularized: bool) -> None:
    features, labels = problem(dtype=torch.float32)
    score = HScore(regularized)
    for start in range(0, len(features), chunk):
        score.update(features[start : start + chunk], labels[start : start + chunk])
    assert score.samples == len(features)
    assert score.compute() == pytest.approx(h_score(features, labels, regularized), rel=1e-10)


@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize("samples", [15, 60, 800])
def test_merging_in_any_order_equals_one_pass(samples: int, regularized: bool) -> None:
    """Parts of very different size and mean, sorted by class so that no part sees all classes."""
    features, labels = problem(samples)
    order = labels.argsort()
    features, labels = features[order] + 100 * torch.linspace(0, 1, samples).unsqueeze(1), labels[order]
    bounds = [0, 2, samples // 5, samples // 2, samples]
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = h_score(features, labels, regularized)
    for _ in range(4):
        parts = [HScore(regularized).update(features[a:b], labels[a:b]) for a, b in itertools.pairwise(bounds)]
        rng.shuffle(parts)
        total = HScore(regularized)
        for part in parts:
            before = part.samples
            total.merge(part)
            assert part.samples == before
        assert total.details().value == pytest.approx(want, rel=1e-10)


def test_batches_of_different_dtypes() -> None:
    features, labels = problem(dtype=torch.float32)
    score = HScore().update(features[:5].half(), labels[:5]).update(features[5:9].double(), labels[5:9])
    score.update(features[9:], labels[9:])
    mixed = torch.cat([features[:5].half().double(), features[5:].double()])
    assert score.compute() == pytest.approx(h_score(mixed, labels), rel=1e-10)


def test_updates_copy_their_input() -> None:
    features, labels = problem(10)
    score = HScore(regularized=True).update(features, labels)
    want = score.compute()
    features.zero_()
    labels.zero_()
    assert score.compute() == want


def test_reset_forgets() -> None:
    features, labels = problem()
    score = HScore().update(features * 2 + torch.randn(20), labels.flip(0))
    score.reset()
    assert score.update(features, labels).compute() == pytest.approx(h_score(features, labels), rel=1e-12)


def test_invariant_to_affine_maps() -> None:
    features, labels = problem(dtype=torch.float64)
    want = quiet(features, labels)
    mix = torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scales = torch.logspace(-8, 8, 20, dtype=torch.float64)
    assert quiet(features @ mix + 5, labels) == pytest.approx(want, rel=1e-8)
    assert quiet(features * scales, labels) == pytest.approx(want, rel=1e-8)


def test_large_mean_in_float32() -> None:
    """mean / sd = 1000: a one-pass uncentred float32 covariance gives values off by a factor."""
    features, labels = problem(2000, dtype=torch.float64)
    features = (features / features.std(0) + 1000).float()
    assert quiet(features, labels) == pytest.approx(reference.projection_h_score(features, labels), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 7.3, 1e4])
@pytest.mark.parametrize("regularized", [False, True])
def test_dead_features_change_nothing(value: float, regularized: bool) -> None:
    features, labels = problem(dtype=torch.float32)
    dead = torch.cat([features, torch.full((len(features), 3), value)], 1)
    if not regularized:
        assert quiet(dead, labels) == pytest.approx(quiet(features, labels), rel=1e-10)
    else:  # they enter through D and the target of the shrinkage, as in the published formula
        assert quiet(dead, labels, regularized=True) == pytest.approx(
            reference.published_regularized_h_score(dead, labels), rel=1e-7
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_duplicated_features_are_left_out_and_said(dtype: torch.dtype) -> None:
    features, labels = problem(dtype=dtype)
    want = quiet(features, labels)
    with pytest.warns(ScoreWarning, match="7 of 27 directions lie below the rounding level"):
        value = h_score(torch.cat([features, features[:, :7]], 1), labels)
    assert value == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8, 1e12])
def test_ill_conditioned_features_are_right_or_warn(condition: float, dtype: torch.dtype) -> None:
    features, labels = problem(dtype=torch.float64)
    features, _ = torch.linalg.qr(features - features.mean(0))  # condition 1
    basis, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    spectrum = torch.logspace(0, -math.log10(condition), 20, dtype=torch.float64)
    features = (features @ (basis * spectrum) @ basis.mT).to(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = h_score(features, labels)
    assert 0 <= value <= CLASSES - 1
    if not caught:
        assert value == pytest.approx(reference.projection_h_score(features, labels), rel=1e-4)
    else:
        assert "rounding" in str(caught[0].message)
    assert bool(caught) == (condition >= 1e8)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_of_the_features_does_not_matter(scale: float) -> None:
    features, labels = problem(dtype=torch.float32)
    scaled = features.double() * scale
    for regularized in (False, True):
        assert quiet(scaled, labels, regularized=regularized) == pytest.approx(
            quiet(features, labels, regularized=regularized), rel=1e-6
        )


def test_directions_below_half_precision_are_left_out_and_said() -> None:
    """A feature that is the sum of two others, up to bfloat16 rounding, adds only the noise of that rounding."""
    features, labels = problem(dtype=torch.float64)
    features = features / features.std(0)
    total = (features[:, 0] + features[:, 1]).unsqueeze(1)
    with pytest.warns(ScoreWarning, match="1 of 21 directions lie below the rounding level"):
        value = h_score(torch.cat([features, total], 1).bfloat16(), labels)
    assert value == pytest.approx(quiet(features, labels), rel=1e-2)


def test_never_above_its_bound() -> None:
    """Random problems, many near-degenerate: 0 <= H <= min(rank, C - 1)."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        samples, dim, classes = (
            int(torch.randint(low, high, (), generator=generator)) for low, high in ((3, 60), (1, 40), (2, 9))
        )
        rank = int(torch.randint(1, dim + 1, (), generator=generator))
        low_rank = torch.randn(samples, rank, generator=generator) @ torch.randn(rank, dim, generator=generator)
        labels = torch.arange(samples) % classes
        for regularized in (False, True):
            details = HScore(regularized).update(low_rank, labels).details()
            bound = min(details.rank, details.classes - 1) * (samples / (samples - 1) if regularized else 1)
            assert 0 <= details.value <= bound, (trial, regularized)
            if not regularized:
                assert details.rank <= min(rank, samples - 1)


def test_perfectly_separated_classes_reach_the_bound() -> None:
    labels = torch.arange(60) % 4
    features = torch.nn.functional.one_hot(labels, 4).double()[:, :3]
    assert quiet(features, labels) == pytest.approx(3, rel=1e-12)


def test_fewer_samples_than_features_says_nothing_and_says_so() -> None:
    features, labels = problem(40, 64)
    with pytest.warns(ScoreWarning, match=r"40 samples of 64 features span the whole sample space"):
        assert h_score(features, labels) == pytest.approx(CLASSES - 1, rel=1e-9)
    assert quiet(features, labels, regularized=True) < CLASSES - 1


def test_single_class_is_zero_with_a_warning() -> None:
    features, _ = problem()
    for regularized in (False, True):
        for samples in (800, 10):
            with pytest.warns(ScoreWarning, match="all samples are of one class"):
                assert h_score(features[:samples], torch.full((samples,), 3), regularized) == 0


def test_constant_features_are_zero_with_a_warning() -> None:
    _, labels = problem()
    for samples in (800, 3):
        for regularized in (False, True):
            with pytest.warns(ScoreWarning, match="every feature is constant"):
                assert (
                    h_score(
                        torch.full((samples, 5), 2.5),
                        labels[:samples] * 0 + torch.arange(samples) % 2,
                        regularized,
                    )
                    == 0
                )


def test_any_integer_labels() -> None:
    features, labels = problem()
    want = quiet(features, labels)
    renamed = torch.tensor([-7, 1000, 3, 2**40, 0, -(2**50)])[labels]
    assert quiet(features, renamed) == pytest.approx(want, rel=1e-12)
    assert quiet(features, labels.to(torch.uint8)) == pytest.approx(want, rel=1e-12)
    assert quiet(features.numpy(), labels.numpy()) == pytest.approx(want, rel=1e-12)
    two = quiet(features, labels == 0)
    assert two == pytest.approx(quiet(features, (labels == 0).long()), rel=1e-12)


def test_random_labels_score_at_chance_level() -> None:
    """E[H] = (C-1) D / (N-1) for labels that ignore the features; the corrected score is 0 on average."""
    samples, dim, classes, repeats = 150, 30, 5, 200
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(samples) % classes
    values, corrected = [], []
    for _ in range(repeats):
        features = torch.randn(samples, dim, generator=generator)
        values.append(h_score(features, labels))
        corrected.append(h_score(features, labels, chance_corrected=True))
    chance = HScore().update(features, labels).details().chance_level
    assert chance == pytest.approx((classes - 1) * dim / (samples - 1))
    for observed, expected in ((values, chance), (corrected, 0.0)):
        error = np.std(observed, ddof=1) / math.sqrt(repeats)
        assert abs(np.mean(observed) - expected) < 4 * error


def test_standardize_makes_the_regularized_score_scale_free() -> None:
    features, labels = problem(100, 30)
    scales = torch.logspace(-3, 3, 30, dtype=torch.float64)
    for part in (slice(0, 100), slice(0, 25)):
        x, y = features[part], labels[part]
        plain = quiet(x, y, regularized=True, standardize=True)
        assert quiet(x * scales, y, regularized=True, standardize=True) == pytest.approx(plain, rel=1e-9)
        assert quiet(x * scales, y, regularized=True) != pytest.approx(plain, rel=1e-3)


def test_details_say_what_the_value_rests_on() -> None:
    features, labels = problem()
    details = HScore().update(features, labels).details()
    assert (details.samples, details.dimension, details.classes, details.rank) == (800, 20, CLASSES, 20)
    assert (details.method, details.shrinkage, details.warnings) == ("cholesky", None, ())
    assert HScore.higher_is_better


def test_refused_batch_changes_nothing() -> None:
    features, labels = problem()
    for rows in (5, 100):
        score = HScore().update(features[:50], labels[:50])
        want = score.details()
        bad = features[:rows].clone()
        bad[rows - 1, 3] = math.nan
        with pytest.raises(
            ValueError, match=rf"features: expected finite values, got nan at position \[{rows - 1}, 3\]"
        ):
            score.update(bad, labels[:rows])
        assert score.details() == want


def test_moments_about_another_point() -> None:
    """The shift formulas of all moments, cubic and quartic included, against direct sums."""
    features, labels = problem(50, 7)
    moments = scores.FeatureMoments.of(features, labels, norms=True)
    point = moments.mean + torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 10
    moved = moments.about(point)
    y = features - point
    norm = y.square().sum(1)
    assert moved.norms is not None
    torch.testing.assert_close(moved.gram, y.mT @ y, rtol=1e-10, atol=0)
    torch.testing.assert_close(moved.norms.cubic, norm @ y, rtol=1e-9, atol=0)
    torch.testing.assert_close(moved.norms.quartic, norm.square().sum(), rtol=1e-10, atol=0)
    torch.testing.assert_close(moved.sums[2], y[labels == 2].sum(0), rtol=1e-10, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize(("samples", "dim"), [(800, 20), (30, 64)])
def test_gpu_agrees_with_cpu(samples: int, dim: int, regularized: bool) -> None:
    features, labels = problem(samples, dim, dtype=torch.float32)
    want = HScore(regularized).update(features, labels).details()
    got = HScore(regularized).update(features.cuda(), labels.cuda()).details()
    assert got.value == pytest.approx(want.value, rel=1e-9)
    assert got.rank == want.rank
