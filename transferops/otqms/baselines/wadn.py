"""Weights in the manner of WADN (Shui et al., "Aggregating From Multiple Target-Shifted Sources", ICML 2021)."""

from __future__ import annotations

import numpy as np
import torch

from transferops.otqms.baselines.ensembles import Features
from transferops.otqms.phases import Decision, Situation

_SAMPLES = 512  # of a source, for its loss and its class centroids
_BISECTIONS = 200


def wadn(situation: Situation) -> Decision:
    """All samples, with weights that prefer sources of small loss, near class centroids and many samples.

    With limited target labels the paper minimises over lambda on the simplex
    sum_t lambda_t (R_t + C0 D_t) + C1 sqrt(sum_t lambda_t^2 / beta_t): R_t is the loss on source t with its
    labels reweighted to the target's class proportions, D_t the distance between the class-conditional feature
    distributions of source and target, averaged over the target's classes, beta_t the source's share of all
    samples. A sample of source t then counts lambda_t / N_t times the ratio of the class's proportions.

    Simplified: D_t is the distance of class centroids, as the paper too computes it, in the features before
    the last linear layer, divided by their root mean square norm; the target is a member of its own with D = 0;
    C0 = C1 = 1; the terms that align features (centroid matching, adversarial loss) are left out; R_t and the
    centroids come from the first 512 samples of a source.
    """
    samples = situation.samples
    sizes = np.array(samples.sizes, dtype=np.float64)
    classes = int(samples.labels.max()) + 1
    proportions = torch.stack(
        [torch.bincount(samples.part_labels(part), minlength=classes) for part in range(len(sizes))]
    ).double()
    proportions /= proportions.sum(1, keepdim=True)
    ratios = torch.where(proportions > 0, proportions[0] / proportions.clamp_min(1e-12), 0.0)
    losses, centroids, scale = _assess(situation, ratios, classes)
    present = proportions[0] > 0
    distances = []
    for own in centroids:
        both = present & own.isfinite().all(1) & centroids[0].isfinite().all(1)
        apart = (own[both] - centroids[0][both]).norm(dim=1) / scale
        distances.append(
            float((proportions[0][both] * apart).sum() / proportions[0][both].sum()) if both.any() else 2.0
        )
    shares = _simplex_minimum(np.array(losses) + np.array(distances), sizes / sizes.sum())
    table = torch.tensor(shares / sizes)[:, None] * ratios
    return Decision(situation.source_samples, weights=tuple(tuple(row) for row in table.tolist()))


def _assess(situation: Situation, ratios: torch.Tensor, classes: int) -> tuple[list[float], torch.Tensor, float]:
    """Reweighted losses, class centroids ``[K + 1, C, D]`` (NaN for an empty class) and the scale of features."""
    samples, model = situation.samples, situation.model
    training = model.training
    extractor = Features(model.eval())
    losses, centroids, squares, count = [], [], 0.0, 0
    with torch.no_grad():
        for part in range(len(samples.sizes)):
            found, labels_found, loss, mass = [], [], 0.0, 0.0
            for inputs, labels in samples.batches(samples.positions(part)[:_SAMPLES]):
                found.append(extractor(inputs).cpu())
                logits = extractor.outputs
                factors = ratios[part][labels.cpu()]
                each = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double().cpu()
                loss, mass = loss + float((factors * each).sum()), mass + float(factors.sum())
                labels_found.append(labels.cpu())
            features, labels = torch.cat(found), torch.cat(labels_found)
            member = torch.nn.functional.one_hot(labels, classes).double()
            centroids.append((member.T @ features) / member.sum(0)[:, None])
            losses.append(loss / mass if mass > 0 else float("inf"))
            squares, count = squares + float(features.square().sum()), count + len(features)
    extractor.remove()
    model.train(training)
    worst = max((loss for loss in losses if loss < float("inf")), default=0.0)
    return [min(loss, 10 * worst + 10) for loss in losses], torch.stack(centroids), (squares / count) ** 0.5 + 1e-12


def _simplex_minimum(costs: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The minimiser of c^T x + sqrt(sum x_i^2 / b_i) over the simplex, which is convex.

    With nu the multiplier of sum x = 1 and r the root at the optimum, x_i = r b_i max(nu - c_i, 0); the sizes
    of both sides agree where sum b_i max(nu - c_i, 0)^2 = 1, found by bisection; r makes the sum one.
    """
    low, high = float(costs.min()), float(costs.min() + 1 / np.sqrt(sizes[costs.argmin()])) + 1e-12
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if float((sizes * np.maximum(middle - costs, 0) ** 2).sum()) < 1:
            low = middle
        else:
            high = middle
    shares = sizes * np.maximum(high - costs, 0)
    return np.asarray(shares / shares.sum())
