"""Per-sample gradients of a layer's parameters from its inputs and output gradients, without forming them.

For each parameter of each supported layer type, :data:`FORMULAS` names a form of g_n, n = 1 .. N, that gives what
the estimators ask for: the projections on K directions, the sum of squares, the norms. Only parameters with few
elements (biases, scales of norms) have their g_n in memory; those of weights stay products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transferops import ops
from transferops._transfer import to_device
from transferops._validate import fail


class Gradients(Protocol):
    """Gradients g_n of one parameter, one for each of N samples; results in at least float32."""

    def project(self, directions: Sequence[Tensor]) -> Tensor:
        """g_n . delta_k for K directions of the parameter's shape: [N, K]."""

    def diagonal(self) -> Tensor:
        """sum_n g_n^2, elementwise: [*shape]."""

    def norms(self) -> Tensor:
        """|g_n|^2: [N]."""

    def rows(self) -> Tensor:
        """The gradients themselves, in memory: [N, *shape]."""


class Rows:
    """The gradients themselves, [N, *shape]."""

    def __init__(self, values: Tensor) -> None:
        self.values = _wide(values)

    def project(self, directions: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(tuple(directions)).to(self.values.dtype)
        return self._flat() @ stacked.view(len(stacked), -1).T

    def diagonal(self) -> Tensor:
        return self.values.square().sum(0)

    def norms(self) -> Tensor:
        return self._flat().square().sum(1)

    def rows(self) -> Tensor:
        return self.values

    def _flat(self) -> Tensor:
        return self.values.reshape(len(self.values), -1)


class LinearWeight:
    """g_n = sum_t b_nt a_nt^T from inputs a [N, T, I] and output gradients b [N, T, O]."""

    def __init__(self, inputs: Tensor, grads: Tensor) -> None:
        one = inputs.shape[1] == 1
        self.inputs, self.grads = (inputs[:, 0], grads[:, 0]) if one else (inputs, grads)

    def project(self, directions: Sequence[Tensor]) -> Tensor:
        return ops.linear_fisher_projection(self.inputs, self.grads, list(directions))

    def project_products(self, products: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """As ``project`` on left [O, r] @ right [r, I], by sum_t (left^T b_nt) . (right a_nt)."""
        a, b = _wide(self.inputs), _wide(self.grads)
        left = torch.cat([to_device(factor, b.device).to(b) for factor, _ in products], 1)
        right = torch.cat([to_device(factor, a.device).to(a) for _, factor in products])
        terms = (b @ left) * (a @ right.T)
        if terms.dim() == 3:
            terms = terms.sum(1)
        ranks = [factor.shape[1] for factor, _ in products]
        return torch.stack([part.sum(1) for part in torch.split(terms, ranks, 1)], 1)

    def diagonal(self) -> Tensor:
        return ops.linear_fisher_diagonal(self.inputs, self.grads)

    def norms(self) -> Tensor:
        return ops.linear_grad_norm(self.inputs, self.grads)

    def rows(self) -> Tensor:
        a, b = _wide(self.inputs), _wide(self.grads)
        return b.unsqueeze(2) * a.unsqueeze(1) if a.dim() == 2 else b.mT @ a

    def input_factor(self) -> Tensor:
        """sum_n mean_t a_nt a_nt^T: [I, I]."""
        a = _wide(self.inputs).flatten(0, -2)
        return (a.T @ a).mul_(len(self.inputs) / len(a))

    def grad_factor(self) -> Tensor:
        """sum_n sum_t b_nt b_nt^T: [O, O]."""
        b = _wide(self.grads).flatten(0, -2)
        return b.T @ b


class ConvWeight:
    """The same over the patches of a convolution's input [N, C, *spatial]."""

    def __init__(self, module: Any, inputs: Tensor, grads: Tensor) -> None:
        padding = module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros":
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            inputs = F.pad(inputs, module._reversed_padding_repeated_twice, mode)
            padding = (0,) * len(module.kernel_size)
        self.inputs, self.grads = inputs, grads
        self.geometry = (module.kernel_size, module.stride, padding, module.dilation, module.groups)

    def project(self, directions: Sequence[Tensor]) -> Tensor:
        return ops.conv_fisher_projection(self.inputs, self.grads, list(directions), *self.geometry)

    def diagonal(self) -> Tensor:
        return ops.conv_fisher_diagonal(self.inputs, self.grads, *self.geometry)

    def norms(self) -> Tensor:
        return ops.conv_grad_norm(self.inputs, self.grads, *self.geometry)

    def rows(self) -> Tensor:
        groups, columns = self.geometry[4], self._columns()
        grads = [_wide(g).reshape(groups, -1, g[0].numel()) for g in self.grads]
        each = [b @ patches.view(groups, -1, patches.shape[1]).mT for b, patches in zip(grads, columns)]
        return torch.stack(each).view(len(each), self.grads.shape[1], -1, *self.geometry[0])

    def input_factor(self) -> Tensor:
        """As of the linear layer over all patches, which are in memory for one sample at a time."""
        size = self.inputs.shape[1] * math.prod(self.geometry[0])
        factor = self.inputs.new_zeros((size, size), dtype=_wide(self.inputs[:0]).dtype)
        for patches in self._columns():
            factor.addmm_(patches, patches.T, alpha=1 / patches.shape[1])
        return factor

    def _columns(self) -> Iterator[Tensor]:
        """Of each sample the patches [C |kernel|, T]."""
        kernel, stride, padding, dilation, _ = self.geometry
        margins = [margin for side in reversed(padding) for margin in (side, side)]
        for sample in self.inputs:
            patches = F.pad(_wide(sample), margins)
            for i, (k, s, d) in enumerate(zip(kernel, stride, dilation)):
                patches = patches.unfold(1 + i, d * (k - 1) + 1, s)[..., ::d]  # [C, *out, *kernel]
            dims = len(kernel)
            last = (0, *range(1 + dims, 1 + 2 * dims), *range(1, 1 + dims))
            yield patches.permute(last).reshape(sample.shape[0] * math.prod(kernel), -1)

    def grad_factor(self) -> Tensor:
        b = _wide(self.grads).transpose(0, 1).flatten(1)
        return b @ b.T


class EmbeddingWeight:
    """Rows of a table: those that a sample looks up, summed over its positions before anything is squared."""

    def __init__(self, module: nn.Embedding, ids: Tensor, grads: Tensor) -> None:
        """ids: [N, T]; grads: [N, T, D]."""
        entries = module.num_embeddings
        grads = _wide(grads)
        if module.padding_idx is not None:  # that row is never updated
            grads = torch.where(ids.eq(module.padding_idx).unsqueeze(-1), 0, grads)
        keys = (ids + entries * torch.arange(len(ids), device=ids.device).unsqueeze(1)).flatten()
        # A row for each pair of sample and entry, in their order, then zeros that count for any pair: N T in all,
        # whatever the ids, so that no program has to wait for a GPU to know how many.
        ordered, order = keys.sort(stable=True)
        fresh = torch.cat([ordered[:1] < 0, ordered[1:] != ordered[:-1]])
        place = torch.empty_like(keys).scatter_(0, order, fresh.cumsum(0))
        self.values = grads.new_zeros(len(keys), module.embedding_dim).index_add_(0, place, grads.flatten(0, 1))
        unique = keys.scatter(0, place, keys)
        self.entry, self.sample = unique % entries, unique // entries
        self.entries, self.samples = entries, len(ids)

    def project(self, directions: Sequence[Tensor]) -> Tensor:
        scores = [torch.einsum("ud,ud->u", self.values, d[self.entry].to(self.values.dtype)) for d in directions]
        stacked = torch.stack(scores, 1)
        return stacked.new_zeros(self.samples, len(directions)).index_add_(0, self.sample, stacked)

    def diagonal(self) -> Tensor:
        shape = self.entries, self.values.shape[1]
        return self.values.new_zeros(shape).index_add_(0, self.entry, self.values.square())

    def norms(self) -> Tensor:
        squares = self.values.square().sum(1)
        return squares.new_zeros(self.samples).index_add_(0, self.sample, squares)

    def rows(self) -> Tensor:
        result = self.values.new_zeros(self.samples, self.entries, self.values.shape[1])
        return result.index_put_((self.sample, self.entry), self.values, accumulate=True)


Call = tuple[Tensor, Tensor]
"""Input and output gradient of one call of a module."""

Formula = Callable[[Any, Sequence[Call], int], Gradients]
"""The gradients of one parameter from a module, its calls and N; leading dimensions of a call are N times anything."""


def _linear_weight(module: nn.Module, calls: Sequence[Call], samples: int) -> Gradients:
    return LinearWeight(*_linear_operands(calls, samples))


def _transposed_weight(module: nn.Module, calls: Sequence[Call], samples: int) -> Gradients:
    """Of a weight [I, O]: inputs and output gradients change places."""
    inputs, grads = _linear_operands(calls, samples)
    return LinearWeight(grads, inputs)


def _linear_operands(calls: Sequence[Call], samples: int) -> Call:
    inputs = _join([a.reshape(samples, -1, a.shape[-1]) for a, _ in calls])
    grads = _join([b.reshape(samples, -1, b.shape[-1]) for _, b in calls])
    return inputs, grads.to(inputs.dtype)


def _embedding_weight(module: nn.Embedding, calls: Sequence[Call], samples: int) -> Gradients:
    ids = _join([a.reshape(samples, -1).long() for a, _ in calls])
    return EmbeddingWeight(module, ids, _join([b.reshape(samples, -1, b.shape[-1]) for _, b in calls]))


def _conv_weight(module: Any, calls: Sequence[Call], samples: int) -> Gradients:
    ((inputs, grads),) = calls
    return ConvWeight(module, inputs, grads.to(inputs.dtype))


def _trailing_bias(module: Any, calls: Sequence[Call], samples: int) -> Gradients:
    """Of the parameter's own trailing dimensions: linear layers and LayerNorm."""
    parts = [_wide(b).reshape(samples, -1, *module.bias.shape) for _, b in calls]
    return Rows(_total([_over_rows(part) for part in parts]))


def _trailing_scale(module: Any, calls: Sequence[Call], samples: int) -> Gradients:
    parts = [_wide(b) * _normalized(module, _wide(a)) for a, b in calls]
    return Rows(_total([_over_rows(g.reshape(samples, -1, *module.weight.shape)) for g in parts]))


def _channel_bias(module: Any, calls: Sequence[Call], samples: int) -> Gradients:
    """Of dimension 1: convolutions, GroupNorm and BatchNorm."""
    return Rows(_total([_over_positions(_wide(b), samples) for _, b in calls]))


def _channel_scale(module: Any, calls: Sequence[Call], samples: int) -> Gradients:
    parts = [_over_positions(_wide(b) * _normalized(module, _wide(a)), samples) for a, b in calls]
    return Rows(_total(parts))


def _over_positions(values: Tensor, samples: int) -> Tensor:
    channels = values.shape[1]
    return _over_rows(values.reshape(len(values), channels, -1).sum(-1).reshape(samples, -1, channels))


def _over_rows(values: Tensor) -> Tensor:
    """The sum over dimension 1, a view if there is one row."""
    return values[:, 0] if values.shape[1] == 1 else values.sum(1)


def _total(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts)).sum(0)


def _normalized(module: Any, inputs: Tensor) -> Tensor:
    """What a norm multiplies by its weight."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        eps = torch.finfo(module.weight.dtype).eps if module.eps is None else module.eps
        return F.rms_norm(inputs, module.normalized_shape, eps=eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(inputs, module.num_groups, eps=module.eps)
    mean, variance = _wide(module.running_mean), _wide(module.running_var)
    return F.batch_norm(inputs, mean, variance, eps=module.eps)


_CHANNELS: dict[str, Formula] = {"weight": _channel_scale, "bias": _channel_bias}
_CONV: dict[str, Formula] = {"weight": _conv_weight, "bias": _channel_bias}
FORMULAS: dict[type[nn.Module], dict[str, Formula]] = {
    nn.Linear: {"weight": _linear_weight, "bias": _trailing_bias},
    nn.Embedding: {"weight": _embedding_weight},
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONV),
    nn.LayerNorm: {"weight": _trailing_scale, "bias": _trailing_bias},
    nn.RMSNorm: {"weight": _trailing_scale},
    **dict.fromkeys((nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _CHANNELS),
}
# By name: the package need not be installed.
_TRANSPOSED_LINEAR = "transformers.pytorch_utils.Conv1D"  # GPT-2's linear layer, of weight [I, O]
_TRANSPOSED: dict[str, Formula] = {"weight": _transposed_weight, "bias": _trailing_bias}


def formulas(module: nn.Module) -> dict[str, Formula]:
    """The formulas for a module's own parameters; none if its type, or its forward, is not one of the above."""
    kind = _kind(module)
    return {} if kind is None or type(module).forward is not kind.forward else FORMULAS.get(kind, _TRANSPOSED)


def row_dimensions(module: nn.Module) -> tuple[int, int] | None:
    """How many trailing dimensions of input and output make a row, where the leading ones may come in any order."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape), len(module.normalized_shape)
    if isinstance(module, nn.Embedding):
        return 0, 1
    kind = _kind(module)
    return (1, 1) if kind is not None and (kind is nn.Linear or _is_transposed(kind)) else None


def one_call_only(module: nn.Module, own_name: str) -> bool:
    """Whether a parameter's formula does not add up several calls, nor samples spread over several rows."""
    return formulas(module).get(own_name) is _conv_weight


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The base of a module's type that has formulas."""
    return next((kind for kind in type(module).__mro__ if kind in FORMULAS or _is_transposed(kind)), None)


def _is_transposed(kind: type) -> bool:
    return f"{kind.__module__}.{kind.__qualname__}" == _TRANSPOSED_LINEAR


def refuse_changed_gradients(name: str, module: nn.Module) -> None:
    """Raise for options by which a layer's gradient is not the derivative of its output."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        for option in ("max_norm", "scale_grad_by_freq"):
            if getattr(module, option):
                got = f"{option}={getattr(module, option)}, which changes weights or gradients on the way"
                fail("model", f"{type(module).__name__} {name!r} without {option}", got)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _wide(values: Any) -> Tensor:
    result: Tensor = values if values.dtype is torch.float64 else values.float()
    return result
