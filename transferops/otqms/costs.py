"""What a sample costs: seconds of a training step, measured, for budgets of time."""

from __future__ import annotations

import copy
import itertools
from time import perf_counter

import torch
from torch import nn

from transferops.otqms.distributed import World
from transferops.otqms.options import TrainingOptions
from transferops.otqms.pool import Pool
from transferops.otqms.training import EpochPlan, Stepper

_STEPS = 5  # the first warms up, of the others the fastest counts: what else a machine does only adds time


def measure(
    model: nn.Module, samples: Pool, options: TrainingOptions, generator: torch.Generator, world: World
) -> torch.Tensor:
    """Seconds that a sample of each part takes in a training step of a whole batch.

    Reading it is included, unless workers read ahead. Measured on a copy of the model, with samples at random; the
    caller's random state is as before.

    Args:
        model: As it is trained.
        samples: K + 1 parts.
        options: How it is trained.
        generator: Draws the samples.
        world: The processes that share a step. The first one's clock counts.

    Returns:
        float64 ``[K + 1]``, positive.
    """
    seconds = torch.zeros(len(samples.sizes), dtype=torch.float64)
    device = samples.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for part, size in enumerate(samples.sizes):
            positions = samples.positions(part)[torch.randperm(size, generator=generator)]
            drawn = positions[torch.arange(_STEPS * options.batch_size) % size]
            plan = EpochPlan(drawn.view(_STEPS, options.batch_size), 1)
            stepper = Stepper(copy.deepcopy(model), options, options.lr, world)
            ends = [perf_counter()]
            for loss in stepper.steps(samples, plan, 0, (0, 1)):
                loss.item()  # a GPU has computed it only now
                ends.append(perf_counter())
            seconds[part] = min(end - start for start, end in itertools.pairwise(ends[1:])) / options.batch_size
    world.send([seconds])
    return seconds.clamp_min(torch.finfo(torch.float64).tiny)
