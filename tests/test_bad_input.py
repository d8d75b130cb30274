"""Malformed calls of the ops and scores, each with its exact message. (Other parts keep tables in their own tests.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from transferops import ops, show_config
from transferops._extension import check_device
from transferops.scores import FeatureMoments, HScore, MomentsAccumulator, h_score

X = torch.arange(12.0).reshape(4, 3)
Y = torch.tensor([0, 1, 0, 1])
NAN = X.clone()
NAN[2, 1] = float("nan")
INF = X.clone()
INF[0, 2] = -float("inf")
HUGE = X.double() * 1e200
META = torch.empty(4, 3, device="meta")

DEVICES = "a CPU tensor" if show_config()["cuda_built"] is None else "a CPU or CUDA tensor"
FLOATING = "expected float32, float64, float16 or bfloat16"
ARRAY = "expected a torch.Tensor, NumPy array or DLPack array"

CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # class_moments
    "features list": (lambda: ops.class_moments([[1.0]], Y), TypeError, f"features: {ARRAY}, got list"),
    "features None": (lambda: ops.class_moments(None, Y), TypeError, f"features: {ARRAY}, got None"),
    "features of strings": (
        lambda: ops.class_moments(np.array([["a"]]), Y),
        TypeError,
        f"features: {ARRAY}, got ndarray (can't convert np.ndarray of type numpy.str_. The only supported types are: "
        "float64, float32, float16, complex64, complex128, int64, int32, int16, int8, uint64, uint32, uint16, uint8, "
        "and bool.)",
    ),
    "features int": (
        lambda: ops.class_moments(X.int(), Y),
        TypeError,
        f"features: {FLOATING}, got a int32 tensor of shape [4, 3] on cpu",
    ),
    "features complex": (
        lambda: ops.class_moments(X.to(torch.complex64), Y),
        TypeError,
        f"features: {FLOATING}, got a complex64 tensor of shape [4, 3] on cpu",
    ),
    "features 1-d": (
        lambda: ops.class_moments(X[0], Y),
        ValueError,
        "features: expected shape [..., N, D], got a float32 tensor of shape [3] on cpu",
    ),
    "features nan": (
        lambda: ops.class_moments(NAN, Y),
        ValueError,
        "features: expected finite values, got nan at position [2, 1]",
    ),
    "features inf in a batch": (
        lambda: ops.class_moments(torch.stack([X, INF]), Y),
        ValueError,
        "features: expected finite values, got -inf at position [1, 0, 2]",
    ),
    "features overflow": (
        lambda: ops.class_moments(HUGE, Y),
        ValueError,
        "features: expected values whose products fit float64, got magnitudes up to 1.1e+201",
    ),
    "labels float": (
        lambda: ops.class_moments(X, Y.float()),
        TypeError,
        "labels: expected integers, got a float32 tensor of shape [4] on cpu",
    ),
    "labels huge": (
        lambda: ops.class_moments(X, Y + 10**9),
        ValueError,
        "labels: expected classes below 1000000 where num_classes is not given, there being a row of sums for each, "
        "got 1000000001 at position 1",
    ),
    "labels bool": (
        lambda: ops.class_moments(X, Y.bool()),
        TypeError,
        "labels: expected integers, got a bool tensor of shape [4] on cpu",
    ),
    "labels 2-d": (
        lambda: ops.class_moments(X, Y.unsqueeze(0)),
        ValueError,
        "labels: expected shape [N], got a int64 tensor of shape [1, 4] on cpu",
    ),
    "labels too few": (
        lambda: ops.class_moments(X, Y[:3]),
        ValueError,
        "labels: expected one label for each of the 4 rows of features, got 3",
    ),
    "labels too large": (
        lambda: ops.class_moments(X, Y + 3, 4),
        ValueError,
        "labels: expected 4 classes 0..3, got 4 at position 1",
    ),
    "labels negative": (
        lambda: ops.class_moments(X, Y - 1, 2),
        ValueError,
        "labels: expected 2 classes 0..1, got -1 at position 0",
    ),
    "precision": (
        lambda: ops.class_moments(X, Y, precision="half"),
        ValueError,
        "precision: expected one of 'float64', 'float32', 'tf32', 'bfloat16', got 'half'",
    ),
    "precision in bits": (
        lambda: torch.ops.transferops.class_moments(X, Y, 2, 16),
        RuntimeError,
        "precision: expected 53, 24, 11 or 8 significant bits, got 16",
    ),
    "labels on another device": (
        lambda: ops.class_moments(META, Y),
        ValueError,
        "labels: expected the device of features, meta, got cpu",
    ),
    "num_classes negative": (
        lambda: ops.class_moments(X, Y, -1),
        ValueError,
        "num_classes: expected an integer of at least 0, got -1",
    ),
    "num_classes float": (
        lambda: ops.class_moments(X, Y, 2.0),
        ValueError,
        "num_classes: expected an integer of at least 0, got 2.0",
    ),
    "op: label out of range": (
        lambda: torch.ops.transferops.class_moments(X, Y + 3, 4),
        RuntimeError,
        "labels: expected 4 classes 0..3, got 4 at position 1",
    ),
    "op: int32 labels": (
        lambda: torch.ops.transferops.class_moments(X, Y.int(), 4),
        RuntimeError,
        "labels: expected dtype int64, got another dtype",
    ),
    "a device without kernels": (
        lambda: check_device("features", torch.device("mps")),
        ValueError,
        f"features: expected {DEVICES}, this build having no other kernels (transferops.show_config()), got one on mps",
    ),
    # sample_gram and norm_moments
    "sample_gram nan": (
        lambda: ops.sample_gram(NAN),
        ValueError,
        "features: expected finite values, got nan at position [2, 1]",
    ),
    "sample_gram scalar": (
        lambda: ops.sample_gram(torch.tensor(1.0)),
        ValueError,
        "features: expected shape [..., N, D], got a float32 tensor of shape [] on cpu",
    ),
    "shift float32": (
        lambda: ops.norm_moments(X, torch.zeros(3)),
        ValueError,
        "shift: expected a float64 tensor of shape [3], got a float32 tensor of shape [3] on cpu",
    ),
    "shift too long": (
        lambda: ops.norm_moments(X, torch.zeros(4).double()),
        ValueError,
        "shift: expected a float64 tensor of shape [3], got a float64 tensor of shape [4] on cpu",
    ),
    "shift number": (lambda: ops.norm_moments(X, 0.0), TypeError, f"shift: {ARRAY}, got 0.0"),
    # h_score
    "h_score no samples": (
        lambda: h_score(X[:0], Y[:0]),
        ValueError,
        "features: expected at least one sample before the score is computed, got none",
    ),
    "h_score no features": (
        lambda: h_score(X[:, :0], Y),
        ValueError,
        "features: expected shape [N, D] with D >= 1, got a float32 tensor of shape [4, 0] on cpu",
    ),
    "h_score 3-d": (
        lambda: h_score(X.unsqueeze(0), Y),
        ValueError,
        "features: expected shape [N, D] with D >= 1, got a float32 tensor of shape [1, 4, 3] on cpu",
    ),
    "h_score labels too many": (
        lambda: h_score(X, torch.cat([Y, Y])),
        ValueError,
        "labels: expected shape [4], one label per row of features, got a int64 tensor of shape [8] on cpu",
    ),
    "h_score labels list": (lambda: h_score(X, [0, 1, 0, 1]), TypeError, f"labels: {ARRAY}, got list"),
    "h_score nan, N > D": (
        lambda: h_score(NAN, Y),
        ValueError,
        "features: expected finite values, got nan at position [2, 1]",
    ),
    "h_score nan, N < D": (
        lambda: h_score(NAN.mT, Y[:3], regularized=True),
        ValueError,
        "features: expected finite values, got nan at position [1, 2]",
    ),
    "h_score both options": (
        lambda: h_score(X, Y, True, chance_corrected=True),
        ValueError,
        "chance_corrected: expected False when regularized, got both True",
    ),
    "h_score too few for chance": (
        lambda: h_score(torch.eye(4)[:, :3], Y, chance_corrected=True),
        ValueError,
        "features: expected more than 4 samples for the chance-corrected score at rank 3, got 4",
    ),
    # streaming
    "update other dimension": (
        lambda: HScore().update(X, Y).update(X[:, :2], Y),
        ValueError,
        "features: expected 3 features as in the batches before, got 2",
    ),
    "update other device": (
        lambda: HScore().update(X, Y).update(META, Y.to("meta")),
        ValueError,
        "features: expected the device of the batches before, cpu, got meta",
    ),
    "compute before update": (
        lambda: HScore().compute(),
        ValueError,
        "features: expected at least one sample before the score is computed, got none",
    ),
    "merge other kind": (
        lambda: HScore().merge(HScore(regularized=True)),
        ValueError,
        "other: expected an HScore with regularized=False, got regularized=True",
    ),
    "merge a number": (
        lambda: HScore().merge(3),
        ValueError,
        "other: expected an HScore with regularized=False, got 3",
    ),
    "merge other dimension": (
        lambda: HScore().update(X, Y).merge(HScore().update(X[:, :2], Y)),
        ValueError,
        "other: expected 3 features, got 2",
    ),
    "accumulators of different kinds": (
        lambda: MomentsAccumulator().merge(MomentsAccumulator(norms=True)),
        ValueError,
        "other: expected norms=False, got norms=True",
    ),
    "moments of different dimension": (
        lambda: FeatureMoments.of(X, Y).merge(FeatureMoments.of(X[:, :2], Y)),
        ValueError,
        "other: expected 3 features, got 2",
    ),
    "moments with and without norms": (
        lambda: FeatureMoments.of(X, Y).merge(FeatureMoments.of(X, Y, norms=True)),
        ValueError,
        "other: expected norm moments in both or in neither, got them in one only",
    ),
    # empirical_prediction
    "probabilities integer": (
        lambda: ops.empirical_prediction(X.int(), Y),
        TypeError,
        f"probabilities: {FLOATING}, got a int32 tensor of shape [4, 3] on cpu",
    ),
    "probabilities 1-d": (
        lambda: ops.empirical_prediction(X[0], Y),
        ValueError,
        "probabilities: expected shape [N, C_s], got a float32 tensor of shape [3] on cpu",
    ),
    "probabilities on another device": (
        lambda: ops.empirical_prediction(META, Y),
        ValueError,
        "labels: expected the device of probabilities, meta, got cpu",
    ),
    "labels too few for probabilities": (
        lambda: ops.empirical_prediction(X, Y[:3]),
        ValueError,
        "labels: expected one label for each of the 4 rows of probabilities, got 3",
    ),
    "labels too large for probabilities": (
        lambda: ops.empirical_prediction(X, Y + 3, 4),
        ValueError,
        "labels: expected 4 classes 0..3, got 4 at position 1",
    ),
    "num_classes of probabilities negative": (
        lambda: ops.empirical_prediction(X, Y, -1),
        ValueError,
        "num_classes: expected an integer of at least 0, got -1",
    ),
    "op: label of a probability out of range": (
        lambda: torch.ops.transferops.empirical_prediction(X, Y - 1, 2),
        RuntimeError,
        "labels: expected 2 classes 0..1, got -1 at position 0",
    ),
    "op: probabilities 1-d": (
        lambda: torch.ops.transferops.empirical_prediction(X[0], Y, 2),
        RuntimeError,
        "probabilities: expected shape [N, C_s], got [3]",
    ),
    # gradient_expectation_gram_
    "expectations not lists": (
        lambda: ops.gradient_expectation_gram_([X], None, [[X]], [0]),
        TypeError,
        "means[0]: expected a list of tensors, got a float32 tensor of shape [4, 3] on cpu",
    ),
    "expectations of two dtypes": (
        lambda: ops.gradient_expectation_gram_([[X], [X.double()]], None, [[X]], [0]),
        TypeError,
        "means[1][0]: expected the dtype of means[0][0], float32, got a float64 tensor of shape [4, 3] on cpu",
    ),
    "expectations of other lengths": (
        lambda: ops.gradient_expectation_gram_([[X], [X, X]], None, [[X]], [0]),
        ValueError,
        "means[1]: expected 1 tensors, as means[0], got 2",
    ),
    "expectations of other shapes": (
        lambda: ops.gradient_expectation_gram_([[X], [X[:2]]], None, [[X]], [0]),
        ValueError,
        "means[1][0]: expected shape [4, 3] on cpu, got a float32 tensor of shape [2, 3] on cpu",
    ),
    "gradients of more lists than expectations": (
        lambda: ops.gradient_expectation_gram_([[X]], None, [[X], [X]], [0, 0]),
        ValueError,
        "gradients: expected 1 to 1 lists, as means, got 2",
    ),
    "gradients of another length than expectations": (
        lambda: ops.gradient_expectation_gram_([[X]], None, [[X, X]], [0]),
        ValueError,
        "gradients[0]: expected 1 tensors, as means[0], got 2",
    ),
    "counts too few": (
        lambda: ops.gradient_expectation_gram_([[X]], None, [[X]], []),
        ValueError,
        "counts: expected 1 numbers, one for each list of gradients, got list",
    ),
    "an expectation in two lists": (
        lambda: ops.gradient_expectation_gram_([[X], [X]], None, [[X]], [0]),
        RuntimeError,
        "means: expected memory of its own for every element at index 1, got some that another element has",
    ),
    "an expectation that another overlaps": (
        lambda: ops.gradient_expectation_gram_([[X[:2]], [X[1:3]]], None, [[X[:2]]], [0]),
        RuntimeError,
        "means: expected memory of its own for every element at index 1, got some that another element has",
    ),
    "an expectation expanded": (
        lambda: ops.gradient_expectation_gram_([[X[:1].expand(4, 3)]], None, [[X]], [0]),
        RuntimeError,
        "means: expected memory of its own for every element at index 0, got some that another element has",
    ),
    "counts negative": (
        lambda: ops.gradient_expectation_gram_([[X]], None, [[X]], [-1]),
        ValueError,
        "counts[0]: expected an integer of at least 0, got -1",
    ),
    "squares of fewer lists": (
        lambda: ops.gradient_expectation_gram_([[X], [X + 1]], [[X]], [[X], [X]], [0, 0]),
        ValueError,
        "squares: expected 2 lists, as gradients, got 1",
    ),
    "squares of another shape than expectations": (
        lambda: ops.gradient_expectation_gram_([[X]], [[X[:2]]], [[X]], [0]),
        ValueError,
        "squares[0][0]: expected shape [4, 3] on cpu, got a float32 tensor of shape [2, 3] on cpu",
    ),
    "op: counts too many": (
        lambda: torch.ops.transferops.gradient_expectation_gram_([X], [], [X], False, [0, 0], 1),
        RuntimeError,
        "counts: expected 1 to 1 of them, got 2",
    ),
    "op: gradients too few for the counts": (
        lambda: torch.ops.transferops.gradient_expectation_gram_([X, X], [], [X], False, [0, 0], 2),
        RuntimeError,
        "gradients: expected 2 tensors, 1 for each of the counts, got 1",
    ),
    # gradients
    "means no list": (
        lambda: ops.gradient_expectation_(X, None, [X], 0),
        TypeError,
        "means: expected a list of tensors, got a float32 tensor of shape [4, 3] on cpu",
    ),
    "means half": (
        lambda: ops.gradient_expectation_([X.half()], None, [X], 0),
        TypeError,
        "means[0]: expected float32 or float64, got a float16 tensor of shape [4, 3] on cpu",
    ),
    "means asking for gradients": (
        lambda: ops.gradient_expectation_([X.clone().requires_grad_()], None, [X], 0),
        ValueError,
        "means[0]: expected a tensor that asks for no gradient, got requires_grad=True",
    ),
    "gradients too few": (
        lambda: ops.gradient_expectation_([X, X], None, [X], 0),
        ValueError,
        "gradients: expected 2 tensors, as means, got 1",
    ),
    "gradients no tensors": (
        lambda: ops.gradient_expectation_([X], None, [[1.0]], 0),
        TypeError,
        "gradients[0]: expected a torch.Tensor, got list",
    ),
    "gradients integer": (
        lambda: ops.gradient_expectation_([X], None, [X.int()], 0),
        TypeError,
        f"gradients[0]: {FLOATING}, got a int32 tensor of shape [4, 3] on cpu",
    ),
    "gradients of another shape": (
        lambda: ops.gradient_expectation_([X], None, [X[:2]], 0),
        ValueError,
        "gradients[0]: expected shape [4, 3] on cpu, got a float32 tensor of shape [2, 3] on cpu",
    ),
    "gradients not stacked": (
        lambda: ops.gradient_expectation_([X], None, [X], 0, stacked=True),
        ValueError,
        "gradients[0]: expected shape [4, 4, 3] on cpu, got a float32 tensor of shape [4, 3] on cpu",
    ),
    "gradients on another device": (
        lambda: ops.gradient_expectation_([X], None, [META], 0),
        ValueError,
        "gradients[0]: expected shape [4, 3] on cpu, got a float32 tensor of shape [4, 3] on meta",
    ),
    "squares of another dtype": (
        lambda: ops.gradient_expectation_([X], [X.double()], [X], 0),
        TypeError,
        "squares[0]: expected the dtype of the mean, float32, got a float64 tensor of shape [4, 3] on cpu",
    ),
    "count negative": (
        lambda: ops.gradient_expectation_([X], None, [X], -1),
        ValueError,
        "count: expected an integer of at least 0, got -1",
    ),
    "means expanded": (
        lambda: ops.gradient_expectation_([X[:1].expand(4, 3)], None, [X], 0),
        RuntimeError,
        "means: expected memory of its own for every element at index 0, got some that another element has",
    ),
    "means twice": (
        lambda: ops.gradient_expectation_([X, X], None, [X, X], 0),
        RuntimeError,
        "means: expected memory of its own for every element at index 1, got some that another element has",
    ),
    "means that overlap": (
        lambda: ops.gradient_expectation_([X[:, :2], X[:, 1:]], None, [X[:, :2], X[:, 1:]], 0),
        RuntimeError,
        "means: expected memory of its own for every element at index 1, got some that another element has",
    ),
    "squares that are the means": (
        lambda: ops.gradient_expectation_([X], [X], [X], 0),
        RuntimeError,
        "means: expected memory of its own for every element at index 0, got some that another element has",
    ),
    "op: gradients of another shape": (
        lambda: torch.ops.transferops.gradient_expectation_([X], [], [X[:2]], False, 0),
        RuntimeError,
        "gradients: expected shape [4, 3] at index 0, got [2, 3]",
    ),
    "gram of nothing": (
        lambda: ops.gradient_gram([]),
        TypeError,
        "gradients: expected a sequence of at least one list of tensors, got list",
    ),
    "gram of empty lists": (
        lambda: ops.gradient_gram([[], []]),
        ValueError,
        "gradients[0]: expected at least one tensor, got none",
    ),
    "gram of unequal lists": (
        lambda: ops.gradient_gram([[X], [X, X]]),
        ValueError,
        "gradients[1]: expected 1 tensors, as gradients[0], got 2",
    ),
    "gram of unequal shapes": (
        lambda: ops.gradient_gram([[X, X], [X, X.T]]),
        ValueError,
        "gradients[1][1]: expected shape [4, 3] on cpu, got a float32 tensor of shape [3, 4] on cpu",
    ),
    "op: lists that do not divide": (
        lambda: torch.ops.transferops.gradient_gram([X, X, X], 2),
        RuntimeError,
        "gradients: expected tensors of 2 lists of equal length, got 3",
    ),
    "directions 1-d": (
        lambda: ops.weighted_gram(X[0], X[0]),
        ValueError,
        "directions: expected shape [K, P], got a float32 tensor of shape [3] on cpu",
    ),
    "weights of another length": (
        lambda: ops.weighted_gram(X, Y.float()),
        ValueError,
        "weights: expected shape [3] on cpu, got a float32 tensor of shape [4] on cpu",
    ),
    "base integer": (
        lambda: ops.weighted_gram(X, X[0], X[0].int()),
        TypeError,
        f"base: {FLOATING}, got a int32 tensor of shape [3] on cpu",
    ),
    "op: base of another dtype": (
        lambda: torch.ops.transferops.weighted_gram(X, X[0], X[0].double()),
        RuntimeError,
        "base: expected the dtype of directions, got another",
    ),
    "gradients 1-d": (
        lambda: ops.gradient_fisher_gram(X[0], X),
        ValueError,
        "gradients: expected shape [N, P], got a float32 tensor of shape [3] on cpu",
    ),
    "directions of another length": (
        lambda: ops.gradient_fisher_gram(X, X[:, :2]),
        ValueError,
        "directions: expected shape [K, 3] on cpu, as the gradients, got a float32 tensor of shape [4, 2] on cpu",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_malformed_call_is_refused_with_its_message(name: str) -> None:
    call, error, message = CASES[name]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).split("\n")[0] == message
