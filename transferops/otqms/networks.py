"""Small networks for when the user brings none.

Neither normalises: after a normalisation layer the logits do not depend on the scale of the weights before
it, so differences between parameters, which the allocation is computed from, would say little about
differences between tasks; and batch statistics would couple the samples that a Fisher information sums over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from transferops._validate import check_positive_int, fail

_SMALLEST_IMAGE = 8


class ConvNet(nn.Module):
    """Three 3x3 convolutions with ReLU, averaged to 2x2 positions, and a linear head.

    Args:
        channels: Channels of the images.
        classes: Number of logits, at least 2.
        width: Channels of the first convolution; the other two have twice as many.

    Shape:
        float32 ``[N, channels, H, W]``, H and W at least 8, to ``[N, classes]``. After each convolution the
        image is halved by max pooling as long as it has 8 pixels or more on its shorter side.

    Raises:
        ValueError: A number is not a positive integer, or there are fewer than 2 classes.
    """

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        check_positive_int("channels", channels)
        check_positive_int("classes", classes, minimum=2)
        check_positive_int("width", width)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1)
            for before, after in ((channels, width), (width, 2 * width), (2 * width, 2 * width))
        )
        self.head = nn.Linear(4 * 2 * width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, classes]``."""
        hidden = images
        for convolution in self.convolutions:
            hidden = F.relu(convolution(hidden))
            if min(hidden.shape[2:]) >= _SMALLEST_IMAGE:
                hidden = F.max_pool2d(hidden, 2)
        logits: torch.Tensor = self.head(F.adaptive_avg_pool2d(hidden, 2).flatten(1))
        return logits


class FeatureNet(nn.Sequential):
    """A multilayer perceptron with one hidden layer for feature vectors, or a linear head.

    Args:
        features: Numbers per sample.
        classes: Number of logits, at least 2.
        hidden: Units of the hidden layer; 0 for a linear head.

    Shape:
        float32 ``[N, features]`` to ``[N, classes]``.

    Raises:
        ValueError: ``features`` is no positive integer, ``hidden`` a negative one, or there are fewer than 2 classes.
    """

    def __init__(self, features: int, classes: int, hidden: int = 64) -> None:
        check_positive_int("features", features)
        check_positive_int("classes", classes, minimum=2)
        check_positive_int("hidden", hidden, minimum=0)
        if hidden == 0:
            super().__init__(nn.Linear(features, classes))
        else:
            super().__init__(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def network_for(sample_shape: Sequence[int], classes: int) -> nn.Module:
    """The built-in network for samples of a shape.

    Args:
        sample_shape: Of one sample, without the batch dimension.
        classes: Number of logits, at least 2.

    Returns:
        :class:`ConvNet` for ``(C, H, W)``, :class:`FeatureNet` for ``(D,)``.

    Raises:
        ValueError: For any other shape, or images below 8 pixels.
    """
    shape = tuple(sample_shape)
    if len(shape) == 1:
        return FeatureNet(shape[0], classes)
    if len(shape) == 3 and min(shape[1:]) >= _SMALLEST_IMAGE:
        return ConvNet(shape[0], classes)
    return fail("sample_shape", f"(C, H, W) of at least {_SMALLEST_IMAGE} pixels, or (D,)", str(shape))
