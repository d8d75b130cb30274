"""The scores by name."""

from __future__ import annotations

from transferops.scores.base import Score
from transferops.scores.energy import Energy
from transferops.scores.etran import Etran
from transferops.scores.gbc import Gbc
from transferops.scores.h_score import HScore
from transferops.scores.knn import Knn
from transferops.scores.leep import Leep, Nce
from transferops.scores.log_me import LogMe
from transferops.scores.n_leep import NLeep
from transferops.scores.parc import Parc
from transferops.scores.sfda import Sfda
from transferops.scores.trans_rate import TransRate

SCORES: dict[str, type[Score]] = {
    cls.name: cls for cls in (HScore, LogMe, TransRate, Knn, Gbc, Sfda, Etran, Parc, NLeep, Leep, Nce, Energy)
}
"""Name to class: every score of one set of samples that can be made without arguments.

``takes`` of the class says what its ``update`` takes beside labels: "features", "probabilities" or "logits" of the
source model, or "source_labels"; ``requires``, which package it needs beyond torch and NumPy, if any.
"""

RELATIONS: dict[str, str | None] = {"pge": None, "pge_cosine": None, "task2vec": None, "otce": "POT"}
"""Scores of two sets of samples, a source's beside the target's, and the package that each needs.

They need more than one ``update(values, labels)`` can give: gradients of a shared network, a shared probe, or the
source's own features. :func:`transferops.rank.source_relations` computes them by name; here they are
:class:`PrincipalGradientExpectation`, :func:`task_embedding` with :func:`task_distance`, and :class:`Otce`.
"""
