"""The functions of ``tllib.ranking`` (Transfer-Learning-Library).

Where values differ from that library's:

* ``h_score``: nearly dependent features enter there with the inverse of their rounding error; here they are left out.
* ``log_maximum_evidence``: the fixed-point iteration there stops at a change of 1 % in lambda; here it is the maximum.
  Its weights are [C, D] there too, though its documentation says [D, C].
* ``leep``: a source class that is never predicted makes the value there NaN; here it takes no part.
* ``transrate``: the classes' rates are averaged there; here weighted by their sizes, as the definition says. With
  classes of one size both agree.

Classes are the labels that occur. There they are 0 .. max, and one without samples enters the average of
``log_maximum_evidence`` and ``transrate``.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from transferops import scores
from transferops.compat._evidence import posterior_mean, real_targets


def h_score(features: Tensor | Any, labels: Tensor | Any) -> float:
    """H-score; :func:`transferops.scores.h_score`.

    Args:
        features: [N, D] floating point, tensor or array.
        labels: [N] integers.

    Raises:
        TypeError, ValueError: as :func:`transferops.scores.h_score`.
    """
    return scores.h_score(features, labels)


def regularized_h_score(features: Tensor | Any, labels: Tensor | Any) -> float:
    """H-score with the covariance shrunk by Ledoit-Wolf; :func:`transferops.scores.h_score` ``(regularized=True)``.

    Args:
        features: [N, D] floating point, tensor or array.
        labels: [N] integers.

    Raises:
        TypeError, ValueError: as :func:`transferops.scores.h_score`.
    """
    return scores.h_score(features, labels, regularized=True)


@overload
def log_maximum_evidence(
    features: Tensor | Any, targets: Tensor | Any, regression: bool = ..., return_weights: Literal[False] = ...
) -> float: ...
@overload
def log_maximum_evidence(
    features: Tensor | Any, targets: Tensor | Any, regression: bool = ..., *, return_weights: Literal[True]
) -> tuple[float, NDArray[np.float64]]: ...


def log_maximum_evidence(
    features: Tensor | Any, targets: Tensor | Any, regression: bool = False, return_weights: bool = False
) -> float | tuple[float, NDArray[np.float64]]:
    """LogME; :func:`transferops.scores.log_me`.

    Args:
        features: [N, D] floating point, tensor or array.
        targets: [N] integers, or with ``regression`` numbers [N] or [N, M].
        regression: whether the targets are numbers to be regressed on; integers are then taken as such.
        return_weights: give the weights of the Bayesian linear model, too.

    Returns:
        The score; with ``return_weights`` also the posterior mean at the maximum, float64 [C, D] for the classes
        0 .. max (zero for one without samples), or [M, D] for regression.

    Raises:
        TypeError, ValueError: as :func:`transferops.scores.log_me`; floating-point targets without ``regression``;
            with ``return_weights``, a negative label.
    """
    value = scores.LogMe(regression=regression).update(features, real_targets(targets, regression)).compute()
    return (value, posterior_mean(features, targets, regression)) if return_weights else value


def leep(predictions: Tensor | Any, labels: Tensor | Any) -> float:
    """LEEP; :func:`transferops.scores.leep`.

    Args:
        predictions: [N, C_s] probabilities of the source model's classes, tensor or array.
        labels: [N] integers, the target's classes.

    Raises:
        TypeError, ValueError: as :func:`transferops.scores.leep`.
    """
    return scores.leep(predictions, labels)


def negative_conditional_entropy(source_labels: Tensor | Any, target_labels: Tensor | Any) -> float:
    """NCE; :func:`transferops.scores.nce`.

    Args:
        source_labels: [N] integers, what the source model predicts.
        target_labels: [N] integers.

    Raises:
        TypeError, ValueError: as :func:`transferops.scores.nce`.
    """
    return scores.nce(source_labels, target_labels)


def transrate(features: Tensor | Any, labels: Tensor | Any, eps: float = 1e-4) -> float:
    """TransRate with ``eps`` in the features' own units; :func:`transferops.scores.trans_rate` ``(relative=False)``.

    Args:
        features: [N, D] floating point, tensor or array.
        labels: [N] integers.
        eps: distortion of the code, positive.

    Raises:
        TypeError, ValueError: as :func:`transferops.scores.trans_rate`.
    """
    return scores.trans_rate(features, labels, eps=eps, relative=False)


log_expected_empirical_prediction = leep
"""The older name of :func:`leep`."""

nce = negative_conditional_entropy
"""The usual short name of :func:`negative_conditional_entropy`."""
