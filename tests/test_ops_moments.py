"""The moments ops against float64 references, with error bounds from the arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from transferops import _C, ops
from transferops.ops.moments import Precision

EPS = torch.finfo(torch.float64).eps
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 1),
    (2, 1),
    (1, 5),
    (7, 3),
    (33, 8),
    (64, 24),
    (65, 25),
    (257, 7),
    (300, 193),
    (1030, 49),
    (40, 400),
]


def labelled(
    samples: int,
    dim: int,
    classes: int = 5,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.0,
    sets: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples * 1000 + dim)
    features = torch.randn(*sets, samples, dim, generator=generator, dtype=torch.float64) + offset
    return features.to(dtype), torch.randint(classes, (samples,), generator=generator)


def gram_bound(left: Tensor, right: Tensor, spread: Tensor) -> Tensor:
    """Bound on |computed - exact| of left^T right for centred float64 matrices of n rows.

    Summing n products costs n eps sum |products|, and so does the reference; each factor carries the rounding of the
    mean, n eps of the size of the entries as they came (spread, one number per column or row).
    """
    n = left.shape[-2]
    magnitude = left.abs().mT @ right.abs()
    shift_error = (n + 3) * EPS * spread
    first_order = left.abs().sum(-2).unsqueeze(-1) * shift_error.unsqueeze(-2)
    return 2 * ((n + 3) * EPS * magnitude + first_order + first_order.mT + n * shift_error.square().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("samples", "dim"), SHAPES)
def test_class_moments_matches_reference(samples: int, dim: int, dtype: torch.dtype) -> None:
    features, labels = labelled(samples, dim, dtype=dtype, offset=3.0)
    counts, sums, gram, shift = ops.class_moments(features, labels, 5)
    want_counts, want_sums, want_gram, want_shift = reference.class_moments(features, labels, 5)
    x = features.double()
    spread = x.abs().amax(0)
    bound = gram_bound(x - want_shift, x - want_shift, spread)
    assert torch.equal(counts, want_counts)
    assert ((shift - want_shift).abs() <= 2 * samples * EPS * spread).all()
    assert ((gram - want_gram).abs() <= bound).all()
    assert ((sums - want_sums).abs() <= 4 * (samples + 3) ** 2 * EPS * spread).all()
    assert torch.equal(gram, gram.mT)
    for tensor in (sums, gram, shift):
        assert tensor.dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("samples", "dim"), SHAPES)
def test_sample_gram_matches_reference(samples: int, dim: int, dtype: torch.dtype) -> None:
    features, _ = labelled(samples, dim, dtype=dtype, offset=3.0)
    gram, shift = ops.sample_gram(features)
    x = features.double()
    centred = x - x.mean(0)
    bound = gram_bound(centred.mT, centred.mT, torch.full((samples,), float(x.abs().max())) * max(samples / dim, 1))
    assert ((gram - centred @ centred.mT).abs() <= bound).all()
    assert ((shift - x.mean(0)).abs() <= 2 * samples * EPS * x.abs().amax(0)).all()
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("samples", "dim"), SHAPES)
def test_norm_moments_matches_reference(samples: int, dim: int, dtype: torch.dtype) -> None:
    features, _ = labelled(samples, dim, dtype=dtype)
    shift = features.double().mean(0)
    cubic, quartic = ops.norm_moments(features, shift)
    y = features.double() - shift
    norm = y.square().sum(1)
    bound = 2 * (samples + dim + 4) * EPS
    assert ((cubic - norm @ y).abs() <= bound * (norm @ y.abs())).all()
    assert abs(quartic - norm.square().sum()) <= 2 * bound * norm.square().sum()


def test_batch_of_feature_sets_equals_one_by_one() -> None:
    features, labels = labelled(50, 9, sets=(2, 3))
    batched = ops.class_moments(features, labels, 5)
    batched_gram = ops.sample_gram(features)
    batched_norms = ops.norm_moments(features, batched.shift)
    assert batched.sums.shape == (2, 3, 5, 9)
    assert batched_norms.quartic.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            single = ops.class_moments(features[i, j], labels, 5)
            assert torch.equal(single.counts, batched.counts)
            assert torch.equal(single.gram, batched.gram[i, j])
            assert torch.equal(single.sums, batched.sums[i, j])
            assert torch.equal(ops.sample_gram(features[i, j]).gram, batched_gram.gram[i, j])
            assert torch.equal(ops.norm_moments(features[i, j], single.shift).cubic, batched_norms.cubic[i, j])


def test_strides_do_not_matter() -> None:
    wide, labels = labelled(60, 40)
    for view in (wide[:, ::2], wide.mT.contiguous().mT, wide.flip(0), wide[:, 3:20], wide.expand(2, 60, 40)):
        plain = view.contiguous()
        assert torch.equal(ops.class_moments(view, labels, 5).gram, ops.class_moments(plain, labels, 5).gram)
        assert torch.equal(ops.sample_gram(view).gram, ops.sample_gram(plain).gram)


def test_empty_classes_and_unused_labels() -> None:
    features, labels = labelled(20, 4, classes=3)
    moments = ops.class_moments(features, labels * 2, 7)
    assert moments.counts[1::2].tolist() == [0, 0, 0]
    assert (moments.sums[1::2] == 0).all()


def test_number_of_classes_is_inferred() -> None:
    features, labels = labelled(20, 4)
    assert len(ops.class_moments(features, labels).counts) == int(labels.max()) + 1


@pytest.mark.parametrize("integer", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_label_dtypes(integer: torch.dtype) -> None:
    features, labels = labelled(20, 4)
    assert torch.equal(
        ops.class_moments(features, labels.to(integer), 5).sums, ops.class_moments(features, labels, 5).sums
    )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3), (0, 4, 3)])
def test_empty_input_gives_zeros(shape: tuple[int, ...]) -> None:
    features = torch.empty(shape)
    labels = torch.zeros(shape[-2], dtype=torch.long)
    counts, sums, gram, shift = ops.class_moments(features, labels, 2)
    assert counts.tolist() == [shape[-2], 0]  # whatever the number of feature sets, which share the labels
    for tensor in (sums, gram, shift, ops.sample_gram(features).gram, *ops.norm_moments(features, shift)):
        assert (tensor == 0).all()
    assert gram.shape == (*shape[:-2], shape[-1], shape[-1])


def test_large_common_offset_costs_no_digits() -> None:
    """mean / sd = 1e6 in float64: the sum of squares alone would lose 12 of 16 digits."""
    features, labels = labelled(500, 6, dtype=torch.float64)
    plain, moved = ops.class_moments(features, labels, 5), ops.class_moments(features + 1e6, labels, 5)
    # Moving rounds every entry to eps * 1e6; the rest is the bound of the sums.
    rounding = 4 * EPS * 1e6 * features.abs().sum()
    assert (plain.gram - moved.gram).abs().max() <= rounding
    assert (plain.sums - moved.sums).abs().max() <= rounding


def test_result_does_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            rows = []
            for samples, dim in ((5000, 20), (700, 500), (3000, 64)):
                features, labels = labelled(samples, dim)
                rows += [
                    *ops.class_moments(features, labels, 5),
                    *ops.norm_moments(features, torch.zeros(dim).double()),
                ]
                rows.append(ops.sample_gram(features[:300]).gram)
            results.append(rows)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own, in torch 2.14
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    features, labels = labelled(12, 5, dtype=dtype)
    features.requires_grad_(dtype == torch.float64)
    shift = features.detach().double().mean(0)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # The last check adds up all outputs in place, which fails when the first is an integer tensor and a gradient is
    # wanted; test_gradients_under_compile covers that case.
    class_moments_checks = checks[:3] if features.requires_grad else checks
    torch.library.opcheck(torch.ops.transferops.class_moments, (features, labels, 5), test_utils=class_moments_checks)
    torch.library.opcheck(torch.ops.transferops.sample_gram, (features,))
    torch.library.opcheck(torch.ops.transferops.norm_moments, (features, shift))
    torch.library.opcheck(torch.ops.transferops.class_moments, (features.detach().expand(3, 12, 5), labels, 5))


def test_gradients() -> None:
    """Against finite differences; a batch of two sets, an empty class."""
    features, labels = labelled(6, 3, classes=2, dtype=torch.float64, sets=(2,))
    features.requires_grad_()
    shift = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.class_moments(x, labels, 3)[1:], (features,))
    assert torch.autograd.gradcheck(lambda x: tuple(ops.sample_gram(x)), (features,))
    assert torch.autograd.gradcheck(lambda x, s: tuple(ops.norm_moments(x, s)), (features, shift))


def test_gradient_keeps_the_features_dtype() -> None:
    features, labels = labelled(6, 3)
    features.requires_grad_()
    ops.class_moments(features, labels, 5).gram.sum().backward()
    assert features.grad is not None
    assert features.grad.dtype == torch.float32


def test_compiles_without_graph_break() -> None:
    def total(x: Tensor, y: Tensor) -> Tensor:
        moments = ops.class_moments(x, y, 5)
        return moments.gram.sum() + ops.sample_gram(x).gram.sum() + ops.norm_moments(x, moments.shift).quartic

    features, labels = labelled(30, 7)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(features, labels), total(features, labels))
    assert torch.equal(compiled(features[:11], labels[:11]), total(features[:11], labels[:11]))


def test_gradients_under_compile() -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        moments = ops.class_moments(x, y, 5)
        return moments.gram.square().sum() + moments.sums.square().sum() + moments.shift.sum()

    features, labels = labelled(12, 5, dtype=torch.float64)
    features.requires_grad_()
    (want,) = torch.autograd.grad(loss(features, labels), features)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(features, labels), features)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


def test_export_round_trip() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return ops.class_moments(x, y, 5).gram

    features, labels = labelled(30, 7)
    program = torch.export.export(Module(), (features, labels))
    assert torch.equal(program.module()(features, labels), ops.class_moments(features, labels, 5).gram)


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "reversed", "read-only", "columns"])
def test_numpy_arrays_are_taken(kind: str) -> None:
    features, labels = labelled(20, 4)
    array = features.numpy().astype(kind) if kind.startswith("float") else features.numpy().copy()
    if kind == "reversed":
        array = array[::-1]
    if kind == "columns":
        array = np.asfortranarray(array)
    if kind == "read-only":
        array.flags.writeable = False
    want = ops.class_moments(torch.from_numpy(array.copy()), labels, 5)
    got = ops.class_moments(array, labels.numpy(), 5)
    assert torch.equal(want.gram, got.gram)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_face_runs_the_same_kernels(dtype: torch.dtype) -> None:
    features, labels = labelled(70, 30, dtype=dtype)
    array = features.view(torch.uint16).numpy() if dtype == torch.bfloat16 else features.numpy()
    counts, sums = np.empty(5, np.int64), np.full((5, 30), np.nan)
    gram, shift = np.full((30, 30), np.nan), np.full(30, np.nan)
    _C.class_moments(array, labels.numpy(), counts, sums, gram, shift)
    for got, want in zip((counts, sums, gram, shift), ops.class_moments(features, labels, 5)):
        assert (got == want.numpy()).all()
    samples = np.full((70, 70), np.nan)
    _C.sample_gram(array, samples, shift)
    assert (samples == ops.sample_gram(features).gram.numpy()).all()
    cubic, quartic = np.full(30, np.nan), np.full(1, np.nan)
    _C.norm_moments(array, shift, cubic, quartic)
    want_cubic, want_quartic = ops.norm_moments(features, torch.from_numpy(shift))
    assert (cubic == want_cubic.numpy()).all()
    assert quartic[0] == float(want_quartic)


def test_numpy_face_refuses_wrong_buffers() -> None:
    features, labels = labelled(7, 3)
    counts, sums, gram, shift = np.empty(5, np.int64), np.empty((5, 3)), np.empty((3, 3)), np.empty(3)
    with pytest.raises(ValueError, match="gram: expected 9 elements, got 4"):
        _C.class_moments(features.numpy(), labels.numpy(), counts, sums, gram[:2, :2].copy(), shift)
    with pytest.raises(ValueError, match=r"labels: expected values in 0\.\.4"):
        _C.class_moments(features.numpy(), labels.numpy() + 5, counts, sums, gram, shift)
    with pytest.raises(ValueError, match="features: expected float32, float64, float16, or bfloat16 as uint16"):
        _C.sample_gram(np.zeros((3, 3), np.int32), gram, shift)
    with pytest.raises(TypeError):  # an output of another dtype would be a copy, and the result lost
        _C.sample_gram(features.numpy(), np.empty((7, 7), np.float32), shift)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("samples", "dim"), [*SHAPES, (5000, 300), (100_000, 64)])
def test_gpu_agrees_with_cpu(samples: int, dim: int, dtype: torch.dtype) -> None:
    features, labels = labelled(samples, dim, dtype=dtype, offset=3.0)
    x = features.double()
    spread = x.abs().amax(0)
    want, got = ops.class_moments(features, labels, 6), ops.class_moments(features.cuda(), labels.cuda(), 6)
    centred = x - want.shift
    assert torch.equal(got.counts.cpu(), want.counts)
    assert ((got.gram.cpu() - want.gram).abs() <= gram_bound(centred, centred, spread)).all()
    assert ((got.sums.cpu() - want.sums).abs() <= 4 * (samples + 3) ** 2 * EPS * spread).all()
    norms, gpu_norms = (
        ops.norm_moments(features, want.shift),
        ops.norm_moments(features.cuda(), want.shift.cuda()),
    )
    bound = 4 * (samples + dim + 4) * EPS
    assert abs(gpu_norms.quartic.cpu() - norms.quartic) <= bound * norms.quartic
    assert (gpu_norms.cubic.cpu() - norms.cubic).abs().max() <= bound * (centred.norm(dim=1) ** 3).sum()
    if samples <= 2000:
        want_gram, got_gram = ops.sample_gram(features).gram, ops.sample_gram(features.cuda()).gram
        spread = torch.full((samples,), float(x.abs().max())) * max(samples / dim, 1)
        assert ((got_gram.cpu() - want_gram).abs() <= gram_bound(centred.mT, centred.mT, spread)).all()


NARROW = ("float32", "tf32", "bfloat16")


@pytest.mark.parametrize("precision", NARROW)
def test_precision_is_the_least_and_a_cpu_takes_float64(precision: Precision) -> None:
    features, labels = labelled(30, 7)
    want, got = ops.class_moments(features, labels, 5), ops.class_moments(features, labels, 5, precision=precision)
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    x = features.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.class_moments(x, labels, 5, precision=precision).gram, x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize(("samples", "dim"), [(1, 1), (65, 33), (5000, 300)])
def test_gpu_precision(samples: int, dim: int, precision: Precision, dtype: torch.dtype) -> None:
    features, labels = labelled(samples, dim, dtype=dtype, offset=100.0)
    want, got = (
        ops.class_moments(x, y, 6, precision=precision)
        for x, y in ((features, labels), (features.cuda(), labels.cuda()))
    )
    bound = {"float32": 2.0**-16, "tf32": 2.0**-9, "bfloat16": 2.0**-6}[precision]
    centred = (features.double() - want.shift).abs()
    rounding = 1e-12 * (features.double().abs().mT @ features.double().abs())  # of the two shifts
    assert ((got.gram.cpu() - want.gram).abs() <= bound * (centred.mT @ centred) + rounding).all()
    assert torch.equal(got.gram, got.gram.mT)
    again = ops.class_moments(features.cuda(), labels.cuda(), 6, precision=precision)
    assert all(torch.equal(a, b) for a, b in zip(got, again))


@pytest.mark.gpu
def test_gpu_repeats_bit_for_bit_and_follows_streams() -> None:
    features, labels = (t.cuda() for t in labelled(20_000, 130))
    first = ops.class_moments(features, labels, 5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = ops.class_moments(features, labels, 5)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3)])
def test_gpu_empty_input(shape: tuple[int, ...]) -> None:
    features = torch.empty(shape, device="cuda")
    labels = torch.zeros(shape[-2], dtype=torch.long, device="cuda")
    moments = ops.class_moments(features, labels, 2)
    assert all((tensor == 0).all() for tensor in moments[1:])
    assert (ops.sample_gram(features).gram == 0).all()


@pytest.mark.gpu
def test_gpu_strides_sets_and_bad_labels() -> None:
    features, labels = labelled(60, 40, sets=(3,))
    for view in (features, features[..., ::2], features.mT.contiguous().mT, features[..., 3:20]):
        want, got = ops.class_moments(view, labels, 5), ops.class_moments(view.cuda(), labels.cuda(), 5)
        assert (want.gram - got.gram.cpu()).abs().max() <= 1e-12 * want.gram.abs().max()
    with pytest.raises(ValueError, match="labels: expected 4 classes"):
        ops.class_moments(features.cuda(), labels.cuda(), 4)
