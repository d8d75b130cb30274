"""The 1-D regression setting of layer variational analysis (arXiv 2302.01798), all arms.

    python examples/lva/regression.py --output results

A network 1-64-64-1 learns x = sin(5 pi t) from 2000 points. The target has t~ = t + 0.05 n, n ~ N(1.5, 0.8), and
x~ = r x + u, u ~ U(-0.03, 0.03), for r from 1 to 1.8; 100 samples of it are at hand to adapt to, 2000 others measure
the result. The setting is the paper's; how many target samples it adapts to and how long it trains is not known here,
so the numbers are no reproduction of its table. 0.8 is read as the standard deviation.
"""

from __future__ import annotations

import math

import torch
from common import ARMS, Pairs, adapt, arguments, report, train
from torch import nn
from torch.nn import functional as F

SHIFTS = (1.0, 1.2, 1.4, 1.6, 1.8)
SOURCE, TARGET, TEST = 2000, 100, 2000


def signal(t: torch.Tensor) -> torch.Tensor:
    return torch.sin(5 * math.pi * t)


def target(count: int, r: float) -> Pairs:
    t = 2 * torch.rand(count, 1) - 1
    moved = t + 0.05 * (1.5 + 0.8 * torch.randn(count, 1))
    return moved, r * signal(t) + 0.06 * torch.rand(count, 1) - 0.03


def main() -> None:
    options = arguments("1-D regression")
    results: dict[str, dict[str, list[float]]] = {f"{r:g}": {arm: [] for arm in ARMS} for r in SHIFTS}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        t = torch.linspace(-1, 1, SOURCE + 1)[:-1, None]
        model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        train(model, (t, signal(t)), 3000, 3e-3, 256)
        for r in SHIFTS:
            at_hand, test = target(TARGET, r), target(TEST, r)
            for arm in ARMS:
                adapted = adapt(arm, model, at_hand, ("2", "4"), 500, 1e-3)
                with torch.no_grad():
                    results[f"{r:g}"][arm].append(float(F.mse_loss(adapted(test[0]), test[1])))
    settings = {"source": SOURCE, "target": TARGET, "test": TEST, "seeds": options.seeds, "network": "1-64-64-1, tanh"}
    axes = ("amplitude r of the target", "mean squared error")
    report("regression", settings, results, axes, options.output, lambda panel: panel.set_yscale("log"))


if __name__ == "__main__":
    main()
