"""A ranking as JSON."""

from __future__ import annotations

import math
from typing import Any

from transferops.otqms.results import versions
from transferops.rank.ranking import Ranking


def to_json(ranking: Ranking, **about: Any) -> dict[str, Any]:
    """The document that ``transferops rank --json`` writes.

    Args:
        ranking: What :func:`transferops.rank.rank_candidates` has found.
        about: Further entries, put first.

    Returns:
        ``target``, ``samples``, ``classes``, ``scores`` (names), ``candidates`` (a list in the order given, each with
        ``name``, ``layer``, ``scores`` by name with ``null`` where there is none, ``notes`` by score, ``mean_rank``),
        ``versions`` and ``about``.
    """
    return {
        **about,
        "target": ranking.target,
        "samples": ranking.samples,
        "classes": ranking.classes,
        "scores": list(ranking.scores),
        "candidates": [
            {
                "name": row.name,
                "layer": row.layer,
                "scores": {name: None if math.isnan(value) else value for name, value in row.scores.items()},
                "notes": row.notes,
                "mean_rank": rank,
            }
            for row, rank in zip(ranking.rows, ranking.mean_ranks(), strict=True)
        ],
        "versions": versions(),
    }
