"""Per-sample gradients of weights, summarised without being formed: what Fisher information is made of.

The gradient of sample n for the weight of a linear layer or a convolution is G_n = sum_t b_nt a_nt^T, with a_nt the
input at position t (for a convolution the patch under the window), b_nt the gradient at the output. Three things are
asked of it: sum_n G_n * G_n (the diagonal of the empirical Fisher information, times N), <G_n, Delta_k> (its quadratic
form, by way of S^T S), and |G_n|^2 (its trace). Nothing of size [N, O, I] is allocated, and convolutions are not
unfolded. All are sums over samples or per sample, never means.

Products are taken in float32, in float64 for float64 inputs; float16 and bfloat16 are converted before they are
multiplied. On a GPU a float32 product is formed from three TF32 ones and the bounds below hold with at least
(20 + T/16 + N/2) eps. Results do not depend on the number of threads and are the same in every run. NaN and infinities
in the inputs come out as one of the two, in a convolution perhaps in all gradients of their channel (an input that no
window reads has no part in any), and so does a square or product on the way that is beyond the range of its type (3e38
in float32); one below it (1e-38) counts as 0. These ops have no derivative: a backward pass through them raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from transferops._extension import check_device  # also registers torch.ops.transferops
from transferops._validate import as_tensor, describe, fail

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def linear_fisher_diagonal(inputs: Tensor | Any, grad_outputs: Tensor | Any) -> Tensor:
    """sum_n (sum_t b_nt a_nt^T)^2, elementwise: the empirical Fisher diagonal of a linear layer's weight, times N.

    Args:
        inputs: a, [N, T, I], or [N, I] without positions; float32, float64, float16 or bfloat16, any strides.
        grad_outputs: b, [N, T, O] or [N, O], the dtype of ``inputs``.

    Returns:
        [O, I], float64 for float64 inputs, float32 otherwise.

    Raises:
        TypeError: an argument is no array, not floating point, or the dtypes differ.
        ValueError: shapes or devices disagree.

    Cost: 2 N T O I operations. With one position it is (b * b)^T (a * a), and is computed so.

    Each entry is within (2 T + N + 8) eps sum_n (sum_t |b_nt| |a_nt|)^2 of the exact sum, with eps of the result's
    dtype. Positions that cancel exactly (b_2 = -b_1 at equal inputs) give 0 up to the rounding of one product, and
    exactly 0 where products are exact, as they are for 16-bit inputs.
    """
    inputs, grad_outputs = _check_linear(inputs, grad_outputs)
    return _call("linear_fisher_diagonal", inputs, grad_outputs)


def linear_fisher_projection(
    inputs: Tensor | Any, grad_outputs: Tensor | Any, directions: Tensor | Sequence[Tensor] | Any
) -> Tensor:
    """s_nk = <sum_t b_nt a_nt^T, Delta_k>: per-sample gradients of a linear layer's weight along K directions.

    Args:
        inputs: a, [N, T, I], or [N, I] without positions; float32, float64, float16 or bfloat16, any strides.
        grad_outputs: b, [N, T, O] or [N, O], the dtype of ``inputs``.
        directions: Delta, [K, O, I] or a list of K tensors [O, I], which need not be stacked; any floating dtype, taken
            in the dtype of the result.

    Returns:
        [N, K], float64 for float64 inputs, float32 otherwise. S^T S is Delta^T J Delta of the empirical Fisher
        information, times N, once S is summed over the layers.

    Raises:
        TypeError: an argument is no array, not floating point, or the dtypes of ``inputs`` and ``grad_outputs`` differ.
        ValueError: shapes or devices disagree.

    Cost: 2 N (T + K) O I operations, or on a CPU 2 N T K O I where that is cheaper.
    """
    inputs, grad_outputs = _check_linear(inputs, grad_outputs)
    moves = _check_directions(directions, inputs, [grad_outputs.shape[-1], inputs.shape[-1]])
    return _call("linear_fisher_projection", inputs, grad_outputs, moves)


def linear_grad_norm(inputs: Tensor | Any, grad_outputs: Tensor | Any) -> Tensor:
    """|sum_t b_nt a_nt^T|^2: squared Frobenius norm of each sample's gradient of a linear layer's weight.

    Args:
        inputs: a, [N, T, I], or [N, I] without positions; float32, float64, float16 or bfloat16, any strides.
        grad_outputs: b, [N, T, O] or [N, O], the dtype of ``inputs``.

    Returns:
        [N], float64 for float64 inputs, float32 otherwise.

    Raises:
        TypeError: an argument is no array, not floating point, or the dtypes differ.
        ValueError: shapes or devices disagree.

    Cost: the cheaper of 2 N T O I operations (the gradient itself) and N T^2 (O + I), by way of
    sum_{t,s} (a_t . a_s)(b_t . b_s); on a GPU the latter at one position only. Its rounding is that of terms that may
    cancel, so that the norm of a vanishing gradient can come out slightly negative.
    """
    inputs, grad_outputs = _check_linear(inputs, grad_outputs)
    return _call("linear_grad_norm", inputs, grad_outputs)


def conv_fisher_diagonal(
    inputs: Tensor | Any,
    grad_outputs: Tensor | Any,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """:func:`linear_fisher_diagonal` for the weight of a convolution with zero padding, in 1 to 3 dimensions.

    Args:
        inputs: [N, C_in, *spatial] float32, float64, float16 or bfloat16, any strides (channels last is as good).
        grad_outputs: [N, C_out, *out_spatial], gradients at the output of the convolution, the dtype of ``inputs``.
        kernel_size, stride, padding, dilation, groups: as in :class:`torch.nn.Conv2d`; the same padding on both sides.

    Returns:
        [C_out, C_in / groups, *kernel_size], float64 for float64 inputs, float32 otherwise.

    Raises:
        TypeError: an argument is no array, not floating point, or the dtypes differ.
        ValueError: shapes or devices disagree.

    Cost: 2 N T C_out (C_in / groups) |kernel| operations for T output positions. Patches are formed in cache; memory
    beyond the result is its size once more (twice from 512 positions on) and a few MiB.
    """
    inputs, grad_outputs, window = _check_conv(inputs, grad_outputs, kernel_size, stride, padding, dilation, groups)
    return _call("conv_fisher_diagonal", inputs, grad_outputs, *window)


def conv_fisher_projection(
    inputs: Tensor | Any,
    grad_outputs: Tensor | Any,
    directions: Tensor | Sequence[Tensor] | Any,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """:func:`linear_fisher_projection` for the weight of a convolution with zero padding, in 1 to 3 dimensions.

    Args:
        inputs, grad_outputs, kernel_size, stride, padding, dilation, groups: as in :func:`conv_fisher_diagonal`.
        directions: Delta, [K, C_out, C_in / groups, *kernel_size] or a list of K such weights, any floating dtype.

    Returns:
        [N, K], float64 for float64 inputs, float32 otherwise.

    Raises:
        TypeError: an argument is no array, not floating point, or the dtypes of ``inputs`` and ``grad_outputs`` differ.
        ValueError: shapes or devices disagree.
    """
    inputs, grad_outputs, window = _check_conv(inputs, grad_outputs, kernel_size, stride, padding, dilation, groups)
    weight = [grad_outputs.shape[1], inputs.shape[1] // groups, *window[0]]
    moves = _check_directions(directions, inputs, weight)
    return _call("conv_fisher_projection", inputs, grad_outputs, moves, *window)


def conv_grad_norm(
    inputs: Tensor | Any,
    grad_outputs: Tensor | Any,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """:func:`linear_grad_norm` for the weight of a convolution with zero padding, in 1 to 3 dimensions.

    Args:
        inputs, grad_outputs, kernel_size, stride, padding, dilation, groups: as in :func:`conv_fisher_diagonal`.

    Returns:
        [N], float64 for float64 inputs, float32 otherwise.

    Raises:
        TypeError: an argument is no array, not floating point, or the dtypes differ.
        ValueError: shapes or devices disagree.
    """
    inputs, grad_outputs, window = _check_conv(inputs, grad_outputs, kernel_size, stride, padding, dilation, groups)
    return _call("conv_grad_norm", inputs, grad_outputs, *window)


def softmax_fisher_gram(logits: Tensor | Any, tangents: Tensor | Any) -> Tensor:
    """Gram matrix of tangents under the Fisher information of a softmax output, summed over samples [derived].

    A_kl = sum_n T_kn (diag p_n - p_n p_n^T) T_ln with p_n = softmax(z_n), formed as the sum over n and c of
    p_nc (T_knc - m_kn) (T_lnc - m_ln), m_kn = sum_c p_nc T_knc.

    Args:
        logits: z, [N, C] float32, float64, float16 or bfloat16, any strides.
        tangents: T, [K, N, C], derivatives of the logits along K directions, any strides. If the dtypes differ, both
            are copied to the wider one.

    Returns:
        A, [K, K] float64, symmetric, positive semidefinite to rounding.

    Raises:
        TypeError: an argument is no array or not floating point.
        ValueError: shapes or devices disagree.

    Cost: one read of the tangents. Products and the sums over at most 1024 / 16 classes are taken in float32 (float64
    for float64 inputs), everything beyond in float64. Centring starts from each row's first entry: tangents that are
    constant over the classes give exactly 0, however large.
    """
    logits, tangents = _check_floating("logits", logits), _check_floating("tangents", tangents)
    if logits.dim() != 2:
        fail("logits", "shape [N, C]", describe(logits))
    if tangents.shape[1:] != logits.shape or tangents.device != logits.device:
        expected = f"shape [K, {logits.shape[0]}, {logits.shape[1]}] on {logits.device}, as the logits"
        fail("tangents", expected, describe(tangents))
    dtype = torch.promote_types(logits.dtype, tangents.dtype)
    return _call("softmax_fisher_gram", logits.to(dtype), tangents.to(dtype))


def _call(name: str, *arguments: Any) -> Tensor:
    result: Tensor = getattr(torch.ops.transferops, name)(*arguments)
    return result


def _check_floating(argument: str, value: Any) -> Tensor:
    tensor = as_tensor(argument, value)
    if tensor.dtype not in _FLOATING:
        fail(argument, "float32, float64, float16 or bfloat16", describe(tensor), TypeError)
    check_device(argument, tensor.device)
    return tensor


def _check_pair(inputs: Any, grad_outputs: Any) -> tuple[Tensor, Tensor]:
    inputs, grad_outputs = _check_floating("inputs", inputs), _check_floating("grad_outputs", grad_outputs)
    if grad_outputs.dtype != inputs.dtype:
        dtype = str(inputs.dtype).removeprefix("torch.")
        fail("grad_outputs", f"the dtype of inputs, {dtype}", describe(grad_outputs), TypeError)
    if grad_outputs.device != inputs.device:
        fail("grad_outputs", f"the device of inputs, {inputs.device}", str(grad_outputs.device))
    return inputs, grad_outputs


def _check_linear(inputs: Any, grad_outputs: Any) -> tuple[Tensor, Tensor]:
    inputs, grad_outputs = _check_pair(inputs, grad_outputs)
    if inputs.dim() not in (2, 3):
        fail("inputs", "shape [N, T, I] or [N, I]", describe(inputs))
    if grad_outputs.shape[:-1] != inputs.shape[:-1]:
        leading = ", ".join(str(size) for size in inputs.shape[:-1])
        fail("grad_outputs", f"shape [{leading}, O], as the inputs", describe(grad_outputs))
    return inputs, grad_outputs


_Window = tuple[list[int], list[int], list[int], list[int], int]


def _check_conv(
    inputs: Any, grad_outputs: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> tuple[Tensor, Tensor, _Window]:
    inputs, grad_outputs = _check_pair(inputs, grad_outputs)
    spatial = inputs.dim() - 2
    if spatial not in (1, 2, 3):
        fail("inputs", "shape [N, C, *spatial] with 1 to 3 spatial dimensions", describe(inputs))
    kernel = _integers("kernel_size", kernel_size, spatial, 1)
    strides = _integers("stride", stride, spatial, 1)
    paddings = _integers("padding", padding, spatial, 0)
    dilations = _integers("dilation", dilation, spatial, 1)
    if grad_outputs.dim() != inputs.dim():
        fail("grad_outputs", f"{inputs.dim()} dimensions, as the inputs", describe(grad_outputs))
    channels = (inputs.shape[1], grad_outputs.shape[1])
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or any(c % groups for c in channels):
        fail("groups", f"a divisor of the channels, {channels[0]} and {channels[1]}", describe(groups))
    size = [
        max((length + 2 * p - d * (k - 1) - 1) // s + 1, 0)
        for length, k, s, p, d in zip(inputs.shape[2:], kernel, strides, paddings, dilations)
    ]
    if grad_outputs.shape[0] != inputs.shape[0] or list(grad_outputs.shape[2:]) != size:
        expected = ", ".join(str(x) for x in (inputs.shape[0], "C_out", *size))
        fail("grad_outputs", f"shape [{expected}], that of the convolution's output", describe(grad_outputs))
    return inputs, grad_outputs, (kernel, strides, paddings, dilations, groups)


def _integers(argument: str, value: Any, count: int, minimum: int) -> list[int]:
    values = [value] * count if isinstance(value, int) else value
    valid = isinstance(values, (tuple, list)) and len(values) == count
    if not valid or any(isinstance(x, bool) or not isinstance(x, int) or x < minimum for x in values):
        got = repr(list(value)) if isinstance(value, (tuple, list)) else describe(value)
        fail(argument, f"{count} integers of at least {minimum}, or one for all", got)
    return list(values)


def _check_directions(value: Any, inputs: Tensor, weight: list[int]) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [_check_direction(f"directions[{k}]", each, inputs, weight, False) for k, each in enumerate(value)]
    return list(_check_direction("directions", value, inputs, weight, True).unbind())


def _check_direction(argument: str, value: Any, inputs: Tensor, weight: list[int], stacked: bool) -> Tensor:
    direction = _check_floating(argument, value)
    if list(direction.shape[stacked:]) != weight or direction.dim() != len(weight) + stacked:
        expected = ", ".join(str(size) for size in weight)
        shape = f"shape [K, {expected}], K of the weight's" if stacked else f"shape [{expected}]"
        fail(argument, shape, describe(direction))
    if direction.device != inputs.device:
        fail(argument, f"the device of inputs, {inputs.device}", str(direction.device))
    return direction


# Shapes and dtypes without data, for torch.compile and torch.export.


def _result(inputs: Tensor, *shape: int) -> Tensor:
    return inputs.new_empty(shape, dtype=torch.float64 if inputs.dtype == torch.float64 else torch.float32)


def _fake_linear_diagonal(inputs: Tensor, grad_outputs: Tensor) -> Tensor:
    return _result(inputs, grad_outputs.shape[-1], inputs.shape[-1])


def _fake_conv_diagonal(inputs: Tensor, grad_outputs: Tensor, kernel_size: list[int], *window: Any) -> Tensor:
    groups: int = window[-1]
    return _result(inputs, grad_outputs.shape[1], inputs.shape[1] // groups, *kernel_size)


def _fake_projection(inputs: Tensor, grad_outputs: Tensor, directions: list[Tensor], *window: Any) -> Tensor:
    return _result(inputs, inputs.shape[0], len(directions))


def _fake_norm(inputs: Tensor, grad_outputs: Tensor, *window: Any) -> Tensor:
    return _result(inputs, inputs.shape[0])


def _fake_gram(logits: Tensor, tangents: Tensor) -> Tensor:
    return logits.new_empty((tangents.shape[0], tangents.shape[0]), dtype=torch.float64)


# No derivatives: a backward pass raises instead of passing on no gradient.


def _refuse_backward(name: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise RuntimeError(f"{name}: expected no backward pass, got one: this op has no derivative")

    return backward


_FAKES: dict[str, Callable[..., Tensor]] = {
    "linear_fisher_diagonal": _fake_linear_diagonal,
    "linear_fisher_projection": _fake_projection,
    "linear_grad_norm": _fake_norm,
    "conv_fisher_diagonal": _fake_conv_diagonal,
    "conv_fisher_projection": _fake_projection,
    "conv_grad_norm": _fake_norm,
    "softmax_fisher_gram": _fake_gram,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"transferops::{_name}", _fake)
    torch.library.register_autograd(f"transferops::{_name}", _refuse_backward(_name))
