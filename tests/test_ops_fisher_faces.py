"""The ways to call the Fisher ops: dispatcher, torch.compile, NumPy arrays and buffers; and calls that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fisher_operands import DTYPES, arguments, random, result_dtype

from transferops import _C, ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", arguments(torch.float32))
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(torch.ops.transferops, name), arguments(dtype)[name])


@pytest.mark.parametrize("name", arguments(torch.float32))
def test_backward_raises(name: str) -> None:
    first, *rest = arguments(torch.float32)[name]
    result = getattr(ops, name)(first.requires_grad_(), *rest)
    message = f"^{name}: expected no backward pass, got one: this op has no derivative$"
    with pytest.raises(RuntimeError, match=message):
        result.sum().backward()


@pytest.mark.parametrize("name", arguments(torch.float32))
def test_compiles_without_graph_break(name: str) -> None:
    op = getattr(ops, name)
    call = arguments(torch.float32)[name]
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: op(*x) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(*call), op(*call) * 2)
    if "projection" not in name and "gram" not in name:  # another number of samples
        fewer = (call[0][:2], call[1][:2], *call[2:])
        assert torch.equal(compiled(*fewer), op(*fewer) * 2)


def test_numpy_arrays_are_taken() -> None:
    a, b = random(4, 3, 5), random(4, 3, 2)
    assert torch.equal(ops.linear_fisher_diagonal(a.numpy(), b.numpy()[::-1]), ops.linear_fisher_diagonal(a, b.flip(0)))
    z, t = random(5, 7), random(3, 5, 7)
    assert torch.equal(ops.softmax_fisher_gram(np.asarray(z), np.asarray(t)), ops.softmax_fisher_gram(z, t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_face_runs_the_same_kernels(dtype: torch.dtype) -> None:
    x, g, w, kernel, stride, padding, dilation, groups = arguments(dtype)["conv_fisher_projection"]
    w = torch.stack(w).to(result_dtype(dtype))
    window = [[1, *size] for size in (kernel, stride)] + [[0, *padding], [1, *dilation]]
    face = [(t.view(torch.uint16) if dtype == torch.bfloat16 else t).numpy() for t in (x.unsqueeze(2), g.unsqueeze(2))]
    diagonal, projection, norm = (np.full(shape, np.nan, w.numpy().dtype) for shape in (w.shape[1:], (3, 2), 3))
    _C.fisher_diagonal(*face, window, groups, diagonal)
    _C.fisher_projection(*face, w.numpy(), window, groups, projection)
    _C.grad_norm(*face, window, groups, norm)
    rest = (kernel, stride, padding, dilation, groups)
    assert (diagonal == ops.conv_fisher_diagonal(x, g, *rest).numpy()).all()
    assert (projection == ops.conv_fisher_projection(x, g, w, *rest).numpy()).all()
    assert (norm == ops.conv_grad_norm(x, g, *rest).numpy()).all()

    z, t = arguments(dtype)["softmax_fisher_gram"]
    face = [(x.view(torch.uint16) if dtype == torch.bfloat16 else x).numpy() for x in (z, t)]
    gram = np.full((3, 3), np.nan)
    _C.softmax_fisher_gram(*face, gram)
    assert (gram == ops.softmax_fisher_gram(z, t).numpy()).all()


def test_numpy_face_refuses_wrong_buffers() -> None:
    x, g = np.zeros((2, 4, 1, 6, 6), np.float32), np.zeros((2, 6, 1, 4, 4), np.float32)
    window = [[1, 3, 3], [1, 1, 1], [0, 0, 0], [1, 1, 1]]
    out = np.zeros((6, 4, 3, 3), np.float32)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x[:, :, 0], g, window, 1, out), r"inputs: expected 5 dimensions \[N, C, depth, height, width\]"),
        ((x, g.astype(np.float64), window, 1, out), "grad_outputs: expected the dtype of inputs"),
        ((x, g[:1], window, 1, out), "grad_outputs: expected the samples of inputs"),
        ((x, g, window, 3, out), "groups: expected a divisor of the channels"),
        ((x, g[..., :3], window, 1, out), "grad_outputs: expected the size of the convolution's output"),
        ((x, g, [[1, 3, 3], [1, 0, 1], [0, 0, 0], [1, 1, 1]], 1, out), "window: expected kernel, stride and dilation"),
        ((x, g, window, 1, out.astype(np.float64)), "out: expected a contiguous array of float32"),
        ((x, g, window, 1, out[:, ::2]), "out: expected a contiguous array of float32"),
        ((x, g, window, 1, out[:2]), "out: expected as many elements as the weight"),
        ((x.astype(np.int32), g, window, 1, out), "inputs: expected float32, float64, float16, or bfloat16 as uint16"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            _C.fisher_diagonal(*call)
    with pytest.raises(ValueError, match=r"tangents: expected shape \[K, N, C\] for logits \[N, C\]"):
        _C.softmax_fisher_gram(np.zeros((5, 7)), np.zeros((3, 4, 7)), np.zeros((3, 3)))


A, B, D = torch.zeros(4, 3, 5), torch.zeros(4, 3, 2), torch.zeros(1, 2, 5)
X, G = torch.zeros(2, 4, 6, 6), torch.zeros(2, 6, 4, 4)
Z, T = torch.zeros(5, 7), torch.zeros(3, 5, 7)
META = torch.empty(4, 3, 2, device="meta")
FLOATING = "expected float32, float64, float16 or bfloat16"

BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "inputs list": (
        lambda: ops.linear_grad_norm([1.0], B),
        TypeError,
        "inputs: expected a torch.Tensor, NumPy array or DLPack array, got list",
    ),
    "inputs int": (
        lambda: ops.linear_fisher_diagonal(A.int(), B),
        TypeError,
        f"inputs: {FLOATING}, got a int32 tensor of shape [4, 3, 5] on cpu",
    ),
    "inputs 4-d": (
        lambda: ops.linear_fisher_diagonal(X, X),
        ValueError,
        "inputs: expected shape [N, T, I] or [N, I], got a float32 tensor of shape [2, 4, 6, 6] on cpu",
    ),
    "grad_outputs complex": (
        lambda: ops.linear_grad_norm(A, B.to(torch.complex64)),
        TypeError,
        f"grad_outputs: {FLOATING}, got a complex64 tensor of shape [4, 3, 2] on cpu",
    ),
    "grad_outputs of another dtype": (
        lambda: ops.linear_grad_norm(A, B.half()),
        TypeError,
        "grad_outputs: expected the dtype of inputs, float32, got a float16 tensor of shape [4, 3, 2] on cpu",
    ),
    "grad_outputs on another device": (
        lambda: ops.linear_grad_norm(A, META),
        ValueError,
        "grad_outputs: expected the device of inputs, cpu, got meta",
    ),
    "grad_outputs of other samples": (
        lambda: ops.linear_grad_norm(A, B[:2]),
        ValueError,
        "grad_outputs: expected shape [4, 3, O], as the inputs, got a float32 tensor of shape [2, 3, 2] on cpu",
    ),
    "grad_outputs of other dimensions": (
        lambda: ops.linear_fisher_diagonal(A, B[:, 0]),
        ValueError,
        "grad_outputs: expected shape [4, 3, O], as the inputs, got a float32 tensor of shape [4, 2] on cpu",
    ),
    "directions transposed": (
        lambda: ops.linear_fisher_projection(A, B, D.mT),
        ValueError,
        "directions: expected shape [K, 2, 5], K of the weight's, got a float32 tensor of shape [1, 5, 2] on cpu",
    ),
    "direction alone": (
        lambda: ops.linear_fisher_projection(A, B, D[0]),
        ValueError,
        "directions: expected shape [K, 2, 5], K of the weight's, got a float32 tensor of shape [2, 5] on cpu",
    ),
    "directions int": (
        lambda: ops.linear_fisher_projection(A, B, D.long()),
        TypeError,
        f"directions: {FLOATING}, got a int64 tensor of shape [1, 2, 5] on cpu",
    ),
    "directions on another device": (
        lambda: ops.linear_fisher_projection(A, B, D.to("meta")),
        ValueError,
        "directions: expected the device of inputs, cpu, got meta",
    ),
    "direction of a list transposed": (
        lambda: ops.linear_fisher_projection(A, B, [D[0], D[0].mT]),
        ValueError,
        "directions[1]: expected shape [2, 5], got a float32 tensor of shape [5, 2] on cpu",
    ),
    "direction of a list int": (
        lambda: ops.linear_fisher_projection(A, B, [D[0].long()]),
        TypeError,
        f"directions[0]: {FLOATING}, got a int64 tensor of shape [2, 5] on cpu",
    ),
    "conv without positions": (
        lambda: ops.conv_grad_norm(Z, Z, [3]),
        ValueError,
        "inputs: expected shape [N, C, *spatial] with 1 to 3 spatial dimensions, got a float32 tensor of shape [5, 7] "
        "on cpu",
    ),
    "kernel of another dimension": (
        lambda: ops.conv_grad_norm(X, G, [3]),
        ValueError,
        "kernel_size: expected 2 integers of at least 1, or one for all, got [3]",
    ),
    "kernel of floats": (
        lambda: ops.conv_grad_norm(X, G, [3, 3.0]),
        ValueError,
        "kernel_size: expected 2 integers of at least 1, or one for all, got [3, 3.0]",
    ),
    "stride 0": (
        lambda: ops.conv_grad_norm(X, G, [3, 3], 0),
        ValueError,
        "stride: expected 2 integers of at least 1, or one for all, got 0",
    ),
    "padding by name": (
        lambda: ops.conv_grad_norm(X, G, [3, 3], 1, "same"),
        ValueError,
        "padding: expected 2 integers of at least 0, or one for all, got 'same'",
    ),
    "dilation negative": (
        lambda: ops.conv_grad_norm(X, G, [3, 3], 1, 0, [1, -1]),
        ValueError,
        "dilation: expected 2 integers of at least 1, or one for all, got [1, -1]",
    ),
    "groups": (
        lambda: ops.conv_fisher_diagonal(X, G, [3, 3], groups=3),
        ValueError,
        "groups: expected a divisor of the channels, 4 and 6, got 3",
    ),
    "grad_outputs of another convolution": (
        lambda: ops.conv_fisher_diagonal(X, G, [3, 3], padding=1),
        ValueError,
        "grad_outputs: expected shape [2, C_out, 6, 6], that of the convolution's output, got a float32 tensor of "
        "shape [2, 6, 4, 4] on cpu",
    ),
    "grad_outputs with fewer dimensions": (
        lambda: ops.conv_fisher_diagonal(X, G[0], [3, 3]),
        ValueError,
        "grad_outputs: expected 4 dimensions, as the inputs, got a float32 tensor of shape [6, 4, 4] on cpu",
    ),
    "conv directions": (
        lambda: ops.conv_fisher_projection(X, G, torch.zeros(2, 6, 4, 3), [3, 3]),
        ValueError,
        "directions: expected shape [K, 6, 4, 3, 3], K of the weight's, got a float32 tensor of shape [2, 6, 4, 3] "
        "on cpu",
    ),
    "logits 3-d": (
        lambda: ops.softmax_fisher_gram(T, T),
        ValueError,
        "logits: expected shape [N, C], got a float32 tensor of shape [3, 5, 7] on cpu",
    ),
    "tangents of other classes": (
        lambda: ops.softmax_fisher_gram(Z, T[..., 1:]),
        ValueError,
        "tangents: expected shape [K, 5, 7] on cpu, as the logits, got a float32 tensor of shape [3, 5, 6] on cpu",
    ),
    "tangents int": (
        lambda: ops.softmax_fisher_gram(Z, T.int()),
        TypeError,
        f"tangents: {FLOATING}, got a int32 tensor of shape [3, 5, 7] on cpu",
    ),
    # What C++ callers and torch.ops see.
    "op: shapes": (
        lambda: torch.ops.transferops.linear_grad_norm(A, B[:2]),
        RuntimeError,
        "grad_outputs: expected the shape of inputs but for the last dimension, [4, 3, 5], got [2, 3, 2]",
    ),
    "op: dtypes": (
        lambda: torch.ops.transferops.linear_grad_norm(A, B.half()),
        RuntimeError,
        "grad_outputs: expected the dtype of inputs, got another",
    ),
    "op: directions": (
        lambda: torch.ops.transferops.linear_fisher_projection(A, B, list(D.mT)),
        RuntimeError,
        "directions: expected the weight's shape [2, 5] at index 0, got [5, 2]",
    ),
    "op: convolution": (
        lambda: torch.ops.transferops.conv_grad_norm(X, G, [3, 3], [1, 1], [1, 1], [1, 1], 1),
        RuntimeError,
        "grad_outputs: expected the spatial size of the convolution's output, got shape [2, 6, 4, 4]",
    ),
    "op: groups": (
        lambda: torch.ops.transferops.conv_grad_norm(X, G, [3, 3], [1, 1], [0, 0], [1, 1], 3),
        RuntimeError,
        "groups: expected a divisor of 4 and 6 channels, got 3",
    ),
    "op: stride": (
        lambda: torch.ops.transferops.conv_grad_norm(X, G, [3, 3], [0, 1], [0, 0], [1, 1], 1),
        RuntimeError,
        "stride: expected integers of at least 1, got 0",
    ),
    "op: kernel": (
        lambda: torch.ops.transferops.conv_grad_norm(X, G, [3], [1, 1], [0, 0], [1, 1], 1),
        RuntimeError,
        "kernel_size: expected 2 integers, got 1",
    ),
    "op: tangents": (
        lambda: torch.ops.transferops.softmax_fisher_gram(Z, T[:, 1:]),
        RuntimeError,
        "tangents: expected shape [K, 5, 7], got [3, 4, 7]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_call_is_refused_with_its_message(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).split("\n")[0] == message
