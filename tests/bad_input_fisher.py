"""Malformed calls of the estimators of the Fisher information, each with its exact message."""

from __future__ import annotations

import math

import torch
from bad_input_table import Case
from test_bad_input import NAN, X, Y
from torch import nn

from transferops.fisher import FisherInformation, parameter_differences, softmax_fisher_gram, tangent_gram

BATCHES = [X]
NET = nn.Linear(3, 2)

FISHER: dict[str, Case] = {
    "a model that is none": (lambda: FisherInformation(3), TypeError, "model: expected a torch.nn.Module, got 3"),
    "an unknown estimator": (
        lambda: FisherInformation(NET, estimator="gauss"),
        ValueError,
        "estimator: expected 'exact' or 'monte_carlo' or 'empirical', got 'gauss'",
    ),
    "an unknown loss": (
        lambda: FisherInformation(NET, loss="hinge"),
        ValueError,
        "loss: expected 'cross_entropy' or 'mse', got 'hinge'",
    ),
    "chunk_size 0": (
        lambda: FisherInformation(NET, chunk_size=0),
        ValueError,
        "chunk_size: expected an integer of at least 1, got 0",
    ),
    "a negative seed": (
        lambda: FisherInformation(NET, seed=-1),
        ValueError,
        "seed: expected an integer of at least 0, got -1",
    ),
    "no draws": (
        lambda: FisherInformation(NET, draws=0),
        ValueError,
        "draws: expected an integer of at least 1, got 0",
    ),
    "a model without parameters": (
        lambda: FisherInformation(nn.ReLU()).diagonal(BATCHES),
        ValueError,
        "parameters: expected at least one of 0 trainable parameters to be selected, got none",
    ),
    "a model on the meta device": (
        lambda: FisherInformation(nn.Linear(3, 2, device="meta")).diagonal(BATCHES),
        ValueError,
        "model: expected parameters that have values, 'weight' among them, got one on meta",
    ),
    "a lazy layer that has seen nothing": (
        lambda: FisherInformation(nn.LazyLinear(2)).diagonal(BATCHES),
        ValueError,
        "model: expected parameters that have values, 'weight' among them, got a lazy one",
    ),
    "complex parameters": (
        lambda: FisherInformation(nn.Linear(3, 2, dtype=torch.complex64)).diagonal(BATCHES),
        ValueError,
        "parameters: expected real ones, got 'weight' of torch.complex64",
    ),
    "batches that are a number": (
        lambda: FisherInformation(NET).diagonal(3),
        TypeError,
        "batches: expected an iterable of batches, such as [inputs], got 3",
    ),
    "no batches": (
        lambda: FisherInformation(NET).diagonal([]),
        ValueError,
        "batches: expected at least one sample, got none",
    ),
    "a batch without samples": (
        lambda: FisherInformation(NET).diagonal([X[:0]]),
        ValueError,
        "batches[0]: expected at least one sample, got inputs of shape [0, 3]",
    ),
    "a batch of strings": (
        lambda: FisherInformation(NET).diagonal([["a"]]),
        TypeError,
        "batches[0]: expected a tensor of inputs, a mapping with tensors of inputs, or (inputs, targets), got list",
    ),
    "NaN in a batch": (
        lambda: FisherInformation(NET).diagonal([NAN]),
        ValueError,
        "model: expected finite outputs and derivatives, got infinities or NaN among them",
    ),
    "empirical without labels": (
        lambda: FisherInformation(NET, estimator="empirical").diagonal([X]),
        TypeError,
        "batches[0]: expected (inputs, targets), the empirical Fisher information being that of the targets, got "
        "targets None",
    ),
    "empirical with too few labels": (
        lambda: FisherInformation(NET, estimator="empirical").diagonal([(X, Y[:3])]),
        ValueError,
        "batches[0]: expected integer targets of shape [4], got a int64 tensor of shape [3] on cpu",
    ),
    "empirical with a label out of range": (
        lambda: FisherInformation(NET, estimator="empirical").diagonal([(X, Y + 5)]),
        ValueError,
        "batches[0]: expected targets of 2 classes 0..1 or -100, got 5 at position 0",
    ),
    "empirical with floating labels": (
        lambda: FisherInformation(NET, estimator="empirical").diagonal([(X, Y.float())]),
        ValueError,
        "batches[0]: expected integer targets of shape [4], got a float32 tensor of shape [4] on cpu",
    ),
    "selected parameters that are none": (
        lambda: FisherInformation(NET, parameters=["w"]).diagonal(BATCHES),
        ValueError,
        "parameters: expected names of trainable parameters of the reference, got 'w'",
    ),
    "one model instead of a list": (
        lambda: parameter_differences(NET, NET),
        TypeError,
        "models: expected a sequence of modules or state dictionaries, got one Linear",
    ),
    "a reference that is no model": (
        lambda: parameter_differences([NET], 3),
        TypeError,
        "reference: expected a torch.nn.Module, got 3",
    ),
    "a model of another shape": (
        lambda: parameter_differences([nn.Linear(4, 2)], NET),
        ValueError,
        "models[0]: expected 'weight' of shape [2, 3], as in the reference, got shape [2, 4]",
    ),
    "differences in an integer type": (
        lambda: parameter_differences([NET], NET, dtype=torch.int32),
        ValueError,
        "dtype: expected a floating-point type, got torch.int32",
    ),
    "logits 1-d": (
        lambda: softmax_fisher_gram(X[0], X[None]),
        ValueError,
        "logits: expected 2 dimensions, got a float32 tensor of shape [3] on cpu",
    ),
    "tangents of another shape": (
        lambda: softmax_fisher_gram(X, X[None, :2]),
        ValueError,
        "tangents: expected shape [K, 4, 3] on cpu, as the logits, got a float32 tensor of shape [1, 2, 3] on cpu",
    ),
    "tangents of integers": (
        lambda: tangent_gram(X[None].int()),
        TypeError,
        "tangents: expected a floating-point tensor, got a int32 tensor of shape [1, 4, 3] on cpu",
    ),
    "directions: none": (
        lambda: FisherInformation(NET).gram([], BATCHES),
        ValueError,
        "directions: expected at least one direction, got none",
    ),
    "directions: a tensor of another width": (
        lambda: FisherInformation(NET).gram(X, BATCHES),
        ValueError,
        "directions[0]: expected a flat vector over the 8 selected elements, got a float32 tensor of shape [3] on cpu",
    ),
    "directions: an unknown parameter": (
        lambda: FisherInformation(NET).gram([{"weights": X}], BATCHES),
        ValueError,
        "directions[0]: expected names of the model's parameters, got 'weights'",
    ),
    "directions: another shape": (
        lambda: FisherInformation(NET).gram([{"weight": X}], BATCHES),
        ValueError,
        "directions[0]['weight']: expected shape [2, 3], as the parameter, got shape [4, 3]",
    ),
    "directions: NaN": (
        lambda: FisherInformation(NET).gram([{"weight": NAN[1:3]}], BATCHES),
        ValueError,
        "directions[0]['weight']: expected finite values, got infinities or NaN among them",
    ),
    "directions: integers": (
        lambda: FisherInformation(NET).gram([{"weight": torch.ones(2, 3, dtype=torch.int64)}], BATCHES),
        TypeError,
        "directions[0]['weight']: expected a floating-point tensor, got a int64 tensor of shape [2, 3] on cpu",
    ),
    "directions: a number": (
        lambda: FisherInformation(NET).gram(3, BATCHES),
        TypeError,
        "directions: expected a list of dictionaries from parameter name to tensor, of modules or of flat vectors, "
        "got 3",
    ),
    "a direction of words": (
        lambda: FisherInformation(NET).quadratic("up", BATCHES),
        TypeError,
        "directions[0]: expected a dictionary from parameter name to tensor, a module or a flat vector, got 'up'",
    ),
    "an empty direction": (
        lambda: FisherInformation(NET).matvec({}, BATCHES),
        ValueError,
        "direction: expected at least one parameter to move, got an empty dictionary",
    ),
    "a block of an unknown parameter": (
        lambda: FisherInformation(NET).block("w", BATCHES),
        ValueError,
        "name: expected the name of a selected parameter, or of a module with some, got 'w'",
    ),
    "an unknown quantity": (
        lambda: FisherInformation(NET).accumulate("hessian"),
        ValueError,
        "quantity: expected 'gram', 'diagonal', 'trace', 'matvec', 'block' or 'kfac', got 'hessian'",
    ),
    "a quantity with an argument too many": (
        lambda: FisherInformation(NET).accumulate("trace", X),
        ValueError,
        "what: expected nothing, 'trace' having no argument, got a float32 tensor of shape [4, 3] on cpu",
    ),
    "an accumulator without samples": (
        lambda: FisherInformation(NET).accumulate("diagonal").compute(),
        ValueError,
        "batches: expected at least one sample, got none",
    ),
    "accumulators of different kinds": (
        lambda: FisherInformation(NET).accumulate("diagonal").merge(FisherInformation(NET).accumulate("trace")),
        ValueError,
        "other: expected an accumulator of diagonal, exact, cross_entropy, shapes [[2, 3], [2]], got one of trace, "
        "exact, cross_entropy, shapes [[]]",
    ),
    "accumulating a number": (
        lambda: FisherInformation(NET).accumulate("diagonal").update(3),
        TypeError,
        "batches: expected an iterable of batches, such as [inputs], got 3",
    ),
    "damping 0": (
        lambda: FisherInformation(NET).effective_dimension(0.0, BATCHES),
        ValueError,
        "damping: expected a positive number, got 0.0",
    ),
    "damping NaN": (
        lambda: FisherInformation(NET).effective_dimension(math.nan, BATCHES),
        ValueError,
        "damping: expected a positive number, got nan",
    ),
    "one probe": (
        lambda: FisherInformation(NET).effective_dimension(1.0, BATCHES, probes=1),
        ValueError,
        "probes: expected an integer of at least 2, got 1",
    ),
    "outputs without classes": (
        lambda: FisherInformation(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))).trace(BATCHES),
        ValueError,
        "model: expected outputs of shape [4, C] or [4, T, C], got shape [4]",
    ),
    "mse with too few targets": (
        lambda: FisherInformation(NET, "empirical", "mse").trace([(X, X[:3, :2])]),
        ValueError,
        "batches[0]: expected floating-point targets of shape [4, 2], got a float32 tensor of shape [3, 2] on cpu",
    ),
}
