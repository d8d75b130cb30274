"""Every form in which directions may be given, against the same directions as plain float64 dictionaries."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transferops.fisher import FisherInformation, LowRank, parameter_differences

CLASSES, SAMPLES = 3, 5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread only waits, and on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Network(nn.Module):
    """A frozen layer, tokens and none, attention, a convolution, and a weight used outside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.tokens = nn.Linear(4, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.outside = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.tokens(self.frozen(x)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = torch.tanh(self.conv(x.mT)).mean(-1)
        return self.head(F.linear(x, self.outside.weight, self.outside.bias))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Network().double()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(SAMPLES, 3, 4).double(), torch.randint(CLASSES, (SAMPLES,)))]


def moved(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p))
    return other


CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_every_form_gives_the_same(estimator: str, model: nn.Module, batches: Any) -> None:
    models = [moved(model, seed) for seed in (1, 2)]
    differences = parameter_differences(models, model)
    fisher = FisherInformation(model, estimator)
    expected = fisher.gram(differences, batches)
    flat = torch.stack([torch.cat([v.flatten() for v in d.values()]) for d in differences])
    for given in (models, parameter_differences([m.state_dict() for m in models], model), flat, list(flat)):
        torch.testing.assert_close(fisher.gram(given, batches), expected, **CLOSE)
    torch.testing.assert_close(fisher.gram([differences[0], models[1]], batches), expected, **CLOSE)
    assert fisher.quadratic(models[1], batches) == pytest.approx(float(expected[1, 1]), rel=1e-9)
    image = fisher.matvec(flat[0], batches)
    assert sum(float((image[n] * differences[1][n]).sum()) for n in image) == pytest.approx(float(expected[0, 1]))
    # Where J is over less, so are modules and vectors.
    part = FisherInformation(model, estimator, parameters=["head.bias", "tokens.weight"])
    some = parameter_differences(models, model, ["head.bias", "tokens.weight"])
    short = [torch.cat([d["tokens.weight"].flatten(), d["head.bias"]]) for d in some]
    for given in (models, short):
        torch.testing.assert_close(part.gram(given, batches), part.gram(some, batches), **CLOSE)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_low_precision_directions(estimator: str, model: nn.Module, batches: Any) -> None:
    """bfloat16 differences are differences rounded once; what is computed with them is as exact as before."""
    models = [moved(model, seed) for seed in (1, 2)]
    kept = parameter_differences(models, model, dtype=torch.bfloat16, device="cpu")
    assert all(v.dtype is torch.bfloat16 for d in kept for v in d.values())
    fisher = FisherInformation(model, estimator)
    rounded = [{n: v.bfloat16().double() for n, v in d.items()} for d in parameter_differences(models, model)]
    torch.testing.assert_close(fisher.gram(kept, batches), fisher.gram(rounded, batches), **CLOSE)


def product(model: nn.Module, name: str, rank: int) -> LowRank:
    shape = model.get_parameter(name).shape
    left, right = torch.randn(shape[0], rank).double(), torch.randn(rank, shape[1:].numel()).double()
    return LowRank(left, right)


@pytest.mark.parametrize("estimator", ["exact", "empirical", "monte_carlo"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_low_rank_directions(estimator: str, chunk_size: int | None, model: nn.Module, batches: Any) -> None:
    """Of several ranks, mixed with tensors, on every route."""
    weights = ["tokens.weight", "attention.in_proj_weight", "attention.out_proj.weight", "conv.weight"]
    weights += ["outside.weight", "head.weight", "frozen.weight"]
    torch.manual_seed(2)
    given: list[dict[str, Any]] = [{n: product(model, n, rank) for n in weights} for rank in (1, 3)]
    given.append({"head.weight": torch.randn(CLASSES, 6).double(), "tokens.weight": product(model, "tokens.weight", 2)})
    given.append({"head.bias": torch.randn(CLASSES).double()})
    plain = [
        {n: (v[0] @ v[1]).view(model.get_parameter(n).shape) if isinstance(v, LowRank) else v for n, v in d.items()}
        for d in given
    ]
    fisher = FisherInformation(model, estimator, chunk_size=chunk_size)
    torch.testing.assert_close(fisher.gram(given, batches), fisher.gram(plain, batches), **CLOSE)
    step = {n: v for n, v in given[1].items() if n != "frozen.weight"}
    image, other = fisher.matvec(step, batches), fisher.matvec({n: plain[1][n] for n in step}, batches)
    for name, value in image.items():
        torch.testing.assert_close(value, other[name], **CLOSE)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_products_of_linear_layers_are_never_formed(
    estimator: str, model: nn.Module, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [{n: product(model, n, 2) for n in ("tokens.weight", "head.weight")} for _ in range(3)]
    expected = FisherInformation(model, estimator).gram(given, batches)

    def formed(move: Any, parameter: Tensor) -> Tensor:
        raise AssertionError

    monkeypatch.setattr("transferops.fisher.directions.dense", formed)
    monkeypatch.setattr("transferops.fisher.collect.dense", formed)
    assert torch.equal(FisherInformation(model, estimator).gram(given, batches), expected)
    with pytest.raises(AssertionError):
        FisherInformation(model, estimator).gram([{"conv.weight": product(model, "conv.weight", 2)}], batches)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_many_directions_are_taken_a_few_at_a_time(
    estimator: str, model: nn.Module, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transferops.fisher.collect._BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("transferops.fisher.estimation._DIRECTIONS_AT_ONCE", 3)
    models = [moved(model, seed) for seed in range(7)]
    fisher = FisherInformation(model, estimator)
    gram = fisher.gram(models, batches)
    for k in (0, 4, 6):
        assert fisher.quadratic(models[k], batches) == pytest.approx(float(gram[k, k]), rel=1e-9)
    torch.testing.assert_close(fisher.gram(models[::-1], batches), gram.flip(0, 1), **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_directions_off_the_device(estimator: str, model: nn.Module, batches: Any) -> None:
    """Kept on the CPU, used on the GPU."""
    directions = parameter_differences([moved(model, seed) for seed in (1, 2)], model)
    directions.append({"head.weight": product(model, "head.weight", 2)})
    expected = FisherInformation(model, estimator).gram(directions, batches)
    found = FisherInformation(model.cuda(), estimator).gram(directions, batches)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
