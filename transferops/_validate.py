"""One way to refuse bad input: the argument's name, what was expected, what came.

Every public function raises through here, so messages read alike:
``labels: expected 10 classes 0..9, got 12 at position 37``.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray


def fail(argument: str, expected: str, got: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` with the message ``argument: expected ..., got ...``."""
    raise error(f"{argument}: expected {expected}, got {got}")


def describe(value: Any) -> str:
    """A short description of ``value`` for the "got" half of a message."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {list(value.shape)} on {value.device}"
    if isinstance(value, (bool, int, float, str)) or value is None:
        return repr(value)
    return f"{type(value).__name__}"


def as_tensor(argument: str, value: Any) -> torch.Tensor:
    """Return ``value`` as a tensor: tensors as they are, NumPy, DLPack and CUDA arrays uncopied if possible."""
    if isinstance(value, torch.Tensor):
        return value
    try:
        if isinstance(value, np.ndarray):
            # torch takes neither read-only arrays nor negative strides; both are rare enough to copy.
            plain = value.flags.writeable and all(stride >= 0 for stride in value.strides)
            return torch.from_numpy(value if plain else value.copy())
        if hasattr(value, "__dlpack__"):
            return torch.utils.dlpack.from_dlpack(value)
        if hasattr(value, "__cuda_array_interface__"):
            return torch.as_tensor(value, device="cuda")
    except (TypeError, RuntimeError, BufferError, AssertionError) as error:  # the last: a torch without CUDA
        fail(argument, "a torch.Tensor, NumPy array or DLPack array", f"{describe(value)} ({error})", TypeError)
    return fail(argument, "a torch.Tensor, NumPy array or DLPack array", describe(value), TypeError)


def check_tensor(argument: str, value: Any) -> torch.Tensor:
    """Return ``value`` if it is a tensor, raise ``TypeError`` otherwise."""
    if not isinstance(value, torch.Tensor):
        fail(argument, "a torch.Tensor", describe(value), TypeError)
    return value


def check_positive_int(argument: str, value: Any, *, minimum: int = 1) -> int:
    """Return ``value`` as an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        fail(argument, f"an integer of at least {minimum}", describe(value))
    return value


def check_positive(argument: str, value: Any) -> float:
    """Return ``value`` as a float that is positive and finite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (0 < value < math.inf):
        fail(argument, "a positive number", describe(value))
    return float(value)


def check_array(argument: str, value: Any, *, finite: bool = True) -> NDArray[np.float64]:
    """Return ``value``, a tensor on any device or anything NumPy takes, as a float64 array of real numbers.

    NaN is never accepted; ``finite=False`` lets infinities through.
    """
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            fail(argument, "real numbers", describe(value), TypeError)
        value = value.detach().to("cpu", torch.float64).numpy()
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError
    except (TypeError, ValueError):
        fail(argument, "a number or an array of real numbers", describe(value), TypeError)
    array = array.astype(np.float64, copy=False)
    bad = ~np.isfinite(array) if finite else np.isnan(array)
    if bad.any():
        index = [int(i) for i in np.argwhere(bad)[0]]
        where = f" at index {index}" if index else ""
        fail(argument, "finite numbers" if finite else "numbers", f"{array[tuple(index)]}{where}")
    return array
