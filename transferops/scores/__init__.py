"""Which source or model suits the target: transferability scores.

Every score is a function (``h_score(features, labels)``) and a streaming class of the same name (``HScore`` with
``update``, ``merge`` and ``compute``). Higher means more transferable throughout.
"""

from ._warnings import ScoreWarning
from .h_score import HScore, HScoreDetails, h_score
from .moments import FeatureMoments, MomentsAccumulator

__all__ = ["FeatureMoments", "HScore", "HScoreDetails", "MomentsAccumulator", "ScoreWarning", "h_score"]
