"""Every quantity of every estimator against the dense J made of explicit float64 per-sample derivatives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from transferops.fisher import FisherInformation

CLASSES, SAMPLES = 3, 5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread only waits, and on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Attention(nn.Module):
    """A pre-norm block over tokens with class token, positions and F.scaled_dot_product_attention."""

    def __init__(self, tokens: int = 4, width: int = 6) -> None:
        super().__init__()
        self.patches = nn.Linear(3, width)
        self.start = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, tokens + 1, width))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.start.expand(len(x), -1, -1), self.patches(x)], 1) + self.positions
        query, key, value = self.project(self.norm(x)).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-2, -3)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(-2, -3).flatten(-2))
        return self.head(x[:, 0])


class MultiHead(nn.Module):
    def __init__(self, need_weights: bool = False, causal: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **{"batch_first": True, **options})
        self.head = nn.Linear(4, CLASSES)
        self.need_weights, self.causal = need_weights, causal

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if self.causal else None
        x = x if self.attention.batch_first else x.transpose(0, 1)
        kinds: dict[str, Any] = {"need_weights": self.need_weights, "average_attn_weights": False}
        x, weights = self.attention(x, x, x, key_padding_mask=padding, attn_mask=mask, is_causal=self.causal, **kinds)
        x = x.mean(1 if self.attention.batch_first else 0)
        return self.head(x) + (0 if weights is None else weights.square().sum((1, 2, 3)).unsqueeze(1) * x[:, :CLASSES])


class CrossAttention(nn.Module):
    """Keys other than the queries, and once values other than the keys, with a mask for each sample and head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        query, key = x[:, :2], x.tanh()
        mask = torch.arange(3) > torch.arange(1, 3).unsqueeze(1)
        query = query + self.first(query, key, key, need_weights=False)[0]
        each = mask.expand(2 * len(x), 2, 3)
        return self.head(self.second(query, key, x.sin(), attn_mask=each, need_weights=False)[0].mean(1))


class LayerScaled(nn.Module):
    """As timm writes vision transformers: scales [D] and a temperature of their own, a joint qkv, normed queries."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, width, 2, 2)
        self.start = nn.Parameter(torch.randn(1, 1, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = nn.LayerNorm(2)
        self.proj = nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.rand(width))
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.final_scale = nn.Parameter(torch.rand(width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.start.expand(len(x), -1, -1), x], 1)
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(self.query_norm(q) * self.temperature, k, v)
        x = x + self.gamma * self.proj(attended.transpose(1, 2).flatten(2))
        return self.head(x[:, 0] * self.final_scale)


class RMSNorm(nn.Module):
    """As Hugging Face writes it: without a formula."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Decoder(nn.Module):
    """As Hugging Face writes language models: keyword inputs, separate projections, an object with logits."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, width)
        self.norm, self.last_norm = RMSNorm(width), RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 5, bias=False) for _ in range(2))
        self.down = nn.Linear(5, width, bias=False)
        self.lm_head = nn.Linear(width, CLASSES, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.embed(input_ids)
        y = self.norm(x)
        causal = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        q, k, v = (layer(y).view(*y.shape[:2], 2, 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = (causal & attention_mask[:, None, None, :]) | torch.eye(x.shape[1]).bool()
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return SimpleNamespace(logits=self.lm_head(self.last_norm(x)))


class Adapted(nn.Module):
    """A frozen layer with a trained low-rank product beside it, and a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 4).requires_grad_(False)
        self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x) + 0.5 * self.up(self.down(x))).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Language(nn.Module):
    """Token-level outputs [N, T, C], repeated tokens, an embedding of positions, the table tied to the head."""

    def __init__(self, tied: bool = True, functional: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(CLASSES, 4, padding_idx=None if tied else 0)
        self.positions = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.functional = functional
        if not functional:
            self.head = nn.Linear(4, CLASSES, bias=False)
            if tied:
                self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, scale: float = 1.0, offset: Tensor | None = None) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        x = torch.tanh(self.hidden(x) * scale)
        if offset is not None:
            x = x + offset
        return F.linear(x, self.tokens.weight) if self.functional else self.head(x)


class Repeated(nn.Module):
    """One linear layer, one norm and one convolution, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.linear = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(torch.tanh(self.conv(x)))
        x = self.norm(torch.tanh(self.linear(x)))
        return self.head(self.norm(self.linear(x)).flatten(1))


class Flattened(nn.Module):
    """Linear layers over rows of all samples, in the order of the samples and in that of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        samples = len(x)
        x = self.norm(self.first(x.flatten(0, 1))).unflatten(0, (samples, -1)).tanh()
        x = self.second(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x.flatten(1))


class Scaled(nn.Module):
    """Parameters of its own, one that broadcasts over samples and one that mixes them with features."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(1, 3))
        self.weight = nn.Parameter(torch.randn(1, 3))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x * self.scale, torch.tanh(x @ self.weight.T)], 1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, (3, 2), padding="same", dilation=(1, 2), bias=False, padding_mode="circular"),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


@dataclass
class Problem:
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    tokens: int | None = None
    loss: str = "cross_entropy"
    fallback: tuple[str, ...] = ()


def image() -> Tensor:
    return torch.randn(SAMPLES, 2, 6, 5).double()


def vectors(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(SAMPLES, *shape).double()


def ids() -> Tensor:
    return torch.randint(CLASSES, (SAMPLES, 4))


PROBLEMS = {
    "mlp": Problem(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.RMSNorm(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, CLASSES)),
        vectors(3),
    ),
    "regression": Problem(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), vectors(3), loss="mse"),
    "convolutions": Problem(convolutions, image),
    "conv_1d": Problem(
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, dilation=2), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES)
        ),
        vectors(2, 6),
    ),
    "conv_3d": Problem(
        lambda: nn.Sequential(nn.Conv3d(2, 2, 2, padding=(1, 0, 0)), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES)),
        vectors(2, 2, 2, 3),
    ),
    "attention": Problem(Attention, vectors(4, 3)),
    "multi_head": Problem(MultiHead, vectors(3, 4)),
    "multi_head_weights": Problem(lambda: MultiHead(need_weights=True), vectors(3, 4)),
    "multi_head_masked": Problem(
        lambda: MultiHead(need_weights=True, bias=False),
        lambda: {"x": vectors(3, 4)(), "padding": torch.arange(3) >= torch.tensor([[3], [2], [1], [3], [2]])},
    ),
    "multi_head_causal": Problem(lambda: MultiHead(batch_first=False, causal=True), vectors(3, 4)),
    "multi_head_cross": Problem(CrossAttention, vectors(3, 4)),
    "multi_head_other": Problem(
        lambda: MultiHead(add_bias_kv=True),
        vectors(3, 4),
        fallback=tuple(
            f"attention.{name}"
            for name in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias")
        ),
    ),
    "layer_scale": Problem(LayerScaled, image),
    "decoder": Problem(
        Decoder,
        lambda: {
            "input_ids": torch.randint(6, (SAMPLES, 4)),
            "attention_mask": torch.arange(4) < torch.tensor([[4], [2], [3], [4], [1]]),
        },
        tokens=4,
    ),
    "adapters": Problem(Adapted, vectors(4, 3)),
    "lstm": Problem(
        lambda: Recurrent(nn.LSTM),
        vectors(3, 3),
        fallback=("rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"),
    ),
    "recurrent": Problem(
        Recurrent, vectors(3, 3), fallback=("rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0")
    ),
    "language": Problem(lambda: Language(tied=False), ids, tokens=4),
    "tied": Problem(Language, ids, tokens=4, fallback=("tokens.weight",)),
    "tied_by_function": Problem(lambda: Language(functional=True), ids, tokens=4, fallback=("tokens.weight",)),
    "repeated": Problem(Repeated, vectors(2, 5), fallback=("conv.weight",)),
    "flattened": Problem(Flattened, vectors(2, 3)),
    "scaled": Problem(Scaled, vectors(3), fallback=("weight",)),
    "frozen": Problem(frozen, vectors(3)),
    "keywords": Problem(
        lambda: Language(tied=False),
        lambda: {"ids": ids(), "scale": 0.7, "offset": torch.randn(SAMPLES, 4, 4).double()},
        tokens=4,
    ),
}


def build(name: str) -> tuple[nn.Module, Any, Tensor]:
    """The model in training mode, inputs and targets."""
    torch.manual_seed(0)
    problem = PROBLEMS[name]
    model, inputs = problem.make().double().train(), problem.inputs()
    for buffer_name, buffer in model.named_buffers():
        if "running" in buffer_name:
            buffer.copy_(1 + torch.rand_like(buffer))
    if problem.loss == "mse":
        return model, inputs, torch.randn(SAMPLES, 2).double()
    targets = torch.randint(CLASSES, (SAMPLES,) if problem.tokens is None else (SAMPLES, problem.tokens))
    if problem.tokens is not None:
        targets[0, 1:3] = -100
        targets[2] = -100
    return model, inputs, targets


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def outputs_of(model: nn.Module, inputs: Any, n: int) -> Tensor:
    """Of one sample, alone in its batch."""
    with sdpa_kernel(SDPBackend.MATH):
        if isinstance(inputs, dict):
            one = {k: v[n : n + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            found = model(**one)
            return getattr(found, "logits", found)[0]
        return model(inputs[n : n + 1])[0]


def flat_gradient(model: nn.Module, value: Tensor) -> Tensor:
    found = torch.autograd.grad(value, list(trainable(model).values()), retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(trainable(model).values(), found)]
    )


def dense(model: nn.Module, inputs: Any, targets: Tensor, estimator: str, loss: str) -> Tensor:
    """J as a matrix, sample by sample."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    size = sum(p.numel() for p in trainable(model).values())
    total = torch.zeros(size, size).double()
    for n in range(SAMPLES):
        z, y = outputs_of(model, inputs, n), targets[n]
        if estimator == "empirical":
            if loss == "mse":
                value = -0.5 * (y - z).square().sum()
            else:
                value = -F.cross_entropy(z, y, reduction="sum", ignore_index=-100)
            g = flat_gradient(model, value)
            total += torch.outer(g, g)
            continue
        for position, zt in enumerate(z.reshape(-1, z.shape[-1])):
            if loss != "mse" and y.reshape(-1)[position] == -100:
                continue
            jacobian = torch.stack([flat_gradient(model, entry) for entry in zt])
            p = zt.detach().softmax(-1)
            curvature = torch.eye(len(p)).double() if loss == "mse" else torch.diag(p) - torch.outer(p, p)
            total += jacobian.T @ curvature @ jacobian
    for module, training in modes.items():
        module.training = training
    return total / SAMPLES


def flatten(values: dict[str, Tensor], model: nn.Module) -> Tensor:
    assert {name: v.shape for name, v in values.items()} == {name: p.shape for name, p in trainable(model).items()}
    return torch.cat([values[name].flatten() for name in trainable(model)])


def directions(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in trainable(model).items()}
        for _ in range(count)
    ]


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
    routes = dict(re.match(r"(\S+) +(captured|copies|per sample)  +\S", line).groups() for line in lines)  # type: ignore[union-attr]
    assert list(routes) == list(trainable(model))
    assert {n for n, route in routes.items() if route == "per sample"} == set(PROBLEMS[name].fallback)


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
