"""Every quantity of every estimator against the dense J made of explicit float64 per-sample derivatives."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from fisher_models import CLASSES, PROBLEMS, SAMPLES, build, dense, directions, flatten, trainable
from torch import Tensor, nn
from torch.nn import functional as F

from transferops.fisher import FisherInformation

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("estimator", ["empirical", "exact"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_quantity_is_the_dense_one(name: str, estimator: str) -> None:
    model, inputs, targets = build(name)
    loss = PROBLEMS[name].loss
    expected = dense(model, inputs, targets, estimator, loss)
    fisher = FisherInformation(model, estimator, loss)
    batches = [(inputs, targets)]

    diagonal = flatten(fisher.diagonal(batches), model)
    torch.testing.assert_close(diagonal, expected.diagonal(), **CLOSE)
    assert fisher.trace(batches) == pytest.approx(float(expected.trace()), rel=1e-9)

    steps = directions(model, 3)
    theta = torch.stack([flatten(step, model) for step in steps], 1)
    gram = fisher.gram(steps, batches)
    torch.testing.assert_close(gram, theta.T @ expected @ theta, **CLOSE)
    assert torch.equal(gram, gram.T)
    assert fisher.quadratic(steps[1], batches) == pytest.approx(float(gram[1, 1]), rel=1e-9)
    torch.testing.assert_close(flatten(fisher.matvec(steps[0], batches), model), expected @ theta[:, 0], **CLOSE)


@pytest.mark.parametrize("name", PROBLEMS)
def test_routes_are_the_fast_ones_where_there_is_one(name: str) -> None:
    model, inputs, targets = build(name)
    lines = FisherInformation(model, "empirical", PROBLEMS[name].loss).explain((inputs, targets)).splitlines()[1:]
    routes = dict(re.match(r"(\S+) +(captured|copies|per sample)  +\S", line).groups() for line in lines)
    assert list(routes) == list(trainable(model))
    assert {n for n, route in routes.items() if route == "per sample"} == set(PROBLEMS[name].fallback)


def by_module(model: nn.Module) -> dict[str, list[int]]:
    """Of each module with parameters of its own, how many elements each of them has; in the model's order."""
    sizes: dict[str, list[int]] = {}
    for name, p in trainable(model).items():
        sizes.setdefault(name.rpartition(".")[0], []).append(p.numel())
    return sizes


@pytest.mark.parametrize("estimator", ["empirical", "exact"])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "recurrent", "attention", "tied", "language"])
def test_blocks_and_effective_dimension(name: str, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the eigenvalues of the rows' Gram matrix, in one pass and in several, and by those of J."""
    model, inputs, targets = build(name)
    expected = dense(model, inputs, targets, estimator, PROBLEMS[name].loss)
    fisher = FisherInformation(model, estimator)
    start = 0
    for parameter, p in trainable(model).items():
        part = slice(start, start := start + p.numel())
        block = fisher.block(parameter, [(inputs, targets)])
        torch.testing.assert_close(block, expected[part, part], **CLOSE)
    start = 0
    for layer, sizes in by_module(model).items():
        part = slice(start, start := start + sum(sizes))
        if layer and len(sizes) > 1:
            torch.testing.assert_close(fisher.block(layer, [(inputs, targets)]), expected[part, part], **CLOSE)
    eigenvalues = torch.linalg.eigvalsh(expected).clamp_min(0)
    halves = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    largest = max(p.numel() for p in trainable(model).values())
    rows = SAMPLES * (1 if estimator == "empirical" else targets[0].numel() * CLASSES)
    small = "samples" if rows <= len(expected) else "parameters"
    changes: dict[str, tuple[str, Any]] = {
        "all at once": ("_GRADIENT_BYTES", 1 << 20),
        "parameter by parameter": ("_GRADIENT_BYTES", 8 * rows * largest),
        "parameters": ("_count_rows", lambda *_: len(expected) + 1),
    }
    fisher = FisherInformation(model, estimator, chunk_size=2)
    for case, (name, value) in changes.items():
        monkeypatch.setattr(f"transferops.fisher.spectrum.{name}", value)
        for damping in (1e-3, 0.1):
            found = fisher.effective_dimension(damping, iter(halves))
            assert found.value == pytest.approx(float((eigenvalues / (eigenvalues + damping)).sum()), rel=1e-6)
            assert (found.standard_error, found.method) == (0.0, "parameters" if case == "parameters" else small)


def test_effective_dimension_by_lanczos_quadrature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within four standard errors; exact for a multiple of the identity, where every vector tells all."""
    model, inputs, targets = build("mlp")
    fisher = FisherInformation(model, "empirical", seed=3)
    exact = fisher.effective_dimension(0.05, [(inputs, targets)]).value
    monkeypatch.setattr("transferops.fisher.spectrum._ROWS", 2)
    found = fisher.effective_dimension(0.05, iter([(inputs, targets)]), probes=40, steps=12)
    assert found.method == "lanczos"
    assert 0 < found.standard_error < 0.3 * exact
    assert abs(found.value - exact) < 4 * found.standard_error
    bias = FisherInformation(nn.Linear(2, 12, bias=True).double(), loss="mse", parameters=["bias"])
    isotropic = bias.effective_dimension(0.5, [torch.randn(4, 2).double()], probes=2)
    assert isotropic.value == pytest.approx(12 / 1.5, rel=1e-12)
    assert isotropic.standard_error < 1e-12


def unfolded(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs of a layer as rows, [N, T, I]; a square kernel is assumed."""
    if isinstance(module, nn.Conv2d):
        return F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT
    return x.reshape(len(x), -1, x.shape[-1])


def test_kronecker_factors() -> None:
    """Against inputs and output gradients collected by hand; for one position and sample they give the block."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=1, dilation=(1, 2)),
        nn.Tanh(),
        nn.Flatten(2),
        nn.Linear(12, CLASSES),
    ).double()
    inputs, targets = torch.randn(SAMPLES, 2, 5, 6).double(), torch.randint(CLASSES, (SAMPLES, 3))
    factors = FisherInformation(model, "empirical").kfac([(inputs[:2], targets[:2]), (inputs[2:], targets[2:])])
    assert list(factors) == ["0.weight", "3.weight"]
    x, outputs = inputs, {}
    for i, module in enumerate(model):
        a, x = x, module(x)
        x.retain_grad()
        outputs[i] = (a.detach(), x)
    F.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    for i in (0, 3):
        a, y = unfolded(model[i], outputs[i][0]), outputs[i][1].grad
        b = y.flatten(2).mT if i == 0 else y
        left, right = factors[f"{i}.weight"]
        torch.testing.assert_close(left, torch.einsum("nti,ntj->ij", a, a) / a.shape[1] / SAMPLES, **CLOSE)
        torch.testing.assert_close(right, torch.einsum("nti,ntj->ij", b, b) / SAMPLES, **CLOSE)

    linear = nn.Linear(3, CLASSES).double()
    for estimator in ("empirical", "exact"):
        fisher = FisherInformation(linear, estimator)
        batch = (torch.randn(1, 3).double(), targets[:1, 0])
        ((left, right),) = fisher.kfac([batch]).values()
        torch.testing.assert_close(torch.kron(right, left), fisher.block("weight", [batch]), **CLOSE)


@pytest.mark.parametrize("name", ["mlp", "regression", "language"])
def test_monte_carlo_is_the_exact_one_in_expectation(name: str) -> None:
    """Each quantity over many seeds, within five standard errors; within one call, draws are averaged."""
    model, inputs, targets = build(name)
    loss, batches, (step,) = PROBLEMS[name].loss, [(inputs, targets)], directions(model, 1)
    exact = FisherInformation(model, "exact", loss)
    reference = flatten(exact.diagonal(batches), model)
    parts: dict[str, list[Any]] = {"diagonal": [], "quadratic": [], "trace": []}
    for seed in range(60):
        fisher = FisherInformation(model, "monte_carlo", loss, draws=5, seed=seed)
        parts["diagonal"].append(flatten(fisher.diagonal(batches), model))
        parts["quadratic"].append(fisher.quadratic(step, batches))
        parts["trace"].append(fisher.trace(batches))
        assert parts["trace"][-1] == pytest.approx(float(parts["diagonal"][-1].sum()), rel=1e-9)
        product = flatten(fisher.matvec(step, batches), model)
        assert float(product @ flatten(step, model)) == pytest.approx(parts["quadratic"][-1], rel=1e-9)
    expected = {"diagonal": reference, "quadratic": exact.quadratic(step, batches), "trace": exact.trace(batches)}
    for quantity, value in expected.items():
        found = torch.stack([torch.as_tensor(part) for part in parts[quantity]])
        error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - value).abs() <= 5 * error + 1e-12).all()
    spread = torch.tensor(parts["trace"]).std()
    single = [FisherInformation(model, "monte_carlo", loss, seed=s).trace(batches) for s in range(60)]
    assert 1.3 < torch.tensor(single).std() / spread < 4  # sqrt(5) in the limit


def test_monte_carlo_repeats_with_its_seed() -> None:
    model, inputs, _ = build("mlp")
    fisher = FisherInformation(model, "monte_carlo", seed=1)
    first, again = fisher.diagonal([inputs]), fisher.diagonal([inputs])
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = FisherInformation(model, "monte_carlo", seed=2).diagonal([inputs])
    assert not torch.equal(first["0.weight"], other["0.weight"])


@pytest.mark.parametrize("name", ["convolutions", "language", "multi_head", "regression", "layer_scale"])
@pytest.mark.parametrize("estimator", ["empirical", "exact"])
def test_batches_and_order_do_not_matter(name: str, estimator: str) -> None:
    model, inputs, targets = build(name)
    fisher, steps = FisherInformation(model, estimator, PROBLEMS[name].loss), directions(model, 3)
    order = torch.tensor([3, 0, 4, 2, 1])
    whole = [(inputs, targets)]
    for batches in (
        list(zip(inputs.split(2), targets.split(2))),
        [(inputs[order], targets[order])],
        [(inputs[n : n + 1], targets[n : n + 1]) for n in range(SAMPLES)],
    ):
        torch.testing.assert_close(fisher.gram(steps, batches), fisher.gram(steps, whole), **CLOSE)
        torch.testing.assert_close(
            flatten(fisher.diagonal(batches), model), flatten(fisher.diagonal(whole), model), **CLOSE
        )
    gram = fisher.gram(steps, whole)
    assert torch.linalg.eigvalsh(gram)[0] > -1e-12 * gram.trace()
    # Scores are summed over layers before their product: the parameters are not independent of each other.
    apart = sum(fisher.gram([{n: s[n]} for s in steps], whole) for n in trainable(model))
    assert (apart - gram).norm() > 0.01 * gram.norm()
    first, rest = (fisher.gram(steps, [(inputs[s], targets[s])]) for s in (slice(2), slice(2, None)))
    torch.testing.assert_close((2 * first + 3 * rest) / SAMPLES, gram, **CLOSE)


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("name", ["recurrent", "multi_head", "tied", "keywords"])
def test_chunks_do_not_matter(name: str, chunk_size: int) -> None:
    model, inputs, targets = build(name)
    whole, chunked = (FisherInformation(model, "empirical", chunk_size=c) for c in (None, chunk_size))
    torch.testing.assert_close(
        flatten(chunked.diagonal([(inputs, targets)]), model),
        flatten(whole.diagonal([(inputs, targets)]), model),
        **CLOSE,
    )


def test_selected_parameters_are_a_part_of_the_whole() -> None:
    model, inputs, targets = build("attention")
    whole = FisherInformation(model, "empirical").diagonal([(inputs, targets)])
    for chosen in (["positions", "out.weight"], lambda name: name in {"positions", "out.weight"}):
        part = FisherInformation(model, "empirical", parameters=chosen).diagonal([(inputs, targets)])
        assert list(part) == ["positions", "out.weight"]
        for name in part:
            torch.testing.assert_close(part[name], whole[name], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "attention", "language", "recurrent"])
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    model, inputs, targets = build(name)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    model.to(dtype)
    found = FisherInformation(model, "empirical").diagonal([(inputs, targets)])
    assert all(value.dtype is torch.float32 for value in found.values())
    exact = inputs.double() if inputs.is_floating_point() else inputs
    expected = FisherInformation(model.double(), "empirical").diagonal([(exact, targets)])
    for parameter, value in found.items():
        error = (value - expected[parameter]).norm() / expected[parameter].norm()
        assert error < (1e-4 if dtype is torch.float32 else 0.1)
