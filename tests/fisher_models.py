"""Small models of every kind that Fisher information is taken of, and their dense J, from float64 derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

CLASSES, SAMPLES = 3, 5


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
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype) if self.causal else None
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
        mask = torch.arange(3, device=x.device) > torch.arange(1, 3, device=x.device).unsqueeze(1)
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
        ones = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        q, k, v = (layer(y).view(*y.shape[:2], 2, 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = (ones.tril() & attention_mask[:, None, None, :]) | (ones.tril() & ones.triu())
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
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
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


class Conv1D(nn.Module):
    """GPT-2's linear layer, of a weight [I, O], known by its full name: Hugging Face need not be installed."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = (
            outputs,
            nn.Parameter(torch.randn(inputs, outputs)),
            nn.Parameter(torch.zeros(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


class Transposed(nn.Module):
    """Linear layers of transposed weights: first of all, called twice, over rows in the order of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = Conv1D(4, 3), Conv1D(4, 4), Conv1D(CLASSES, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(torch.tanh(self.first(x)))).transpose(0, 1).contiguous())
        return self.head(x.transpose(0, 1).flatten(1))


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


class Coupled(nn.Module):
    """A model of which the samples depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x - x.mean(0))


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
    "transposed": Problem(Transposed, vectors(2, 3)),
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
