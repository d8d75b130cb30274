"""The compiled module (csrc/python/module.cpp)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

def class_moments(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    counts: NDArray[np.int64],
    sums: NDArray[np.float64],
    gram: NDArray[np.float64],
    shift: NDArray[np.float64],
) -> None: ...
def sample_gram(features: NDArray[Any], gram: NDArray[np.float64], shift: NDArray[np.float64]) -> None: ...
def norm_moments(
    features: NDArray[Any],
    shift: NDArray[np.float64],
    cubic: NDArray[np.float64],
    quartic: NDArray[np.float64],
) -> None: ...
def build_info() -> dict[str, Any]: ...
