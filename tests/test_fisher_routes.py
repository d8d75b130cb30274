"""What the routes of the Fisher information must not get wrong, leave behind, or let pass."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fisher_models import Coupled
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from transferops.fisher import FisherInformation, LowRank

CLASSES = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread only waits, and on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def batch(samples: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(samples, 4).double(), torch.randint(CLASSES, (samples,))


def diagonal_by_loop(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in zip(inputs, targets):
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for name, g in zip(total, found):
            total[name] += 0 if g is None else g**2 / len(inputs)
    return total


def assert_is_the_loop(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    found = FisherInformation(model, "empirical").diagonal([(inputs, targets)])
    for name, expected in diagonal_by_loop(model, inputs, targets).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def route(model: nn.Module, name: str, inputs: Tensor, targets: Tensor) -> str:
    lines = FisherInformation(model, "empirical").explain((inputs, targets)).splitlines()
    return " ".join(next(line for line in lines if line.startswith(name + " ")).split()[1:])


def test_tokens_that_cancel_leave_nothing() -> None:
    """g_2 = -g_1 on equal inputs: the square of the sum is 0, the sum of squares is not."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.linear(torch.stack([x, x], 1)).unbind(1)
            return first - second + self.linear(x).detach()

    fisher = FisherInformation(Cancelling().double(), "empirical")
    assert all(value.abs().max() < 1e-30 for value in fisher.diagonal([batch()]).values())
    assert fisher.trace([batch()]) < 1e-30


class Bilinear(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * super().forward(x)


class Hooked(nn.Module):
    """User hooks that change what goes in and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)
        self.linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        self.linear.register_forward_hook(lambda module, args, output: output.sin())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5))
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Detached(nn.Module):
    """A layer that runs without gradients, one whose output is dropped, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.still, self.dropped, self.idle = (nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.still(x)
        self.dropped(x)
        return self.head(input=torch.relu_(x))


class Inplace(nn.Module):
    """In-place operations on a layer's output, and a sum into it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh_()
        y = y + self.second(y).relu_()
        return self.head(y).mul_(2)


@pytest.mark.parametrize(
    ("make", "slow"),
    [
        (lambda: nn.Sequential(Bilinear(4, 5), nn.Linear(5, CLASSES)), {"0.weight"}),
        (Hooked, set()),
        (Checkpointed, set()),
        (Detached, {f"{name}.{p}" for name in ("still", "idle") for p in ("weight", "bias")}),
        (Inplace, set()),
        (
            lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, CLASSES)),
            {f"0.parametrizations.weight.original{i}" for i in (0, 1)},
        ),
    ],
    ids=["subclass", "hooks", "checkpoint", "detached", "inplace", "parametrized"],
)
def test_unusual_models_are_right(make: Callable[[], nn.Module], slow: set[str]) -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = make().double(), batch()
    assert_is_the_loop(model, inputs, targets)
    for name, _ in model.named_parameters():
        assert route(model, name, inputs, targets).startswith("per sample") == (name in slow)


def test_a_loop_serves_what_vmap_refuses() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, CLASSES))
            self.head = nn.Linear(CLASSES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            rows = [row @ self.weight if float(row[0]) > 0 else -row @ self.weight for row in x]
            return self.head(torch.stack(rows).tanh())

    assert_is_the_loop(Branching().double(), *batch())


def test_logits_in_an_object_and_labels_in_the_batch() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: Tensor, flag: bool = False) -> Any:
            return SimpleNamespace(logits=self.network(x if flag else -x))

    inputs, targets = batch()
    found = FisherInformation(Named(), "empirical").diagonal([{"x": inputs, "flag": True, "labels": targets}])
    for name, expected in diagonal_by_loop(network(), inputs, targets).items():
        torch.testing.assert_close(found[f"network.{name}"], expected)


@pytest.mark.parametrize("estimator", ["exact", "empirical", "monte_carlo"])
def test_compiled_models_run_uncompiled(estimator: str) -> None:
    inputs, targets = batch()
    plain, compiled = network(), network()
    compiled[0].compile(backend="eager")
    whole = torch.compile(compiled, backend="eager")
    whole(inputs)
    expected = FisherInformation(plain, estimator).diagonal([(inputs, targets)])
    fisher = FisherInformation(whole, estimator)
    found = fisher.diagonal([(inputs, targets)])
    for name, value in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], value)
    gram = FisherInformation(plain, estimator).gram([expected], [(inputs, targets)])
    torch.testing.assert_close(fisher.gram([found], [(inputs, targets)]), gram)


def test_compiled_attention_and_directions() -> None:
    """Through a compiled module whose forward is replaced, and along low-rank directions."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
    plain = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, CLASSES)).double()
    inputs, targets = torch.randn(6, 3, 4).double(), batch()[1]
    directions = [{"2.weight": LowRank(torch.randn(CLASSES, 1).double(), torch.randn(1, 12).double())}]
    expected = [FisherInformation(plain, e).gram(directions, [(inputs, targets)]) for e in ("exact", "empirical")]
    diagonal = FisherInformation(plain, "empirical").diagonal([(inputs, targets)])
    plain.compile(backend="eager")
    plain(inputs)
    for estimator, gram in zip(("exact", "empirical"), expected):
        found = FisherInformation(plain, estimator).gram(directions, [(inputs, targets)])
        torch.testing.assert_close(found, gram)
    found_diagonal = FisherInformation(plain, "empirical").diagonal([(inputs, targets)])
    for name, value in diagonal.items():
        torch.testing.assert_close(found_diagonal[name], value)


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_cuda_graphs(estimator: str) -> None:
    """A model whose training passes are CUDA graphs runs without them, and they replay as before afterwards."""
    model, (inputs, targets) = network().float().cuda(), batch()
    inputs, targets = inputs.float().cuda(), targets.cuda()
    fisher, step = FisherInformation(model, estimator), {n: p.detach().clone() for n, p in model.named_parameters()}
    diagonal, gram = fisher.diagonal([(inputs, targets)]), fisher.gram([step], [(inputs, targets)])
    torch.cuda.make_graphed_callables(model.train(), (inputs,))
    first = model(inputs).detach().clone()
    for name, value in fisher.diagonal([(inputs, targets)]).items():
        torch.testing.assert_close(value, diagonal[name])
    torch.testing.assert_close(fisher.gram([step], [(inputs, targets)]), gram)
    again = model(inputs)
    torch.testing.assert_close(again.detach(), first)
    again.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_autocast(estimator: str) -> None:
    model, (inputs, targets) = network().float(), batch(32)
    inputs = inputs.float()
    fisher, (step,) = FisherInformation(model, estimator), [{n: p.detach() for n, p in model.named_parameters()}]
    diagonal, gram = fisher.diagonal([(inputs, targets)]), fisher.gram([step], [(inputs, targets)])
    with torch.autocast("cpu", torch.bfloat16):
        low = FisherInformation(model, estimator)
        assert "per sample" not in low.explain((inputs, targets))
        found = low.diagonal([(inputs, targets)])
        torch.testing.assert_close(low.gram([step], [(inputs, targets)]), gram, rtol=0.05, atol=0)
    assert not torch.equal(found["0.weight"], diagonal["0.weight"])
    for name, value in diagonal.items():
        assert (found[name] - value).norm() < 0.05 * value.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_large_weights_in_parts(dtype: torch.dtype) -> None:
    """More rows than the diagonal of a weight is formed at once."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(1030, 513).to(dtype), torch.randn(3, 1030).to(dtype)
    targets = torch.tensor([0, 512, 255])
    found = FisherInformation(model, "empirical").diagonal([(inputs, targets)])["weight"]
    expected = diagonal_by_loop(model.double(), inputs.double(), targets)["weight"]
    assert (found - expected).norm() < (1e-12 if dtype is torch.float64 else 0.03) * expected.norm()


class Failing(nn.Module):
    """Fails for batches of six samples, after its first layer has run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.head = nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.drop.training
        x = self.first(x)
        if len(x) == 6:
            raise ArithmeticError
        return self.head(x)


@pytest.mark.parametrize("samples", [4, 6])
@pytest.mark.parametrize("method", ["diagonal", "trace", "gram", "matvec", "kfac", "explain"])
def test_the_model_is_left_as_it_was(method: str, samples: int) -> None:
    model = Failing().double()
    model.first.eval()
    model.head.bias.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    step = {"first.weight": torch.ones_like(model.first.weight)}
    fisher, data = FisherInformation(model, "empirical"), batch(samples)
    calls: dict[str, Callable[[], object]] = {
        "gram": lambda: fisher.gram([step], [data]),
        "matvec": lambda: fisher.matvec(step, [data]),
        "explain": lambda: fisher.explain(data),
    }
    call = calls.get(method, lambda: getattr(fisher, method)([data]))
    if samples == 6 and method != "explain":  # which looks at two samples only
        with pytest.raises(ArithmeticError):
            call()
    else:
        call()
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert data[0].grad is None
    assert torch.is_grad_enabled()


def test_what_changes_between_calls_is_seen() -> None:
    """New values, a new layer, a tied weight and another precision, all in a model that has been checked before."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(1, 4))
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x + self.shift)))

    model, (inputs, targets) = Shifted().double(), batch()
    fisher = FisherInformation(model, "empirical")

    def check() -> None:
        found = fisher.diagonal([(inputs, targets)])
        for name, expected in diagonal_by_loop(model, inputs, targets).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)

    check()
    model.shift.data = torch.randn(1, 4).double()
    check()
    model.head = nn.Linear(4, 4).double()
    check()
    model.head.weight = model.body.weight
    check()
    assert fisher.model.float() is model
    assert fisher.diagonal([(inputs.float(), targets)])["shift"].dtype is torch.float32


def test_what_is_captured_is_let_go() -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Watched(nn.Tanh):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            kept.append(weakref.ref(y))
            return y

    model = nn.Sequential(nn.Linear(4, 5), Watched(), nn.Linear(5, CLASSES)).double()
    fisher = FisherInformation(model, "exact")
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        fisher.diagonal([batch()])
        assert kept
        assert all(reference() is None for reference in kept)
    finally:
        gc.enable()


def test_inputs_that_need_no_gradient_get_none() -> None:
    inputs, targets = batch()
    inputs.requires_grad_()
    FisherInformation(network(), "empirical").diagonal([(inputs, targets)])
    assert inputs.grad is None


class Changing(nn.Module):
    """Overwrites a layer's input after use, in large batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.head(x)
        if len(x) > 2:
            x.zero_()
        return y


class Alternating(nn.Module):
    """Calls a layer more often in large batches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 if len(x) < 3 else 2):
            x = self.body(x)
        return self.head(x)


def empirical(
    model: nn.Module, inputs: Any = None, targets: Any = None, loss: str = "cross_entropy"
) -> FisherInformation:
    data = batch()
    fisher = FisherInformation(model.double(), "empirical", loss)
    fisher.diagonal([(data[0] if inputs is None else inputs, data[1] if targets is None else targets)])
    return fisher


INPUTS = torch.randn(6, 4).double()
TARGETS = torch.zeros(6, dtype=torch.int64)
DATA = [(INPUTS, TARGETS)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: empirical(Coupled()),
            ValueError,
            "model: expected outputs of a sample that do not depend on the rest of its batch, "
            "got others for the same sample in another batch (first seen at the input of 'head')",
        ),
        (
            lambda: empirical(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False))),
            ValueError,
            "model: expected running statistics in '1', without which the samples of a batch are coupled, "
            "got BatchNorm1d that keeps none",
        ),
        (
            lambda: FisherInformation(nn.BatchNorm1d(4, track_running_stats=False).double()).gram(
                [{"bias": torch.ones(4).double()}], [INPUTS]
            ),
            ValueError,
            "model: expected running statistics in '', without which the samples of a batch are coupled, "
            "got BatchNorm1d that keeps none",
        ),
        (
            lambda: empirical(
                nn.Sequential(nn.Embedding(4, CLASSES, max_norm=1.0)), TARGETS[:, None], TARGETS[:, None]
            ),
            ValueError,
            "model: expected Embedding '0' without max_norm, "
            "got max_norm=1.0, which changes weights or gradients on the way",
        ),
        (
            lambda: empirical(Changing()),
            RuntimeError,
            "model: expected inputs of 'head' to be left as they are, got an operation that changes them in place",
        ),
        (
            lambda: empirical(Alternating()),
            ValueError,
            "model: expected 'body' to be called as on the first samples, got more than 1 calls",
        ),
        (
            lambda: FisherInformation(network(), "empirical").diagonal([INPUTS]),
            TypeError,
            "batches[0]: expected (inputs, targets), the empirical Fisher information being that of the targets, "
            "got targets None",
        ),
        (
            lambda: empirical(network(), targets=TARGETS[:5]),
            ValueError,
            "batches[0]: expected integer targets of shape [6], got a int64 tensor of shape [5] on cpu",
        ),
        (
            lambda: empirical(network(), targets=TARGETS.double()),
            ValueError,
            "batches[0]: expected integer targets of shape [6], got a float64 tensor of shape [6] on cpu",
        ),
        (
            lambda: empirical(network(), targets=TARGETS + torch.tensor([0, 0, 0, 3, 0, 0])),
            ValueError,
            "batches[0]: expected targets of 3 classes 0..2 or -100, got 3 at position 3",
        ),
        (
            lambda: empirical(network(), loss="mse"),
            ValueError,
            "batches[0]: expected floating-point targets of shape [6, 3], got a int64 tensor of shape [6] on cpu",
        ),
        (
            lambda: FisherInformation(network(), "monte_carlo").diagonal([(INPUTS, TARGETS[:5] - 100)]),
            ValueError,
            "batches[0]: expected targets of shape [6], got a int64 tensor of shape [5] on cpu",
        ),
        (
            lambda: empirical(network(), INPUTS * torch.inf),
            ValueError,
            "model: expected finite outputs and derivatives, got infinities or NaN among them",
        ),
        (
            lambda: FisherInformation(network(), "monte_carlo").diagonal([INPUTS * torch.nan]),
            ValueError,
            "model: expected finite outputs and derivatives, got infinities or NaN among them",
        ),
        (
            lambda: FisherInformation(network(), "empirical").diagonal(INPUTS),
            TypeError,
            "batches: expected an iterable of batches, such as [inputs], got a float64 tensor of shape [6, 4] on cpu",
        ),
        (
            lambda: FisherInformation(network(), "empirical").trace([]),
            ValueError,
            "batches: expected at least one sample, got none",
        ),
        (
            lambda: FisherInformation(network().requires_grad_(False), "empirical").diagonal(DATA),
            ValueError,
            "parameters: expected at least one of 0 trainable parameters to be selected, got none",
        ),
        (
            lambda: FisherInformation(network(), parameters=["0.bias"]).gram(
                [{"2.bias": torch.ones(3).double()}], DATA
            ),
            ValueError,
            "directions[0]: expected names of the selected parameters, got '2.bias'",
        ),
        (
            lambda: FisherInformation(network()).matvec({}, DATA),
            ValueError,
            "direction: expected at least one parameter to move, got an empty dictionary",
        ),
        (
            lambda: FisherInformation(network()).matvec({"2.bias": torch.tensor([0.0, torch.nan, 0])}, DATA),
            ValueError,
            "direction['2.bias']: expected finite values, got infinities or NaN among them",
        ),
        (
            lambda: FisherInformation(network()).block("3.bias", DATA),
            ValueError,
            "name: expected the name of a selected parameter, or of a module with some, got '3.bias'",
        ),
        (
            lambda: FisherInformation(nn.Linear(1025, 4)).block("weight", DATA),
            ValueError,
            "name: expected parameters of at most 4096 elements, got 'weight' of 4100",
        ),
        (
            lambda: FisherInformation(nn.Sequential(nn.Conv1d(4, 4, 1, groups=2))).kfac(DATA),
            ValueError,
            "model: expected convolutions without groups, got 2 groups in '0'",
        ),
        (
            lambda: FisherInformation(nn.Sequential(Bilinear(4, 3)).double(), "empirical").kfac(DATA),
            ValueError,
            "model: expected '0.weight' to be used by its layer only, got a weight without Kronecker factors",
        ),
        (
            lambda: FisherInformation(network()).effective_dimension(0.0, DATA),
            ValueError,
            "damping: expected a positive number, got 0.0",
        ),
        (
            lambda: FisherInformation(network()).effective_dimension(1.0, DATA, probes=1),
            ValueError,
            "probes: expected an integer of at least 2, got 1",
        ),
        (
            lambda: FisherInformation(network(), draws=0),
            ValueError,
            "draws: expected an integer of at least 1, got 0",
        ),
        (
            lambda: FisherInformation(network(), seed=-1),
            ValueError,
            "seed: expected an integer of at least 0, got -1",
        ),
    ],
)
def test_refuses(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
