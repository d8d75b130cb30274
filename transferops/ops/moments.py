"""First and second moments of labelled features: what the H-score and its kin are made of.

Everything is accumulated and returned in float64, whatever the dtype of the features, which are converted before they
are subtracted or multiplied; :func:`class_moments` on a GPU can be asked for less. Results do not depend on the number
of threads and are the same in every run.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from transferops._extension import check_device  # also registers torch.ops.transferops
from transferops._validate import as_tensor, check_positive_int, describe, fail

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MOST_CLASSES = 1_000_000

Precision = Literal["float64", "float32", "tf32", "bfloat16"]
_SIGNIFICANT_BITS = {"float64": 53, "float32": 24, "tf32": 11, "bfloat16": 8}


class ClassMoments(NamedTuple):
    """Moments of features about their column means. Leading dimensions are those of the features.

    Attributes:
        counts: [C] int64, samples of each class.
        sums: [..., C, D] float64, sum over the class of x - shift; n_c (mean_c - mean).
        gram: [..., D, D] float64, sum over all samples of (x - shift)(x - shift)^T; N times the covariance.
        shift: [..., D] float64, the column means.
    """

    counts: Tensor
    sums: Tensor
    gram: Tensor
    shift: Tensor


class SampleGram(NamedTuple):
    """Inner products between centred samples.

    Attributes:
        gram: [..., N, N] float64, (x_m - shift) . (x_n - shift).
        shift: [..., D] float64, the column means.
    """

    gram: Tensor
    shift: Tensor


class NormMoments(NamedTuple):
    """Moments of the norms of y = x - shift.

    Attributes:
        cubic: [..., D] float64, sum_n |y_n|^2 y_n.
        quartic: [...] float64, sum_n |y_n|^4.
    """

    cubic: Tensor
    quartic: Tensor


def class_moments(
    features: Tensor | Any,
    labels: Tensor | Any,
    num_classes: int | None = None,
    *,
    precision: Precision = "float64",
    validate: bool = True,
) -> ClassMoments:
    """Class counts, class sums and the centred Gram matrix, in one call.

    Args:
        features: [..., N, D] float32, float64, float16 or bfloat16; leading dimensions are a batch of feature sets
            over the same N samples. Any strides.
        labels: [N] integers in 0 .. num_classes-1, shared by all feature sets.
        num_classes: number of classes C; classes without samples are allowed. Default: the largest label + 1, up to
            1 000 000 (reads the labels back from the GPU; give it under torch.compile).
        precision: the least that the Gram matrix is computed in on a GPU; a CPU always takes float64. Below float64,
            y = x - shift is rounded to "float32", "tf32" or "bfloat16" before it is multiplied, and up to 2048 products
            are summed in float32 before they are added in float64. An entry is then within 2^-16, 2^-9 or 2^-6 of
            sum_n |y_ni y_nj|. Counts, sums and shift are float64 in all cases. "bfloat16" rounds wide features of 4 or
            8 bytes into a copy of N D 2 bytes, if that is at most 16 GiB.
        validate: check that labels are in range and the result is finite. On a GPU this waits for the kernels; without
            it, out-of-range labels there count to the first or the last class, and NaN and Inf propagate.

    Returns:
        :class:`ClassMoments`, all float64 but the counts. With N = 0 all are zero.

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes disagree, a label is out of range, a feature is NaN or infinite (the message names the first
            offending position), or ``precision`` is none of the four.

    Differentiable in the features. Cost: N D^2 float64 operations (half of a general product), two reads of the data.
    """
    if not isinstance(precision, str) or precision not in _SIGNIFICANT_BITS:
        fail("precision", f"one of {', '.join(map(repr, _SIGNIFICANT_BITS))}", repr(precision))
    features = _check_features(features)
    labels = check_labels(labels, "features", features, features.shape[-2])
    eager = not torch.compiler.is_compiling()
    if num_classes is None:
        num_classes = _inferred_classes(labels)
    elif eager:
        check_positive_int("num_classes", num_classes, minimum=0)
    if validate and eager:
        check_label_range(labels, num_classes)
    moments = ClassMoments(
        *torch.ops.transferops.class_moments(features, labels, num_classes, _SIGNIFICANT_BITS[precision])
    )
    if validate and eager:
        check_finite_sums(features, moments.shift, moments.gram.diagonal(dim1=-2, dim2=-1))
    return moments


def sample_gram(features: Tensor | Any, *, validate: bool = True) -> SampleGram:
    """Inner products between centred samples, for fewer samples than features.

    Args:
        features: [..., N, D] float32, float64, float16 or bfloat16, any strides.
        validate: check that the result is finite (waits for the kernels on a GPU).

    Returns:
        :class:`SampleGram`, float64. The nonzero eigenvalues are those of :func:`class_moments`' Gram matrix.

    Raises:
        TypeError: features is no array or not floating point.
        ValueError: features has fewer than two dimensions, or holds NaN or Inf; the message names the position.

    Differentiable. Cost: N^2 D float64 operations.
    """
    features = _check_features(features)
    result = SampleGram(*torch.ops.transferops.sample_gram(features))
    if validate and not torch.compiler.is_compiling():
        check_finite_sums(features, result.shift, result.gram.diagonal(dim1=-2, dim2=-1))
    return result


def norm_moments(features: Tensor | Any, shift: Tensor | Any, *, validate: bool = True) -> NormMoments:
    """Third and fourth moments of the sample norms: what Ledoit-Wolf shrinkage needs beyond the covariance.

    Args:
        features: [..., N, D] float32, float64, float16 or bfloat16, any strides.
        shift: [..., D] float64, subtracted from every sample (usually the column means).
        validate: check that the result is finite (waits for the kernels on a GPU).

    Returns:
        :class:`NormMoments`, float64. sum_i ||y_i y_i^T||_F^2 of Ledoit and Wolf (2004) is ``quartic``; ``cubic`` is
        what moves it to another shift.

    Raises:
        TypeError: an argument is no array or has the wrong kind of dtype.
        ValueError: shapes disagree, or the features hold NaN or Inf.

    Differentiable. Cost: one read of the data.
    """
    features = _check_features(features)
    shift = as_tensor("shift", shift)
    expected = [*features.shape[:-2], features.shape[-1]]
    if shift.dtype != torch.float64 or list(shift.shape) != expected:
        fail("shift", f"a float64 tensor of shape {expected}", describe(shift))
    if shift.device != features.device:
        fail("shift", f"the device of features, {features.device}", str(shift.device))
    result = NormMoments(*torch.ops.transferops.norm_moments(features, shift))
    if validate and not torch.compiler.is_compiling():
        check_finite_sums(features, result.quartic)
    return result


def _check_features(features: Any) -> Tensor:
    tensor = as_tensor("features", features)
    if tensor.dtype not in _FLOATING:
        fail("features", "float32, float64, float16 or bfloat16", describe(tensor), TypeError)
    if tensor.dim() < 2:
        fail("features", "shape [..., N, D]", describe(tensor))
    check_device("features", tensor.device)
    return tensor


def check_labels(labels: Any, argument: str, values: Tensor, rows: int) -> Tensor:
    """Labels [rows] as int64, one for each of the rows of an argument with these values."""
    tensor = as_tensor("labels", labels)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        fail("labels", "integers", describe(tensor), TypeError)
    if tensor.dim() != 1:
        fail("labels", "shape [N]", describe(tensor))
    if tensor.shape[0] != rows:  # not len, which would fix the size that torch.export leaves open
        fail("labels", f"one label for each of the {rows} rows of {argument}", f"{tensor.shape[0]}")
    if tensor.device != values.device:
        fail("labels", f"the device of {argument}, {values.device}", str(tensor.device))
    return tensor.long()


def _inferred_classes(labels: Tensor) -> int:
    largest = int(labels.max()) if labels.numel() else -1
    if largest >= _MOST_CLASSES:
        expected = f"classes below {_MOST_CLASSES} where num_classes is not given, there being a row of sums for each"
        fail("labels", expected, f"{largest} at position {int(labels.argmax())}")
    return largest + 1


def check_label_range(labels: Tensor, num_classes: int) -> None:
    """Refuse labels outside 0 .. num_classes-1; waits for a GPU."""
    if labels.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        position = int(((labels < 0) | (labels >= num_classes)).nonzero()[0])
        fail(
            "labels",
            f"{num_classes} classes 0..{num_classes - 1}",
            f"{int(labels[position])} at position {position}",
        )


def check_finite_sums(features: Tensor, *sums: Tensor) -> None:
    """Sums of finite numbers are finite, so small results show whether the whole input was."""
    if bool(torch.cat([value.flatten() for value in sums]).isfinite().all()):  # a GPU is waited for once
        return
    bad = (~torch.isfinite(features)).nonzero()
    if len(bad):
        position = bad[0].tolist()
        fail("features", "finite values", f"{features[tuple(position)].item()} at position {position}")
    fail("features", "values whose products fit float64", f"magnitudes up to {float(features.abs().max()):.3g}")


# Shapes and dtypes without data, for torch.compile and torch.export.


def _fake_class_moments(
    features: Tensor, labels: Tensor, num_classes: int, precision: int = 53
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *leading, _, dim = features.shape
    return (
        labels.new_empty([num_classes]),
        features.new_empty([*leading, num_classes, dim], dtype=torch.float64),
        features.new_empty([*leading, dim, dim], dtype=torch.float64),
        features.new_empty([*leading, dim], dtype=torch.float64),
    )


def _fake_sample_gram(features: Tensor) -> tuple[Tensor, Tensor]:
    *leading, samples, dim = features.shape
    return (
        features.new_empty([*leading, samples, samples], dtype=torch.float64),
        features.new_empty([*leading, dim], dtype=torch.float64),
    )


def _fake_norm_moments(features: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    *leading, _, dim = features.shape
    return (
        features.new_empty([*leading, dim], dtype=torch.float64),
        features.new_empty(leading, dtype=torch.float64),
    )


# Derivatives. In every one y = x - shift, computed anew in float64 so that nothing of size [N, D] is kept.


def _save_class_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, labels, *_ = inputs
    counts, _, _, shift = output
    ctx.mark_non_differentiable(counts)
    ctx.save_for_backward(features, labels, counts, shift)


def _class_moments_backward(
    ctx: Any, _counts: Tensor, grad_sums: Tensor, grad_gram: Tensor, grad_shift: Tensor
) -> tuple[Tensor, None, None, None]:
    """d gram = sum y dy^T + dy y^T; d sums_c = sum_c dx - n_c d shift; d shift = mean dx. sum y = 0 drops a term."""
    features, labels, counts, shift = ctx.saved_tensors
    samples = max(features.shape[-2], 1)
    centred = features.double() - shift.unsqueeze(-2)
    shared = (grad_shift - (counts.double().unsqueeze(-1) * grad_sums).sum(-2)) / samples
    grad = centred @ (grad_gram + grad_gram.mT) + grad_sums.index_select(-2, labels) + shared.unsqueeze(-2)
    return grad.to(features.dtype), None, None, None


def _save_sample_gram(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[1])


def _sample_gram_backward(ctx: Any, grad_gram: Tensor, grad_shift: Tensor) -> Tensor:
    """d K = dy y^T + y dy^T with dy = dx - d shift, d shift = mean dx."""
    saved: tuple[Tensor, Tensor] = ctx.saved_tensors
    features, shift = saved
    grad = (grad_gram + grad_gram.mT) @ (features.double() - shift.unsqueeze(-2))
    grad = grad - grad.mean(-2, keepdim=True) + grad_shift.unsqueeze(-2) / max(features.shape[-2], 1)
    return grad.to(features.dtype)


def _save_norm_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _norm_moments_backward(ctx: Any, grad_cubic: Tensor, grad_quartic: Tensor) -> tuple[Tensor, Tensor]:
    """With r = |y|^2: d(r y) = r dy + 2 (y . dy) y and d r^2 = 4 r y . dy."""
    saved: tuple[Tensor, Tensor] = ctx.saved_tensors
    features, shift = saved
    centred = features.double() - shift.unsqueeze(-2)
    norm = centred.square().sum(-1, keepdim=True)
    along = (centred * grad_cubic.unsqueeze(-2)).sum(-1, keepdim=True)
    grad = norm * grad_cubic.unsqueeze(-2) + (2 * along + 4 * norm * grad_quartic[..., None, None]) * centred
    return grad.to(features.dtype), -grad.sum(-2)


for _name, _fake, _backward, _save in (
    ("class_moments", _fake_class_moments, _class_moments_backward, _save_class_moments),
    ("sample_gram", _fake_sample_gram, _sample_gram_backward, _save_sample_gram),
    ("norm_moments", _fake_norm_moments, _norm_moments_backward, _save_norm_moments),
):
    torch.library.register_fake(f"transferops::{_name}", _fake)
    torch.library.register_autograd(f"transferops::{_name}", _backward, setup_context=_save)
