"""The exact Fisher information along given directions, by forward-mode derivatives of the outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn import functional as F

from transferops.fisher.batches import Batch
from transferops.fisher.directions import Direction, Directions, LowRank
from transferops.fisher.modes import function_transforms, unfused_recurrence


class Tangents(NamedTuple):
    """K directions, side by side.

    Attributes:
        dense: [K, *shape] by parameter.
        products: stacked factors of the weights that linear layers move by low-rank products.
    """

    dense: Direction
    products: dict[str, LowRank]

    @classmethod
    def of(cls, directions: Directions, layers: Collection[str]) -> Tangents:
        """Those of some directions; ``layers`` names the weights that are products."""
        names = directions.parameters
        return cls(
            {name: directions.stack(name) for name in names if name not in layers},
            {name: directions.stack_factors(name) for name in names if name in layers},
        )

    def load(self, directions: Directions) -> None:
        """Overwrite them with those of other directions of the same parameters and ranks."""
        for name, value in self.dense.items():
            value.copy_(directions.stack(name))
        for name, factors in self.products.items():
            for factor, other in zip(factors, directions.stack_factors(name)):
                factor.copy_(other)

    def part(self, start: int, stop: int) -> Tangents:
        """Some of the directions."""
        return Tangents(
            {name: value[start:stop] for name, value in self.dense.items()},
            {name: LowRank(left[start:stop], right[start:stop]) for name, (left, right) in self.products.items()},
        )

    @property
    def size(self) -> int:
        """K."""
        return len(next(iter([*self.dense.values(), *(factors.left for factors in self.products.values())])))


def push_forward(
    model: nn.Module, tangents: Tangents, batch: Batch, layers: Mapping[str, nn.Module]
) -> tuple[Tensor, Tensor]:
    """Outputs [N, ..., C] and their derivatives along K directions, [K, N, ..., C].

    Nothing is kept for a backward pass. Scaled dot-product attention runs on its plain (math) backend, the fused
    ones having no forward-mode derivative. A single direction is differentiated without ``torch.vmap``.

    Args:
        model: the model, in evaluation mode.
        tangents: the K directions.
        batch: the samples.
        layers: of weights that may be moved by low-rank products, the linear layer whose calls are all there is
            of the weight.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    dense, factors = tangents
    moving = {name: parameters[name] for name in dense}
    fixed = {name: p for name, p in parameters.items() if name not in dense}
    none = next(iter(parameters.values())).new_zeros(())

    def push(tangent: Direction, products: Mapping[str, LowRank]) -> tuple[Tensor, Tensor]:
        def run(moved: Direction, step: Tensor) -> Tensor:
            with _along({layers[name]: product for name, product in products.items()}, step):
                return batch.run(model, {**fixed, **moved})

        value, derivative, *_ = jvp(run, (moving, none), (tangent, torch.ones_like(none)))
        return value, derivative

    with function_transforms(gradients=False), unfused_recurrence(model), _constant_padding(model):
        if tangents.size == 1:
            products = {name: LowRank(left[0], right[0]) for name, (left, right) in factors.items()}
            value, derivative = push({name: t[0] for name, t in dense.items()}, products)
            return value, derivative.unsqueeze(0)
        values, derivatives = vmap(push)(dense, factors)
        return values[0], derivatives


@contextlib.contextmanager
def _along(products: Mapping[nn.Module, LowRank], step: Tensor) -> Iterator[None]:
    """Linear layers whose weight is ``step`` (of value 0) further along a product, which is never formed."""

    def move(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        left, right = products[module]
        moved = F.linear(F.linear(args[0] if args else kwargs["input"], right), left)
        return output + (step * moved).to(output.dtype)

    handles = [module.register_forward_hook(move, prepend=True, with_kwargs=True) for module in products]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _constant_padding(model: nn.Module) -> Iterator[None]:
    """No derivative of padding entries: reverse mode leaves them out, PyTorch's forward mode does not."""

    def hold(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        ids: Tensor = args[0] if args else kwargs["input"]
        padding = ids.eq(cast(int, module.padding_idx)).unsqueeze(-1)
        return torch.where(padding, output.detach(), output)

    handles = [
        module.register_forward_hook(hold, prepend=True, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
