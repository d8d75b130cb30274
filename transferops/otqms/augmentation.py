"""Random translations of training images: the augmentation that needs to know least about what the images show.

Drawn with the plan of an epoch, so that neither the number of processes nor an interruption changes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch


def translate(images: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Move each image by its own offset; what comes in from outside repeats the nearest pixel of the edge.

    Args:
        images: ``[N, C, H, W]``.
        offsets: Pixels down and to the right, int64 ``[N, 2]``.

    Returns:
        Images of the same shape and memory format.
    """
    height, width = images.shape[2:]
    offsets = offsets.to(images.device)
    rows = (torch.arange(height, device=images.device) - offsets[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - offsets[:, 1:]).clamp(0, width - 1)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return moved.contiguous(memory_format=torch.contiguous_format if images.is_contiguous() else torch.channels_last)


def draw_offsets(shape: torch.Size, reach: float, size: torch.Size, generator: torch.Generator) -> torch.Tensor | None:
    """Offsets for :func:`translate`, each uniform among those within reach.

    Args:
        shape: Of a sample; anything but ``[C, H, W]`` is not an image.
        reach: Largest translation, as a part of the height and of the width; to the nearest pixel, a half down.
        size: How many offsets, of any shape.
        generator: On the CPU; not used where there is nothing to draw.

    Returns:
        int64 ``[*size, 2]`` on the CPU; ``None`` if no image can move.
    """
    if len(shape) != 3:
        return None
    largest = [math.ceil(side * reach - 0.5) for side in shape[1:]]
    if max(largest) <= 0:
        return None
    return torch.stack([torch.randint(-most, most + 1, size, generator=generator) for most in largest], dim=-1)


def translated(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]], offsets: Iterable[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``batches`` of images and labels with the images moved."""
    for (images, labels), own in zip(batches, offsets, strict=True):
        yield translate(images, own), labels
