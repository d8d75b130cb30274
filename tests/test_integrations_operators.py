"""The Fisher information as a linear operator: of curvlinops, against its own operators, and of SciPy."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from transferops.fisher import FisherInformation

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture
def batches(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (20,), generator=generator)
    return [(inputs[:12], labels[:12]), (inputs[12:], labels[12:])]


def dense(model: nn.Module, inputs: Tensor) -> Tensor:
    """J = (1/N) sum_n J_n^T (diag p_n - p_n p_n^T) J_n from the Jacobian of every sample."""
    total = torch.zeros(())
    for sample in inputs:
        outputs = model(sample)
        rows = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in outputs]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        p = outputs.softmax(0).detach()
        total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / len(inputs)
    return total


class TestCurvlinops:
    @pytest.fixture
    def peer(self) -> Any:
        with warnings.catch_warnings():  # of its dependencies, on import
            warnings.simplefilter("ignore")
            return pytest.importorskip("curvlinops", exc_type=ImportError)

    @pytest.mark.parametrize(("estimator", "name"), [("exact", "GGNLinearOperator"), ("empirical", "EFLinearOperator")])
    @pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
    def test_products_are_those_of_its_own_operator(
        self, peer: Any, model: nn.Module, batches: Any, estimator: str, name: str, loss: str
    ) -> None:
        from transferops.integrations.curvlinops import FisherOperator

        if loss == "mse":
            batches = [(x, nn.functional.one_hot(y, 3).double()) for x, y in batches]
        criterion = nn.CrossEntropyLoss() if loss == "cross_entropy" else nn.MSELoss(reduction="sum")
        # The sum of squared errors is twice the negative log-likelihood; of its gradients, four times the squares.
        scale = 1.0 if loss == "cross_entropy" else 20.0 * (2 if estimator == "exact" else 4)
        theirs = getattr(peer, name)(model, criterion, list(model.parameters()), batches)
        ours = FisherOperator(FisherInformation(model, estimator, loss), batches)
        assert ours.shape == theirs.shape
        assert (ours.dtype, ours.device, ours.SELF_ADJOINT) == (theirs.dtype, theirs.device, True)
        columns = torch.randn(39, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        torch.testing.assert_close(scale * (ours @ columns), theirs @ columns, rtol=1e-10, atol=1e-13)
        vectors = [torch.full_like(p, 0.5) for p in model.parameters()]
        for got, want in zip(ours @ vectors, theirs @ vectors, strict=True):
            torch.testing.assert_close(scale * got, want, rtol=1e-10, atol=1e-13)
        scipy_product = ours.to_scipy() @ columns.numpy()
        np.testing.assert_allclose(scipy_product, (ours @ columns).numpy(), rtol=1e-12)

    def test_it_takes_part_in_compositions(self, peer: Any, model: nn.Module, batches: Any) -> None:
        from transferops.integrations.curvlinops import FisherOperator

        operator = FisherOperator(FisherInformation(model), batches)
        ggn = peer.GGNLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), batches)
        vector = torch.linspace(-1, 1, 39, dtype=torch.float64)
        difference = (operator - ggn) @ vector
        assert float(difference.abs().max()) < 1e-12
        part = peer.SubmatrixLinearOperator(operator, [0, 7], [2]) @ torch.ones(1, dtype=torch.float64)
        want = dense(model, torch.cat([x for x, _ in batches]))
        torch.testing.assert_close(part, want[[0, 7], 2], rtol=1e-10, atol=1e-14)

    def test_a_part_of_the_parameters(self, peer: Any, model: nn.Module, batches: Any) -> None:
        from transferops.integrations.curvlinops import FisherOperator

        operator = FisherOperator(FisherInformation(model, parameters=["2.weight", "2.bias"]), batches)
        assert operator.shape == (15, 15)
        identity = torch.eye(15, dtype=torch.float64)
        want = dense(model, torch.cat([x for x, _ in batches]))[24:, 24:]
        torch.testing.assert_close(operator @ identity, want, rtol=1e-10, atol=1e-14)


class TestScipy:
    @pytest.fixture(autouse=True)
    def linalg(self) -> Any:
        return pytest.importorskip("scipy.sparse.linalg")

    def test_it_is_the_matrix(self, model: nn.Module, batches: Any) -> None:
        from transferops.integrations.scipy import FisherOperator

        operator = FisherOperator(FisherInformation(model), iter(batches))  # read more than once
        want = dense(model, torch.cat([x for x, _ in batches])).numpy()
        assert operator.shape == (39, 39)
        assert operator.dtype == np.float64
        np.testing.assert_allclose(operator @ np.eye(39), want, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(operator.H @ np.ones(39), want @ np.ones(39), rtol=1e-10, atol=1e-14)
        assert (operator @ np.empty((39, 0))).shape == (39, 0)

    def test_eigenvalues_and_solutions(self, linalg: Any, model: nn.Module, batches: Any) -> None:
        from transferops.integrations.scipy import FisherOperator

        operator = FisherOperator(FisherInformation(model), batches)
        want = dense(model, torch.cat([x for x, _ in batches])).numpy()
        largest = linalg.eigsh(operator, k=3, return_eigenvectors=False, v0=np.ones(39))
        np.testing.assert_allclose(sorted(largest), np.linalg.eigvalsh(want)[-3:], rtol=1e-8)
        damped = operator + linalg.aslinearoperator(0.1 * np.eye(39))
        tolerance = "rtol" if "rtol" in inspect.signature(linalg.cg).parameters else "tol"  # before SciPy 1.12
        solution, failed = linalg.cg(damped, np.ones(39), **{tolerance: 1e-10})
        assert failed == 0
        np.testing.assert_allclose(solution, np.linalg.solve(want + 0.1 * np.eye(39), np.ones(39)), rtol=1e-7)

    def test_bad_input(self, model: nn.Module, batches: Any) -> None:
        from transferops.integrations.scipy import FisherOperator

        fisher = FisherInformation(model)
        with pytest.raises(TypeError, match=r"^batches: expected an iterable of batches"):
            FisherOperator(fisher, batches[0][0])
        with pytest.raises(
            TypeError, match=r"^fisher: expected a transferops.fisher.FisherInformation, got Sequential"
        ):
            FisherOperator(model, batches)
        with pytest.raises(ValueError, match=r"direction.*finite"):
            FisherOperator(fisher, batches) @ np.full(39, np.nan)
        model[2].to("meta")
        with pytest.raises(ValueError, match=r"^fisher: expected parameters on one device, got cpu, meta"):
            FisherOperator(fisher, batches)
