"""Which source or model suits the target: transferability scores.

Every score is a function (``h_score(features, labels)``) and a streaming class of the same name (``HScore`` with
``update``, ``merge``, ``compute``, ``details``, ``state_dict``, ``all_reduce`` and scikit-learn's ``fit``). Higher
means more transferable throughout. :data:`SCORES` has them by name, :data:`RELATIONS` those that compare two sets of
samples; :func:`score_all` and :class:`ScoreCollection` compute several in one pass.
"""

from transferops.scores._warnings import ScoreWarning
from transferops.scores.base import Score, ScoreDetails
from transferops.scores.collection import ScoreCollection, score_all
from transferops.scores.energy import Energy, energy
from transferops.scores.etran import Etran, etran, etran_ranking
from transferops.scores.gbc import Gbc, gbc
from transferops.scores.h_score import HScore, HScoreDetails, h_score
from transferops.scores.knn import Knn, knn
from transferops.scores.leep import Leep, Nce, leep, nce
from transferops.scores.log_me import LogMe, LogMeDetails, log_me
from transferops.scores.moments import FeatureMoments, MomentsAccumulator
from transferops.scores.multi_source import Combination, MultiSourceHScore, multi_source_h_score
from transferops.scores.n_leep import NLeep, n_leep
from transferops.scores.otce import Otce, otce
from transferops.scores.parc import Parc, parc
from transferops.scores.pge import PgeResult, PrincipalGradientExpectation
from transferops.scores.pge_gap import pge_cosine, pge_gap
from transferops.scores.registry import RELATIONS, SCORES
from transferops.scores.sfda import Sfda, sfda
from transferops.scores.task2vec import asymmetric_task_distance, task_distance, task_embedding
from transferops.scores.trans_rate import TransRate, trans_rate

__all__ = [
    "RELATIONS",
    "SCORES",
    "Combination",
    "Energy",
    "Etran",
    "FeatureMoments",
    "Gbc",
    "HScore",
    "HScoreDetails",
    "Knn",
    "Leep",
    "LogMe",
    "LogMeDetails",
    "MomentsAccumulator",
    "MultiSourceHScore",
    "NLeep",
    "Nce",
    "Otce",
    "Parc",
    "PgeResult",
    "PrincipalGradientExpectation",
    "Score",
    "ScoreCollection",
    "ScoreDetails",
    "ScoreWarning",
    "Sfda",
    "TransRate",
    "asymmetric_task_distance",
    "energy",
    "etran",
    "etran_ranking",
    "gbc",
    "h_score",
    "knn",
    "leep",
    "log_me",
    "multi_source_h_score",
    "n_leep",
    "nce",
    "otce",
    "parc",
    "pge_cosine",
    "pge_gap",
    "score_all",
    "sfda",
    "task_distance",
    "task_embedding",
    "trans_rate",
]
