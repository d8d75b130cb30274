"""Partial parameter transfer between two-layer ReLU CNNs, simulated: hundreds of networks at once.

The setting of "Towards Understanding Feature Learning in Parameter Transfer", arXiv 2509.22056 [paper]: a sample
with label y = +-1 has a signal patch y (u + v_k) and a noise patch xi ~ N(0, sigma_k^2 (I - P)), P the projection on
span(u, v_1, v_2), three orthogonal directions. Task 1 is upstream, task 2 downstream; u is shared, v_k is the task's
own. A share alpha of the upstream filters is inherited, the others start afresh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby

import torch

from transferops._validate import check_positive_int, describe, fail

_CHUNK_ELEMENTS = 2**25  # of upstream noise patches in memory at once: 128 MiB


@dataclass(frozen=True)
class TransferSetting:
    """One pair of tasks.

    Attributes:
        shared: |u|, strength of the signal that both tasks have.
        upstream_samples: N1.
        downstream_samples: N2.
        upstream_signal: |v_1|.
        downstream_signal: |v_2|.
        upstream_noise: sigma_1.
        downstream_noise: sigma_2.
        dimension: d of a patch, at least 4.

    Raises:
        ValueError: A number is out of range.
    """

    shared: float
    upstream_samples: int = 200
    downstream_samples: int = 20
    upstream_signal: float = 2.0
    downstream_signal: float = 2.0
    upstream_noise: float = 1.0
    downstream_noise: float = 1.0
    dimension: int = 1000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                check_positive_int(field.name, value, minimum=4 if field.name == "dimension" else 1)
            elif not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                fail(field.name, "a finite number of at least 0", describe(value))
        for name in ("upstream_noise", "downstream_noise"):
            if getattr(self, name) == 0:
                fail(name, "a positive number", describe(0))


def gamma_index(setting: TransferSetting, alpha: float) -> float:
    """Signal against noise of the downstream network that inherits a share alpha [derived; constants dropped].

    Gamma = S^2/T^2 with S = N2 (|u|^2 + |v_2|^2)/(sigma_2^2 d) + alpha N1 |u|^2/(sigma_1^2 d) and
    T^2 = N2/d + alpha^2 N1 sigma_2^2/(sigma_1^2 d) + alpha^2 sigma_2^2 N1^2 |v_1|^2/(sigma_1^4 d^2).
    Transfer is predicted to hurt iff Gamma(alpha) < Gamma(0). Where it errs it mostly warns of harm that is not
    there, at alpha = 1 most of all, where no fresh filter is left (measured by bench/study_inherit.py).

    Args:
        setting: numbers of samples, dimension, signals and noise of both tasks.
        alpha: share of the filters that are inherited, in [0, 1].

    Returns:
        Gamma.

    Raises:
        ValueError: ``alpha`` is not in [0, 1].
    """
    _check_share("alpha", alpha)
    n1, n2, d = setting.upstream_samples, setting.downstream_samples, setting.dimension
    u, v1, v2 = setting.shared**2, setting.upstream_signal**2, setting.downstream_signal**2
    s1, s2 = setting.upstream_noise**2, setting.downstream_noise**2
    signal = n2 * (u + v2) / (s2 * d) + alpha * n1 * u / (s1 * d)
    noise = n2 / d + alpha**2 * n1 * s2 / (s1 * d) + alpha**2 * s2 * n1**2 * v1 / (s1 * d) ** 2
    return signal**2 / noise


def simulate(
    settings: Sequence[TransferSetting],
    alphas: Sequence[float],
    seeds: Sequence[int],
    *,
    filters: int = 20,
    learning_rate: float = 0.5,
    steps: int = 300,
    initial_scale: float = 0.01,
    upstream_mean: bool = False,
    test_samples: int = 2000,
    on_progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Train every setting upstream and, for every alpha, downstream; return the downstream test accuracy.

    The network is f(x) = (2/m) sum_r s_r (relu<w_r, x_1> + relu<w_r, x_2>) over m filters, the first half with
    s_r = +1, the second with -1, fixed; the loss is logistic, trained by gradient descent from N(0, scale^2) weights.
    The gradients of the samples are added and divided by N2 downstream and, unless ``upstream_mean``, upstream, too:
    a sample then moves the weights as far in one task as in the other, which is what :func:`gamma_index` counts;
    with ``upstream_mean`` both tasks have the mean loss, and the upstream noise is learned more weakly.

    Whole filters are inherited, the same share of either sign, rounded to the nearest number. A seed fixes data,
    fresh weights and the order in which filters are inherited, for all settings and alphas alike: differences are
    paired.

    Exact shortcuts [derived]: weights stay in the span of their start and the patches, so a step is taken on the
    inner products with the N + 1 distinct patches (their Gram matrix is computed once), not on d weights; test noise
    enters through m inner products only, which are drawn from their joint normal distribution.

    Args:
        settings: Pairs of tasks.
        alphas: Shares in [0, 1].
        seeds: Repetitions.
        filters: m, even.
        learning_rate: Positive.
        steps: Of gradient descent, in either task.
        initial_scale: Standard deviation of fresh weights, positive.
        upstream_mean: See above.
        test_samples: Test set of every network.
        on_progress: Called with (networks done, networks in all), upstream networks counted.

    Returns:
        float64 ``[settings, alphas, seeds]``.

    Raises:
        ValueError: An argument is out of range or empty.
        RuntimeError: The training diverges.
    """
    for name, value in (("settings", settings), ("alphas", alphas), ("seeds", seeds)):
        if len(value) == 0:
            fail(name, "at least one", "none")
    for alpha in alphas:
        _check_share("alphas", alpha)
    for name, number in (("learning_rate", learning_rate), ("initial_scale", initial_scale)):
        if not (math.isfinite(number) and number > 0):
            fail(name, "a positive number", describe(number))
    if check_positive_int("filters", filters) % 2:
        fail("filters", "an even number", describe(filters))
    check_positive_int("steps", steps)
    check_positive_int("test_samples", test_samples)

    networks = [(setting, i, seed, j) for i, setting in enumerate(settings) for j, seed in enumerate(seeds)]
    networks.sort(key=lambda network: _shape(network[0]))
    accuracy = torch.empty(len(settings), len(alphas), len(seeds), dtype=torch.float64)
    done = 0
    for shape, group in groupby(networks, key=lambda network: _shape(network[0])):
        members = list(group)
        size = max(1, _CHUNK_ELEMENTS // (shape[0] * shape[2]))
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            batch = _Batch([m[0] for m in chunk], [m[2] for m in chunk], filters, initial_scale, test_samples)
            result = batch.run(alphas, learning_rate, steps, upstream_mean)
            for column, (_, i, _, j) in enumerate(chunk):
                accuracy[i, :, j] = result[:, column]
            done += len(chunk)
            if on_progress is not None:
                on_progress(done, len(networks))
    return accuracy


def _shape(setting: TransferSetting) -> tuple[int, int, int]:
    return setting.upstream_samples, setting.downstream_samples, setting.dimension


def _check_share(argument: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        fail(argument, "a number in [0, 1]", describe(value))


@dataclass(frozen=True)
class _Task:
    """Samples of B tasks: signal [B, d], noise patches [B, N, d], labels +-1 [B, N]."""

    signal: torch.Tensor
    noise: torch.Tensor
    labels: torch.Tensor


class _Batch:
    """B pairs of tasks of one shape, with everything random about them drawn. u, v_1, v_2 lie on the first axes."""

    def __init__(
        self,
        settings: Sequence[TransferSetting],
        seeds: Sequence[int],
        filters: int,
        scale: float,
        test_samples: int,
    ) -> None:
        n1, n2, d = _shape(settings[0])
        self.signs = torch.ones(filters)
        self.signs[filters // 2 :] = -1
        upstream, downstream, first, fresh, order, tests = [], [], [], [], [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            upstream.append(_draw(n1, d, generator))
            downstream.append(_draw(n2, d, generator))
            first.append(scale * torch.randn(filters, d, generator=generator))
            fresh.append(scale * torch.randn(filters, d, generator=generator))
            order.append(torch.cat([torch.randperm(filters // 2, generator=generator) for _ in range(2)]))
            tests.append(_draw(test_samples, filters, generator, axes=0))
        self.first, self.fresh, self.order = torch.stack(first), torch.stack(fresh), torch.stack(order)
        self.test_noise, self.test_labels = (torch.stack(part) for part in zip(*tests, strict=True))
        self.test_scale = torch.tensor([s.downstream_noise for s in settings])
        self.upstream = self._task(upstream, settings, "upstream", 1)
        self.downstream = self._task(downstream, settings, "downstream", 2)

    @staticmethod
    def _task(
        drawn: list[tuple[torch.Tensor, torch.Tensor]], settings: Sequence[TransferSetting], name: str, axis: int
    ) -> _Task:
        noise, labels = (torch.stack(part) for part in zip(*drawn, strict=True))
        noise *= torch.tensor([getattr(s, f"{name}_noise") for s in settings])[:, None, None]
        signal = torch.zeros(len(settings), noise.shape[2])
        signal[:, 0] = torch.tensor([float(s.shared) for s in settings])
        signal[:, axis] = torch.tensor([float(getattr(s, f"{name}_signal")) for s in settings])
        return _Task(signal, noise, labels)

    def run(self, alphas: Sequence[float], rate: float, steps: int, upstream_mean: bool) -> torch.Tensor:
        """Accuracy, float64 [alphas, B]."""
        n1, n2 = self.upstream.labels.shape[1], self.downstream.labels.shape[1]
        gram = self.downstream.noise @ self.downstream.noise.mT
        inherited = _descend(
            self.first,
            self.upstream,
            self.upstream.noise @ self.upstream.noise.mT,
            self.signs,
            rate / (n1 if upstream_mean else n2),
            steps,
        )
        half = len(self.signs) // 2
        accuracy = []
        for alpha in alphas:
            kept = self.order < math.floor(alpha * half + 0.5)
            start = torch.where(kept[..., None], inherited, self.fresh)
            weights = _descend(start, self.downstream, gram, self.signs, rate / n2, steps)
            accuracy.append(self._accuracy(weights))
        return torch.stack(accuracy)

    def _accuracy(self, weights: torch.Tensor) -> torch.Tensor:
        # <w_r, xi> over r is normal with covariance sigma^2 W (I - P) W^T.
        outside = weights[..., 3:].double()
        covariance = outside @ outside.mT
        values, vectors = torch.linalg.eigh(covariance)
        root = (vectors * values.clamp_min(0).sqrt()[:, None, :]).float() * self.test_scale[:, None, None]
        noise = (self.test_noise @ root.mT).relu_()
        signal = (weights @ self.downstream.signal[..., None])[..., 0]
        activation = noise.add_((self.test_labels[..., None] * signal[:, None]).relu())
        right: torch.Tensor = (activation @ self.signs) * self.test_labels > 0
        return right.double().mean(1)


def _draw(samples: int, dimension: int, generator: torch.Generator, axes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal noise [N, d], zero on the first ``axes``, and labels +-1 [N]."""
    noise = torch.randn(samples, dimension, generator=generator)
    noise[:, :axes] = 0
    return noise, torch.randint(0, 2, (samples,), generator=generator) * 2.0 - 1.0


def _descend(
    weights: torch.Tensor, task: _Task, gram: torch.Tensor, signs: torch.Tensor, rate: float, steps: int
) -> torch.Tensor:
    """Gradient descent on B networks at once, in the coordinates of the distinct patches.

    Args:
        weights: The start, [B, m, d].
        task: The samples.
        gram: Of the noise patches, [B, N, N]; they are orthogonal to the signal.
        signs: s_r, [m].
        rate: Step for the sum over samples.
        steps: How many.

    Returns:
        The weights reached, [B, m, d].
    """
    positive = (task.labels > 0).to(weights.dtype)
    length = (task.signal**2).sum(1, keepdim=True)
    factor = (2 / len(signs)) * signs
    on_signal = (weights @ task.signal[..., None])[..., 0]
    on_noise = weights @ task.noise.mT
    signal_share = torch.zeros_like(on_signal)
    noise_share = torch.zeros_like(on_noise)
    for _ in range(steps):
        # On the signal patch of a sample with label +1 the filters with a positive product answer, else the others.
        at_positive, at_negative = (on_signal.relu() @ factor)[:, None], ((-on_signal).relu() @ factor)[:, None]
        output = torch.lerp(at_negative, at_positive, positive) + factor @ on_noise.relu()
        weight = rate * torch.sigmoid(-task.labels * output)
        of_positive, of_negative = (weight * positive).sum(1, True), (weight * (1 - positive)).sum(1, True)
        signal_step = factor * torch.where(on_signal > 0, of_positive, of_negative * (on_signal < 0))
        noise_step = (on_noise > 0) * (weight * task.labels)[:, None]
        noise_step *= factor[:, None]
        signal_share += signal_step
        noise_share += noise_step
        on_signal += signal_step * length
        on_noise.baddbmm_(noise_step, gram)
    if not bool(on_noise.isfinite().all()):
        raise RuntimeError("the simulated training diverged; a smaller learning rate may help")
    return weights + signal_share[..., None] * task.signal[:, None] + noise_share @ task.noise
