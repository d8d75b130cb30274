"""The gradients ops against float64 references, with error bounds from the arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from transferops import _C, ops

EPS = torch.finfo(torch.float64).eps
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
STATES = [torch.float32, torch.float64]
SHAPES: list[tuple[int, ...]] = [(3, 4), (7,), (), (0, 5), (2, 3, 5, 5), (70001,), (1,), (257, 3)]


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + offset).to(dtype)


def lists(count: int, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> list[list[Tensor]]:
    return [[random(s, 100 * k + i, dtype, offset) for i, s in enumerate(SHAPES)] for k in range(count)]


def moments_like(tensors: list[Tensor], dtype: torch.dtype, squares: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Not initialised: the first update has to ignore what they hold."""
    means, deviations = ([torch.full(t.shape, float("nan"), dtype=dtype) for t in tensors] for _ in range(2))
    return means, deviations if squares else []


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten().double() for t in tensors])


# ---- gradient_expectation_ ----


@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expectation_matches_reference(dtype: torch.dtype, state: torch.dtype, offset: float) -> None:
    """Each step of Welford's recurrence rounds at most six times: in the value, the difference, the share, two
    products and the sum; none of the terms is larger than twice the gradients, or their square."""
    gradients = lists(5, dtype, offset)
    means, squares = moments_like(gradients[0], state)
    for count, sample in enumerate(gradients):
        assert ops.gradient_expectation_(means, squares, sample, count) is None
    rows = torch.stack([flat(sample) for sample in gradients])
    eps, size = torch.finfo(state).eps, rows.abs().amax(0)
    steps = len(gradients)
    assert ((flat(means) - rows.mean(0)).abs() <= 6 * steps * eps * size).all()
    want, deviation = (rows - rows.mean(0)).square().sum(0), (rows - rows.mean(0)).abs().amax(0)
    bound = 12 * steps**2 * eps * size * (deviation + steps * eps * size)
    assert ((flat(squares) - want).abs() <= bound + 12 * steps * eps * want).all()
    assert all(t.dtype == state for t in (*means, *squares))


@pytest.mark.parametrize("squares", [True, False])
def test_stacked_gradients_are_those_one_by_one(squares: bool) -> None:
    gradients = lists(5)
    single, stacked = (moments_like(gradients[0], torch.float32, squares) for _ in range(2))
    for count, sample in enumerate(gradients):
        ops.gradient_expectation_(single[0], single[1] or None, sample, count)
    for begin, end in ((0, 2), (2, 5), (5, 5)):
        part = [torch.stack([sample[i] for sample in gradients])[begin:end] for i in range(len(SHAPES))]
        ops.gradient_expectation_(stacked[0], stacked[1] or None, part, begin, stacked=True)
    assert all(torch.equal(a, b) for a, b in zip([*single[0], *single[1]], [*stacked[0], *stacked[1]]))


def test_expectation_of_any_layout() -> None:
    """Channels last as it lies, anything else through copies, written back in place."""
    shape = (4, 6, 5, 3)
    sample = [random(shape, n) for n in range(3)]
    plain = [torch.zeros(shape), torch.zeros(shape)]
    for n, gradient in enumerate(sample):
        ops.gradient_expectation_(plain[:1], plain[1:], [gradient], n)

    def last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def spread(x: Tensor) -> Tensor:
        return torch.zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)

    def turned(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT

    layouts = (torch.Tensor.contiguous, last, spread, turned)
    for of_mean in layouts:
        for of_gradient in layouts:
            means, squares = [of_mean(torch.zeros(shape))], [of_gradient(torch.zeros(shape))]
            for n, gradient in enumerate(sample):
                ops.gradient_expectation_(means, squares, [of_gradient(gradient)], n)
            assert torch.equal(means[0], plain[0])
            assert torch.equal(squares[0], plain[1])


def test_tensors_of_several_dtypes_in_one_list() -> None:
    sample = [random((5, 3), 0), random((9,), 1, torch.bfloat16), random((4,), 2, torch.float64)]
    means = [torch.zeros(5, 3), torch.zeros(9), torch.zeros(4, dtype=torch.float64)]
    ops.gradient_expectation_(means, None, sample, 0)
    assert all(torch.equal(mean, x.to(mean.dtype)) for mean, x in zip(means, sample))


def test_a_backward_pass_that_has_saved_the_moments_fails() -> None:
    weight, mean, square = torch.ones(3, requires_grad=True), torch.ones(3), torch.ones(3)
    for changed in (mean, square):
        for update in (
            lambda: ops.gradient_expectation_([mean], [square], [torch.ones(3)], 0),
            lambda: ops.gradient_expectation_gram_([[mean]], [[square]], [[torch.ones(3)]], [0]),
        ):
            loss = (weight * changed).sum()
            update()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_empty_lists_and_gradients_that_ask_for_gradients() -> None:
    ops.gradient_expectation_([], [], [], 3)
    means = [torch.zeros(3)]
    ops.gradient_expectation_(means, None, [torch.ones(3, requires_grad=True)], 0)
    assert not means[0].requires_grad
    assert torch.equal(means[0], torch.ones(3))


# ---- gradient_expectation_gram_ ----


@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize(("count", "updated"), [(1, 1), (2, 1), (3, 3), (9, 8)])
@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expectation_and_gram_are_the_two_ops_one_after_the_other(
    dtype: torch.dtype, state: torch.dtype, count: int, updated: int, squares: bool
) -> None:
    """To the last bit; a list without gradients is read and not changed."""
    samples = [lists(count, dtype, offset) for offset in (0.0, 1.0)]
    want, got = ([moments_like(x, state, squares) for x in samples[0]] for _ in range(2))
    for k in range(updated, count):
        for moments in (want, got):
            moments[k][0][:] = [x.to(state) for x in samples[0][k]]
    for step, sample in enumerate(samples):
        for k in range(updated):
            ops.gradient_expectation_(want[k][0], want[k][1] or None, sample[k], step)
        gram = ops.gradient_expectation_gram_(
            [means for means, _ in got],
            [deviations for _, deviations in got[:updated]] if squares else None,
            sample[:updated],
            [step] * updated,
        )
        assert torch.equal(gram, ops.gradient_gram([means for means, _ in want]))
        for k, (one, other) in enumerate(zip(want, got)):
            assert all(torch.equal(a, b) for a, b in zip(one[0], other[0]))
            if k < updated:
                assert all(torch.equal(a, b) for a, b in zip(one[1], other[1]))


def test_expectation_and_gram_of_stacked_gradients_and_counts() -> None:
    """Each list has its own count; tensors of any layout are written back in place."""
    shape = (4, 6, 5, 3)
    stacks = [torch.stack([random(shape, 10 * k + n) for n in range(3)]) for k in range(2)]
    started = [random(shape, 7), random(shape, 8)]
    want = [x.clone() for x in started]
    for k, (mean, stack) in enumerate(zip(want, stacks)):
        ops.gradient_expectation_([mean], None, [stack], k, stacked=True)
    gram = ops.gradient_gram([[mean] for mean in want])
    layouts = (
        lambda x: x.clone(),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x),
    )
    for of_first in layouts:
        for of_second in layouts:
            means = [of_first(started[0]), of_second(started[1])]
            found = ops.gradient_expectation_gram_(
                [[x] for x in means], None, [[x] for x in stacks], (0, 1), stacked=True
            )
            assert all(torch.equal(a, b) for a, b in zip(means, want))
            assert (found - gram).abs().max() <= 2 * means[0].numel() * EPS * gram.diagonal().max()


def test_moments_lie_apart_or_are_refused() -> None:
    """Neighbours in memory, columns of a matrix and odd strides share nothing; one element in common is refused."""
    room, table, line = torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.float64), torch.zeros(20)
    apart = (
        [room[:2], room[2:]],
        [table[:, ::2], table[:, 1::2]],
        [table[:, :3], table[:, 3:]],
        [line.as_strided((2, 2), (3, 2)), line.as_strided((2, 2), (3, 2), 4)],
        [room[:0], room[:0]],
    )
    for means in apart:
        gradients = [random(x.shape, i) for i, x in enumerate(means)]
        ops.gradient_expectation_(means, None, gradients, 0)
        assert all(torch.equal(a.float(), b) for a, b in zip(means, gradients))
    together = (
        [room[:3], room[2:]],
        [table[:, :3], table[:, 2:5]],
        [table[:, ::2], table[1:2, 2:3]],
        [room[0].unfold(0, 3, 1)],
        [line.as_strided((2, 2), (3, 2)), line.as_strided((2, 2), (3, 2), 3)],
        [table.view(torch.float32)[0, :3], table[0, 1:2]],
    )
    for means in together:
        kept = [x.clone() for x in means]
        with pytest.raises(RuntimeError, match=r"^means: expected memory of its own for every element at index"):
            ops.gradient_expectation_(means, None, [torch.ones(x.shape) for x in means], 0)
        assert all(torch.equal(a, b) for a, b in zip(means, kept))


def test_means_that_are_only_compared_may_share_memory() -> None:
    mean, other = random((4, 3), 0), random((3,), 1).expand(4, 3)
    gram = ops.gradient_expectation_gram_([[mean], [other], [other]], None, [[random((4, 3), 2)]], [0])
    assert torch.equal(gram, ops.gradient_gram([[mean], [other], [other]]))


# ---- gradient_gram ----


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_matches_reference(dtype: torch.dtype, count: int) -> None:
    gradients = lists(count, dtype)
    rows = torch.stack([flat(sample) for sample in gradients])
    gram = ops.gradient_gram(gradients)
    assert ((gram - rows @ rows.T).abs() <= 2 * rows.shape[1] * EPS * (rows.abs() @ rows.abs().T)).all()
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)


def test_gram_of_any_layout_and_dtype() -> None:
    one, other = random((4, 6, 5, 3), 0), random((4, 6, 5, 3), 1)
    last = other.contiguous(memory_format=torch.channels_last)
    want = float((one.double() * other.double()).sum())
    bound = 2 * one.numel() * EPS * float((one.double() * other.double()).abs().sum())
    for left in (one, one.contiguous(memory_format=torch.channels_last), one.mT.contiguous().mT, one.double()):
        for right in (other, last):
            assert abs(float(ops.gradient_gram([[left], [right]])[0, 1]) - want) <= bound


def test_equal_lists_have_equal_products() -> None:
    """To the last bit, wherever they stand: gaps between equal expectations are exactly zero."""
    one, other = lists(2)
    gram = ops.gradient_gram([one, one, other, one, one])
    equal = torch.tensor([0, 1, 3, 4])
    assert (gram[equal][:, equal] == gram[0, 0]).all()
    assert (gram[equal, 2] == gram[0, 2]).all()


def test_gram_of_nothing_is_zero() -> None:
    assert torch.equal(ops.gradient_gram([[torch.empty(0, 3)], [torch.empty(0, 3)]]), torch.zeros(2, 2).double())


# ---- weighted_gram ----


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(("count", "size"), [(0, 4), (1, 1), (2, 300), (3, 0), (5, 20001), (9, 257)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_gram_matches_reference(dtype: torch.dtype, count: int, size: int, with_base: bool) -> None:
    directions, weights = random((count, size), 0, dtype), random((size,), 1, dtype)
    base = random((size,), 2, dtype, 0.5) if with_base else None
    rows = directions.double() - (base.double() if base is not None else 0)
    want = (rows * weights.double()) @ rows.T
    bound = 2 * (size + 6) * EPS * ((rows.abs() * weights.double().abs()) @ rows.abs().T)
    gram = ops.weighted_gram(directions, weights, base)
    assert ((gram - want).abs() <= bound).all()
    assert torch.equal(gram, gram.T)


def test_differences_from_the_base_lose_nothing() -> None:
    """Directions that differ from the base by a millionth: the difference is exact, that of the Gram would not be."""
    base = random((1000,), 0, offset=3.0)
    directions = base + 1e-6 * random((2, 1000), 1)
    rows = directions.double() - base.double()
    gram = ops.weighted_gram(directions, torch.ones(1000), base)
    assert ((gram - rows @ rows.T).abs() <= 2 * 1006 * EPS * (rows.abs() @ rows.abs().T)).all()


def test_weighted_gram_of_any_layout_and_dtype() -> None:
    directions, weights = random((3, 40), 0), random((40,), 1).abs()
    want = ops.weighted_gram(directions, weights)
    for view in (directions.T.contiguous().T, torch.stack([directions] * 2, 2)[..., 0]):
        assert torch.equal(ops.weighted_gram(view, torch.stack([weights] * 2, 1)[:, 0]), want)
    assert torch.equal(ops.weighted_gram(directions, weights.double()), want)
    assert torch.equal(ops.weighted_gram(directions, weights, torch.zeros(40, dtype=torch.float64)), want)
    assert torch.equal(ops.weighted_gram(directions.numpy(), weights.numpy()), want)


# ---- gradient_fisher_gram ----


@pytest.mark.parametrize(
    ("samples", "size", "count"), [(1, 1, 1), (3, 300, 2), (17, 1030, 9), (33, 20001, 5), (4, 7, 0)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fisher_gram_matches_reference(dtype: torch.dtype, samples: int, size: int, count: int) -> None:
    gradients, directions = random((samples, size), 0, dtype), random((count, size), 1, dtype)
    gram, diagonal, norms = ops.gradient_fisher_gram(gradients, directions)
    rows, moves = gradients.double(), directions.double()
    products, absolute = rows @ moves.T, rows.abs() @ moves.abs().T
    bound = 2 * (2 * size + samples + 4) * EPS * (absolute.T @ absolute) / samples
    assert ((gram - products.T @ products / samples).abs() <= bound).all()
    assert ((norms - rows.square().sum(1)).abs() <= 2 * size * EPS * norms).all()
    want = rows.square().mean(0)
    assert diagonal.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((diagonal - want).abs() <= ((samples + 2) * EPS + torch.finfo(diagonal.dtype).eps) * want).all()


def test_fisher_gram_without_samples_or_columns_is_zero() -> None:
    for shape in ((0, 5), (3, 0)):
        gram, diagonal, norms = ops.gradient_fisher_gram(torch.empty(shape), torch.ones(2, shape[1]))
        assert torch.equal(gram, torch.zeros(2, 2).double())
        assert diagonal.shape == (shape[1],)
        assert (diagonal == 0).all()
        assert torch.equal(norms, torch.zeros(shape[0]).double())


def test_fisher_gram_of_any_layout() -> None:
    gradients, directions = random((6, 40), 0), random((3, 40), 1)
    want = ops.gradient_fisher_gram(gradients, directions)
    for view in (gradients.T.contiguous().T, torch.cat([gradients, gradients], 1)[:, :40]):
        got = ops.gradient_fisher_gram(view, directions.double().T.contiguous().T)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


# ---- all of them ----


def call_all(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    gradients = lists(3, dtype)
    means, squares = moments_like(gradients[0], torch.float32)
    ops.gradient_expectation_(means, squares, [torch.stack([x, x + 1]) for x in gradients[0]], 0, stacked=True)
    rows = torch.stack([flat(sample) for sample in gradients]).to(dtype)
    fisher = ops.gradient_fisher_gram(rows, rows[:2])
    both = [[x.clone() for x in means], [x + 1 for x in means]]
    fused = ops.gradient_expectation_gram_(both, None, gradients[:2], (2, 3))
    return [
        *means,
        *squares,
        *both[0],
        *both[1],
        fused,
        ops.gradient_gram(gradients),
        ops.weighted_gram(rows, rows[0], rows[1]),
        *fisher,
    ]


def test_results_do_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call_all())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own, in torch 2.14
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    one, other = [random((3, 2), 0, dtype), random((5,), 1, dtype)], [random((3, 2), 2, dtype), random((5,), 3, dtype)]
    rows, weights, base = random((4, 6), 4, dtype), random((6,), 5, dtype), random((6,), 6, dtype)
    for tensor in (*one, *other, rows, weights, base):
        tensor.requires_grad_(dtype == torch.float64)
    namespace = torch.ops.transferops
    torch.library.opcheck(namespace.gradient_gram, ([*one, *other], 2))
    torch.library.opcheck(namespace.weighted_gram, (rows, weights, base))
    torch.library.opcheck(namespace.weighted_gram, (rows, weights, None))
    torch.library.opcheck(namespace.gradient_fisher_gram, (rows, rows[:2].detach()))
    plain = [x.detach() for x in one]
    for squares in ([], [torch.zeros(3, 2), torch.zeros(5)]):
        means = [torch.zeros(3, 2), torch.zeros(5)]
        torch.library.opcheck(namespace.gradient_expectation_, (means, squares, plain, False, 0))
        pair = [torch.ones(3, 2), torch.ones(5), torch.zeros(3, 2), torch.zeros(5)]
        torch.library.opcheck(namespace.gradient_expectation_gram_, (pair, squares, plain, False, [1], 2))
    stacked = [x.expand(3, *x.shape) for x in plain]
    torch.library.opcheck(namespace.gradient_expectation_, ([torch.zeros(3, 2), torch.zeros(5)], [], stacked, True, 2))


def test_gradients() -> None:
    """Against finite differences."""
    one, other = ([random((3, 2), s, torch.float64), random((4,), s + 1, torch.float64)] for s in (0, 2))
    rows, moves = random((4, 3), 4, torch.float64), random((2, 3), 5, torch.float64)
    weights, base = random((3,), 6, torch.float64), random((3,), 7, torch.float64)
    for tensor in (*one, *other, rows, moves, weights, base):
        tensor.requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda a, b, c, d: ops.gradient_gram([[a, b], [c, d]]), (*one, *other))
    assert check(ops.weighted_gram, (rows, weights, base))
    assert check(ops.weighted_gram, (rows, weights))
    assert check(lambda x, d: tuple(ops.gradient_fisher_gram(x, d)), (rows, moves))


def test_gradient_keeps_the_dtype() -> None:
    tensor = random((3, 2), 0).requires_grad_()
    ops.gradient_gram([[tensor], [tensor.detach() + 1]]).sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.dtype == torch.float32


def test_compiles_without_graph_break() -> None:
    def total(one: list[Tensor], other: list[Tensor]) -> tuple[Tensor, ...]:
        means = [torch.zeros_like(x) for x in one]
        squares = [torch.zeros_like(x) for x in one]
        ops.gradient_expectation_(means, squares, one, 0)
        ops.gradient_expectation_(means, squares, other, 1)
        both = [[x.clone() for x in means], [x.clone() for x in squares]]
        fused = ops.gradient_expectation_gram_(both, None, [one], [2])
        fisher = ops.gradient_fisher_gram(one[0], other[0])
        return (
            ops.gradient_gram([means, other]),
            fused,
            both[0][0],
            squares[0],
            ops.weighted_gram(one[0], other[0][0], one[0][0]),
            fisher.gram,
        )

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7):
        one, other = ([random((rows, 5), s), random((9,), s + 1)] for s in (0, 2))
        assert all(torch.equal(a, b) for a, b in zip(compiled(one, other), total(one, other)))


def test_numpy_face() -> None:
    """The same kernels over NumPy arrays; bfloat16 comes as its bits."""
    gradients = lists(2)
    kept = [i for i, shape in enumerate(SHAPES) if len(shape) > 0]
    arrays = [[sample[i].numpy() for i in kept] for sample in gradients]
    means, squares = ([np.full_like(x, np.nan) for x in arrays[0]] for _ in range(2))
    for count, sample in enumerate(arrays):
        _C.gradient_expectation(means, squares, sample, 1, count)
    want, deviations = moments_like(gradients[0], torch.float32)
    for count, sample in enumerate(gradients):
        ops.gradient_expectation_(want, deviations, sample, count)
    for place, i in enumerate(kept):
        assert np.array_equal(means[place], want[i].numpy())
        assert np.array_equal(squares[place], deviations[i].numpy())
    gram = np.empty((2, 2))
    pair = [[x.numpy().copy() for x in (want[i] for i in kept)], [x.copy() for x in arrays[1]]]
    _C.gradient_expectation_gram([*pair[0], *pair[1]], [], arrays[0], 1, [2], 2, gram)
    moved = [[want[i].clone() for i in kept], [gradients[1][i] for i in kept]]
    fused = ops.gradient_expectation_gram_(moved, None, [[gradients[0][i] for i in kept]], [2])
    assert np.array_equal(gram, fused.numpy())
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(pair[0], moved[0]))
    _C.gradient_gram([*arrays[0], *arrays[1]], 2, gram)
    assert np.array_equal(gram, ops.gradient_gram([[sample[i] for i in kept] for sample in gradients]).numpy())

    rows, weights = random((3, 50), 0, torch.bfloat16), random((50,), 1)
    bits = rows.view(torch.uint16).numpy()
    gram, norms, diagonal = np.empty((3, 3)), np.empty(3), np.empty(50, np.float32)
    _C.weighted_gram(bits, weights.numpy(), bits[0].copy(), gram)
    assert np.array_equal(gram, ops.weighted_gram(rows, weights, rows[0]).numpy())
    _C.gradient_fisher_gram(bits, rows.float().numpy(), gram, diagonal, norms)
    fisher = ops.gradient_fisher_gram(rows, rows)
    for got, expected in zip((gram, diagonal, norms), fisher):
        assert np.array_equal(got, expected.numpy())
    with pytest.raises(ValueError, match="gram: expected 9 elements, got 4"):
        _C.weighted_gram(bits, weights.numpy(), None, np.empty((2, 2)))
    with pytest.raises(ValueError, match="means: expected a contiguous array"):
        _C.gradient_expectation([np.zeros((4, 4))[:, ::2]], [], [np.zeros((4, 2))], 1, 0)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_agrees_with_cpu(dtype: torch.dtype) -> None:
    gradients = lists(19, dtype)
    on_gpu = [[x.cuda() for x in sample] for sample in gradients]
    for state in STATES:
        for squares in (True, False):
            cpu = moments_like(gradients[0], state, squares)
            gpu = tuple([x.cuda() for x in tensors] for tensors in cpu)
            for count, (sample, moved) in enumerate(zip(gradients[:4], on_gpu)):
                ops.gradient_expectation_(cpu[0], cpu[1] or None, sample, count)
                ops.gradient_expectation_(gpu[0], gpu[1] or None, moved, count)
            for want, got in zip(cpu, gpu):
                assert all(
                    torch.allclose(a, b.cpu(), rtol=0, atol=200 * torch.finfo(state).eps) for a, b in zip(want, got)
                )
    for count in (2, 9):
        cpu_lists, gpu_lists = ([moments_like(x, torch.float32)[0] for x in gradients[:count]] for _ in range(2))
        gpu_lists = [[x.cuda() for x in tensors] for tensors in gpu_lists]
        want = ops.gradient_expectation_gram_(cpu_lists, None, gradients[:count], [0] * count)
        got = ops.gradient_expectation_gram_(gpu_lists, None, on_gpu[:count], [0] * count).cpu()
        assert (want - got).abs().max() <= 1e-12 * want.diagonal().max()
    for count in (1, 2, 4, 5, 8, 9, 19):
        want, got = ops.gradient_gram(gradients[:count]), ops.gradient_gram(on_gpu[:count]).cpu()
        assert (want - got).abs().max() <= 1e-12 * want.diagonal().max()
        assert torch.equal(got, got.T)
    rows = torch.stack([flat(sample) for sample in gradients]).to(dtype)
    for view in (rows, rows[:, 1:], rows[:, :33]):
        weights, base = view[1].abs(), view[2]
        for count in (1, 4, 7, 12):
            want = ops.weighted_gram(view[:count], weights, base)
            got = ops.weighted_gram(view[:count].cuda(), weights.cuda(), base.cuda()).cpu()
            assert (want - got).abs().max() <= 1e-12 * want.diagonal().max()
            fisher, moved = (
                ops.gradient_fisher_gram(view, view[:count]),
                ops.gradient_fisher_gram(view.cuda(), view[:count].cuda()),
            )
            for want, got in zip(fisher, moved):
                tolerance = 1e-6 if want.dtype == torch.float32 else 1e-12
                assert (want - got.cpu()).abs().max() <= tolerance * want.abs().max()


@pytest.mark.gpu
def test_gpu_long_lists_and_repeats() -> None:
    """More tensors than one launch takes."""
    tensors = [random((n % 7, 5), n).cuda() for n in range(1000)]
    other = [x + 1 for x in tensors]
    means = [torch.zeros_like(x) for x in tensors]
    ops.gradient_expectation_(means, None, tensors, 0)
    assert all(torch.equal(a, b) for a, b in zip(means, tensors))
    first = ops.gradient_gram([tensors, other])
    assert torch.equal(first, ops.gradient_gram([tensors, other]))
    want = ops.gradient_gram([[x.cpu() for x in tensors], [x.cpu() for x in other]])
    assert (want - first.cpu()).abs().max() <= 1e-12 * want.max()


@pytest.mark.gpu
def test_gpu_empty() -> None:
    empty = torch.empty(0, 3, device="cuda")
    assert (ops.gradient_gram([[empty], [empty]]) == 0).all()
    assert (ops.weighted_gram(empty.T, empty[:, 0]) == 0).all()
    for tensor in ops.gradient_fisher_gram(empty, torch.ones(2, 3, device="cuda")):
        assert (tensor == 0).all()
