"""Inputs as plain data: what a fuzz example is drawn as, kept in the corpus as, and made into tensors from.

An example is a dict that JSON can hold; the numbers of its arrays come from a seed. So an example found today is the
same example under any version of hypothesis.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

Spec = dict[str, Any]

FLOATING = ("float32", "float64", "float16", "bfloat16")
INTEGER = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool", "float32")
LAYOUTS = ("plain", "transposed", "every other", "shifted", "repeated", "numpy", "reversed numpy", "read-only numpy")
EXPONENTS = st.one_of(st.just(0), st.integers(-3, 3), st.integers(-30, 30))
SEEDS = st.integers(0, 2**16)
SIZES = st.sampled_from([0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 23, 32, 33])


@st.composite
def arrays(
    draw: Any,
    shape: tuple[int, ...],
    *,
    dtypes: tuple[str, ...] = FLOATING,
    exponents: st.SearchStrategy[int] = EXPONENTS,
    layouts: tuple[str, ...] = LAYOUTS,
    poison: bool = True,
) -> Spec:
    """Random numbers of any scale, dtype and place in memory; one in eight holds a NaN or an infinity."""
    values = draw(st.sampled_from(("normal", "normal", "normal", "offset", "constant", "zero", "low rank", "ties")))
    bad = draw(st.sampled_from((None,) * 21 + ("nan", "inf", "-inf"))) if poison else None
    return {
        "shape": list(shape),
        "dtype": draw(st.sampled_from(dtypes)),
        "exponent": draw(exponents),
        "values": values,
        "layout": draw(st.sampled_from(layouts)),
        "poison": bad,
        "seed": draw(SEEDS),
    }


def array(spec: Spec) -> Any:
    """What ``arrays`` describes: a tensor, or a NumPy array."""
    shape, dtype = spec["shape"], getattr(torch, spec["dtype"])
    generator = torch.Generator().manual_seed(spec["seed"])
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if spec["values"] == "offset":
        x = x + 1000
    elif spec["values"] == "constant":
        x = torch.ones_like(x)
    elif spec["values"] == "zero":
        x = torch.zeros_like(x)
    elif spec["values"] == "low rank" and x.dim() and x.shape[-1] > 1:
        x = x[..., :1] * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    elif spec["values"] == "ties":
        x = x.round()
    largest = torch.finfo(dtype).max / 8
    x = (x * 10.0 ** spec["exponent"]).clamp(-largest, largest).to(dtype)
    if spec["poison"] is not None and x.numel():
        x.view(-1)[spec["seed"] % x.numel()] = float(spec["poison"])
    return laid_out(x, spec["layout"])


def laid_out(x: torch.Tensor, layout: str) -> Any:
    """The same values elsewhere in memory (``repeated``: the first entry along the first dimension throughout)."""
    if layout == "transposed":
        backwards = tuple(reversed(range(x.dim())))
        return x.permute(backwards).contiguous().permute(backwards)
    if layout == "every other" and x.dim():
        wide = torch.full([*x.shape[:-1], 2 * x.shape[-1]], math.nan if x.is_floating_point() else 99).to(x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "shifted":  # storage that does not begin at a multiple of any vector's size
        room = torch.empty(x.numel() + 1, dtype=x.dtype)
        room[1:] = x.reshape(-1)
        return room[1:].view(x.shape)
    if layout == "repeated" and x.dim() and len(x):
        return x[:1].expand(x.shape)
    if layout.endswith("numpy") and x.dtype != torch.bfloat16:
        values = x.numpy()
        if layout == "reversed numpy" and values.ndim:
            values = np.ascontiguousarray(values[::-1])[::-1]
        elif layout == "read-only numpy":
            values = values.copy()
            values.flags.writeable = False
        return values
    return x


def as_given(value: Any) -> torch.Tensor:
    """A tensor of the same dtype and numbers, contiguous."""
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value.clone()


def tensor(value: Any) -> torch.Tensor:
    """The numbers that a function is given, in float64."""
    return as_given(value).double()


@st.composite
def labels(draw: Any, count: int, *, classes: int | None = None, any_integers: bool = True) -> Spec:
    """Labels of any integer type (or, wrongly, another), perhaps of another length, negative, huge or all equal."""
    dtype = draw(st.sampled_from(INTEGER + ("int64",) * 6))
    if classes is None:
        classes = draw(st.sampled_from([1, 2, 2, 3, 5, 8]))
    names: list[int] = list(range(classes))
    if any_integers and classes:
        low, high = (-(2**40), 2**40) if dtype == "int64" else (-5, 100) if dtype.startswith("int") else (0, 200)
        names = draw(st.lists(st.integers(low, high), min_size=classes, max_size=classes))
    return {
        "count": draw(st.sampled_from((count,) * 15 + (count + 1,))),
        "dtype": dtype,
        "names": names,
        "layout": draw(st.sampled_from(LAYOUTS)),
        "seed": draw(SEEDS),
    }


def label_array(spec: Spec) -> Any:
    """What ``labels`` describes."""
    generator = torch.Generator().manual_seed(spec["seed"])
    names = spec["names"] or [0]
    chosen = torch.tensor(names)[torch.randint(len(names), (spec["count"],), generator=generator)]
    dtype = getattr(torch, spec["dtype"])
    wide = dtype in (torch.uint16, torch.uint32, torch.uint64)  # which torch can hold and do little with
    return laid_out(chosen.to(dtype), "plain" if wide else spec["layout"])


def is_finite(*values: Any) -> bool:
    """Whether no number among those given is NaN or infinite."""
    return all(bool(torch.isfinite(tensor(value)).all()) for value in values)


def dtype_of(value: Any) -> str:
    """Its name, of a tensor's or a NumPy array's."""
    return str(value.dtype).removeprefix("torch.")
