"""Labels of the unsigned types, for which torch has next to no operators, are the same labels everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from transferops import adapt, ops, rank, scores
from transferops.compat import logme, tllib, transformer_ranker
from transferops.fisher import FisherInformation
from transferops.otqms.pool import Pool

GENERATOR = torch.Generator().manual_seed(0)
Y = torch.arange(24) % 3
X = torch.randn(24, 4, generator=GENERATOR) + Y.unsqueeze(1)
P = torch.rand(24, 5, generator=GENERATOR).softmax(1)
Z = Y.flip(0)
LAST = {"weight": torch.ones(3, 4), "bias": torch.ones(3)}


class Part(NamedTuple):
    inputs: Tensor
    labels: Tensor


def net() -> nn.Linear:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, 12).reshape(3, 4))
        model.bias.zero_()
    return model


def empirical(y: Tensor) -> FisherInformation:
    return FisherInformation(net(), "empirical")


def gradient_gap(y: Tensor) -> Tensor:
    gradients = scores.PrincipalGradientExpectation(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), restarts=2)
    gradients.update("source", X, Y)
    gradients.update("target", X.flip(0), y)
    return gradients.compute().gap


def several(y: Tensor) -> float:
    combined = scores.MultiSourceHScore(2)
    return combined.update([X, X.square()], y).compute()


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "class_moments": lambda y: ops.class_moments(X, y),
    "empirical_prediction": lambda y: ops.empirical_prediction(P, y),
    "h_score": lambda y: scores.h_score(X, y),
    "log_me": lambda y: scores.log_me(X, y),
    "trans_rate": lambda y: scores.trans_rate(X, y),
    "knn": lambda y: scores.knn(X, y),
    "gbc": lambda y: scores.gbc(X, y),
    "parc": lambda y: scores.parc(X, y),
    "sfda": lambda y: scores.sfda(X, y),
    "etran": lambda y: scores.etran(X, y),
    "n_leep": lambda y: scores.n_leep(X, y),
    "leep": lambda y: scores.leep(P, y),
    "nce": lambda y: scores.nce(y, Z.to(y.dtype)),
    "otce": lambda y: scores.otce(X.flip(0), Z.to(y.dtype), X, y, regularization=None),
    "score_all": lambda y: scores.score_all(X, y, ["h_score", "knn"]),
    "multi_source": several,
    "principal gradients": gradient_gap,
    "task_embedding": lambda y: scores.task_embedding(net(), [(X, y)], body=["weight"], estimator="empirical"),
    "tllib": lambda y: [tllib.h_score(X, y), tllib.log_maximum_evidence(X, y), tllib.transrate(X, y)],
    "tllib leep": lambda y: [tllib.leep(P, y), tllib.negative_conditional_entropy(y, Z.to(y.dtype))],
    "logme": lambda y: logme.LogME().fit(X.numpy(), y.numpy()),
    "transformer_ranker": lambda y: transformer_ranker.NearestNeighbors().fit(X, y),
    "fisher diagonal": lambda y: empirical(y).diagonal([(X, y)]),
    "fisher gram": lambda y: empirical(y).gram([LAST], [(X, y)]),
    "fisher trace": lambda y: empirical(y).trace([(X, y)]),
    "fisher product": lambda y: empirical(y).matvec(LAST, [(X, y)]),
    "extract": lambda y: rank.extract(net(), [(X, y)]).labels,
    "HeadSolver": lambda y: adapt.HeadSolver(classes=3).update(X, y).solve(1.0)[0],
    "adapt_head": lambda y: adapt.adapt_head(net(), [(X, y)], lam=1.0)[0].weight,
    "pool": lambda y: Pool({"source": Part(X, y)}, torch.device("cpu")).labels,
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_labels_of_unsigned_types(name: str, dtype: torch.dtype) -> None:
    torch.testing.assert_close(CALLS[name](Y.to(dtype)), CALLS[name](Y), rtol=0, atol=0)
