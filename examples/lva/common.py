"""What both reproductions share: the arms, training, and the picture."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transferops._figures import DPI, new_figure, plain_axes
from transferops.adapt import adapt_head, adapt_layers, published_head
from transferops.adapt.head_layer import find_head, recording
from transferops.fisher.batches import Batch

ARMS = {
    "none": "no adaptation",
    "gradient-1": "gradient descent, last layer",
    "gradient-2": "gradient descent, two layers",
    "pinv": "published pseudo-inverse",
    "head": "ours, last layer",
    "layers": "ours, two layers",
}

Pairs = tuple[Tensor, Tensor]


def train(
    model: nn.Module, data: Pairs, steps: int, lr: float, batch: int, parameters: Sequence[str] = ()
) -> nn.Module:
    """Adam on the mean squared error, of all parameters or of the modules named."""
    names = [n for n, _ in model.named_parameters() if not parameters or n.split(".")[0] in parameters]
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if n in names], lr=lr)
    for _ in range(steps):
        index = torch.randint(len(data[0]), (min(batch, len(data[0])),))
        loss = F.mse_loss(model(data[0][index]), data[1][index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def adapt(arm: str, model: nn.Module, data: Pairs, layers: Sequence[str], steps: int, lr: float) -> nn.Module:
    """The model, adapted by one arm; ``layers`` names the last two, the head last."""
    model = copy.deepcopy(model)
    if arm == "gradient-1":
        return train(model, data, steps, lr, 64, layers[-1:])
    if arm == "gradient-2":
        return train(model, data, steps, lr, 64, layers)
    if arm == "pinv":
        head = find_head(model, Batch(0, data[0][:1], None, 1))
        with torch.no_grad(), recording(head.module) as recorder:
            model(data[0])
            inputs, outputs = recorder.take(head.name)
        weight, bias = published_head(head.rows(inputs), head.targets(data[1], outputs), head.weight, head.bias)
        assert bias is not None
        head.set(weight, bias)
    elif arm == "head":
        model, _ = adapt_head(model, [data])
    elif arm == "layers":
        kept = len(data[0]) * 3 // 4
        model, _ = adapt_layers(
            model, [(data[0][:kept], data[1][:kept])], [(data[0][kept:], data[1][kept:])], layers[:1]
        )
    return model


def arguments(description: str) -> argparse.Namespace:
    """Options of both scripts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the JSON and the picture")
    parser.add_argument("--seeds", type=int, default=5)
    return parser.parse_args()


def report(name: str, settings: dict[str, Any], results: dict[str, dict[str, list[float]]], axis: tuple[str, str],
           folder: Path, scale: Callable[[Any], Any] | None = None) -> None:  # fmt: skip
    """Print a table; write the JSON and a picture with means and standard errors over seeds.

    Args:
        name: of the files.
        settings: put on record.
        results: by place on the axis and arm, one number per seed.
        axis: labels of the picture's axes.
        folder: where to write.
        scale: called with the axes, to set scales.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    figure = new_figure(3.8)
    panel = plain_axes(figure.subplots())
    places = [float(place) for place in results]
    print(f"{axis[1]} by {axis[0]}")
    print(f"{'':32}" + "".join(f"{place:>18}" for place in results))
    for offset, (arm, label) in enumerate(ARMS.items()):
        values = [results[place][arm] for place in results]
        errors = [stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in values]
        print(f"{label:32}" + "".join(f"{f'{fmean(v):.4g} ± {e:.2g}':>18}" for v, e in zip(values, errors)))
        width = 0.006 * (max(places) - min(places))
        shifted = [place + (offset - 2.5) * width for place in places]
        panel.errorbar(shifted, [fmean(v) for v in values], errors, fmt="o-", capsize=2, markersize=3, label=label)
    panel.set_xlabel(axis[0])
    panel.set_ylabel(axis[1])
    if scale is not None:
        scale(panel)
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(folder / f"{name}.png", dpi=DPI)
