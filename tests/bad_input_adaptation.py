"""Malformed calls of heads, inheritance and the check of transfer, each with its exact message."""

from __future__ import annotations

import math

import torch
from bad_input_table import Case
from test_bad_input import NAN, X, Y
from torch import nn

from transferops.adapt import (
    HeadSolver,
    adapt_head,
    adapt_layers,
    freeze,
    inherit,
    paired_effects,
    published_head,
    transfer_check,
)

NET = nn.Linear(3, 2)

ADAPTATION: dict[str, Case] = {
    "an unknown mode of a head": (
        lambda: adapt_head(NET, [(X, Y)], mode="fast"),
        ValueError,
        "mode: expected 'exact' or 'perturb', got 'fast'",
    ),
    "a negative penalty": (
        lambda: adapt_head(NET, [(X, Y)], lam=-1.0),
        ValueError,
        "lam: expected a number of at least 0, got -1.0",
    ),
    "no batches for a head": (
        lambda: adapt_head(NET, []),
        ValueError,
        "batches: expected at least one batch, got none",
    ),
    "an unknown head": (
        lambda: adapt_head(NET, [(X, Y)], head="fc"),
        ValueError,
        "head: expected a Linear, Conv1d or Conv2d layer of the model (''), got 'fc'",
    ),
    "a label out of range for a head": (
        lambda: adapt_head(NET, [(X, Y + 2)]),
        ValueError,
        "targets: expected 2 classes 0..1, got 2 at row 0",
    ),
    "too few labels for a head": (
        lambda: adapt_head(NET, [(X, Y[:3])]),
        ValueError,
        "targets: expected 4 labels, one for each output position, got shape [3]",
    ),
    "NaN in features of a head": (
        lambda: adapt_head(NET, [(NAN, Y)]),
        ValueError,
        "features: expected finite values, got nan at position [2, 1]",
    ),
    "labels without classes": (
        lambda: HeadSolver().update(X, Y),
        ValueError,
        "classes: expected a number of classes, or a prior, where targets are labels, got None",
    ),
    "a target scale of 0": (
        lambda: HeadSolver(classes=2, target_scale=0.0),
        ValueError,
        "target_scale: expected 'auto' or a positive number, got 0.0",
    ),
    "features of integers": (
        lambda: HeadSolver(classes=2).update(X.int(), Y),
        TypeError,
        "features: expected float32, float64, float16 or bfloat16, got a int32 tensor of shape [4, 3] on cpu",
    ),
    "rows of another width": (
        lambda: HeadSolver(classes=2).update(X, Y).update(X[:, :2], Y),
        ValueError,
        "features: expected 3 features, got 2",
    ),
    "negative weights": (
        lambda: HeadSolver(classes=2).update(X, Y, -torch.ones(4)),
        ValueError,
        "weights: expected numbers of at least 0, got -1.0 at row 0",
    ),
    "weights for other rows": (
        lambda: HeadSolver(classes=2).update(X, Y, torch.ones(3)),
        ValueError,
        "weights: expected shape [4] on cpu, got a float64 tensor of shape [3] on cpu",
    ),
    "a solve without samples": (
        lambda: HeadSolver(classes=2).solve(1.0),
        ValueError,
        "features: expected at least one sample before a head is solved for, got none",
    ),
    "merging a number": (lambda: HeadSolver(classes=2).merge(3), TypeError, "other: expected a HeadSolver, got 3"),
    "a prior bias without a weight": (
        lambda: HeadSolver(None, torch.zeros(2)),
        ValueError,
        "prior_bias: expected None without prior_weight, got a float32 tensor of shape [2] on cpu",
    ),
    "classes unlike the prior": (
        lambda: HeadSolver(torch.zeros(2, 3), classes=3),
        ValueError,
        "classes: expected the 2 rows of prior_weight, got 3",
    ),
    "a published head of half precision": (
        lambda: published_head(X.half(), Y.half().unsqueeze(1), torch.zeros(1, 3)),
        TypeError,
        "features: expected float32 or float64, got a float16 tensor of shape [4, 3] on cpu",
    ),
    "a target too few for a published head": (
        lambda: published_head(X, Y[:3].float().unsqueeze(1), torch.zeros(1, 3)),
        ValueError,
        "targets: expected 4 rows, one for each row of features, got a float32 tensor of shape [3, 1] on cpu",
    ),
    "a published head of another shape": (
        lambda: published_head(X, Y.float().unsqueeze(1), torch.zeros(2, 3)),
        ValueError,
        "weight: expected shape [1, 3], got a float32 tensor of shape [2, 3] on cpu",
    ),
    "a published head's bias of another shape": (
        lambda: published_head(X, Y.float().unsqueeze(1), torch.zeros(1, 3), torch.zeros(2)),
        ValueError,
        "bias: expected shape [1], got a float32 tensor of shape [2] on cpu",
    ),
    "NaN in a published head's bias": (
        lambda: published_head(X, Y.float().unsqueeze(1), torch.zeros(1, 3), torch.tensor([math.nan])),
        ValueError,
        "bias: expected finite values, got nan at position [0]",
    ),
    "damping 0 for layers": (
        lambda: adapt_layers(NET, [(X, Y)], [(X, Y)], ["weight"], damping=0),
        ValueError,
        "damping: expected a positive number, got 0",
    ),
    "alpha above 1": (lambda: inherit(NET, NET, 1.5), ValueError, "alpha: expected a number in [0, 1], got 1.5"),
    "alpha NaN": (lambda: inherit(NET, NET, math.nan), ValueError, "alpha: expected a number in [0, 1], got nan"),
    "an unknown granularity": (
        lambda: inherit(NET, NET, 0.5, granularity="half"),
        ValueError,
        "granularity: expected 'element' or 'filter' or 'layer' or 'block', got 'half'",
    ),
    "an unknown choice": (
        lambda: inherit(NET, NET, 0.5, select="best"),
        ValueError,
        "select: expected 'random' or 'uniform' or 'magnitude' or 'fisher', got 'best'",
    ),
    "nothing in common": (
        lambda: inherit(NET, {"other": torch.zeros(2)}, 0.5),
        ValueError,
        "upstream_state: expected at least one tensor that corresponds to one of the target's, got none",
    ),
    "an upstream state of numbers": (
        lambda: inherit(NET, {"weight": 3}, 0.5),
        TypeError,
        "upstream_state: expected tensors by name, got 3 under 'weight'",
    ),
    "NaN upstream": (
        lambda: inherit(NET, {"weight": NAN[2:4]}, 0.5),
        ValueError,
        "upstream_state: expected finite numbers, got nan in 'weight' at [0, 1]",
    ),
    "a target that is no model": (lambda: inherit(3, NET, 0.5), TypeError, "target: expected a torch.nn.Module, got 3"),
    "fisher without a diagonal": (
        lambda: inherit(NET, NET, 0.5, select="fisher"),
        ValueError,
        "fisher: expected a diagonal by name, or an upstream module and batches, for select='fisher', got neither",
    ),
    "freezing an unknown name": (
        lambda: freeze(NET, ["head"]),
        ValueError,
        "part: expected names of the model's tensors or modules, got 'head'",
    ),
    "a mask of another shape": (
        lambda: freeze(NET, {"weight": torch.ones(2, 2, dtype=torch.bool)}),
        ValueError,
        "part['weight']: expected a bool tensor of shape [2, 3], got a bool tensor of shape [2, 2] on cpu",
    ),
    "one seed": (
        lambda: transfer_check(lambda alpha, seed: 0.0, seeds=[0]),
        ValueError,
        "seeds: expected at least 2 seeds, each once, got [0]",
    ),
    "alphas without 0": (
        lambda: transfer_check(lambda alpha, seed: 0.0, alphas=[0.5, 1.0]),
        ValueError,
        "alphas: expected 0 and at least one other share, each once, got [0.5, 1.0]",
    ),
    "an alpha above 1": (
        lambda: transfer_check(lambda alpha, seed: 0.0, alphas=[0.0, 2.0]),
        ValueError,
        "alphas: expected numbers in [0, 1], got 2.0",
    ),
    "a metric that is NaN": (
        lambda: transfer_check(lambda alpha, seed: math.nan),
        ValueError,
        "train: expected a finite metric, got nan at alpha 0, seed 0",
    ),
    "a metric that is a text": (
        lambda: transfer_check(lambda alpha, seed: "0.9"),
        ValueError,
        "train: expected a finite metric, got '0.9' at alpha 0, seed 0",
    ),
    "confidence 95": (
        lambda: transfer_check(lambda alpha, seed: 0.0, confidence=95),
        ValueError,
        "confidence: expected a number in (0, 1), got 95",
    ),
    "an unknown interval": (
        lambda: transfer_check(lambda alpha, seed: 0.0, interval="normal"),
        ValueError,
        "interval: expected 't' or 'bootstrap', got 'normal'",
    ),
    "metrics of one seed": (
        lambda: paired_effects([[0.1], [0.2]], [0.0, 1.0]),
        ValueError,
        "metrics: expected shape [2, seeds] with at least 2 seeds, got [2, 1]",
    ),
    "NaN in metrics": (
        lambda: paired_effects([[0.1, math.nan], [0.2, 0.3]], [0.0, 1.0]),
        ValueError,
        "metrics: expected finite numbers, got nan at index [0, 1]",
    ),
}
