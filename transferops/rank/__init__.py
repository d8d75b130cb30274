"""Which source or which model suits the target: extraction of features, many scores at once, and how well they rank."""

from __future__ import annotations

from transferops.rank.cache import extract_cached
from transferops.rank.candidates import Candidate, load_candidate
from transferops.rank.evaluation import Measure, RankingQuality, compare_scores, evaluate_ranking
from transferops.rank.extraction import HEAD_INPUT, Extraction, extract
from transferops.rank.ranking import BASELINES, Ranked, Ranking, default_scores, rank_candidates
from transferops.rank.relations import (
    embedding_relations,
    gradient_relations,
    source_relations,
    transport_relations,
)
from transferops.rank.results import to_json
from transferops.rank.sources import source_candidates

__all__ = [
    "BASELINES",
    "HEAD_INPUT",
    "Candidate",
    "Extraction",
    "Measure",
    "Ranked",
    "Ranking",
    "RankingQuality",
    "compare_scores",
    "default_scores",
    "embedding_relations",
    "evaluate_ranking",
    "extract",
    "extract_cached",
    "gradient_relations",
    "load_candidate",
    "rank_candidates",
    "source_candidates",
    "source_relations",
    "to_json",
    "transport_relations",
]
