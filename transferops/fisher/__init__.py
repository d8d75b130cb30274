"""Fisher information of a network, contracted with given directions: never a d x d matrix."""

from transferops.fisher.accumulate import Accumulator
from transferops.fisher.contraction import softmax_fisher_gram, tangent_gram
from transferops.fisher.directions import LowRank, parameter_differences
from transferops.fisher.information import FisherInformation
from transferops.fisher.spectrum import EffectiveDimension

__all__ = [
    "Accumulator",
    "EffectiveDimension",
    "FisherInformation",
    "LowRank",
    "parameter_differences",
    "softmax_fisher_gram",
    "tangent_gram",
]
