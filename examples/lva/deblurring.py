"""Deblurring with a small SRCNN on synthetic images: from one blur to a stronger one with noise, all arms.

    python examples/lva/deblurring.py --output results

Images 32x32 of random rectangles and discs; the network (9x9, 1x1, 5x5 convolutions as in SRCNN, with 16 and 8
channels) learns to undo a Gaussian blur of 1 pixel. The target is blurred by 1 to 2 pixels, with noise of standard
deviation 0.02; 4 target images are at hand to adapt to, 24 others measure the result.
"""

from __future__ import annotations

import math

import torch
from common import ARMS, Pairs, adapt, arguments, report, train
from torch import Tensor, nn
from torch.nn import functional as F

BLURS = (1.0, 1.25, 1.5, 1.75, 2.0)
SIZE, SOURCE, TARGET, TEST = 32, 128, 4, 24


def images(count: int) -> Tensor:
    """[count, 1, 32, 32] in [0, 1]: six shapes each, later ones in front."""
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    result = torch.rand(count, 1, 1, 1).expand(count, 1, SIZE, SIZE).clone()
    for _ in range(6):
        y, x, height, width = (torch.rand(4, count, 1, 1) * torch.tensor([SIZE, SIZE, 9, 9]).view(4, 1, 1, 1)) + 1
        disc = torch.rand(count, 1, 1) < 0.5
        round_ = ((row - y) / height) ** 2 + ((column - x) / width) ** 2 < 1
        square = ((row - y).abs() < height) & ((column - x).abs() < width)
        inside = torch.where(disc, round_, square).unsqueeze(1)
        result = torch.where(inside, torch.rand(count, 1, 1, 1), result)
    return result


def blurred(sharp: Tensor, sigma: float, noise: float) -> Pairs:
    taps = torch.exp(-torch.arange(-6, 7).square() / (2 * sigma**2))
    kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
    padded = F.pad(sharp, (6, 6, 6, 6), mode="reflect")
    return F.conv2d(padded, kernel) + noise * torch.randn_like(sharp), sharp


def main() -> None:
    options = arguments("Deblurring")
    results: dict[str, dict[str, list[float]]] = {f"{s:g}": {arm: [] for arm in ARMS} for s in BLURS}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 9, padding=4), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 1, 5, padding=2)
        )
        train(model, blurred(images(SOURCE), 1.0, 0.0), 400, 3e-3, 16)
        for sigma in BLURS:
            at_hand, test = blurred(images(TARGET), sigma, 0.02), blurred(images(TEST), sigma, 0.02)
            for arm in ARMS:
                adapted = adapt(arm, model, at_hand, ("2", "4"), 100, 1e-3)
                with torch.no_grad():
                    error = F.mse_loss(adapted(test[0]), test[1])
                results[f"{sigma:g}"][arm].append(-10 * math.log10(float(error)))
    settings = {
        "source": SOURCE,
        "target": TARGET,
        "test": TEST,
        "seeds": options.seeds,
        "network": "SRCNN 9-1-5, 16-8",
    }
    report("deblurring", settings, results, ("blur of the target, pixels", "PSNR, dB"), options.output)


if __name__ == "__main__":
    main()
