"""The prediction op against a float64 reference, with error bounds from the arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from transferops import _C, ops
from transferops.ops.prediction import composed_prediction

EPS = torch.finfo(torch.float64).eps
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIZES = [(1, 1, 1), (7, 3, 2), (40, 16, 5), (61, 33, 4), (1100, 17, 2), (90, 2070, 30)]


def problem(rows: int, columns: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    probabilities = (2 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)).softmax(1)
    return probabilities.to(dtype), torch.randint(classes, (rows,), generator=generator)


def reference(probabilities: Tensor, labels: Tensor, classes: int) -> ops.EmpiricalPrediction:
    rows = probabilities.double()
    joint = torch.stack([rows[labels == label].sum(0) for label in range(classes)])
    mass = joint.sum(0)
    conditional = torch.where(mass > 0, joint / mass, torch.zeros_like(joint))
    lowest = rows.min(1).values if rows.numel() else rows.new_full((len(rows),), torch.inf)
    return ops.EmpiricalPrediction((conditional[labels] * rows).sum(1), mass, rows.sum(1), lowest)


def check(got: ops.EmpiricalPrediction, want: ops.EmpiricalPrediction, rows: int, columns: int) -> None:
    """Sums of n non-negative terms are within n eps of exact; a prediction divides two of them and sums again."""
    assert ((got.mass - want.mass).abs() <= 2 * rows * EPS * want.mass).all()
    assert ((got.totals - want.totals).abs() <= 2 * columns * EPS * want.totals).all()
    assert ((got.prediction - want.prediction).abs() <= 2 * (2 * rows + columns + 4) * EPS * want.prediction).all()
    assert torch.equal(got.lowest, want.lowest)
    assert all(value.dtype == torch.float64 for value in got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "classes"), SIZES)
def test_matches_reference(rows: int, columns: int, classes: int, dtype: torch.dtype) -> None:
    probabilities, labels = problem(rows, columns, classes, dtype)
    want = reference(probabilities, labels, classes)
    check(ops.empirical_prediction(probabilities, labels, classes), want, rows, columns)
    composed = ops.EmpiricalPrediction(*composed_prediction(probabilities, labels, classes))
    check(composed, want, rows, columns)


def test_strides_and_integers_of_any_width() -> None:
    probabilities, labels = problem(23, 19, 3)
    want = ops.empirical_prediction(probabilities, labels)
    wide = torch.stack([probabilities] * 2, 2)[..., 0]
    for view in (probabilities.T.contiguous().T, wide, torch.cat([probabilities] * 2, 1)[:, :19]):
        for names in (labels.int(), labels.to(torch.uint8), torch.stack([labels] * 2, 1)[:, 0]):
            assert all(torch.equal(a, b) for a, b in zip(ops.empirical_prediction(view, names), want))


def test_classes_without_samples_take_no_room() -> None:
    generator = torch.Generator().manual_seed(0)
    p, labels = torch.rand(9, 4, generator=generator), torch.arange(9) % 3
    for found in (
        ops.empirical_prediction(p, labels * 2**60),
        ops.empirical_prediction(p, labels, 2**40),
    ):
        for got, expected in zip(found, ops.empirical_prediction(p, labels)):
            assert torch.equal(got, expected)


def test_columns_without_mass_take_no_part() -> None:
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]])
    found = ops.empirical_prediction(probabilities, torch.tensor([0, 1]), 4)
    assert torch.equal(found.mass, torch.tensor([0.75, 1.25, 0.0]).double())
    want = torch.tensor([0.5 * 0.5 / 0.75 + 0.5 * 0.5 / 1.25, 0.25 * 0.25 / 0.75 + 0.75 * 0.75 / 1.25]).double()
    assert (found.prediction - want).abs().max() <= 1e-7  # the expression above is float32


def test_what_is_no_probability_shows() -> None:
    values = torch.full((4, 40), 0.025)
    values[1, 39], values[2, 3], values[3, 17] = -0.5, float("nan"), float("inf")
    found = ops.empirical_prediction(values, torch.zeros(4, dtype=torch.long))
    assert found.lowest[1] == -0.5
    assert torch.isnan(found.totals[2])
    assert torch.isinf(found.totals[3])
    assert found.totals[0].sub(1).abs() < 1e-6


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    labels = torch.zeros(shape[0], dtype=torch.long)
    for found in (
        ops.empirical_prediction(torch.empty(shape), labels, 2),
        ops.EmpiricalPrediction(*composed_prediction(torch.empty(shape), labels, 2)),
    ):
        assert torch.equal(found.prediction, torch.zeros(shape[0]).double())
        assert torch.equal(found.totals, torch.zeros(shape[0]).double())
        assert torch.equal(found.mass, torch.zeros(shape[1]).double())
        assert torch.equal(found.lowest, torch.full((shape[0],), torch.inf).double())


def test_results_do_not_depend_on_threads() -> None:
    """Classes of more rows than one task takes, and more columns than are added at once."""
    probabilities, labels = problem(1100, 2070, 2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.empirical_prediction(probabilities, labels))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_opcheck_and_constants() -> None:
    probabilities, labels = problem(9, 5, 3)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.transferops.empirical_prediction, (probabilities, labels, 3), test_utils=tests)
    assert not ops.empirical_prediction(probabilities.requires_grad_(), labels).prediction.requires_grad


def test_numpy_face() -> None:
    probabilities, labels = problem(30, 21, 4, torch.bfloat16)
    want = ops.empirical_prediction(probabilities, labels, 4)
    outputs = [np.empty(size) for size in (30, 21, 30, 30)]
    bits = probabilities.view(torch.uint16).numpy()
    _C.empirical_prediction(bits, labels.numpy(), 4, *outputs)
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(outputs, want))
    with pytest.raises(ValueError, match=r"labels: expected values in 0\.\.2"):
        _C.empirical_prediction(bits, labels.numpy(), 3, *outputs)
    with pytest.raises(ValueError, match="mass: expected 21 elements, got 30"):
        _C.empirical_prediction(bits, labels.numpy(), 4, outputs[0], outputs[2], outputs[2], outputs[3])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_agrees_with_cpu(dtype: torch.dtype) -> None:
    for rows, columns, classes in SIZES:
        probabilities, labels = problem(rows, columns, classes, dtype)
        found = ops.empirical_prediction(probabilities.cuda(), labels.cuda(), classes)
        check(
            ops.EmpiricalPrediction(*(x.cpu() for x in found)), reference(probabilities, labels, classes), rows, columns
        )
