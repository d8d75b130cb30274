"""Fisher information on the CPU and on a GPU: the same values, where and in what precision they are asked for."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fisher_models import CLASSES, PROBLEMS, build, directions
from torch import Tensor, nn

from transferops import ops
from transferops.fisher import FisherInformation

pytestmark = pytest.mark.usefixtures("one_thread")

CUDA = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
ON_CPU = ("mlp", "convolutions", "decoder", "multi_head_masked", "layer_scale", "transposed", "recurrent")
EVERYWHERE = [("cpu", name) for name in ON_CPU] + [pytest.param("cuda", name, marks=CUDA) for name in PROBLEMS]
TOLERANCE = 1e-4  # relative to the norm, for float32; the models are a few layers deep


def moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: moved(part, device, dtype) for name, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((found.cpu().double() - expected).norm()) <= tolerance * float(expected.norm()) + 1e-12


@contextlib.contextmanager
def a_stream_of_its_own(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("estimator", ["empirical", "exact"])
@pytest.mark.parametrize(("device", "name"), EVERYWHERE)
def test_float32_against_float64_on_the_cpu(device: str, name: str, estimator: str) -> None:
    """On a stream that is not the default one, and twice with the same bits."""
    model, inputs, targets = build(name)
    loss, steps, batches = PROBLEMS[name].loss, directions(model, 2), [(inputs, targets)]
    exact = FisherInformation(model, estimator, loss)
    gram, trace = exact.gram(steps, batches), exact.trace(batches)
    diagonal, product = exact.diagonal(batches), exact.matvec(steps[0], batches)
    model.to(device, torch.float32)
    # On the CPU, from where they are brought.
    batches = [(moved(inputs, "cpu", torch.float32), moved(targets, "cpu", torch.float32))]
    fisher = FisherInformation(model, estimator, loss)
    with a_stream_of_its_own(device):
        results = {"diagonal": fisher.diagonal(batches), "matvec": fisher.matvec(steps[0], batches)}
        again = fisher.diagonal(batches)
        assert close(fisher.gram(steps, batches), gram, TOLERANCE)
        assert fisher.trace(batches) == pytest.approx(trace, rel=TOLERANCE)
    for quantity, reference in (("diagonal", diagonal), ("matvec", product)):
        found = torch.cat([results[quantity][n].flatten().cpu() for n in reference])
        assert close(found, torch.cat([value.flatten() for value in reference.values()]), TOLERANCE)
    for parameter, value in results["diagonal"].items():
        assert value.device.type == device
        assert torch.equal(value, again[parameter])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantity", ["diagonal", "matvec", "kfac"])
def test_results_where_and_as_they_are_asked_for(quantity: str, device: str) -> None:
    model, inputs, targets = build("mlp")
    model.to(device, torch.float32)
    batches = [(part.float(), y) for part, y in zip(inputs.split(2), targets.split(2))]
    what = [directions(model, 1)[0]] if quantity == "matvec" else []

    def tensors(**options: Any) -> list[Tensor]:
        fisher = FisherInformation(model, "empirical", **options)
        found = getattr(fisher, quantity)(*what, batches)
        return [part for value in found.values() for part in (value if isinstance(value, tuple) else (value,))]

    plain, wide = tensors(), tensors(dtype=torch.float64, device="cpu")
    assert {(t.dtype, t.device.type) for t in plain} == {(torch.float32, device)}
    assert {(t.dtype, t.device.type) for t in wide} == {(torch.float64, "cpu")}
    for left, right in zip(plain, wide):
        torch.testing.assert_close(left.cpu().double(), right, rtol=1e-5, atol=1e-7)
    model.double()
    batches = [(part.double(), y) for part, y in batches]
    assert {t.dtype for t in tensors()} == {torch.float64}
    assert {t.dtype for t in tensors(dtype=torch.float32)} == {torch.float32}


def test_sums_in_float64_do_not_lose_small_terms() -> None:
    """Equal batches, whose average is that of one of them: sums in float32 miss it by their rounding."""
    model, inputs, targets = build("mlp")
    model.float()
    batch = (inputs.float(), targets)
    one = FisherInformation(model, "empirical", dtype=torch.float64).diagonal([batch])
    many = FisherInformation(model, "empirical", dtype=torch.float64).diagonal([batch] * 300)
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-13, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_effective_dimension_and_parts_with_results_elsewhere(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, targets = build("mlp")
    model.to(device)
    batches = [(inputs, targets)]
    plain = FisherInformation(model, "empirical")
    kept = FisherInformation(model, "empirical", dtype=torch.float64, device="cpu")
    parts = [kept.accumulate("diagonal").update([(inputs[s], targets[s])]) for s in (slice(2), slice(2, None))]
    merged = parts[0].merge(parts[1]).compute()
    for name, value in plain.diagonal(batches).items():
        torch.testing.assert_close(merged[name], value.cpu())
    monkeypatch.setattr("transferops.fisher.spectrum._ROWS", 2)
    expected = plain.effective_dimension(0.05, batches, probes=2, steps=4)
    assert kept.effective_dimension(0.05, batches, probes=2, steps=4) == pytest.approx(expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["attention", "transposed", "recurrent"])
@pytest.mark.parametrize("estimator", ["empirical", "exact"])
def test_autocast_is_that_of_the_model_only(estimator: str, name: str, device: str) -> None:
    """As under autocast outside, but for its cache of weights; near to full precision; a pass without gradients spoils
    none."""
    model, inputs, targets = build(name)
    model.to(device, torch.float32)
    batches, steps = [(inputs.float(), targets)], directions(model, 2)
    full = FisherInformation(model, estimator)
    low = FisherInformation(model, estimator, autocast=torch.bfloat16)
    gram = low.gram(steps, batches)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(full.gram(steps, batches), gram, rtol=5e-3, atol=0)
    assert not torch.equal(full.gram(steps, batches), gram)
    assert (full.gram(steps, batches) - gram).norm() < 0.05 * gram.norm()
    assert low.effective_dimension(0.1, batches).value == pytest.approx(
        full.effective_dimension(0.1, batches).value, rel=0.05
    )
    assert not torch.is_autocast_enabled(device)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.bfloat16}, "dtype: expected torch.float32 or torch.float64, got torch.bfloat16"),
        ({"dtype": "float32"}, "dtype: expected torch.float32 or torch.float64, got float32"),
        ({"device": "nowhere"}, "device: expected a device that holds values, or the name of one, got 'nowhere'"),
        ({"device": "meta"}, "device: expected a device that holds values, or the name of one, got 'meta'"),
        ({"device": 1.5}, "device: expected a device that holds values, or the name of one, got 1.5"),
        ({"autocast": torch.float32}, "autocast: expected torch.float16 or torch.bfloat16, got torch.float32"),
        ({"autocast": True}, "autocast: expected torch.float16 or torch.bfloat16, got True"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FisherInformation(nn.Linear(2, CLASSES), **options)


@CUDA
def test_cuda_graph_of_a_fisher_step() -> None:
    """The ops of a training step's diagonal, projection, norm and Gram matrix, captured once and replayed."""
    a, b = torch.randn(6, 20, 33, device="cuda"), torch.randn(6, 20, 40, device="cuda")
    image, signal = torch.randn(4, 8, 9, 9, device="cuda"), torch.randn(4, 12, 9, 9, device="cuda")
    steps, filters = torch.randn(3, 40, 33, device="cuda"), torch.randn(3, 12, 8, 3, 3, device="cuda")
    tangents = torch.randn(3, 6, 33, device="cuda")

    def step() -> list[Tensor]:
        return [
            ops.linear_fisher_diagonal(a, b),
            ops.linear_fisher_projection(a, b, steps),
            ops.linear_grad_norm(a, b),
            ops.conv_fisher_diagonal(image, signal, (3, 3), padding=1),
            ops.conv_fisher_projection(image, signal, filters, (3, 3), padding=1),
            ops.conv_grad_norm(image, signal, (3, 3), padding=1),
            ops.softmax_fisher_gram(a[:, 0], tangents),
        ]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (a, b, image, signal, tangents):
        value.normal_()
    expected = step()
    graph.replay()
    for found, wanted in zip(captured, expected):
        assert torch.equal(found, wanted)
