"""Which source or model suits the target: transferability scores.

Every score is a function (``h_score(features, labels)``) and a streaming class of the same name (``HScore`` with
``update``, ``merge`` and ``compute``). Higher means more transferable throughout.
"""

from transferops.scores._warnings import ScoreWarning
from transferops.scores.h_score import HScore, HScoreDetails, h_score
from transferops.scores.knn import Knn, knn
from transferops.scores.leep import Leep, Nce, leep, nce
from transferops.scores.log_me import LogMe, log_me
from transferops.scores.moments import FeatureMoments, MomentsAccumulator
from transferops.scores.trans_rate import TransRate, trans_rate

__all__ = [
    "FeatureMoments",
    "HScore",
    "HScoreDetails",
    "Knn",
    "Leep",
    "LogMe",
    "MomentsAccumulator",
    "Nce",
    "ScoreWarning",
    "TransRate",
    "h_score",
    "knn",
    "leep",
    "log_me",
    "nce",
    "trans_rate",
]
