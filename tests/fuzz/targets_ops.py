"""Fuzz targets of transferops.ops: float64 references by the formulas, with the bounds of the docstrings."""

from __future__ import annotations

import math
from typing import Any

import torch
from cases import FLOATING, SEEDS, SIZES, Spec, array, arrays, dtype_of, is_finite, label_array, labels, tensor
from hypothesis import strategies as st
from outcomes import Refusal, agreed, outcome, refused, target
from torch import Tensor

from transferops import ops

EPS = torch.finfo(torch.float64).eps
COUNTS = st.sampled_from([0, 1, 1, 2, 3, 5, 8, 9])


def _result_type(*values: Any) -> torch.dtype:
    return torch.float64 if any(dtype_of(value) == "float64" for value in values) else torch.float32


def _limits(dtype: torch.dtype) -> tuple[float, float, float]:
    """eps, the distance between the smallest numbers, and what sums may reach without leaving the range."""
    info = torch.finfo(dtype)
    return info.eps, info.smallest_normal * info.eps, info.max / 8


def _overflow(tolerance: Tensor, limit: float, *magnitudes: Tensor) -> Tensor:
    """The tolerance, infinite where a magnitude (broadcast to it) is beyond the range."""
    for magnitude in magnitudes:
        tolerance = torch.where(magnitude > limit, math.inf, tolerance)
    return tolerance


# Moments


@st.composite
def _moments(draw: Any) -> Spec:
    samples, dim = draw(SIZES), draw(SIZES)
    leading = draw(st.sampled_from([(), (), (1,), (2,), (2, 3), (0,)]))
    classes = draw(st.integers(0, 9))
    return {
        "features": draw(arrays((*leading, samples, dim), exponents=st.integers(-30, 30))),
        "labels": draw(labels(samples, classes=classes, any_integers=draw(st.sampled_from([False, False, True])))),
        "num_classes": draw(st.sampled_from([None, classes, classes, classes + 3])),
    }


def _centred(features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Column means, y = x - mean, and bounds of the error of either."""
    samples = max(features.shape[-2], 1)
    mean = features.sum(-2) / samples
    centred = features - mean.unsqueeze(-2)
    mean_error = (samples + 8) * EPS * features.abs().sum(-2) / samples
    return mean, centred, mean_error, mean_error.unsqueeze(-2) + 2 * EPS * features.abs()


@target("ops.class_moments", specs=_moments())
def class_moments(spec: Spec) -> str:
    features, classes = array(spec["features"]), spec["num_classes"]
    targets = label_array(spec["labels"])
    result = outcome(ops.class_moments, features, targets, classes)
    x = tensor(features)
    if dtype_of(targets) in ("bool", "float32") or len(targets) != x.shape[-2]:
        return refused(result, "labels")
    y = tensor(targets).long()
    if classes is None:
        classes = int(y.max()) + 1 if len(y) else 0
        if classes > 1_000_000:
            return refused(result, "labels")
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= classes):
        return refused(result, "labels", "num_classes")
    if not is_finite(features):
        return refused(result, "features")
    if classes > 500:
        return "agreed"  # a [C, D] of that many rows was made; too large to check here
    mean, centred, mean_error, error = _centred(x)
    member = torch.nn.functional.one_hot(y, max(classes, 1)).double()[:, :classes]
    counts = member.sum(0)
    size = centred.abs()
    sums_error = member.mT @ error + (len(y) + 8) * EPS * (member.mT @ size)
    gram_error = error.mT @ size + size.mT @ error + error.mT @ error + (len(y) + 16) * EPS * (size.mT @ size)
    return agreed(
        result,
        (counts, 0.0),
        (member.mT @ centred, sums_error),
        (centred.mT @ centred, gram_error),
        (mean, mean_error),
    )


@target("ops.sample_gram", specs=_moments())
def sample_gram(spec: Spec) -> str:
    features = array(spec["features"])
    result = outcome(ops.sample_gram, features)
    if not is_finite(features):
        return refused(result, "features")
    mean, centred, mean_error, error = _centred(tensor(features))
    size = centred.abs()
    bound = error @ size.mT + size @ error.mT + error @ error.mT + (size.shape[-1] + 16) * EPS * (size @ size.mT)
    return agreed(result, (centred @ centred.mT, bound), (mean, mean_error))


@st.composite
def _norms(draw: Any) -> Spec:
    spec: Spec = draw(_moments())
    shape = spec["features"]["shape"]
    spec["shift"] = draw(arrays((*shape[:-2], shape[-1]), dtypes=("float64",) * 5 + ("float32",)))
    return spec


@target("ops.norm_moments", specs=_norms())
def norm_moments(spec: Spec) -> str:
    features, shift = array(spec["features"]), array(spec["shift"])
    result = outcome(ops.norm_moments, features, shift)
    if dtype_of(shift) != "float64":
        return refused(result, "shift")
    if not is_finite(features) or (not is_finite(shift) and features.shape[-2]):
        return refused(result, "features", "shift")
    x, s = tensor(features), tensor(shift).unsqueeze(-2)
    centred = x - s
    norm = centred.square().sum(-1, keepdim=True)
    factor = (8 * x.shape[-1] + 4 * x.shape[-2] + 32) * EPS
    return agreed(
        result,
        ((norm * centred).sum(-2), factor * (norm * centred.abs()).sum(-2)),
        (norm.square().sum((-2, -1)), factor * norm.square().sum((-2, -1))),
    )


# Layers


@st.composite
def _linear(draw: Any) -> Spec:
    samples, positions = draw(COUNTS), draw(st.sampled_from([None, 0, 1, 2, 3, 7, 40]))
    leading = (samples,) if positions is None else (samples, positions)
    inputs, outputs = draw(SIZES), draw(SIZES)
    dtype = draw(st.sampled_from(FLOATING))
    other = draw(st.sampled_from((dtype,) * 9 + ("float32",)))
    return {
        "inputs": draw(arrays((*leading, inputs), dtypes=(dtype,))),
        "grad_outputs": draw(arrays((*leading, outputs), dtypes=(other,))),
        "directions": draw(arrays((draw(COUNTS), outputs, inputs))),
    }


@st.composite
def _conv(draw: Any) -> Spec:
    spatial, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 1, 2, 3]))
    samples = draw(COUNTS)
    inputs, outputs = (groups * draw(st.sampled_from([0, 1, 1, 2, 3, 5])) for _ in range(2))
    sizes, kernel, stride, padding, dilation, out = [], [], [], [], [], []
    for _ in range(spatial):
        sizes.append(draw(st.integers(0, 8)))
        kernel.append(draw(st.integers(1, 4)))
        stride.append(draw(st.integers(1, 3)))
        padding.append(draw(st.integers(0, 3)))
        dilation.append(draw(st.integers(1, 3)))
        room = sizes[-1] + 2 * padding[-1] - dilation[-1] * (kernel[-1] - 1) - 1
        out.append(max(room // stride[-1] + 1, 0))
    dtype = draw(st.sampled_from(FLOATING))
    if draw(st.integers(0, 9)) == 0:
        out[0] += 1
    return {
        "inputs": draw(arrays((samples, inputs, *sizes), dtypes=(dtype,))),
        "grad_outputs": draw(arrays((samples, outputs, *out), dtypes=(dtype,))),
        "directions": draw(arrays((draw(COUNTS), outputs, inputs // groups, *kernel))),
        "window": [kernel, stride, padding, dilation, groups],
    }


class _Gradients:
    """Per-sample gradients G [N, O, I] of a layer's weight, what they would be of absolute values, and the sizes."""

    def __init__(self, inputs: Any, grad_outputs: Any, window: list[Any] | None) -> None:
        self.dtype = _result_type(inputs)
        self.eps, self.tiny, self.limit = _limits(self.dtype)
        a, b = tensor(inputs), tensor(grad_outputs)
        self.finite = is_finite(inputs, grad_outputs)
        if window is not None:
            a, b = _patches(a, b, *window)
        elif a.dim() == 2:
            a, b = a.unsqueeze(1), b.unsqueeze(1)
        a, b = (x if x.dim() == 4 else x.unsqueeze(2) for x in (a, b))  # [N, T, groups, width]
        self.samples, self.positions, self.groups, self.width = a.shape
        self.outputs = b.shape[3]
        self.a, self.b = a, b
        self.exact = self._products(a, b)
        self.size = self._products(a.abs(), b.abs())

    def _products(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("ntgo,ntgi->ngoi", b, a).reshape(self.samples, self.groups * self.outputs, self.width)

    def diagonal(self) -> tuple[Tensor, Tensor]:
        square, steps = self.size.square().sum(0), self.positions
        tolerance = (2 * steps + self.samples + 8) * self.eps * square
        tolerance = tolerance + self.tiny * (2 * steps * self.size.sum(0) + 4 * self.samples)
        extremes = [square]
        if steps == 1:  # squares are taken first
            a2 = self._products(self.a.square(), torch.ones_like(self.b)).sum(0)
            b2 = self._products(torch.ones_like(self.a), self.b.square()).sum(0)
            tolerance, extremes = tolerance + self.tiny * (a2 + b2), [square, a2, b2]
        if not self.finite:  # kernels that pad with zeros pass a NaN on to its neighbours
            tolerance = torch.full_like(tolerance, math.nan)
        return self.exact.square().sum(0), _overflow(tolerance, self.limit, *extremes)

    def norm(self) -> tuple[Tensor, Tensor]:
        square, steps = self.size.square().sum((1, 2)), self.positions
        a2, b2 = (x.abs().sum((1, 2, 3)).square() for x in (self.a, self.b))
        terms = 2 * steps * steps + 2 * steps + self.outputs * self.groups + self.width + 32
        weights = self.outputs * self.groups * self.width
        tolerance = terms * self.eps * square + terms * self.tiny * (self.size.sum((1, 2)) + a2 + b2 + weights + 1)
        return self.exact.square().sum((1, 2)), _overflow(tolerance, self.limit, square, a2, b2)

    def projection(self, directions: Any) -> tuple[Tensor, Tensor]:
        d = tensor(directions).flatten(2)
        d = d.reshape(d.shape[0], self.groups * self.outputs, self.width)
        value = torch.einsum("noi,koi->nk", self.exact, d if self.positions else torch.zeros_like(d))
        size = torch.einsum("noi,koi->nk", self.size, d.abs())
        terms = self.positions + d[0].numel() + 16 if len(d) else 1
        a, b, moves = (self.a.abs().sum((1, 2, 3)), self.b.abs().sum((1, 2, 3)), d.abs().sum((1, 2)))
        a, b = a.unsqueeze(1), b.unsqueeze(1)
        tolerance = 4 * terms * self.eps * size + terms * self.tiny * (moves + a + b + terms)
        return value, _overflow(tolerance, self.limit, size, a * b, a * moves, b * moves)


def _patches(
    a: Tensor, b: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> tuple[Tensor, Tensor]:
    """A convolution as a linear layer: patches [N, T, groups, C_in/groups |kernel|], and the output gradients alike."""
    samples, channels = a.shape[:2]
    out = b.shape[2:]
    a = torch.nn.functional.pad(a, [p for size in reversed(padding) for p in (size, size)])
    for d, (count, k, s, step) in enumerate(zip(out, kernel, stride, dilation)):
        places = (torch.arange(count) * s).unsqueeze(1) + torch.arange(k) * step
        a = a.index_select(2 + d, places.flatten()).unflatten(2 + d, (count, k)).movedim(3 + d, -1)
    a = a.reshape(samples, groups, channels // groups, math.prod(out), math.prod(kernel))
    b = b.reshape(samples, groups, b.shape[1] // groups, math.prod(out))
    return a.permute(0, 3, 1, 2, 4).flatten(3), b.permute(0, 3, 1, 2)


def _layer(function: Any, measure: str, spec: Spec) -> str:
    inputs, grad_outputs = array(spec["inputs"]), array(spec["grad_outputs"])
    window = spec.get("window")
    arguments = [inputs, grad_outputs]
    if measure == "projection":
        arguments.append(array(spec["directions"]))
    result = outcome(function, *arguments, *(window or ()))
    if dtype_of(inputs) != dtype_of(grad_outputs):
        return refused(result, "grad_outputs")
    if window is not None:
        out = []
        for size, k, s, p, step in zip(inputs.shape[2:], *window[:4]):
            out.append(max((size + 2 * p - step * (k - 1) - 1) // s + 1, 0))
        if list(grad_outputs.shape[2:]) != out:
            return refused(result, "grad_outputs")
    found = _Gradients(inputs, grad_outputs, window)
    value, tolerance = getattr(found, measure)(*arguments[2:])
    if measure == "diagonal" and window is not None:
        value, tolerance = (x.reshape(result.shape) for x in (value, tolerance))
        assert list(result.shape) == [grad_outputs.shape[1], inputs.shape[1] // window[4], *window[0]]
    assert result.dtype == found.dtype
    return agreed(result, (value, tolerance))


for _kind, _specs in (("linear", _linear()), ("conv", _conv())):
    for _name, _measure in (
        ("fisher_diagonal", "diagonal"),
        ("fisher_projection", "projection"),
        ("grad_norm", "norm"),
    ):
        _function = getattr(ops, f"{_kind}_{_name}")
        target(f"ops.{_kind}_{_name}", specs=_specs)(
            lambda spec, function=_function, measure=_measure: _layer(function, measure, spec)
        )


@st.composite
def _softmax(draw: Any) -> Spec:
    directions, samples, classes = draw(COUNTS), draw(SIZES), draw(st.sampled_from([0, 1, 2, 3, 5, 17, 65, 130]))
    return {
        "logits": draw(arrays((samples, classes), exponents=st.integers(-30, 4))),
        "tangents": draw(arrays((directions, samples, classes))),
    }


@target("ops.softmax_fisher_gram", "fisher.softmax_fisher_gram", specs=_softmax())
def softmax_fisher_gram(spec: Spec) -> str:
    logits, tangents = array(spec["logits"]), array(spec["tangents"])
    result = outcome(ops.softmax_fisher_gram, logits, tangents)
    eps, tiny, limit = _limits(_result_type(logits, tangents))
    z, t = tensor(logits), tensor(tangents)
    if not z.shape[1] or not len(t):
        return agreed(result, (torch.zeros(len(t), len(t)), 0.0))
    p = z.softmax(1)
    t = t - t[..., :1]
    centred = t - (p * t).sum(-1, keepdim=True)
    value = torch.einsum("nc,knc,lnc->kl", p, centred, centred)
    if not is_finite(logits):
        value = torch.full_like(value, math.nan)
        if bool(torch.isfinite(p).all()):  # of minus infinity: a class that cannot be
            return "agreed"
    size = t.abs() + (p * t.abs()).sum(-1, keepdim=True)
    below = z.amax(1, keepdim=True) - z
    relative = (below + (p * below).nan_to_num().sum(1, keepdim=True) + z.shape[1] + 32) * eps
    lost = torch.einsum("nc,knc,lnc->kl", p * relative, size, size)
    along, error = (p * size).sum(-1), (p * relative * size).sum(-1)
    lost = 8 * (lost + along @ error.mT + error @ along.mT)
    terms = z.numel() + 32
    lost = lost + (z.shape[1] + 2) * torch.finfo(_result_type(logits, tangents)).tiny * torch.einsum(
        "knc,lnc->kl", size, size
    )
    lost = lost + terms * tiny * (size.sum((1, 2)).unsqueeze(1) + size.sum((1, 2)) + 1)
    largest = size.amax((1, 2)) if size.numel() else size.sum((1, 2))
    return agreed(result, (value, _overflow(lost, limit, (largest.unsqueeze(1) * largest) * z.shape[1])))


# Gradients

_TENSORS = ("plain", "transposed", "every other", "shifted")
_SHAPES = st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 33]), max_size=3), min_size=1, max_size=4)


@st.composite
def _expectation(draw: Any) -> Spec:
    shapes, samples = draw(_SHAPES), draw(st.sampled_from([None, None, 0, 1, 3]))
    wide = draw(st.sampled_from(["float32", "float64"]))
    leading = () if samples is None else (samples,)
    exponents = st.integers(-30, 15)

    def some(leading: tuple[int, ...], dtypes: tuple[str, ...]) -> list[Spec]:
        return [
            draw(arrays((*leading, *shape), dtypes=dtypes, layouts=_TENSORS, exponents=exponents)) for shape in shapes
        ]

    return {
        "means": some((), (wide,)),
        "squares": draw(st.booleans()) and some((), (wide,)),
        "gradients": some(leading, FLOATING),
        "count": draw(st.sampled_from([0, 0, 1, 2, 10])),
        "stacked": samples is not None,
    }


@target("ops.gradient_expectation_", specs=_expectation())
def gradient_expectation(spec: Spec) -> str:
    means = [array(x) for x in spec["means"]]
    squares = [array(x).abs() for x in spec["squares"]] if spec["squares"] else None
    gradients = [array(x) for x in spec["gradients"]]
    count, stacked = spec["count"], spec["stacked"]
    before = [tensor(x) for x in means], [tensor(x) for x in squares or means]
    result = outcome(ops.gradient_expectation_, means, squares, gradients, count, stacked=stacked)
    assert result is None, result
    for i, gradient in enumerate(gradients):
        eps, tiny, limit = _limits(means[i].dtype)
        mean, square = (torch.zeros_like(x[i]) if count == 0 else x[i] for x in before)
        if stacked and not len(gradient):
            mean, square = before[0][i], before[1][i]
        largest, seen = mean.abs(), count
        for g in tensor(gradient) if stacked else [tensor(gradient)]:
            seen += 1
            largest = torch.maximum(largest, g.abs())
            apart = g - mean
            mean = mean + apart / seen
            square = square + apart * (g - mean) if seen > 1 else torch.zeros_like(square)
        steps = seen - count + 2
        agreed(means[i], (mean, _overflow(6 * steps * eps * largest + steps * tiny, limit, largest * 4)))
        if squares is not None:
            lost = 32 * steps * eps * (square.abs() + largest.square()) + steps * tiny * (largest + 1)
            agreed(squares[i], (square, _overflow(lost, limit, largest.square() * 8 * steps)))
    return "agreed"


@st.composite
def _lists(draw: Any) -> Spec:
    shapes = draw(_SHAPES)
    count = draw(st.sampled_from([1, 2, 3, 9]))
    return {
        "lists": [[draw(arrays(tuple(shape), layouts=_TENSORS)) for shape in shapes] for _ in range(count)],
        "seed": draw(SEEDS),
    }


@target("ops.gradient_gram", specs=_lists())
def gradient_gram(spec: Spec) -> str:
    lists = [[array(x) for x in part] for part in spec["lists"]]
    result = outcome(ops.gradient_gram, lists)
    rows = torch.stack([torch.cat([tensor(x).flatten() for x in part]) for part in lists])
    value = rows @ rows.mT
    return agreed(result, (value, (rows.shape[1] + 8) * EPS * (rows.abs() @ rows.abs().mT)))


@st.composite
def _weighted(draw: Any) -> Spec:
    count, size = draw(COUNTS), draw(SIZES)
    return {
        "directions": draw(arrays((count, size))),
        "weights": draw(arrays((size,))),
        "base": draw(st.one_of(st.none(), arrays((size,)))),
    }


@target("ops.weighted_gram", specs=_weighted())
def weighted_gram(spec: Spec) -> str:
    directions, weights = array(spec["directions"]), array(spec["weights"])
    base = None if spec["base"] is None else array(spec["base"])
    result = outcome(ops.weighted_gram, directions, weights, base)
    x, w = tensor(directions), tensor(weights)
    wide = _result_type(directions, *([] if base is None else [base]))
    y = x if base is None else x - tensor(base)
    value, size = (y * w) @ y.mT, (y.abs() * w.abs()) @ y.abs().mT
    eps, tiny, _ = _limits(wide)
    tolerance = ((len(w) + 16) * EPS + (eps if wide == torch.float32 else 0)) * size
    return agreed(result, (value, tolerance + 2 * tiny * (y.abs() @ y.abs().mT)))


@st.composite
def _rows(draw: Any) -> Spec:
    size = draw(SIZES)
    return {"gradients": draw(arrays((draw(COUNTS), size))), "directions": draw(arrays((draw(COUNTS), size)))}


@target("ops.gradient_fisher_gram", specs=_rows())
def gradient_fisher_gram(spec: Spec) -> str:
    gradients, directions = array(spec["gradients"]), array(spec["directions"])
    result = outcome(ops.gradient_fisher_gram, gradients, directions)
    g, d = tensor(gradients), tensor(directions)
    samples = max(len(g), 1)
    eps, tiny, limit = _limits(_result_type(gradients))
    scores, size = g @ d.mT, g.abs() @ d.abs().mT
    cast = eps if _result_type(gradients) == torch.float32 else 0
    factor = 4 * ((g.shape[1] + len(g) + 8) * EPS + cast)
    lost = tiny * g.abs().sum(1, keepdim=True)
    gram_error = factor * size.mT @ size + 2 * (size.mT @ lost.expand_as(size)) + lost.expand_as(size).mT @ size
    diagonal = g.square().sum(0) / samples
    diagonal_error = (len(g) + 8) * eps * diagonal + (len(g) + 2) * tiny
    return agreed(
        result,
        (scores.mT @ scores / samples, gram_error),
        (diagonal, _overflow(diagonal_error, limit, diagonal * samples)),
        (g.square().sum(1), (g.shape[1] + 8) * EPS * g.square().sum(1)),
    )


@st.composite
def _several(draw: Any) -> Spec:
    shapes, lists = draw(_SHAPES), draw(st.sampled_from([1, 2, 3]))
    changed, samples = draw(st.integers(1, lists)), draw(st.sampled_from([None, None, 1, 3]))
    wide, leading = draw(st.sampled_from(["float32", "float64"])), () if samples is None else (samples,)

    def some(count: int, leading: tuple[int, ...], dtypes: tuple[str, ...]) -> list[list[Spec]]:
        small = {"dtypes": dtypes, "layouts": _TENSORS, "exponents": st.integers(-15, 15)}
        return [[draw(arrays((*leading, *shape), **small)) for shape in shapes] for _ in range(count)]

    return {
        "means": some(lists, (), (wide,)),
        "squares": draw(st.booleans()) and some(changed, (), (wide,)),
        "gradients": some(changed, leading, FLOATING),
        "counts": draw(st.lists(st.sampled_from([0, 0, 1, 5]), min_size=changed, max_size=changed)),
        "stacked": samples is not None,
    }


@target("ops.gradient_expectation_gram_", specs=_several())
def gradient_expectation_gram(spec: Spec) -> str:
    """The two steps one after the other: their bits, but for the Gram matrix of tensors with gaps or transposed."""

    def made(part: Any) -> Any:
        return [[array(x) for x in tensors] for tensors in part] if part else None

    def equal(left: Tensor, right: Tensor) -> bool:
        return torch.equal(left.nan_to_num(nan=7.0), right.nan_to_num(nan=7.0))

    means, squares, gradients, counts = (
        made(spec["means"]),
        made(spec["squares"]),
        made(spec["gradients"]),
        spec["counts"],
    )
    wide = FLOATING[0]
    for x in (x for tensors in gradients for x in tensors):
        wide = str(torch.promote_types(getattr(torch, wide), x.dtype)).removeprefix("torch.")
    expected, deviations = made(spec["means"]), made(spec["squares"])
    result = outcome(ops.gradient_expectation_gram_, means, squares, gradients, counts, stacked=spec["stacked"])
    for k, count in enumerate(counts):
        one = None if deviations is None else deviations[k]
        ops.gradient_expectation_(expected[k], one, gradients[k], count, stacked=spec["stacked"])
    gram = ops.gradient_gram(expected)
    assert isinstance(result, Tensor), result
    contiguous = all(x.is_contiguous() for part in (means, gradients) for tensors in part for x in tensors)
    terms = sum(x.numel() for x in expected[0])
    norms = gram.diagonal().abs().sqrt()
    bound = 0.0 if contiguous else 2 * terms * torch.finfo(torch.float64).eps * torch.outer(norms, norms)
    same = ((result - gram).abs() <= bound) | (result == gram) | (result.isnan() & gram.isnan())
    assert same.all(), (result, gram)
    for ours, theirs in ((means, expected), (squares or [], deviations or [])):
        assert all(equal(a, b) for left, right in zip(ours, theirs) for a, b in zip(left, right))
    return "agreed"


@target("ops.empirical_prediction", specs=_moments())
def empirical_prediction(spec: Spec) -> str:
    shape = spec["features"]["shape"][-2:]
    probabilities, targets = array({**spec["features"], "shape": shape}), label_array(spec["labels"])
    p = tensor(probabilities).abs()
    probabilities = p.to(getattr(torch, spec["features"]["dtype"]))
    classes = spec["num_classes"]
    result = outcome(ops.empirical_prediction, probabilities, targets, classes)
    y = tensor(targets).long()
    if dtype_of(targets) in ("bool", "float32") or len(y) != len(p):
        return refused(result, "labels")
    if classes is None:
        classes = int(y.max()) + 1 if len(y) else 0
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= classes):
        return refused(result, "labels", "num_classes")
    assert not isinstance(result, Refusal), result
    y = y.unique(return_inverse=True)[1]
    member = torch.nn.functional.one_hot(y, max(len(y), 1)).double()[:, : len(y)]
    joint = member.mT @ p
    mass = joint.sum(0)
    eps, tiny, limit = _limits(_result_type(probabilities))
    expected = ((joint / torch.where(mass > 0, mass, 1))[y] * p).sum(1)
    steps = (len(p) + p.shape[1] + 32) * eps
    agreed(result.totals, (p.sum(1), _overflow(steps * p.sum(1) + tiny, limit, p.sum(1))))
    if not is_finite(probabilities):  # which the totals have told
        return "agreed"
    lost = _overflow(steps * expected + p.shape[1] * tiny * (1 + p.sum(1)), limit, p.sum(1) + mass.sum())
    return agreed(result.prediction, (expected, lost))
