"""What an epoch trains on, by the rules of OTQMS and by simpler ones."""

from __future__ import annotations

import math

import numpy as np

from transferops.otqms.akaike import akaike_shares
from transferops.otqms.allocation import Allocation, allocate
from transferops.otqms.phases import Anchor, Decide, Decision, Situation
from transferops.otqms.rounding import largest_remainder


def quantities(situation: Situation) -> Decision:
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
    :func:`transferops.otqms.akaike.akaike_shares`. An epoch draws as many samples as the budget says, or half as many
    as there are, the target's in several rounds. As the loss is then unweighted, no step is dominated by the few
    target samples in it.
    """
    survey = situation.survey()
    found = akaike_shares(survey.gram, situation.target_samples, situation.source_samples, survey.dimension)
    masses = np.array([found.target, *found.sources])
    total = situation.budget or math.ceil((situation.target_samples + sum(situation.source_samples)) / 2)
    drawn = largest_remainder(masses * total, np.full(len(masses), total), np.ones(len(masses)))
    return Decision(tuple(drawn[1:].tolist()), found.risk, target=int(drawn[0]))


def budget(situation: Situation) -> Decision:
    """Quantities under a budget of samples, and weights on those [derived]."""
    limit = situation.budget or sum(situation.source_samples) // 2
    allocation = allocate(
        situation.gram(),
        situation.target_samples,
        situation.source_samples,
        situation.dimension,
        mode="budget",
        budget=limit,
    )
    return _weighted(allocation)


def uniform(situation: Situation) -> Decision:
    """As many samples as the budget says, or as "quantities" would take now, the same part of every source."""
    total = situation.budget
    if total is None:
        decided = quantities(situation)
        total = sum(decided.quantities)
    available = np.array(situation.source_samples, dtype=np.float64)
    part = min(total / available.sum(), 1.0)
    whole = largest_remainder(part * available, available, np.ones_like(available), np.inf)
    return Decision(tuple(whole.tolist()))


def _weighted(allocation: Allocation) -> Decision:
    """Draw the quantities and weigh them."""
    weights = (1.0, *allocation.sample_weights.tolist())
    return Decision(tuple(allocation.rounded().tolist()), float(allocation.risk), weights=weights)
