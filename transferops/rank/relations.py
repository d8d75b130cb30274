"""Scores that compare the data of a source with those of the target, not features of one with labels of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from transferops._models import find_head
from transferops._validate import check_positive_int, fail
from transferops.fisher.modes import evaluation
from transferops.otqms import TrainingOptions
from transferops.otqms.pool import TensorSamples
from transferops.rank.candidates import Candidate
from transferops.rank.extraction import HEAD_INPUT, extract
from transferops.rank.sources import source_candidates
from transferops.scores import RELATIONS, PrincipalGradientExpectation, otce, task_distance, task_embedding

_TARGET = "\0target"  # no source's name


class LabelledTensors(Protocol):
    """Anything with ``inputs`` ``[N, ...]`` and ``labels`` int64 ``[N]``, such as a domain."""

    @property
    def inputs(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


def gradient_relations(
    model: Callable[[], nn.Module],
    target: LabelledTensors,
    sources: Mapping[str, LabelledTensors],
    *,
    restarts: int = 8,
    samples: int = 256,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """How alike the principal gradient expectations of the target and of each source are.

    All see the same initialisations. As many samples are taken of each, the expectation being over batches of one size:
    a larger batch has a smaller gradient noise, and so a smaller norm.

    Args:
        model: Makes the network.
        target: Labelled samples of the target.
        sources: Those of each source, by name, with labels of the same meaning.
        restarts: Initialisations.
        samples: Of the target and of each source at most, drawn at random; all take as many as the smallest has.
        seed: Of the initialisations and of the samples.

    Returns:
        "pge" (minus the gap) and "pge_cosine", each by source; higher promises more. See
        :class:`transferops.scores.PrincipalGradientExpectation`.

    Raises:
        ValueError: No sources, or as ``PrincipalGradientExpectation``.
    """
    if not sources:
        fail("sources", "at least one source", "none")
    expectation = PrincipalGradientExpectation(model(), restarts=restarts, seed=seed)
    for name, (inputs, labels) in _equally_many({_TARGET: target, **sources}, samples, seed).items():
        expectation.update(name, inputs, labels)
    result = expectation.compute()
    return {
        "pge": {name: -float(result.gap[0, 1 + i]) for i, name in enumerate(sources)},
        "pge_cosine": {name: float(result.cosine[0, 1 + i]) for i, name in enumerate(sources)},
    }


def embedding_relations(
    model: Callable[[], nn.Module],
    target: LabelledTensors,
    sources: Mapping[str, LabelledTensors],
    *,
    options: TrainingOptions | None = None,
    samples: int = 256,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """How near the Task2Vec embeddings of the target and of each source are.

    The probe is one network trained on all sources and the target together, so that its head serves every task, the
    labels having the same meaning in all of them [derived: the paper's probe is pretrained elsewhere, and has a head of
    its own for each task].

    Args:
        model: Makes the network.
        target: Labelled samples of the target.
        sources: Those of each source, by name, with labels of the same meaning.
        options: How to train the probe, as a source model.
        samples: As for :func:`gradient_relations`; the embedding is the mean over them.
        seed: Of the probe's initialisation, of the samples and of the labels drawn for the Fisher information.

    Returns:
        "task2vec", minus :func:`transferops.scores.task_distance`, by source; higher promises more.

    Raises:
        ValueError: No sources, or a network whose head cannot be found.
    """
    if not sources:
        fail("sources", "at least one source", "none")
    tasks = {_TARGET: target, **sources}
    together = TensorSamples(
        torch.cat([task.inputs for task in tasks.values()]), torch.cat([task.labels for task in tasks.values()])
    )
    probe = source_candidates(model, target, {"all": together}, options=options, seed=seed)["all"].model
    device = next(probe.parameters()).device
    with evaluation(probe):
        head, _ = find_head(probe, lambda: probe(target.inputs[:1].to(device)))
    body = [name for name, _ in probe.named_parameters() if not name.startswith(head + ".")]
    embeddings = {
        name: task_embedding(probe, [inputs], body=body, seed=seed)
        for name, (inputs, _) in _equally_many(tasks, samples, seed).items()
    }
    return {"task2vec": {name: -task_distance(embeddings[name], embeddings[_TARGET]) for name in sources}}


def transport_relations(
    candidates: Mapping[str, Candidate],
    target: LabelledTensors,
    sources: Mapping[str, LabelledTensors],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """How well each source's labels tell the target's once their features are matched by optimal transport.

    Args:
        candidates: The model of each source, by its name; see :func:`transferops.rank.source_candidates`.
        target: Labelled samples of the target.
        sources: Those of each source, by name; labels may mean anything.
        samples: Of the target and of each source at most, drawn at random.
        seed: Of the samples.

    Returns:
        "otce", -W_T of :func:`transferops.scores.otce`, by source, of features at the head's input scaled to a mean
        squared distance of 1 between source and target, since the regularisation is in units of the cost.

    Raises:
        ImportError: POT is not installed.
        ValueError: No sources.

    Warns:
        ScoreWarning: A transport did not converge.
    """
    if not sources:
        fail("sources", "at least one source", "none")
    found = {}
    own = _chosen(target, samples, seed)
    for name, source in sources.items():
        theirs, mine = (extract(candidates[name].model, [batch]) for batch in (_chosen(source, samples, seed), own))
        features = [each.features[HEAD_INPUT].double() for each in (theirs, mine)]
        apart = features[0].mean(0) - features[1].mean(0)
        spread = sum(x.var(0, correction=0).sum() for x in features) + apart.square().sum()
        scale = spread.clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
        found[name] = otce(features[0] * scale, theirs.labels, features[1] * scale, mine.labels)
    return {"otce": found}


def source_relations(
    names: Iterable[str],
    model: Callable[[], nn.Module],
    target: LabelledTensors,
    sources: Mapping[str, LabelledTensors],
    candidates: Mapping[str, Candidate],
    *,
    options: TrainingOptions | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Scores among :data:`transferops.scores.RELATIONS` of each source beside the target.

    Args:
        names: Of the scores.
        model, target, sources, options, seed: As for :func:`gradient_relations` and :func:`embedding_relations`.
        candidates: As for :func:`transport_relations`.

    Returns:
        By name, the score of each source; for ``extra`` of :func:`transferops.rank.rank_candidates`.

    Raises:
        ImportError: A score's package is not installed.
        ValueError: A name is unknown, or there are no sources.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in RELATIONS:
            fail("names", f"names among {', '.join(RELATIONS)}", repr(name))
    found: dict[str, dict[str, float]] = {}
    if {"pge", "pge_cosine"} & set(names):
        found |= gradient_relations(model, target, sources, seed=seed)
    if "task2vec" in names:
        found |= embedding_relations(model, target, sources, options=options, seed=seed)
    if "otce" in names:
        found |= transport_relations(candidates, target, sources, seed=seed)
    return {name: found[name] for name in names}


def _equally_many(tasks: Mapping[str, LabelledTensors], samples: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    count = min(check_positive_int("samples", samples), *(len(task.labels) for task in tasks.values()))
    return {name: _chosen(task, count, seed) for name, task in tasks.items()}


def _chosen(task: LabelledTensors, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(task.labels), generator=torch.Generator().manual_seed(seed))
    index = order[: check_positive_int("samples", samples)]
    return task.inputs[index], task.labels[index]
