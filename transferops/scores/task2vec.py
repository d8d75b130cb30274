"""Task2Vec: a task as the diagonal of a probe network's Fisher information, and distances between such vectors.

[paper: Achille et al., ICCV 2019, "Task2Vec: Task Embedding for Meta-Learning"]. The probe, pretrained, gets a head
that is trained on the task; the embedding is the diagonal Fisher information of its body, averaged over the weights of
each filter (output unit). The paper estimates it by a variational method; here it is the diagonal itself, exact,
empirical or by Monte-Carlo, from :class:`transferops.fisher.FisherInformation`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from transferops._validate import as_tensor, describe, fail
from transferops.fisher import FisherInformation


def task_embedding(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    body: Callable[[str], bool] | Collection[str],
    estimator: str = "monte_carlo",
    seed: int = 0,
) -> Tensor:
    """Embed a task by the diagonal Fisher information of a probe whose head was trained on it.

    Args:
        model: the probe with its head; parameters of the body that require a gradient take part.
        batches: inputs [N, ...], or (inputs, labels), of the task; as for ``FisherInformation``.
        body: names of the parameters that make up the embedding, or a predicate on names. The same for all tasks; the
            head, whose size depends on the classes, must stay out.
        estimator: "monte_carlo" (as published), "exact" or "empirical".
        seed: of the Monte-Carlo draws.

    Returns:
        [F] float64 on the CPU, at least 0: for each weight of two or more dimensions, in the order of the parameters,
        one entry per output unit, the mean over its weights. Biases and norm parameters are left out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``body`` names no weight, or as ``FisherInformation.diagonal``.
    """
    fisher = FisherInformation(model, estimator=estimator, seed=seed, parameters=body)
    diagonal = fisher.diagonal(batches)
    entries = [value.double().flatten(1).mean(1).cpu() for value in diagonal.values() if value.dim() >= 2]
    if not entries:
        fail("body", "at least one weight of two or more dimensions", ", ".join(diagonal) or "no parameter")
    return torch.cat(entries)


def task_distance(first: Tensor | Any, second: Tensor | Any) -> float:
    """Symmetric distance of two tasks: the cosine distance of F_a / (F_a + F_b) and F_b / (F_a + F_b) [paper].

    Args:
        first, second: [F] embeddings by the same probe.

    Returns:
        Between 0 (the same) and 1; smaller means closer. The scale of single entries does not matter, that of a whole
        embedding does. Entries that are 0 in both are left out.

    Raises:
        TypeError: an embedding is no floating-point array.
        ValueError: shapes disagree, an entry is negative or not finite, or an embedding is zero.
    """
    a, b = _check("first", first), _check("second", second)
    if a.shape != b.shape:
        fail("second", f"shape {list(a.shape)}, as first", f"{list(b.shape)}")
    total = a + b
    shared = total > 0
    a, b = a[shared] / total[shared], b[shared] / total[shared]
    return max(0.0, 1 - float(a.dot(b) / (a.norm() * b.norm())))


def asymmetric_task_distance(
    source: Tensor | Any, target: Tensor | Any, trivial: Tensor | Any, *, alpha: float = 0.15
) -> float:
    """Distance of a source to a target that favours complex sources: d(s, t) - alpha d(s, trivial) [paper].

    Args:
        source, target: [F] embeddings by the same probe.
        trivial: [F], the embedding of a task without content (a head that ignores its input, or samples of one class).
        alpha: 0.15 as published.

    Returns:
        Between -alpha and 1; smaller means more transferable: negate it to rank sources.

    Raises:
        TypeError, ValueError: as for :func:`task_distance`.
    """
    return task_distance(source, target) - float(alpha) * task_distance(source, trivial)


def _check(argument: str, value: Any) -> Tensor:
    embedding = as_tensor(argument, value).detach()
    if not embedding.is_floating_point():
        fail(argument, "floating point", describe(embedding), TypeError)
    if embedding.dim() != 1:
        fail(argument, "shape [F]", describe(embedding))
    embedding = embedding.double()
    bad = (~(torch.isfinite(embedding) & (embedding >= 0))).nonzero()
    if len(bad):
        position = int(bad[0])
        fail(argument, "finite entries of at least 0", f"{float(embedding[position])} at position {position}")
    if not bool((embedding > 0).any()):
        fail(argument, "an embedding that is not zero", "only zeros")
    return embedding
