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
def empirical_prediction(
    probabilities: NDArray[Any],
    labels: NDArray[np.int64],
    classes: int,
    prediction: NDArray[np.float64],
    mass: NDArray[np.float64],
    totals: NDArray[np.float64],
    lowest: NDArray[np.float64],
) -> None: ...
def gradient_expectation(
    means: list[NDArray[Any]],
    squares: list[NDArray[Any]],
    gradients: list[NDArray[Any]],
    samples: int,
    count: int,
) -> None: ...
def gradient_expectation_gram(
    means: list[NDArray[Any]],
    squares: list[NDArray[Any]],
    gradients: list[NDArray[Any]],
    samples: int,
    counts: list[int],
    lists: int,
    gram: NDArray[np.float64],
) -> None: ...
def gradient_gram(gradients: list[NDArray[Any]], lists: int, gram: NDArray[np.float64]) -> None: ...
def weighted_gram(
    directions: NDArray[Any], weights: NDArray[Any], base: NDArray[Any] | None, gram: NDArray[np.float64]
) -> None: ...
def gradient_fisher_gram(
    gradients: NDArray[Any],
    directions: NDArray[Any],
    gram: NDArray[np.float64],
    diagonal: NDArray[Any],
    norms: NDArray[np.float64],
) -> None: ...
def build_info() -> dict[str, Any]: ...
