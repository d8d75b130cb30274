"""Quasi-Akaike shares against their formula, their optimality, and at the edges."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from transferops.otqms.akaike import akaike_shares, explain_shares


def instance(generator: np.random.Generator) -> tuple[np.ndarray, float, np.ndarray, float]:
    sources = int(generator.integers(1, 7))
    factor = generator.normal(size=(sources, sources + 2)) * generator.uniform(0.1, 2)
    samples = generator.integers(1, 3000, sources).astype(np.float64)
    return factor @ factor.T, float(generator.integers(2, 200)), samples, float(generator.uniform(0.5, 60))


@pytest.mark.parametrize("seed", range(20))
def test_formula(seed: int) -> None:
    """Written out with plain sums."""
    gram, n0, available, d = instance(np.random.default_rng(seed))
    found = akaike_shares(gram, n0, available, d)
    k = range(len(available))
    nearest = min(gram[i, i] for i in k)
    raw = [available[i] * math.exp(-n0 * (gram[i, i] - nearest) / d / 2) for i in k]
    s = [value / sum(raw) for value in raw]
    squared = sum(s[i] * gram[i, j] * s[j] for i in k for j in k)
    a = max(squared - d / n0, 0) + d * sum(s[i] ** 2 / available[i] for i in k)
    q0 = a / (a + d / n0)
    assert found.target == pytest.approx(q0, rel=1e-12)
    np.testing.assert_allclose(found.sources, [(1 - q0) * value for value in s], rtol=1e-10, atol=1e-300)
    assert found.target + found.sources.sum() == pytest.approx(1, abs=1e-14)
    assert found.risk == pytest.approx((d * q0**2 / n0 + (1 - q0) ** 2 * a) / 2, rel=1e-10)
    for other in np.linspace(0, 1, 51):
        assert found.risk <= (d * other**2 / n0 + (1 - other) ** 2 * a) / 2 + 1e-12


def test_one_source_of_no_distance_is_pooled() -> None:
    """Then all samples count alike, and the risk is that of so many samples."""
    found = akaike_shares([[0.0]], 100, [300], 8.0)
    assert found.target == pytest.approx(100 / 400)
    assert found.risk == pytest.approx(8 / (2 * 400))


def test_indistinguishable_sources_share_by_their_numbers() -> None:
    found = akaike_shares(np.full((3, 3), 0.4), 50, [10, 20, 70], 5.0)
    np.testing.assert_allclose(found.sources / found.sources.sum(), [0.1, 0.2, 0.7])


def test_without_samples_no_share() -> None:
    """Nor does such a source set the standard for the others."""
    gram = np.diag([0.0, 5.0, 1e9])
    found = akaike_shares(gram, 10, [0, 40, 40], 3.0)
    alone = akaike_shares([[5.0]], 10, [40], 3.0)
    np.testing.assert_allclose(found.sources, [0, alone.sources[0], 0])
    nothing = akaike_shares(gram, 10, [0, 0, 0], 3.0)
    assert (nothing.target, nothing.sources.tolist()) == (1, [0, 0, 0])
    assert nothing.risk == pytest.approx(3 / 20)


@pytest.mark.parametrize("d", [0.0, 1e-300, 1e-12])
def test_an_estimate_without_noise(d: float) -> None:
    far = akaike_shares(np.diag([2.0, 3.0]), 10, [5, 5], d)
    assert far.target == pytest.approx(1)
    same = akaike_shares(np.zeros((2, 2)), 10, [5, 15], d)
    assert same.target == pytest.approx(10 / 30)
    assert same.sources == pytest.approx([5 / 30, 15 / 30])


def test_the_far_away_do_not_overflow() -> None:
    found = akaike_shares(np.diag([1.0, 1e300, 0.5]), 1e6, [5, 1e9, 7], 1e-9)
    assert np.isfinite([found.target, *found.sources, found.risk]).all()
    assert found.sources[1] == 0


def test_shares_are_explained() -> None:
    """Delta_i/2 = N0 (A_ii - min_j A_jj) / (2 d) by hand: 100 * 0.02 / 2 = 1 nat, 0.25 over d = 4."""
    gram, samples = np.diag([0.03, 0.05, 0.0]), [300, 100, 0]
    found = akaike_shares(gram, 100, samples, 4.0)
    target, near, far, empty = explain_shares(gram, 100, samples, 4.0, ["near", "far", "empty"])
    assert target.startswith(f"target: {found.target:.1%} of the loss, for the noise of its own estimate, d/N0 = 0.04,")
    assert near == f"source near: {found.sources[0]:.1%} of the loss: no source explains the target's samples better"
    assert far == (
        f"source far: {found.sources[1]:.1%} of the loss: it explains the target's samples worse than the nearest "
        "source by 1 nats, over d by 0.25: a sample of it counts 0.78 of one of that source"
    )
    assert empty == "source empty: 0.0% of the loss: it has no samples"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": np.eye(3)}, "gram: expected shape [2, 2], one row per source, got shape [3, 3]"),
        ({"source_samples": []}, "source_samples: expected shape [K], K at least 1, got shape [0]"),
        ({"source_samples": 3.0}, "source_samples: expected shape [K], K at least 1, got shape []"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    arguments = {"gram": np.eye(2), "target_samples": 10, "source_samples": [1, 2], "dimension": 1.0, **change}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        akaike_shares(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"dimension": -1.0},
        {"dimension": math.nan},
        {"target_samples": 0},
        {"source_samples": [1, -2]},
        {"gram": [[1.0, math.inf], [0.0, 1.0]]},
    ],
)
def test_refuses_numbers_out_of_range(change: dict[str, Any]) -> None:
    arguments = {"gram": np.eye(2), "target_samples": 10, "source_samples": [1, 2], "dimension": 1.0, **change}
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: expected "):
        akaike_shares(**arguments)
