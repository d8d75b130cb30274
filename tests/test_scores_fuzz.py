"""Random shapes, dtypes, labels and magnitudes: every feature score is a finite number in its range, or refuses."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from transferops.scores import SCORES, FeatureMoments, HScore, LogMe, ScoreWarning, knn, leep, score_all

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

QUICK = settings(derandomize=True, deadline=None, max_examples=40, database=None)
RANGES = {
    "h_score": (0.0, math.inf),
    "trans_rate": (-1e-6, math.inf),
    "knn": (0.0, 1.0),
    "gbc": (-math.inf, 0.0),
    "sfda": (-math.inf, 0.0),
    "parc": (-100.0 - 1e-9, 100.0 + 1e-9),
}


@st.composite
def labelled_features(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    samples, dim, classes = draw(st.integers(2, 30)), draw(st.integers(1, 30)), draw(st.integers(1, 6))
    rank = draw(st.integers(1, dim))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    features = torch.randn(samples, rank, generator=generator) @ torch.randn(rank, dim, generator=generator)
    features[:, : draw(st.integers(0, dim))] *= 10.0 ** draw(st.integers(-3, 3))
    features = features + draw(st.sampled_from([0.0, 1.0, 50.0]))
    if draw(st.booleans()):
        features[draw(st.integers(0, samples - 1))] = features[0]
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    features = features.clamp(-6e4, 6e4).to(dtype)
    names = torch.tensor(draw(st.lists(st.integers(-(2**40), 2**40), min_size=classes, max_size=classes, unique=True)))
    labels = names[torch.randint(classes, (samples,), generator=generator)]
    if draw(st.booleans()):
        features = features.mT.contiguous().mT
    return features, labels


@given(labelled_features())
@QUICK
def test_every_score_is_in_its_range_in_any_order(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    features, labels = problem
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ScoreWarning)
        values = score_all(features, labels)
        for name, value in values.items():
            low, high = RANGES.get(name, (-math.inf, math.inf))
            assert math.isfinite(value), name
            assert low <= value <= high, (name, value)
        flipped = score_all(features.flip(0), labels.flip(0))
        details = HScore().update(features, labels).details()
        bounded = not LogMe().update(features, labels).details().warnings
    assert values["h_score"] <= min(details.rank, details.classes - 1)
    for name in ("log_me", "trans_rate", "etran") if bounded else ("trans_rate", "etran"):
        assert flipped[name] == pytest.approx(values[name], rel=1e-5, abs=1e-5), name


@given(labelled_features(), st.integers(1, 29), st.integers(1, 29))
@QUICK
def test_batches_equal_one_pass(problem: tuple[torch.Tensor, torch.Tensor], first: int, second: int) -> None:
    """Moments in three batches are those of all samples, up to rounding relative to the features' size."""
    features, labels = problem
    whole = FeatureMoments.of(features, labels)
    bounds = sorted({0, min(first, len(features)), min(second, len(features)), len(features)})
    parts = [FeatureMoments.of(features[a:b], labels[a:b]) for a, b in zip(bounds, bounds[1:])]  # noqa: RUF007 (two names for the ends)
    total = parts[0]
    for part in parts[1:]:
        total = part.merge(total)
    size = float(features.double().square().sum())
    assert torch.equal(total.classes, whole.classes)
    assert torch.equal(total.counts, whole.counts)
    torch.testing.assert_close(total.gram, whole.gram, rtol=1e-10, atol=1e-12 * size)


@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from([torch.float64, torch.float32]),
    st.data(),
)
@QUICK
def test_leep_is_between_its_bounds(samples: int, width: int, classes: int, dtype: torch.dtype, data: Any) -> None:
    """-H(Y) <= LEEP <= 0: no worse than ignoring the source [derived: Jensen's inequality on the joint]."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    logits = torch.randn(samples, width, generator=generator) * data.draw(st.sampled_from([0.0, 1.0, 30.0]))
    labels = torch.randint(classes, (samples,), generator=generator)
    alone = len(labels.unique()) == 1
    with pytest.warns(ScoreWarning, match="of one class") if alone else nullcontext():
        value = leep(logits.softmax(1).to(dtype), labels)
    share = torch.bincount(labels).double() / samples
    assert -float(torch.special.entr(share).sum()) - 1e-5 <= value <= 0


@given(st.integers(3, 30), st.integers(1, 5), st.integers(1, 4), st.sampled_from(["cosine", "euclidean"]), st.data())
@QUICK
def test_knn_against_sorting(samples: int, dim: int, neighbors: int, metric: str, data: Any) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    features = torch.randn(samples, dim + 1, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (samples,), generator=generator)
    if samples <= neighbors:
        with pytest.raises(ValueError, match="features: expected more than"):
            knn(features, labels, neighbors=neighbors)
        return
    points = torch.nn.functional.normalize(features) if metric == "cosine" else features
    distance = torch.cdist(points, points).fill_diagonal_(torch.inf)
    nearest = labels[distance.argsort(1)[:, :neighbors]].tolist()
    hits = [max(dict.fromkeys(row), key=row.count) == int(label) for row, label in zip(nearest, labels)]
    assert knn(features, labels, neighbors=neighbors, metric=metric) == sum(hits) / samples


def test_ranges_are_of_scores_that_exist() -> None:
    assert set(RANGES) <= set(SCORES)
