"""Classifiers made of the source models' features and the target's samples, without training.

The features of a source model are the inputs of its last linear layer. With features f centred on the
target's samples, all of them predict by maximal correlation regression: P(y|x) = P(y) (1 + f(x)^T g(y)).

Simplified against the papers: P(y) and the moments are those of the target's training samples, the sources'
own heads are not used, and probabilities below 1e-6 are raised to it, so that they have a logarithm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from transferops.otqms.options import head
from transferops.otqms.phases import Materials
from transferops.otqms.pool import Pool

_LEAST_PROBABILITY = 1e-6
_ASCENT_STEPS = 200
_ASCENT_RATE = 0.1


class Features(nn.Module):
    """The inputs of a model's last linear layer, ``[N, D]``, in float64.

    Attributes:
        outputs: The model's own, of the last call.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outputs = self._seen = torch.zeros(0)
        self._hook = head(model)[1].register_forward_pre_hook(self._keep)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features of ``inputs``."""
        self.outputs = self.model(inputs)
        return self._seen

    def remove(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()

    def _keep(self, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._seen = arguments[0].detach().flatten(1).double()


class CorrelationClassifier(nn.Module):
    """Logits log P(y) + log(1 + (f(x) - mean)^T g(y)) of combined features f.

    Args:
        features: Of the source models.
        combine: From their features ``[K, N, D]``-like list to f ``[N, D']``.
        mean: Of f.
        profiles: g, ``[D', C]``.
        prior: P(y), ``[C]``.
    """

    mean: torch.Tensor
    profiles: torch.Tensor
    prior: torch.Tensor

    def __init__(
        self,
        features: list[Features],
        combine: Callable[[list[torch.Tensor]], torch.Tensor],
        mean: torch.Tensor,
        profiles: torch.Tensor,
        prior: torch.Tensor,
    ) -> None:
        super().__init__()
        self.features = nn.ModuleList(features)
        self._combine = combine
        self.register_buffer("mean", mean)
        self.register_buffer("profiles", profiles)
        self.register_buffer("prior", prior)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits, float32 ``[N, C]``."""
        combined = self._combine([features(inputs) for features in self.features])
        factor = 1 + (combined - self.mean) @ self.profiles
        return (self.prior * factor).clamp_min(_LEAST_PROBABILITY).log().float()


def maximal_correlation_weighting(materials: Materials) -> nn.Module:
    """MCW (Lee, Sattigeri, Wornell, "Learning New Tricks From Old Dogs", NeurIPS 2019) [paper].

    Every feature of every source, scaled to unit variance on the target's samples, counts with its maximal
    correlation sigma: P(y|x) = P(y) (1 + sum_j sigma_j f_j(x) g_j(y)), g_j(y) = E[f_j | y] / sigma_j.
    """
    features, found, labels, classes = _target_features(materials)
    scales = [1 / value.std(0, correction=0).clamp_min(1e-8) for value in found]

    def combine(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([value * scale for value, scale in zip(values, scales, strict=True)], 1)

    combined = combine(found)
    _, means, prior = _class_means(combined, labels, classes)
    return CorrelationClassifier(features, combine, combined.mean(0), means.T, prior)


def h_ensemble(materials: Materials) -> nn.Module:
    """H-ensemble (arXiv 2312.12489): the convex combination of features of largest H-score.

    f = sum_k a_k f_k with a on the simplex maximises H(f) = tr(cov(f)^-1 cov(E[f|y])); then
    g(y) = cov(f)^-1 E[f|y]. With few target samples the plain score is C - 1 for any features, so cov(f) is
    shrunk towards a multiple of the identity by the rule of Ledoit and Wolf [derived here; arXiv 2110.06893
    has it for a single source].
    """
    return _ensemble(materials, _h_score)


def released_h_ensemble(materials: Materials) -> nn.Module:
    """The same with the objective of the authors' released code, tr cov(E[f|y]) / tr cov(f)."""
    return _ensemble(materials, _variance_ratio)


def _ensemble(materials: Materials, objective: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]) -> nn.Module:
    features, found, labels, classes = _target_features(materials)
    if len({value.shape[1] for value in found}) > 1:
        raise ValueError("source_models: expected features of one dimension, got several")
    stacked = torch.stack(found)
    free = torch.zeros(len(found), dtype=torch.float64, device=stacked.device, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=_ASCENT_RATE)
    for _ in range(_ASCENT_STEPS):
        score = objective(torch.einsum("k,knd->nd", free.softmax(0), stacked), labels, classes)
        optimizer.zero_grad()
        (-score).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    coefficients = free.detach().softmax(0)

    def combine(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.einsum("k,knd->nd", coefficients, torch.stack(values))

    combined = combine(found)
    centred, means, prior = _class_means(combined, labels, classes)
    profiles = torch.linalg.solve(_shrunk_covariance(centred), means.T)
    return CorrelationClassifier(features, combine, combined.mean(0), profiles, prior)


def _h_score(features: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    centred, means, prior = _class_means(features, labels, classes)
    whitened: torch.Tensor = torch.linalg.solve(_shrunk_covariance(centred), means.T)
    return (prior * (means * whitened.T).sum(1)).sum()


def _variance_ratio(features: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    centred, means, prior = _class_means(features, labels, classes)
    return (prior * means.square().sum(1)).sum() / centred.square().sum(1).mean()


def _class_means(
    features: torch.Tensor, labels: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centred features ``[N, D]``, their class means ``[C, D]`` (0 for an empty class) and P(y) ``[C]``."""
    centred = features - features.mean(0)
    member = torch.nn.functional.one_hot(labels, classes).to(centred.dtype)
    counts = member.sum(0)
    return centred, (member.T @ centred) / counts.clamp_min(1)[:, None], counts / counts.sum()


def _shrunk_covariance(centred: torch.Tensor) -> torch.Tensor:
    """(1 - a) S + a sigma I, S = X^T X / N, sigma = tr S / D, a by Ledoit and Wolf (2004)."""
    samples, dimension = centred.shape
    covariance = centred.T @ centred / samples
    level = covariance.diagonal().mean()
    identity = torch.eye(dimension, dtype=centred.dtype, device=centred.device)
    with torch.no_grad():
        spread = centred.square().sum(1).square().sum() / samples - covariance.square().sum()
        distance = (covariance - level * identity).square().sum()
        amount = (spread / samples / distance.clamp_min(1e-300)).clamp(1e-6, 1)
    return (1 - amount) * covariance + (amount * level + 1e-12) * identity


def _target_features(materials: Materials) -> tuple[list[Features], list[torch.Tensor], torch.Tensor, int]:
    """Extractors, their features of the target's samples, the labels and the number of classes."""
    samples: Pool = materials.samples
    extractors = [Features(model) for model in materials.source_models()]
    classes = head(extractors[0].model)[1].out_features
    found: list[list[torch.Tensor]] = [[] for _ in extractors]
    with torch.no_grad():
        for inputs, _ in samples.batches(samples.positions(0)):
            for own, extractor in zip(found, extractors, strict=True):
                own.append(extractor(inputs))
    return extractors, [torch.cat(own) for own in found], samples.part_labels(0).to(samples.device), classes
