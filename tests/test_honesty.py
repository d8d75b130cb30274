"""What is checked of every result at run time, and what theory says of several: bounds, certificates, monotony."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from transferops.fisher import FisherInformation
from transferops.fisher.estimation import Estimation
from transferops.otqms import allocate, allocation
from transferops.otqms.dimension import effective_dimension
from transferops.otqms.quadratic_program import Solution
from transferops.otqms.theory import single_source_weighted_risk
from transferops.scores import ScoreWarning, gbc, h_score, log_me, parc, sfda, trans_rate
from transferops.scores.h_score import _clip

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 4, generator=GENERATOR)
Y = torch.arange(40) % 3
ROOT = torch.randn(3, 3, generator=GENERATOR, dtype=torch.float64).numpy()
GRAM = ROOT.T @ ROOT


def test_h_score_beyond_its_bound_is_an_error() -> None:
    """Rounding is clipped; more than rounding is a mistake, and said to be one."""
    assert _clip(2 + 1e-9, 2) == 2
    assert _clip(-1e-9, 2) == 0
    for value in (2.1, -0.1, float("nan")):
        with pytest.raises(ArithmeticError, match=r"is outside \[0, 2\]"):
            _clip(value, 2)


@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize("samples", [2, 3, 5, 40])
def test_h_score_is_within_its_bounds(samples: int, regularized: bool) -> None:
    """0 <= H <= min(rank, C - 1), times N / (N - 1) for the published convention of the regularised score."""
    x, y = X[:samples], Y[:samples]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScoreWarning)
        value = h_score(x, y, regularized)
    bound = min(4, samples - 1, len(y.unique()) - 1)
    assert 0 <= value <= bound * (samples / (samples - 1) if regularized else 1) + 1e-9


def test_regularized_score_of_two_samples_is_that_of_its_limit() -> None:
    """Two samples have no spread of their squares: the shrinkage is 0 but for rounding, and the score N / (N - 1)."""
    for seed in range(20):
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        assert h_score(x, torch.arange(2), regularized=True) == pytest.approx(2, rel=1e-9)


def test_gram_that_is_not_semidefinite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 3)
    directions = [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(2)]
    gram = FisherInformation(model).gram(directions, [X])
    assert float(torch.linalg.eigvalsh(gram)[0]) >= -1e-6 * float(gram.trace())

    def indefinite(*_: object) -> Tensor:
        return torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)

    monkeypatch.setattr(Estimation, "gram", indefinite)
    with pytest.raises(ArithmeticError, match=r"gram: expected eigenvalues of at least 0, got -0\.025 with a trace of"):
        FisherInformation(model).gram(directions, [X])


@pytest.mark.parametrize(
    ("worse", "message"),
    [
        (lambda found: found._replace(residual=1e-3), "a KKT residual of at most 1e-06, got 0.001"),
        (lambda found: found._replace(ratios=np.full(3, 1e6)), "that of the target alone, got"),
    ],
)
def test_allocation_without_certificate_is_an_error(
    monkeypatch: pytest.MonkeyPatch, worse: Callable[[Solution], Solution], message: str
) -> None:
    solve = allocation.solve
    monkeypatch.setattr(allocation, "solve", lambda program: worse(solve(program)))
    with pytest.raises(RuntimeError, match=message):
        allocate(GRAM * 100, 20, [1e9] * 3, 10)


def test_more_to_choose_from_is_never_worse() -> None:
    """The least risk falls with the samples there are, with the budget, and with weights beside quantities."""
    counts = [0, 1, 10, 100, 1000]
    for mode in ("quantity", "weight"):
        risks = [allocate(GRAM, 20, [n, 50, n], 30, mode).risk for n in counts]
        assert all(b <= a * (1 + 1e-7) for a, b in itertools.pairwise(risks))
    risks = [allocate(GRAM, 20, [100, 50, 20], 30, "budget", budget).risk for budget in (0, 1, 10, 100, 170)]
    assert all(b <= a * (1 + 1e-7) for a, b in itertools.pairwise(risks))
    assert allocate(GRAM, 20, [100, 50, 20], 30, "weight").risk <= risks[-1] * (1 + 1e-7)
    assert risks[-1] <= allocate(GRAM, 20, [100, 50, 20], 30).risk * (1 + 1e-7)


def test_risk_and_dimension_fall_where_theory_says() -> None:
    risks = single_source_weighted_risk(np.logspace(0, 9, 50), 0.03, 20, 100)
    assert (np.diff(risks) <= 0).all()
    dimensions = effective_dimension([3.0, 1.0, 0.0, 1e-6], np.logspace(-9, 9, 50))
    assert (np.diff(dimensions) <= 0).all()
    assert dimensions[0] <= 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: h_score(X[:4], Y[:4]),
        lambda: h_score(torch.cat([X, X[:, :1] * (1 + 1e-12)], 1), Y),
        lambda: gbc(X[:5], torch.tensor([0, 0, 1, 1, 2])),
        lambda: log_me(torch.eye(6)[:, :5], torch.arange(6)),
    ],
)
def test_a_result_of_little_worth_says_so_with_numbers(call: Callable[[], float]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    text = " ".join(str(warning.message) for warning in caught)
    assert all(warning.category is ScoreWarning for warning in caught)
    assert re.search(r"\d", text), text


@pytest.mark.parametrize("score", [h_score, gbc, log_me, parc, sfda, trans_rate])
def test_one_class_says_so(score: Callable[..., float]) -> None:
    with pytest.warns(ScoreWarning, match=r"one class|equally far"):
        score(X, torch.zeros(40, dtype=torch.long))
