"""The kernels as pure functions of tensors.

Each takes CPU or CUDA tensors (or NumPy and other DLPack arrays), works under ``torch.compile`` and ``torch.export``,
and is registered as ``torch.ops.transferops.<name>`` for use from C++.
"""

from transferops.ops.fisher import (
    conv_fisher_diagonal,
    conv_fisher_projection,
    conv_grad_norm,
    linear_fisher_diagonal,
    linear_fisher_projection,
    linear_grad_norm,
    softmax_fisher_gram,
)
from transferops.ops.gradients import (
    GradientFisherGram,
    gradient_expectation_,
    gradient_expectation_gram_,
    gradient_fisher_gram,
    gradient_gram,
    weighted_gram,
)
from transferops.ops.moments import ClassMoments, NormMoments, SampleGram, class_moments, norm_moments, sample_gram
from transferops.ops.prediction import EmpiricalPrediction, empirical_prediction

__all__ = [
    "ClassMoments",
    "EmpiricalPrediction",
    "GradientFisherGram",
    "NormMoments",
    "SampleGram",
    "class_moments",
    "conv_fisher_diagonal",
    "conv_fisher_projection",
    "conv_grad_norm",
    "empirical_prediction",
    "gradient_expectation_",
    "gradient_expectation_gram_",
    "gradient_fisher_gram",
    "gradient_gram",
    "linear_fisher_diagonal",
    "linear_fisher_projection",
    "linear_grad_norm",
    "norm_moments",
    "sample_gram",
    "softmax_fisher_gram",
    "weighted_gram",
]
