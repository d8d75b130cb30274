"""Malformed calls of the scores beyond the H-score's, each with its exact message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from transferops.scores import (
    Energy,
    Gbc,
    LogMe,
    MultiSourceHScore,
    energy,
    etran,
    etran_ranking,
    gbc,
    leep,
    multi_source_h_score,
    n_leep,
    otce,
    parc,
    sfda,
    task_distance,
    task_embedding,
)

X = torch.arange(12.0).reshape(4, 3)
Y = torch.tensor([0, 1, 0, 1])
NAN = X.clone()
NAN[2, 1] = float("nan")
NEW = {"gbc": gbc, "parc": parc, "sfda": sfda, "etran": etran, "n_leep": n_leep, "energy": energy}

CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    **{
        f"{name} nan": (
            lambda score=score: score(NAN, Y),
            ValueError,
            f"{'logits' if name == 'energy' else 'features'}: expected finite values, got nan at position [2, 1]",
        )
        for name, score in NEW.items()
    },
    **{
        f"{name} no samples": (
            lambda score=score: score(X[:0], Y[:0]),
            ValueError,
            f"{'logits' if name == 'energy' else 'features'}: expected at least one sample before the score is "
            "computed, got none",
        )
        for name, score in NEW.items()
    },
    **{
        f"{name} labels": (
            lambda score=score: score(X, Y[:3]),
            ValueError,
            "labels: expected shape [4], one label per row of features, got a int64 tensor of shape [3] on cpu",
        )
        for name, score in NEW.items()
        if name != "energy"
    },
    **{
        f"{name} integers": (
            lambda score=score: score(X.int(), Y),
            TypeError,
            "features: expected float32, float64, float16 or bfloat16, got a int32 tensor of shape [4, 3] on cpu",
        )
        for name, score in NEW.items()
        if name != "energy"
    },
    "gbc covariance": (
        lambda: gbc(X, Y, covariance="full"),
        ValueError,
        "covariance: expected 'diagonal' or 'spherical', got 'full'",
    ),
    "gbc components": (
        lambda: gbc(X, Y, components=0),
        ValueError,
        "components: expected an integer of at least 1, got 0",
    ),
    "gbc merge": (
        lambda: Gbc().merge(Gbc("spherical")),
        ValueError,
        "other: expected a Gbc with covariance='diagonal', got covariance='spherical'",
    ),
    "parc components": (
        lambda: parc(X, Y, components=1.5),
        ValueError,
        "components: expected an integer of at least 1, got 1.5",
    ),
    "sfda strength": (
        lambda: sfda(X, Y, strength=-1.0),
        ValueError,
        "strength: expected a positive number, got -1.0",
    ),
    "etran target": (
        lambda: etran(X, torch.tensor([0.0, float("inf"), 1.0, 2.0])),
        ValueError,
        "labels: expected finite values, got inf at position [1, 0]",
    ),
    "etran_ranking of nothing": (
        lambda: etran_ranking({}),
        ValueError,
        "details: expected Etran details of the same kind for at least one model, got dict",
    ),
    **{
        f"leep {dtype}": (
            lambda dtype=dtype: leep(torch.full((2, 1000), 2**-9, dtype=dtype), Y[:2]),
            ValueError,
            "source_probabilities: expected rows that sum to 1, got a sum of 1.95312 in row 0",
        )
        for dtype in (torch.float16, torch.bfloat16)  # whose rounding errors do not add up to so much
    },
    "log_me targets": (
        lambda: LogMe(regression=True).update(X, X[:, :1]).update(X, X[:, :2]),
        ValueError,
        "labels: expected rows of shape [1] as before, got [2]",
    ),
    "task2vec integers": (
        lambda: task_distance(Y, Y),
        TypeError,
        "first: expected floating point, got a int64 tensor of shape [4] on cpu",
    ),
    "task2vec shape": (
        lambda: task_distance(X, X),
        ValueError,
        "first: expected shape [F], got a float32 tensor of shape [4, 3] on cpu",
    ),
    "task2vec biases": (
        lambda: task_embedding(torch.nn.Linear(3, 2), [(X, Y)], body=["bias"]),
        ValueError,
        "body: expected at least one weight of two or more dimensions, got bias",
    ),
    "n_leep variance": (
        lambda: n_leep(X, Y, variance=1.0),
        ValueError,
        "variance: expected a share between 0 and 1, got 1.0",
    ),
    "n_leep too few": (
        lambda: n_leep(X, Y),
        ValueError,
        "features: expected at least 10 samples for a mixture of 10 components, got 4",
    ),
    "energy integers": (
        lambda: energy(X.int()),
        TypeError,
        "logits: expected floating point, got a int32 tensor of shape [4, 3] on cpu",
    ),
    "energy 1-d": (
        lambda: energy(X[0]),
        ValueError,
        "logits: expected shape [N, C] with C >= 1, got a float32 tensor of shape [3] on cpu",
    ),
    "energy temperature": (
        lambda: Energy(temperature=float("inf")),
        ValueError,
        "temperature: expected a positive number, got inf",
    ),
    "multi-source: number": (
        lambda: MultiSourceHScore(3).update([X, X], Y),
        ValueError,
        "features: expected those of 3 sources, got 2",
    ),
    "multi-source: shapes": (
        lambda: multi_source_h_score([X, X[:, :2]], Y),
        ValueError,
        "features: expected [N, D] of every source, like a float32 tensor of shape [4, 3] on cpu, got a float32 tensor "
        "of shape [4, 2] on cpu",
    ),
    "multi-source: nan": (
        lambda: multi_source_h_score([X, NAN], Y),
        ValueError,
        "features: expected finite values, got nan at position [2, 4]",
    ),
    "multi-source: objective": (
        lambda: multi_source_h_score([X], Y, objective="h"),
        ValueError,
        "objective: expected 'h_score' or 'trace_ratio', got 'h'",
    ),
    "multi-source: shrinkage": (
        lambda: multi_source_h_score([X], Y, shrinkage=1.0),
        ValueError,
        "shrinkage: expected a number in [0, 1), got 1.0",
    ),
    "multi-source: singular": (
        lambda: multi_source_h_score([X, X], Y),
        ValueError,
        "features: expected combined features of full rank (more samples than features, none constant or linearly "
        "dependent), or shrinkage, got 4 samples of 3 features whose covariance is singular",
    ),
    "multi-source: zero weights": (
        lambda: MultiSourceHScore(2).update([X, X], Y).evaluate(torch.zeros(2)),
        ValueError,
        "weights: expected finite numbers, not all zero, got [0.0, 0.0]",
    ),
    "multi-source: no samples": (
        lambda: MultiSourceHScore(2).evaluate(torch.ones(2)),
        ValueError,
        "features: expected at least one sample before the score is computed, got none",
    ),
    "otce dimension": (
        lambda: otce(X, Y, X[:, :2], Y),
        ValueError,
        "features: expected 3 features, as in the source, got 2",
    ),
    "otce no source": (
        lambda: otce(X[:0], Y[:0], X, Y),
        ValueError,
        "source_features: expected at least one sample, got none",
    ),
    "otce regularization": (
        lambda: otce(X, Y, X, Y, regularization=0),
        ValueError,
        "regularization: expected a positive number, got 0",
    ),
    "otce coefficients": (
        lambda: otce(X, Y, X, Y, coefficients=(1.0, 2.0)),
        ValueError,
        "coefficients: expected three numbers: of W_D, of W_T, and a constant, got tuple",
    ),
    "task_distance negative": (
        lambda: task_distance(torch.tensor([1.0, -1.0]), torch.ones(2)),
        ValueError,
        "first: expected finite entries of at least 0, got -1.0 at position 1",
    ),
    "task_distance zero": (
        lambda: task_distance(torch.ones(2), torch.zeros(2)),
        ValueError,
        "second: expected an embedding that is not zero, got only zeros",
    ),
    "task_distance lengths": (
        lambda: task_distance(torch.ones(2), torch.ones(3)),
        ValueError,
        "second: expected shape [2], as first, got [3]",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_malformed_call_is_refused_with_its_message(name: str) -> None:
    if name.startswith("n_leep"):
        pytest.importorskip("sklearn")
    if name.startswith("otce"):
        pytest.importorskip("ot")
    call, error, message = CASES[name]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
