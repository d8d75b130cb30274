"""What an epoch trains on, by the rules of OTQMS and by simpler ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from transferops.otqms.akaike import akaike_shares
from transferops.otqms.allocation import Allocation, allocate
from transferops.otqms.phases import Anchor, Decide, Decision, Situation
from transferops.otqms.rounding import largest_remainder
from transferops.otqms.theory import FloatArray


def dynamic_quantities(situation: Situation) -> Decision:
    """OTQMS, dynamic [paper]: the quantities of least predicted risk, found anew at the current model.

    The one quadratic programme that finds them is [derived], see :func:`transferops.otqms.allocate`.
    """
    allocation = allocate(situation.gram(), situation.target_samples, situation.source_samples, situation.dimension)
    return Decision(tuple(allocation.rounded().tolist()), float(allocation.risk))


def quantities_at(anchor: Anchor, *, debias: bool = False) -> Decide:
    """The same at a model trained on the target alone, which does not move.

    Args:
        anchor: How far that model is trained, see :data:`transferops.otqms.phases.Anchor`.
        debias: Whether the excess of A that comes from estimating theta_0 and theta_i on samples is taken off
            first [derived].
    """

    def decide(situation: Situation) -> Decision:
        allocation = allocate(
            situation.anchor_gram(anchor),
            situation.target_samples,
            situation.source_samples,
            situation.dimension,
            debias=debias,
        )
        return Decision(tuple(allocation.rounded().tolist()), float(allocation.risk))

    return decide


def weights(situation: Situation) -> Decision:
    """Weights instead of quantities [derived]: all samples of all sources, each with a weight in the loss.

    The shares of the loss minimise the predicted risk. A source of no share is not drawn from.
    """
    allocation = allocate(
        situation.gram(), situation.target_samples, situation.source_samples, situation.dimension, mode="weight"
    )
    return _weighted(allocation)


def surveyed_shares(situation: Situation) -> Decision:
    """The shares of the loss by a survey, realised by how often samples are drawn [derived].

    A and d both come from :class:`transferops.otqms.survey.Survey`, so that they are on one scale; the shares are
    :func:`transferops.otqms.akaike.akaike_shares`. As the loss is unweighted, no step is dominated by the few target
    samples in it.
    """
    survey = situation.survey()
    available = survey.available(situation.source_samples)
    found = akaike_shares(survey.gram, situation.target_samples, available, survey.dimension)
    return _drawn(situation, np.array([found.target, *found.sources]), found.risk, available)


def surveyed_quantities(situation: Situation) -> Decision:
    """The quantities of least predicted risk by a survey, in rounds [derived].

    A is shrunk first, so that the noise of the target's estimate is not fitted
    (:func:`transferops.otqms.semidefinite.shrink`). A round is the target's samples once and the quantities of each
    source, other samples of it in every round.
    """
    survey, target = situation.survey(), situation.target_samples
    available = survey.available(situation.source_samples)
    gram = survey.shrunk(target, situation.source_samples)
    allocation = allocate(gram, target, available, survey.dimension)
    masses = np.array([target, *allocation.quantities])
    return _drawn(situation, masses / masses.sum(), float(allocation.risk), available)


def budget(situation: Situation) -> Decision:
    """Quantities under a budget of samples or of seconds, and weights on those [derived]."""
    limit, costs = _limit(situation)
    allocation = allocate(
        situation.gram(),
        situation.target_samples,
        situation.source_samples,
        situation.dimension,
        mode="budget",
        budget=sum(situation.source_samples) // 2 if limit is None else limit,
        costs=costs,
    )
    return _weighted(allocation)


def uniform(situation: Situation) -> Decision:
    """As much as the budget allows, or as "quantities-dynamic" would take now, the same part of every source."""
    limit, costs = _limit(situation)
    if limit is None:
        limit = sum(dynamic_quantities(situation).quantities)
    available = np.array(situation.source_samples, dtype=np.float64)
    part = min(limit / float(costs @ available), 1.0)
    whole = largest_remainder(part * available, available, np.ones_like(available), np.inf)
    return Decision(tuple(whole.tolist()))


def _drawn(situation: Situation, masses: FloatArray, risk: float, available: Sequence[int]) -> Decision:
    """Draws in proportion to ``masses``, of sum 1: as many as the budget allows, or half as many as there are samples.

    The target's come in several rounds.
    """
    total = situation.budget or math.ceil((situation.target_samples + sum(available)) / 2)
    if situation.budget_seconds is not None:
        total = max(math.floor(situation.budget_seconds / float(masses @ np.array(situation.costs()))), 1)
    drawn = largest_remainder(masses * total, np.full(len(masses), total), np.ones(len(masses)))
    return Decision(tuple(drawn[1:].tolist()), risk, target=int(drawn[0]))


def _limit(situation: Situation) -> tuple[float | None, FloatArray]:
    """What may be spent on the sources, if anything limits it, and what a sample of each costs."""
    if situation.budget_seconds is None:
        return situation.budget, np.ones(len(situation.source_samples))
    target, *sources = situation.costs()
    return max(situation.budget_seconds - target * situation.target_samples, 0.0), np.array(sources)


def _weighted(allocation: Allocation) -> Decision:
    """Draw the quantities and weigh them."""
    weights = (1.0, *allocation.sample_weights.tolist())
    return Decision(tuple(allocation.rounded().tolist()), float(allocation.risk), weights=weights)
