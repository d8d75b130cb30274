"""nn.MultiheadAttention with its projections as layer calls, which its own forward hides in one function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InProjection(nn.Linear):
    """The packed projection of an attention module to queries, keys and values, as a layer over its parameters."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = attention.in_proj_weight.shape
        self.weight = attention.in_proj_weight
        self.bias = attention.in_proj_bias
        self.training = False


def in_projections(model: nn.Module) -> dict[nn.MultiheadAttention, InProjection]:
    """One for each attention module of which :func:`attend` does what its forward does."""
    return {
        module: InProjection(module)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and "forward" not in vars(module)
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
    }


def attend(
    attention: nn.MultiheadAttention,
    project: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The forward of ``attention`` in evaluation mode on batched inputs, calling ``project`` and its ``out_proj``.

    Keys or values other than the queries take a further call of the packed projection each, of which a part is used.
    """

    def heads(x: Tensor) -> Tensor:
        rows = x if attention.batch_first else x.transpose(0, 1)
        return rows.view(*rows.shape[:2], attention.num_heads, -1).transpose(1, 2)  # [N, heads, T, width]

    q, k, v = project(query).chunk(3, -1)
    if key is not query:
        _, k, v = project(key).chunk(3, -1)
    if value is not key:
        v = project(value).chunk(3, -1)[2]
    q, k, v = heads(q), heads(k), heads(v)
    mask = _mask(attn_mask, key_padding_mask, q)
    weights = None
    if need_weights:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = (scores if mask is None else scores + mask).softmax(-1)
        attended = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    rows = attended.transpose(1, 2).flatten(-2)
    return attention.out_proj(rows if attention.batch_first else rows.transpose(0, 1)), weights


def takes(*args: Any, **kwargs: Any) -> bool:
    """Whether a call of an attention module is one for :func:`attend`: with inputs in batches."""
    query = args[0] if args else kwargs["query"]
    return bool(query.dim() == 3 and not query.is_nested)


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the scores [N, heads, T, S]; in boolean masks, True stands for -infinity."""
    total: Tensor | None = None
    for mask in (attn_mask, key_padding_mask):
        if mask is None:
            continue
        added = mask
        if mask.dtype is torch.bool:
            added = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf)
        if mask is key_padding_mask:
            added = added[:, None, None, :]
        elif mask.dim() == 3:
            added = added.view(*q.shape[:2], *added.shape[1:])
        total = added if total is None else total + added
    return total
