"""Plain PyTorch float64 references, written from the definitions and for clarity only."""

from __future__ import annotations

import torch
from torch import Tensor


def class_moments(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, centred class sums, centred Gram and column means; leading dimensions are a batch."""
    x = features.double()
    shift = x.mean(-2) if x.shape[-2] else x.new_zeros(*x.shape[:-2], x.shape[-1])
    y = x - shift.unsqueeze(-2)
    one_hot = torch.nn.functional.one_hot(labels, num_classes).double()
    return one_hot.sum(0).long(), one_hot.mT @ y, y.mT @ y, shift


def projection_h_score(features: Tensor, labels: Tensor) -> float:
    """tr(P_X P_Y) from an orthonormal basis of the centred features (full column rank) and of the class indicators."""
    x = features.double()
    basis, _ = torch.linalg.qr(x - x.mean(0))
    indicator = torch.nn.functional.one_hot(labels, int(labels.max()) + 1).double()
    counts = indicator.sum(0)
    centred = (indicator - counts / len(x)) / counts.sqrt()
    return float((basis.mT @ centred).square().sum())


def published_regularized_h_score(features: Tensor, labels: Tensor) -> float:
    """The published formula taken literally: all D x D matrices, one outer product per sample."""
    x = features.double()
    x = x - x.mean(0)
    samples, dim = x.shape
    covariance = x.mT @ x / samples
    identity = torch.eye(dim, dtype=torch.float64)
    sigma = covariance.trace() / dim
    noise = sum(float((torch.outer(row, row) - covariance).square().sum()) for row in x) / samples**2
    alpha = min(1.0, noise / float((covariance - sigma * identity).square().sum()))
    shrunk = (1 - alpha) * covariance + alpha * sigma * identity
    means = torch.stack([x[labels == label].mean(0) for label in labels.tolist()])
    between = means.mT @ means / (samples - 1)
    return (1 - alpha) * float(torch.trace(torch.linalg.solve(shrunk, between)))
