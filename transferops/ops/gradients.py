"""Gradients as a whole: running moments over lists of tensors, and Gram matrices over all parameters at once.

What principal gradient expectations (:mod:`transferops.scores.pge`) and Fisher quadratic forms are made of. Each op
reads its large inputs once. Lists are what ``[p.grad for p in model.parameters()]`` gives: tensors of any shapes and
strides, on one device; tensors that lie alike in memory (channels last, for instance) are taken as they lie, others are
copied. On a GPU a whole list is one launch (of up to 448 tensors, or 256 for a Gram matrix).

Sums over parameters are taken in float64, as are all products. Results do not depend on the number of threads and are
the same in every run. NaN and infinities in the inputs come out as one of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transferops._extension import check_device  # also registers torch.ops.transferops
from transferops._validate import as_tensor, check_positive_int, check_tensor, describe, fail

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class GradientFisherGram(NamedTuple):
    """Summaries of per-sample gradients G [N, P] and directions D [K, P]; see :func:`gradient_fisher_gram`."""

    gram: Tensor
    """[K, K] float64: S^T S / N with S = G D^T, the empirical Fisher information along the directions."""
    diagonal: Tensor
    """[P]: the mean of G_n * G_n, float64 for float64 gradients, float32 otherwise."""
    norms: Tensor
    """[N] float64: |G_n|^2."""


def gradient_expectation_(
    means: Sequence[Tensor],
    squares: Sequence[Tensor] | None,
    gradients: Sequence[Tensor],
    count: int,
    *,
    stacked: bool = False,
) -> None:
    """Take one more gradient of every tensor into its running mean and variance, in place, by Welford's recurrence.

    With n = ``count`` + 1: d = g - mean, mean += d / n, squares += d (g - mean), elementwise. ``squares`` / (n - 1) is
    then the variance.

    Args:
        means: running means, float32 or float64, changed in place. With ``count`` 0 what they hold is ignored.
        squares: sums of squared deviations, the shapes and dtypes of ``means``, changed in place; None if not wanted.
        gradients: float32, float64, float16 or bfloat16, the shapes of ``means``; converted to their dtype.
        count: gradients that the moments hold already.
        stacked: the gradients are R at a time, of shapes [R, \\*shape], and count R.

    Raises:
        TypeError: an argument is no sequence of tensors, or of another dtype.
        ValueError: lengths, shapes or devices disagree, or ``count`` is negative.
        RuntimeError: elements of means and squares share memory, of one tensor (an expanded one) or of two.

    Cost: one read of the gradients, one read and one write of the moments, however large R is. Rounding: after n
    gradients of magnitude at most m, means are within 6 n eps m of exact (and usually much closer), eps that of their
    dtype. Not differentiable: gradients are taken as constants.
    """
    means = _check_list("means", means)
    squares = [] if squares is None else _check_list("squares", squares)
    gradients = _check_list("gradients", gradients)
    check_positive_int("count", count, minimum=0)
    for name, tensors in (("gradients", gradients), ("squares", squares)):
        if len(tensors) != len(means) and (tensors or name == "gradients"):
            fail(name, f"{len(means)} tensors, as means", f"{len(tensors)}")
    samples = gradients[0].shape[:1] if stacked and gradients else torch.Size()
    for i, mean in enumerate(means):
        _check_moments(f"[{i}]", mean, squares[i] if squares else None, gradients[i], samples)
    if not means:
        return
    gradients = [g.detach() if g.requires_grad else g for g in gradients]
    torch.ops.transferops.gradient_expectation_(means, squares, gradients, stacked, count)
    _mark_changed([*means, *squares])


def gradient_expectation_gram_(
    means: Sequence[Sequence[Tensor]],
    squares: Sequence[Sequence[Tensor]] | None,
    gradients: Sequence[Sequence[Tensor]],
    counts: Sequence[int],
    *,
    stacked: bool = False,
) -> Tensor:
    """Take one more gradient into each of several expectations, and return the inner products of their means.

    The same as :func:`gradient_expectation_` on each list and then :func:`gradient_gram` of the means, in one pass:
    products are taken of the new means while they are in the cache. On a CPU the two agree to the last bit for
    contiguous tensors, and otherwise up to the order of a float64 sum.

    Args:
        means: K lists of running means, float32 or float64, all of one dtype, of the same shapes in every list.
        squares: sums of squared deviations for the lists that take gradients, or None.
        gradients: for the first U <= K lists of means, at least one; the others are compared but not changed. If
            dtypes differ, tensors of a narrower one are copied to the widest.
        counts: U numbers: gradients that each of these expectations holds already.
        stacked: the gradients are R at a time, of shapes [R, \\*shape].

    Returns:
        [K, K] float64, symmetric, as :func:`gradient_gram`.

    Raises:
        TypeError: an argument is no sequence of sequences of tensors, or of another dtype.
        ValueError: there is no tensor, lengths, shapes or devices disagree, or a count is negative.
        RuntimeError: a tensor that is changed shares memory with another mean or squares, or elements of it do.

    Cost: one read of the gradients, one read of every mean and one write of those that change. On a GPU one launch for
    up to 8 lists (of up to 180 tensors for up to 4 lists, else 90); for more, the two steps one after the other. Not
    differentiable: gradients are taken as constants.
    """
    mean_lists = _check_lists("means", means)
    gradient_lists = _check_lists("gradients", gradients)
    square_lists = [] if squares is None else _check_lists("squares", squares)
    updated, length = len(gradient_lists), len(mean_lists[0])
    if not 1 <= updated <= len(mean_lists):
        fail("gradients", f"1 to {len(mean_lists)} lists, as means", f"{updated}")
    if not isinstance(counts, (list, tuple)) or len(counts) != updated:
        fail("counts", f"{updated} numbers, one for each list of gradients", describe(counts))
    if square_lists and len(square_lists) != updated:
        fail("squares", f"{updated} lists, as gradients", f"{len(square_lists)}")
    dtype = gradient_lists[0][0].dtype
    samples = gradient_lists[0][0].shape[:1] if stacked else torch.Size()
    for k, tensors in enumerate(mean_lists):
        if k < updated:
            check_positive_int(f"counts[{k}]", counts[k], minimum=0)
        for name, lists in (("means", mean_lists), ("gradients", gradient_lists), ("squares", square_lists)):
            if k < len(lists) and len(lists[k]) != length:
                fail(f"{name}[{k}]", f"{length} tensors, as means[0]", f"{len(lists[k])}")
        for i, mean in enumerate(tensors):
            like = mean_lists[0][i]
            _check_shape(f"means[{k}][{i}]", mean, list(like.shape), mean_lists[0][0].device)
            if mean.dtype != mean_lists[0][0].dtype:
                expected = f"the dtype of means[0][0], {_dtype_name(mean_lists[0][0].dtype)}"
                fail(f"means[{k}][{i}]", expected, describe(mean), TypeError)
            square = square_lists[k][i] if square_lists and k < updated else None
            gradient = gradient_lists[k][i] if k < updated else None
            _check_moments(f"[{k}][{i}]", mean, square, gradient, samples)
            dtype = dtype if gradient is None else torch.promote_types(dtype, gradient.dtype)
    result: Tensor = torch.ops.transferops.gradient_expectation_gram_(
        [mean for tensors in mean_lists for mean in tensors],
        [square for tensors in square_lists for square in tensors],
        [gradient.detach().to(dtype) for tensors in gradient_lists for gradient in tensors],
        stacked,
        list(counts),
        len(mean_lists),
    )
    _mark_changed([t for lists in (mean_lists[:updated], square_lists) for tensors in lists for t in tensors])
    return result


def gradient_gram(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """Inner products of K lists of tensors, each list seen as one long vector.

    Args:
        gradients: K lists of tensors, of the same shapes in every list; float32, float64, float16 or bfloat16. If
            dtypes differ, tensors of a narrower one are copied to the widest.

    Returns:
        [K, K] float64, symmetric: G_kl = sum over tensors and elements of g_k g_l.

    Raises:
        TypeError: an argument is no sequence of sequences of floating-point tensors.
        ValueError: there is no tensor, or lengths, shapes or devices disagree.

    Each entry is within d eps sum |g_k g_l| of exact for d elements, with the eps of float64 (products of float32 are
    exact in it): distances between nearly equal lists keep half of float64's digits. Differentiable. Cost: one read of
    every list up to K = 8 on a GPU (beyond, each is read ceil(K / 8) times), for any K on a CPU.
    """
    lists = _check_lists("gradients", gradients)
    dtype = lists[0][0].dtype
    for k, tensors in enumerate(lists):
        if len(tensors) != len(lists[0]):
            fail(f"gradients[{k}]", f"{len(lists[0])} tensors, as gradients[0]", f"{len(tensors)}")
        for i, (tensor, like) in enumerate(zip(tensors, lists[0])):
            _check_shape(f"gradients[{k}][{i}]", tensor, list(like.shape), lists[0][0].device)
            dtype = torch.promote_types(dtype, tensor.dtype)
    result: Tensor = torch.ops.transferops.gradient_gram([t.to(dtype) for ts in lists for t in ts], len(lists))
    return result


def weighted_gram(directions: Tensor | Any, weights: Tensor | Any, base: Tensor | Any | None = None) -> Tensor:
    """D diag(w) D^T for directions D: a quadratic form under a diagonal Fisher information, for instance.

    Args:
        directions: theta, [K, P] float32, float64, float16 or bfloat16, any strides.
        weights: w, [P], any floating dtype; taken in float32, in float64 for float64 directions.
        base: theta_0, [P], any floating dtype; subtracted from every direction on the way, exactly in float64. If its
            dtype differs from the directions', both are copied to the wider one.

    Returns:
        [K, K] float64, symmetric: the sum over p of w_p (theta_kp - theta_0p)(theta_lp - theta_0p).

    Raises:
        TypeError: an argument is no array or not floating point.
        ValueError: shapes or devices disagree.

    Differentiable. Cost: one read of the inputs, nothing of size [K, P] is formed (on a GPU up to K = 8; beyond, the
    directions are read ceil(K / 8) times).
    """
    directions = _check_matrix("directions", directions, "[K, P]")
    weights = _check_floating("weights", weights)
    _check_shape("weights", weights, [directions.shape[1]], directions.device)
    if base is not None:
        base = _check_floating("base", base)
        _check_shape("base", base, [directions.shape[1]], directions.device)
        dtype = torch.promote_types(directions.dtype, base.dtype)
        directions, base = directions.to(dtype), base.to(dtype)
    result: Tensor = torch.ops.transferops.weighted_gram(directions, weights, base)
    return result


def gradient_fisher_gram(gradients: Tensor | Any, directions: Tensor | Any) -> GradientFisherGram:
    """What is asked of per-sample gradients that are there already, in one pass over them.

    Args:
        gradients: G, [N, P] float32, float64, float16 or bfloat16, any strides.
        directions: D, [K, P], any floating dtype; taken in float32, in float64 for float64 gradients. K may be 0.

    Returns:
        :class:`GradientFisherGram`: S^T S / N with S = G D^T, the diagonal of G^T G / N, and the squared norms. Zeros
        for N = 0.

    Raises:
        TypeError: an argument is no array or not floating point.
        ValueError: shapes or devices disagree.

    Differentiable. Cost: one read of the gradients up to K = 8 on a GPU (beyond, one for every 8), for any K on a CPU.
    """
    gradients = _check_matrix("gradients", gradients, "[N, P]")
    directions = _check_matrix("directions", directions, "[K, P]")
    if directions.shape[1] != gradients.shape[1] or directions.device != gradients.device:
        expected = f"shape [K, {gradients.shape[1]}] on {gradients.device}, as the gradients"
        fail("directions", expected, describe(directions))
    return GradientFisherGram(*torch.ops.transferops.gradient_fisher_gram(gradients, directions))


def _mark_changed(tensors: list[Tensor]) -> None:
    """For a backward pass that has saved one of them, and must fail now; the dispatcher leaves that to the caller."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def _check_floating(argument: str, value: Any) -> Tensor:
    tensor = as_tensor(argument, value)
    if tensor.dtype not in _FLOATING:
        fail(argument, "float32, float64, float16 or bfloat16", describe(tensor), TypeError)
    check_device(argument, tensor.device)
    return tensor


def _check_list(argument: str, value: Any) -> list[Tensor]:
    if not isinstance(value, (list, tuple)):
        fail(argument, "a list of tensors", describe(value), TypeError)
    return [_check_floating(f"{argument}[{i}]", check_tensor(f"{argument}[{i}]", x)) for i, x in enumerate(value)]


def _check_lists(argument: str, value: Any) -> list[list[Tensor]]:
    if not isinstance(value, (list, tuple)) or not value:
        fail(argument, "a sequence of at least one list of tensors", describe(value), TypeError)
    lists = [_check_list(f"{argument}[{k}]", tensors) for k, tensors in enumerate(value)]
    if not lists[0]:
        fail(f"{argument}[0]", "at least one tensor", "none")
    return lists


def _check_moments(
    place: str, mean: Tensor, square: Tensor | None, gradient: Tensor | None, samples: Sequence[int]
) -> None:
    """A running mean, its squares and its gradients, stacked by these samples; ``place`` is their index."""
    if mean.dtype not in (torch.float32, torch.float64):
        fail(f"means{place}", "float32 or float64", describe(mean), TypeError)
    if mean.requires_grad:
        fail(f"means{place}", "a tensor that asks for no gradient", "requires_grad=True")
    if gradient is not None:
        _check_shape(f"gradients{place}", gradient, [*samples, *mean.shape], mean.device)
    if square is not None:
        _check_shape(f"squares{place}", square, list(mean.shape), mean.device)
        if square.dtype != mean.dtype:
            fail(f"squares{place}", f"the dtype of the mean, {_dtype_name(mean.dtype)}", describe(square), TypeError)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_shape(argument: str, tensor: Tensor, shape: list[int], device: torch.device) -> None:
    if list(tensor.shape) != shape or tensor.device != device:
        fail(argument, f"shape {shape} on {device}", describe(tensor))


def _check_matrix(argument: str, value: Any, shape: str) -> Tensor:
    tensor = _check_floating(argument, value)
    if tensor.dim() != 2:
        fail(argument, f"shape {shape}", describe(tensor))
    return tensor


# Shapes and dtypes without data, for torch.compile and torch.export.


def _fake_gradient_expectation(
    means: list[Tensor], squares: list[Tensor], gradients: list[Tensor], stacked: bool, count: int
) -> None:
    return None


def _fake_gradient_expectation_gram(
    means: list[Tensor],
    squares: list[Tensor],
    gradients: list[Tensor],
    stacked: bool,
    counts: list[int],
    lists: int,
) -> Tensor:
    return means[0].new_empty([lists, lists], dtype=torch.float64)


def _fake_gradient_gram(gradients: list[Tensor], lists: int) -> Tensor:
    return gradients[0].new_empty([lists, lists], dtype=torch.float64)


def _fake_weighted_gram(directions: Tensor, weights: Tensor, base: Tensor | None) -> Tensor:
    return directions.new_empty([directions.shape[0]] * 2, dtype=torch.float64)


def _fake_gradient_fisher_gram(gradients: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    diagonal = torch.float64 if gradients.dtype == torch.float64 else torch.float32
    return (
        gradients.new_empty([directions.shape[0]] * 2, dtype=torch.float64),
        gradients.new_empty([gradients.shape[1]], dtype=diagonal),
        gradients.new_empty([gradients.shape[0]], dtype=torch.float64),
    )


# Derivatives. With M the gradient of a Gram matrix, symmetrised: what reaches row k is sum_l M_kl row_l.


def _save_gradient_gram(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gradients, ctx.lists = inputs
    ctx.save_for_backward(*gradients)


def _gradient_gram_backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None]:
    tensors = ctx.saved_tensors
    length = len(tensors) // ctx.lists
    both = grad + grad.mT
    result = [torch.empty(0)] * len(tensors)
    for i in range(length):
        rows = torch.stack(tensors[i::length]).double()
        for k, row in enumerate(torch.tensordot(both, rows, 1)):
            result[k * length + i] = row.to(tensors[i].dtype)
    return result, None


def _save_weighted_gram(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    directions, weights, base = inputs
    ctx.has_base = base is not None
    ctx.save_for_backward(directions, weights, *([base] if ctx.has_base else []))


def _weighted_gram_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """d of sum_p w_p y_kp y_lp, and y = directions - base."""
    directions, weights, *base = ctx.saved_tensors
    rows = directions.double() - base[0].double() if base else directions.double()
    along = grad @ rows
    grad_rows = (along + grad.mT @ rows) * weights.double()
    grad_weights = (along * rows).sum(0).to(weights.dtype)
    grad_base = -grad_rows.sum(0).to(base[0].dtype) if base else None
    return grad_rows.to(directions.dtype), grad_weights, grad_base


def _save_gradient_fisher_gram(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _gradient_fisher_gram_backward(
    ctx: Any, grad_gram: Tensor, grad_diagonal: Tensor, grad_norms: Tensor
) -> tuple[Tensor, Tensor]:
    """With S = G D^T: dS = S (M + M^T) / N, dG = dS D + 2 (diagonal's / N + norms') G, dD = dS^T G."""
    gradients, directions = ctx.saved_tensors
    rows, moves = gradients.double(), directions.double()
    samples = max(len(gradients), 1)
    grad_products = rows @ moves.mT @ (grad_gram + grad_gram.mT) / samples
    grad_rows = grad_products @ moves + 2 * (grad_diagonal.double() / samples + grad_norms.unsqueeze(1)) * rows
    return grad_rows.to(gradients.dtype), (grad_products.mT @ rows).to(directions.dtype)


torch.library.register_fake("transferops::gradient_expectation_", _fake_gradient_expectation)
torch.library.register_fake("transferops::gradient_expectation_gram_", _fake_gradient_expectation_gram)
for _name, _fake, _backward, _save in (
    ("gradient_gram", _fake_gradient_gram, _gradient_gram_backward, _save_gradient_gram),
    ("weighted_gram", _fake_weighted_gram, _weighted_gram_backward, _save_weighted_gram),
    ("gradient_fisher_gram", _fake_gradient_fisher_gram, _gradient_fisher_gram_backward, _save_gradient_fisher_gram),
):
    torch.library.register_fake(f"transferops::{_name}", _fake)
    torch.library.register_autograd(f"transferops::{_name}", _backward, setup_context=_save)
