"""Other libraries' Fisher information on the problems of bench_fisher.py, each the way that is fastest in it.

A peer is prepared once, from a model, a batch and K directions, and gives a call without arguments: the sum over
samples of the squared gradients, name to tensor, or the K x K Gram matrix summed over samples. Parameters that a
library has no support for are missing from the former, and count as zero in the latter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Directions = list[dict[str, Tensor]]


class Task(NamedTuple):
    """What a peer is given."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    directions: Directions


Peer = Callable[[Task], Callable[[], Any]]


def named(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """A flat vector over all parameters, by name."""
    sizes = [p.numel() for p in model.parameters()]
    return {n: part.view(p.shape) for (n, p), part in zip(model.named_parameters(), flat.split(sizes))}


def flat_directions(task: Task) -> Tensor:
    """[P, K]."""
    return torch.stack([torch.cat([v.flatten() for v in d.values()]) for d in task.directions], 1)


def scores_to_gram(scores: Tensor) -> Tensor:
    return scores.T @ scores


class Scores:
    """S = [N, K], collected parameter by parameter from per-sample gradients that are then let go."""

    def __init__(self, task: Task) -> None:
        self._stacked = {n: torch.stack([d[n] for d in task.directions]).flatten(1) for n in task.directions[0]}
        self.total = torch.zeros(len(task.inputs), len(task.directions))

    def take(self, name: str, gradients: Tensor) -> None:
        self.total += gradients.flatten(1) @ self._stacked[name].T


def backpack_diagonal(task: Task) -> Callable[[], dict[str, Tensor]]:
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    model, loss = extend(copy.deepcopy(task.model)), extend(nn.CrossEntropyLoss(reduction="sum"))

    def call() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with backpack(SumGradSquared()):
            loss(model(task.inputs), task.targets).backward()
        parts = {n: p.__dict__.pop("sum_grad_squared", None) for n, p in model.named_parameters()}
        return {n: part for n, part in parts.items() if part is not None}

    return call


def backpack_gram(task: Task) -> Callable[[], Tensor]:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model, loss = extend(copy.deepcopy(task.model)), extend(nn.CrossEntropyLoss(reduction="sum"))
    names = {id(p): n for n, p in model.named_parameters()}

    def call() -> Tensor:
        scores = Scores(task)

        def take(module: nn.Module) -> None:
            for p in module.parameters(recurse=False):
                if hasattr(p, "grad_batch"):
                    scores.take(names[id(p)], p.__dict__.pop("grad_batch"))

        model.zero_grad(set_to_none=True)
        with backpack(BatchGrad(), extension_hook=take):
            loss(model(task.inputs), task.targets).backward()
        return scores_to_gram(scores.total)

    return call


def opacus_gradients(task: Task) -> Callable[[Callable[[str, Tensor], None]], None]:
    from opacus import GradSampleModule

    # Training mode, outside of which it does nothing; the models here have nothing that differs in it.
    model = GradSampleModule(copy.deepcopy(task.model).train(), loss_reduction="sum")

    def run(take: Callable[[str, Tensor], None]) -> None:
        F.cross_entropy(model(task.inputs), task.targets, reduction="sum").backward()
        for name, p in model.named_parameters():
            take(name.removeprefix("_module."), p.grad_sample)
            p.grad_sample = p.grad = None

    return run


def opacus_diagonal(task: Task) -> Callable[[], dict[str, Tensor]]:
    run = opacus_gradients(task)

    def call() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        run(lambda name, gradients: found.update({name: gradients.square().sum(0)}))
        return found

    return call


def opacus_gram(task: Task) -> Callable[[], Tensor]:
    run = opacus_gradients(task)

    def call() -> Tensor:
        scores = Scores(task)
        run(scores.take)
        return scores_to_gram(scores.total)

    return call


def nngeometry_matrix(task: Task, representation: str) -> Callable[[], Any]:
    """Of the empirical Fisher information, times N."""
    from nngeometry import object as objects
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection

    model, samples = copy.deepcopy(task.model), len(task.inputs)
    layers = LayerCollection.from_model(model)

    def log_likelihood(x: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(model(x), y, reduction="none").unsqueeze(1)

    generator = TorchHooksJacobianBackend(layer_collection=layers, model=model, function=log_likelihood)
    data = torch.utils.data.TensorDataset(task.inputs, task.targets)
    loader = torch.utils.data.DataLoader(data, batch_size=samples)
    kind = getattr(objects, representation)
    return lambda: (kind(generator=generator, examples=loader), layers)


def nngeometry_diagonal(task: Task) -> Callable[[], dict[str, Tensor]]:
    matrix = nngeometry_matrix(task, "PMatDiag")
    return lambda: named(task.model, matrix()[0].get_diag() * len(task.inputs))


def nngeometry_gram(task: Task) -> Callable[[], Tensor]:
    from nngeometry.object.vector import PVector

    matrix, theta = nngeometry_matrix(task, "PMatImplicit"), flat_directions(task)

    def call() -> Tensor:
        implicit, layers = matrix()
        images = [implicit.mv(PVector(layers, vector_repr=column)).to_torch() for column in theta.T]
        return theta.T @ torch.stack(images, 1) * len(task.inputs)

    return call


def asdl_diagonal(task: Task) -> Callable[[], dict[str, Tensor]]:
    from asdl import FISHER_EMP, LOSS_CROSS_ENTROPY, SHAPE_DIAG, FisherConfig
    from asdl.fisher import FisherEmp

    model = copy.deepcopy(task.model)

    def call() -> dict[str, Tensor]:
        maker = FisherEmp(model, FisherConfig(FISHER_EMP, [SHAPE_DIAG], loss_type=LOSS_CROSS_ENTROPY))
        outputs = maker.setup_model_call(model, task.inputs)
        maker.setup_loss_call(F.cross_entropy, outputs, task.targets, reduction="sum")
        maker.forward_and_backward(data_size=1)
        found: dict[str, Tensor] = {}
        for path, module in model.named_modules():
            diagonal = getattr(module.__dict__.pop("fisher", None), "diag", None)
            for own in ("weight", "bias"):
                value = getattr(diagonal, own, None)
                if value is not None:
                    found[f"{path}.{own}" if path else own] = value
        return found

    return call


def laplace_diagonal(task: Task) -> Callable[[], dict[str, Tensor]]:
    from laplace.curvature import CurvlinopsEF

    backend = CurvlinopsEF(copy.deepcopy(task.model), "classification")
    return lambda: named(task.model, backend.diag(task.inputs, task.targets)[1])


def curvlinops_gram(task: Task, operator: str) -> Callable[[], Tensor]:
    import curvlinops

    model, theta = copy.deepcopy(task.model), flat_directions(task)
    linear = getattr(curvlinops, operator)(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        list(model.parameters()),
        [(task.inputs, task.targets)],
        check_deterministic=False,
    )

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return theta.T @ (linear @ theta)

    return call


DIAGONAL: dict[str, Peer] = {
    "BackPACK": backpack_diagonal,
    "opacus": opacus_diagonal,
    "nngeometry": nngeometry_diagonal,
    "asdl": asdl_diagonal,
    "laplace-torch": laplace_diagonal,
}
EMPIRICAL_GRAM: dict[str, Peer] = {
    "BackPACK": backpack_gram,
    "opacus": opacus_gram,
    "nngeometry": nngeometry_gram,
    "curvlinops": lambda task: curvlinops_gram(task, "EFLinearOperator"),
}
EXACT_GRAM: dict[str, Peer] = {"curvlinops": lambda task: curvlinops_gram(task, "GGNLinearOperator")}


class Prepared(NamedTuple):
    """Peers that run.

    Attributes:
        calls: of those that give all of the right value, by name.
        others: of those that give a wrong value or a part of it only, which their names say.
        failed: the rest, and why.
    """

    calls: dict[str, Callable[[], Any]]
    others: dict[str, Callable[[], Any]]
    failed: dict[str, str]


def prepare(peers: dict[str, Peer], task: Task, few: Task, check: Callable[[Any], tuple[float, int]]) -> Prepared:
    """Try every peer on a few samples, then prepare it for all.

    ``check`` gives the relative error against float64 and how many parameters are missing; wrong is from 1e-3 on.
    """
    prepared = Prepared({}, {}, {})
    for name, peer in peers.items():
        try:
            error, missing = check(peer(few)())
            call = peer(task)
        except Exception as reason:
            prepared.failed[name] = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}"[:160]
            continue
        notes = [f"wrong by {error:.2g}"] * (error > 1e-3) + [f"without {missing} parameters"] * (missing > 0)
        if notes:
            prepared.others[f"{name} ({', '.join(notes)})"] = call
        else:
            prepared.calls[name] = call
    return prepared
