"""The back end of laplace-torch against laplace-torch's own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():  # of its dependencies, on import
    warnings.simplefilter("ignore")
    laplace = pytest.importorskip("laplace", exc_type=ImportError)

from laplace.curvature import GGNInterface

from transferops.integrations.laplace import DiagonalGGN

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def setting() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """A network, and data for classification and for regression."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    inputs = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    return model, TensorDataset(inputs, targets.argmax(1)), TensorDataset(inputs, targets)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("weights", ["all", "last_layer", "subnetwork"])
def test_posterior_precision_is_that_of_its_own_back_end(setting: Any, likelihood: str, weights: str) -> None:
    model, *data = setting
    loader = DataLoader(data[likelihood == "regression"], batch_size=8)
    options: dict[str, Any] = {"subnetwork_indices": torch.tensor([0, 4, 41, 60])} if weights == "subnetwork" else {}
    precisions, losses = [], []
    for backend in (DiagonalGGN, GGNInterface):
        found = laplace.Laplace(
            model, likelihood, subset_of_weights=weights, hessian_structure="diag", backend=backend, **options
        )
        found.fit(loader)
        precisions.append(found.posterior_precision)
        losses.append(float(found.loss))
    torch.testing.assert_close(precisions[0], precisions[1], rtol=1e-10, atol=1e-12)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert float(precisions[0].max()) > 1.1  # more than the prior's
