"""How many directions the target's samples determine: the d of the risk formulas, where parameters outnumber samples.

The formulas of :mod:`transferops.otqms.theory` take d as the number of trained parameters [paper]. For a network
d >> N0 and they say "take everything". What they need of d is the risk of the target alone, d / (2 N0). For the ridge
(MAP) estimate of a Gaussian model, theta_0 ~ N(theta_init, tau^2 I), that risk is exactly d_eff / (2 N0) with

    d_eff = tr(J (J + lambda I)^-1),    lambda = 1 / (N0 tau^2),

the mean over prior and samples [derived; d_eff itself is MacKay's number of well-determined parameters, 1992]. The
choices here differ in where lambda, or d_eff itself, comes from:

- :func:`prior_damping`: a known scale tau of the parameters' movement away from the initialisation;
- :func:`displacement_damping`: the distance that training moved them, if the estimate is the ridge one;
- :func:`evidence_damping`: the maximum-likelihood movement along each eigenvector of J, hence the evidence of tau;
- :func:`optimism_dimension`: no model of the movement, the loss on held-out samples above that on the training samples;
- :func:`distance_dimension`: no model either, the distance between two estimates from separate samples.

All take the source models to be as well determined per sample as the target's. All results in this file are [derived].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from transferops._validate import check_array, fail
from transferops.otqms.theory import FloatArray, nonnegative, positive

_BISECTIONS = 100


def effective_dimension(eigenvalues: ArrayLike, damping: ArrayLike) -> FloatArray:
    """tr(J (J + lambda I)^-1) = sum_i mu_i / (mu_i + lambda) [derived].

    For a model, :meth:`transferops.fisher.FisherInformation.effective_dimension` computes it without the eigenvalues.

    Args:
        eigenvalues: mu, shape [M], not negative: those of J, or of the Gram matrix of its gradient rows, which are the
            same but for zeros. Here and below those within 8 M rounding errors (2^-52) of the largest count as zero:
            of a computed spectrum they are noise, and some are negative.
        damping: lambda, positive, any shape.

    Returns:
        d_eff, float64, of the shape of ``damping``.

    Raises:
        ValueError: an argument is out of its range or not finite.
    """
    spectrum, damping = _spectrum(eigenvalues), positive("damping", damping)
    return np.asarray((spectrum / (spectrum + damping[..., None])).sum(-1))


def prior_damping(target_samples: ArrayLike, prior_variance: ArrayLike = 1.0) -> FloatArray:
    """lambda = 1 / (N0 tau^2), for parameters that move by about tau each [derived].

    Args:
        target_samples: N0, positive.
        prior_variance: tau^2, positive.

    Returns:
        lambda, float64, of the broadcast shape.

    Raises:
        ValueError: an argument is not positive and finite.
    """
    return np.asarray(1 / (positive("target_samples", target_samples) * positive("prior_variance", prior_variance)))


def displacement_damping(eigenvalues: ArrayLike, squared_displacement: float, target_samples: float) -> float:
    """lambda such that the ridge estimate is expected to move as far as it did [derived].

    With lambda = 1/(N0 tau^2) the ridge estimate moves by E|theta - theta_init|^2 = tau^2 d_eff(lambda), the mean over
    prior and samples: MacKay's fixed point tau^2 = |theta - theta_init|^2 / d_eff. It falls in lambda, so the solution
    is unique.

    Args:
        eigenvalues: mu of J, shape [M], not negative, not all zero; directions without information do not move and may
            be left out.
        squared_displacement: |theta - theta_init|^2, positive.
        target_samples: N0, positive.

    Returns:
        lambda.

    Raises:
        ValueError: an argument is out of its range or not finite.
    """
    spectrum = _spectrum(eigenvalues)
    length, samples = _number("squared_displacement", squared_displacement), _number("target_samples", target_samples)

    low = high = 1.0
    while float(effective_dimension(spectrum, low)) / (samples * low) < length:
        low /= 16
    while float(effective_dimension(spectrum, high)) / (samples * high) > length:
        high *= 16
    for _ in range(_BISECTIONS):
        middle = np.sqrt(low * high)
        if float(effective_dimension(spectrum, middle)) / (samples * middle) > length:
            low = middle
        else:
            high = middle
    return float(high)


def evidence_damping(eigenvalues: ArrayLike, movements: ArrayLike, target_samples: float) -> float:
    """lambda of greatest evidence, given the maximum-likelihood movement along each eigenvector [derived].

    The movements are b_i ~ N(0, tau^2 + 1/(N0 mu_i)); tau^2 maximises their likelihood. The likelihood may have
    several maxima; they are compared on a grid of lambda over the spectrum's range, and the best is refined.

    Args:
        eigenvalues: mu of J, shape [M], not negative; those equal to zero say nothing and are skipped.
        movements: b_i = v_i^T (theta - theta_init) of the maximum-likelihood estimate, shape [M].
        target_samples: N0, positive.

    Returns:
        lambda; infinite if no movement is beyond what the noise explains (tau = 0, d_eff = 0).

    Raises:
        ValueError: an argument is out of its range or not finite.
    """
    spectrum, moved = _spectrum(eigenvalues), check_array("movements", movements)
    samples = _number("target_samples", target_samples)
    if moved.shape != spectrum.shape:
        fail("movements", f"shape {list(spectrum.shape)}, one for each of eigenvalues", f"shape {list(moved.shape)}")
    known = spectrum > 0
    noise, squared = 1 / (samples * spectrum[known]), moved[known] ** 2

    def cost(variance: FloatArray) -> FloatArray:
        total = variance[..., None] + noise
        return np.asarray((np.log(total) + squared / total).sum(-1))

    largest = 10 * max(float(squared.max()), float(noise.max()))
    low, high = np.log(min(float(noise.min()), largest) * 1e-6), np.log(largest)
    for _ in range(12):  # each round keeps the neighbourhood of the best of 100 points
        grid = np.linspace(low, high, 100)
        best = int(np.argmin(cost(np.exp(grid))))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 99)]
    variance = np.exp((low + high) / 2)
    if cost(np.zeros(())) <= cost(np.asarray(variance)):
        return float(np.inf)
    return float(1 / (samples * variance))


def optimism_dimension(training_loss: ArrayLike, validation_loss: ArrayLike, target_samples: ArrayLike) -> FloatArray:
    """d_eff = N0 (held-out loss - training loss) [derived; Moody 1992].

    The expected optimism of a ridge fit (lambda = 0: maximum likelihood) is d_eff / N0, whatever the true parameters:
    exactly so for new labels at the same inputs of a Gaussian model, asymptotically for new inputs, too. One difference
    is noisy: average over folds and seeds.

    Args:
        training_loss: mean negative log-likelihood in nats of the samples trained on.
        validation_loss: of others from the same distribution.
        target_samples: N0, how many were trained on, positive.

    Returns:
        d_eff, float64, of the broadcast shape; negative where noise made it so.

    Raises:
        ValueError: an argument is out of its range or not finite.
    """
    gap = check_array("validation_loss", validation_loss) - check_array("training_loss", training_loss)
    return np.asarray(positive("target_samples", target_samples) * gap)


def distance_dimension(squared_distance: ArrayLike, first_samples: ArrayLike, second_samples: ArrayLike) -> FloatArray:
    """d_eff = |theta_a - theta_b|_J^2 / (1/n_a + 1/n_b), of estimates from separate samples of one task [derived].

    An unbiased measurement of n tr(J cov(theta)), d for maximum-likelihood estimates. For shrunken ones it counts their
    variance only, not what the shrinkage costs: sum_i mu_i^2 / (mu_i + lambda)^2 for a ridge, below
    :func:`effective_dimension`.

    Args:
        squared_distance: delta^T J delta, delta = theta_a - theta_b, not negative.
        first_samples: n_a, positive.
        second_samples: n_b, positive.

    Returns:
        d_eff, float64, of the broadcast shape.

    Raises:
        ValueError: an argument is out of its range or not finite.
    """
    per_sample = 1 / positive("first_samples", first_samples) + 1 / positive("second_samples", second_samples)
    return np.asarray(nonnegative("squared_distance", squared_distance) / per_sample)


class SplitHalves(NamedTuple):
    """What two estimates of every task from separate halves of its samples tell.

    Attributes:
        gram: an unbiased estimate of A, float64 [K, K], symmetric. It may be indefinite:
            :func:`transferops.otqms.semidefinite.project` makes it fit for :func:`transferops.otqms.allocate`.
        target_noise: v_0 = E[e_0^T J e_0] of the mean of the target's two estimates: d / N0 at maximum likelihood.
        source_noise: v_i likewise, float64 [K].
    """

    gram: FloatArray
    target_noise: float
    source_noise: FloatArray


def split_halves(gram: ArrayLike) -> SplitHalves:
    """A freed of the estimates' noise, and the noise itself, without an assumption about either [derived].

    Differences theta_i - theta_0 formed within the first halves and within the second have independent errors, so
    their cross products (D_a^T J D_b + D_b^T J D_a) / 2 have the mean A. The distance between the halves of one task
    has the mean 4 v_i, v_i being the noise of their average. J must come from other samples, or be smooth enough that
    its own dependence on them does not matter.

    Args:
        gram: theta^T J theta, shape [2 K + 2, 2 K + 2], of the models' parameters relative to any common point, ordered
            target, sources (first halves), target, sources (second halves).

    Returns:
        See :class:`SplitHalves`.

    Raises:
        ValueError: ``gram`` does not have such a shape, or is not finite.
    """
    matrix = check_array("gram", gram)
    tasks = len(matrix) // 2 if matrix.ndim == 2 else 0
    if tasks < 2 or matrix.shape != (2 * tasks, 2 * tasks):
        fail("gram", "shape [2 K + 2, 2 K + 2] with K of at least 1", f"shape {list(matrix.shape)}")
    within = matrix[:tasks, :tasks] + matrix[tasks:, tasks:]
    cross = (matrix[:tasks, tasks:] + matrix[tasks:, :tasks]) / 2
    cross = (cross + cross.T) / 2
    differences = cross[1:, 1:] - cross[1:, :1] - cross[:1, 1:] + cross[0, 0]
    noise = np.maximum(np.diagonal(within) - 2 * np.diagonal(cross), 0) / 4
    return SplitHalves(differences, float(noise[0]), noise[1:].copy())


def _spectrum(eigenvalues: ArrayLike) -> FloatArray:
    spectrum = check_array("eigenvalues", eigenvalues)
    if spectrum.size:  # a computed spectrum is a little negative where it should be zero
        rounding = 8 * spectrum.size * np.finfo(np.float64).eps * max(float(spectrum.max()), 0.0)
        spectrum = nonnegative("eigenvalues", np.where(np.abs(spectrum) <= rounding, 0.0, spectrum))
    if spectrum.ndim != 1 or not spectrum.any():
        fail("eigenvalues", "shape [M] with at least one above zero", f"shape {list(spectrum.shape)}")
    return spectrum


def _number(argument: str, value: float) -> float:
    array = positive(argument, value)
    if array.ndim:
        fail(argument, "a number", f"shape {list(array.shape)}")
    return float(array)
