"""The kernels as pure functions of tensors.

Each takes CPU or CUDA tensors (or NumPy and other DLPack arrays), works under ``torch.compile`` and ``torch.export``,
and is registered as ``torch.ops.transferops.<name>`` for use from C++.
"""

from .moments import ClassMoments, NormMoments, SampleGram, class_moments, norm_moments, sample_gram

__all__ = ["ClassMoments", "NormMoments", "SampleGram", "class_moments", "norm_moments", "sample_gram"]
