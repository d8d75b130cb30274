"""Malformed calls of the allocation and of the training, each with its exact message."""

from __future__ import annotations

import math

import numpy as np
import torch
from bad_input_table import Case
from test_bad_input import NAN, X, Y
from torch import nn

from transferops.otqms import (
    OTQMS,
    TrainingOptions,
    allocate,
    compare,
    network_for,
    optimal_quantity,
    register,
    risk,
    single_source_risk,
    target_only_risk,
    write_json,
)
from transferops.otqms.pool import TensorSamples

NET = nn.Linear(3, 2)
GRAM = np.eye(2)
PART = TensorSamples(X, Y)


def network() -> nn.Module:
    """For three features and two classes."""
    return nn.Sequential(nn.Linear(3, 2))


TRAINING: dict[str, Case] = {
    "a Gram matrix that is not square": (
        lambda: allocate(GRAM[:1], 10, [20, 20], 5),
        ValueError,
        "gram: expected shape [2, 2], one row for each of source_samples, got shape [1, 2]",
    ),
    "a Gram matrix that is not symmetric": (
        lambda: allocate([[1.0, 0.0], [0.5, 1.0]], 10, [20, 20], 5),
        ValueError,
        "gram: expected a symmetric matrix, got 0 at [0, 1] and 0.5 at [1, 0]",
    ),
    "a Gram matrix with a negative eigenvalue": (
        lambda: allocate([[1.0, 2.0], [2.0, 1.0]], 10, [20, 20], 5),
        ValueError,
        "gram: expected a positive semidefinite matrix, got a smallest eigenvalue of -1 (-1 at unit diagonal)",
    ),
    "NaN in the Gram matrix": (
        lambda: allocate([[1.0, math.nan], [math.nan, 1.0]], 10, [20, 20], 5),
        ValueError,
        "gram: expected finite numbers, got nan at index [0, 1]",
    ),
    "a Gram matrix in half precision": (
        lambda: allocate(torch.eye(2).half(), 10, [20, 20], 5),
        ValueError,
        "gram: expected float32 or float64, half precision being too coarse to allocate by, got float16",
    ),
    "a complex Gram matrix": (
        lambda: allocate(torch.eye(2) * 1j, 10, [20, 20], 5),
        TypeError,
        "gram: expected real numbers, got a complex64 tensor of shape [2, 2] on cpu",
    ),
    "a Gram matrix of words": (
        lambda: allocate([["a"]], 10, [20], 5),
        TypeError,
        "gram: expected a number or an array of real numbers, got list",
    ),
    "no target samples": (
        lambda: allocate(GRAM, 0, [20, 20], 5),
        ValueError,
        "target_samples: expected a number of at least 1, got 0",
    ),
    "target samples that are infinite": (
        lambda: allocate(GRAM, math.inf, [20, 20], 5),
        ValueError,
        "target_samples: expected finite numbers, got inf",
    ),
    "no sources": (
        lambda: allocate(np.zeros((0, 0)), 10, [], 5),
        ValueError,
        "source_samples: expected one number for each source, shape [K], got shape [0]",
    ),
    "too few source counts": (
        lambda: allocate(GRAM, 10, [20], 5),
        ValueError,
        "gram: expected shape [1, 1], one row for each of source_samples, got shape [2, 2]",
    ),
    "negative source samples": (
        lambda: allocate(GRAM, 10, [20, -1], 5),
        ValueError,
        "source_samples: expected no negative numbers, got -1 for source 1",
    ),
    "dimension 0": (
        lambda: allocate(GRAM, 10, [20, 20], 0),
        ValueError,
        "dimension: expected a positive number, got 0",
    ),
    "an unknown mode": (
        lambda: allocate(GRAM, 10, [20, 20], 5, mode="best"),
        ValueError,
        "mode: expected 'quantity' or 'weight' or 'budget', got 'best'",
    ),
    "mode budget without a budget": (
        lambda: allocate(GRAM, 10, [20, 20], 5, mode="budget"),
        ValueError,
        "budget: expected a number with mode 'budget', got None",
    ),
    "a negative budget": (
        lambda: allocate(GRAM, 10, [20, 20], 5, mode="budget", budget=-1),
        ValueError,
        "budget: expected a number that is not negative, got -1",
    ),
    "a cost of 0": (
        lambda: allocate(GRAM, 10, [20, 20], 5, mode="budget", budget=5, costs=[1, 0]),
        ValueError,
        "costs: expected positive numbers, got 0 for source 1",
    ),
    "too few costs": (
        lambda: allocate(GRAM, 10, [20, 20], 5, mode="budget", budget=5, costs=[1]),
        ValueError,
        "costs: expected shape [2], one for each of source_samples, got shape [1]",
    ),
    "a budget in another mode": (
        lambda: allocate(GRAM, 10, [20, 20], 5, budget=5),
        ValueError,
        "budget: expected None with mode 'quantity', got 5",
    ),
    "a negative quantity": (
        lambda: risk([-1, 0], GRAM, 10, 5),
        ValueError,
        "quantities: expected no negative values, got a smallest value of -1",
    ),
    "a single quantity": (
        lambda: risk(3, GRAM, 10, 5),
        ValueError,
        "quantities: expected an array of shape [..., K], got a single number",
    ),
    "quantities for other sources": (
        lambda: risk([1, 2, 3], GRAM, 10, 5),
        ValueError,
        "gram: expected shape [3, 3], one row per source, got shape [2, 2]",
    ),
    "NaN in quantities": (
        lambda: risk([math.nan, 0], GRAM, 10, 5),
        ValueError,
        "quantities: expected finite numbers, got nan at index [0]",
    ),
    "a negative discrepancy": (
        lambda: single_source_risk(5, -1, 10, 5),
        ValueError,
        "discrepancy: expected no negative values, got a smallest value of -1",
    ),
    "no target samples for a risk": (
        lambda: target_only_risk(0, 5),
        ValueError,
        "target_samples: expected positive values, got a smallest value of 0",
    ),
    "a discrepancy of NaN": (
        lambda: optimal_quantity(math.nan, 10),
        ValueError,
        "discrepancy: expected finite numbers, got nan",
    ),
    "optimal for no target samples": (
        lambda: optimal_quantity(0.1, 0),
        ValueError,
        "target_samples: expected positive values, got a smallest value of 0",
    ),
    "lr 0": (lambda: TrainingOptions(lr=0), ValueError, "lr: expected a positive number, got 0"),
    "lr NaN": (lambda: TrainingOptions(lr=math.nan), ValueError, "lr: expected a positive number, got nan"),
    "epochs 0": (lambda: TrainingOptions(epochs=0), ValueError, "epochs: expected an integer of at least 1, got 0"),
    "batch_size of words": (
        lambda: TrainingOptions(batch_size="64"),
        ValueError,
        "batch_size: expected an integer of at least 1, got '64'",
    ),
    "folds 1": (lambda: TrainingOptions(folds=1), ValueError, "folds: expected an integer of at least 2, got 1"),
    "early_stopping of words": (
        lambda: TrainingOptions(early_stopping="yes"),
        ValueError,
        "early_stopping: expected True, False or 'folds', got 'yes'",
    ),
    "guard with held-out samples": (
        lambda: TrainingOptions(guard=True, early_stopping=True),
        ValueError,
        "guard: expected early_stopping False or 'folds', which leave no sample out of the folds, got True",
    ),
    "two budgets": (
        lambda: TrainingOptions(budget=5, budget_seconds=1.0),
        ValueError,
        "budget_seconds: expected None with a budget of samples, got 1.0",
    ),
    "a device that is none": (
        lambda: TrainingOptions(device="abacus"),
        ValueError,
        "device: expected one that works here, got 'abacus'",
    ),
    "an unknown schedule": (
        lambda: TrainingOptions(schedule="linear"),
        ValueError,
        "schedule: expected 'constant', 'cosine', 'plateau' or a function, got 'linear'",
    ),
    "an unknown dimension": (
        lambda: TrainingOptions(dimension="rank"),
        ValueError,
        "dimension: expected 'auto', 'parameters' or an integer of at least 1, got 'rank'",
    ),
    "images smaller than the network": (
        lambda: network_for((1, 2, 2), 3),
        ValueError,
        "sample_shape: expected (C, H, W) of at least 8 pixels, or (D,), got (1, 2, 2)",
    ),
    "one class": (lambda: network_for((5,), 1), ValueError, "classes: expected an integer of at least 2, got 1"),
    "no sources to train with": (
        lambda: OTQMS(network, PART, {}),
        ValueError,
        "sources: expected at least one source, got none",
    ),
    "a pair of tensors as the target": (
        lambda: OTQMS(network, (X, Y), {"a": PART}),
        TypeError,
        "target: expected inputs and labels, or a map-style data set with a length, got tuple",
    ),
    "early stopping without validation": (
        lambda: OTQMS(network, PART, {"a": PART}, options=TrainingOptions(early_stopping=True)),
        ValueError,
        "validation: expected target samples to choose the epoch on, for early stopping, got none",
    ),
    "target labels out of range": (
        lambda: OTQMS(network, TensorSamples(X, Y + 2), {"a": PART}),
        ValueError,
        "target: expected labels from 0 to 1, one per logit of the model, got labels from 2 to 3",
    ),
    "source labels too few": (
        lambda: OTQMS(network, PART, {"a": TensorSamples(X, Y[:3])}),
        ValueError,
        "sources['a']: expected 4 labels, one for each of its inputs, got 3",
    ),
    "floating source labels": (
        lambda: OTQMS(network, PART, {"a": TensorSamples(X, Y.float())}),
        ValueError,
        "sources['a']: expected integer labels, shape [N], got a float32 tensor of shape [4] on cpu",
    ),
    "a source that is a number": (
        lambda: OTQMS(network, PART, {"a": 3}),
        TypeError,
        "sources['a']: expected inputs and labels, or a map-style data set with a length, got 3",
    ),
    "an empty target": (
        lambda: OTQMS(network, TensorSamples(X[:0], Y[:0]), {"a": PART}),
        ValueError,
        "target: expected at least one sample, got none",
    ),
    "a frozen model": (
        lambda: OTQMS(lambda: network().requires_grad_(False), PART, {"a": PART}),
        ValueError,
        "model: expected parameters that require a gradient, got none",
    ),
    "a model instead of a function": (
        lambda: OTQMS(NET, PART, {"a": PART}),
        TypeError,
        "model: expected a function that makes the network, got Linear",
    ),
    "NaN in a source": (
        lambda: OTQMS(network, PART, {"a": TensorSamples(NAN, Y)}).fit("all-sources"),
        ValueError,
        "sources['a']: expected finite inputs, got infinities or NaN among them",
    ),
    "another number of features": (
        lambda: OTQMS(network, PART, {"a": TensorSamples(X[:, :2], Y)}).fit("all-sources"),
        ValueError,
        "sources['a']: expected inputs of shape [4, 3], as in target, got a float32 tensor of shape [4, 2] on cpu",
    ),
    "an unknown strategy": (
        lambda: OTQMS(network, PART, {"a": PART}).fit("best"),
        ValueError,
        "strategy: expected names among ...",
    ),
    "a model for no source": (
        lambda: OTQMS(network, PART, {"a": PART}, source_models={"b": NET}),
        ValueError,
        "source_models: expected a model for every source, 'a' included, got 'b'",
    ),
    "a negative seed of a training": (
        lambda: OTQMS(network, PART, {"a": PART}, seed=-1),
        ValueError,
        "seed: expected an integer of at least 0, got -1",
    ),
    "the same seed twice": (
        lambda: compare(network, lambda seed: (PART, PART, PART), {"a": PART}, seeds=[0, 0]),
        ValueError,
        "seeds: expected at least one seed, each once, got [0, 0]",
    ),
    "a strategy twice": (
        lambda: compare(network, lambda seed: (PART, PART, PART), {"a": PART}, strategies=["quantities", "quantities"]),
        ValueError,
        "strategy: expected at least one name, each once, got quantities, quantities",
    ),
    "a strategy name that is taken": (
        lambda: register("quantities"),
        ValueError,
        "name: expected a name that is not taken, got 'quantities'",
    ),
    "NaN in a document": (
        lambda: write_json({"risk": math.nan}, "run.json"),
        ValueError,
        "document: expected finite numbers, which JSON can hold, got Out of range float values are not JSON "
        "compliant: nan",
    ),
}
