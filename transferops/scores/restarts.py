"""Gradients of one network at many initialisations: what a principal gradient expectation averages.

A restart is a seed. The initialisation that it stands for is drawn module by module in a fixed order, the head's last
and from a seed of its own, so that two tasks see the same backbone at the same restart whatever their numbers of
classes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

from transferops._models import layer_calls
from transferops._validate import describe, fail
from transferops.fisher.batches import Batch
from transferops.fisher.modes import function_transforms

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHUNK_BYTES = 2**28
_CACHE_BYTES = 24 * 2**20
_FEWEST = 4  # restarts that are worth batching, on a CPU that has work enough in one
_HEAD_SEED = 0x5DEECE66D  # tells the head's seed from the backbone's


def find_head(model: nn.Module, batch: Batch) -> str:
    """The name of the last linear layer or convolution to run, if its outputs are the model's.

    Raises:
        ValueError: there is none, or its outputs are not as many as the model's.
    """
    probe = copy.deepcopy(model).eval()
    with seeded(0, batch_device(batch)):
        calls, outputs = layer_calls(probe, lambda: batch.run(probe))
    if not calls:
        fail("head", "the name of the model's last layer, which has no linear layer or convolution to go by", "None")
    last = calls[-1][0]
    found = _outputs(probe.get_submodule(last))
    if found != outputs.shape[-1]:
        expected = f"the name of the layer that gives the model's {outputs.shape[-1]} outputs"
        fail("head", f"{expected} ({last!r}, the last to run, gives {found})", "None")
    return last


def batch_device(batch: Batch) -> torch.device:
    """Where the samples are."""
    values = batch.inputs.values() if isinstance(batch.inputs, dict) else [batch.inputs]
    return next(value.device for value in values if isinstance(value, Tensor))


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from ``seed``; the generators' states are restored."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class RestartedNetwork:
    """A copy of a model for one number of classes, differentiated at initialisations that seeds stand for.

    Args:
        model: what is copied; not changed.
        head: names of the head's modules; the last gives the outputs.
        classes: outputs of the head.
        random: draw the whole network anew at each restart, not the head alone.
        initialize: draws the parameters of a module anew, in place; None for the modules' own ``reset_parameters``.

    Attributes:
        names: the parameters that gradients are taken of: all that ask for one but the head's.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Sequence[str],
        classes: int,
        *,
        random: bool,
        initialize: Callable[[nn.Module], None] | None,
    ) -> None:
        self.module = copy.deepcopy(model)
        self.random = random
        self._initialize = initialize or _reset
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if head:
            with seeded(0, self.device):  # building a layer draws its parameters
                _resize(self.module, head[-1], classes)
        self.module.train()
        heads = [self.module.get_submodule(name) for name in head]
        in_head = {id(module) for part in heads for module in part.modules()}
        self._heads = [m for m in _children_first(self.module) if id(m) in in_head]
        self._backbone = [m for m in _children_first(self.module) if id(m) not in in_head] if random else []
        if initialize is None:
            _check_resettable(self.module, [*self._backbone, *self._heads])
        of_head = {id(p) for part in heads for p in part.parameters()}
        parameters = dict(self.module.named_parameters())
        self.names = tuple(n for n, p in parameters.items() if p.requires_grad and id(p) not in of_head)
        if not self.names:
            fail("model", "parameters that ask for gradients besides the head's", "none")
        drawn = {id(p) for m in (*self._backbone, *self._heads) for p in m.parameters()}
        self._drawn = [n for n, p in parameters.items() if id(p) in drawn]
        self._fixed = {n: p.detach() for n, p in parameters.items() if id(p) not in drawn}
        self.loop_reason: str | None = None
        self._kept: dict[tuple[torch.Size, ...], int] = {}  # bytes that a forward pass keeps, by the inputs' shapes

    @property
    def expected(self) -> list[Tensor]:
        """The parameters that gradients are taken of, at whatever values."""
        parameters = dict(self.module.named_parameters())
        return [parameters[name].detach() for name in self.names]

    def chunk(self, restarts: int) -> int:
        """Restarts drawn at a time: as many as have parameters and gradients of 256 MiB in all, at least one."""
        parameters = dict(self.module.named_parameters())
        size = sum(parameters[n].numel() * parameters[n].element_size() for n in (*self._drawn, *self.names))
        return max(1, min(restarts, _CHUNK_BYTES // max(size, 1)))

    def draw(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Parameters and buffers at these restarts, [R, *shape] each; of the parameters those that are drawn."""
        kept: list[dict[str, Tensor]] = []
        for seed in seeds:
            for modules, own_seed in ((self._backbone, seed), (self._heads, seed ^ _HEAD_SEED)):
                with seeded(own_seed, self.device), torch.no_grad():
                    for module in modules:
                        self._initialize(module)
            parameters = dict(self.module.named_parameters())
            state = {name: parameters[name].detach().clone() for name in self._drawn}
            kept.append(state | {name: value.clone() for name, value in self.module.named_buffers()})
        return {name: torch.stack([state[name] for state in kept]) for name in kept[0]}

    def gradients(
        self, batch: Batch, state: dict[str, Tensor], seeds: Sequence[int], draw: int, at_once: int | None = None
    ) -> list[Tensor]:
        """Gradients [R, *shape] of the mean cross-entropy in train mode, of the parameters in ``names``.

        Several restarts at once under ``torch.func.vmap``, where the network allows it. What draws random numbers
        (dropout) does not: it would draw others than one restart at a time, and not the same for two tasks. Neither do
        some operations. Then, from that batch on, one by one, and ``loop_reason`` says why.

        Args:
            batch: inputs and labels, which have been checked.
            state: what :meth:`draw` gave for the seeds.
            seeds: of the restarts.
            draw: number of the batch in its task: random numbers in the network follow from it and the restart's seed.
            at_once: restarts under one vmap. None: all on a GPU; on a CPU, where they are slower than one by one once
                they leave the cache, as many as keep 24 MiB in all for the backward pass, or one if those are below 4.
        """
        if self.loop_reason is None and len(seeds) > 1:
            step = at_once or self._at_once(batch, state, len(seeds))
            try:
                if step > 1:
                    return self._batched(batch, state, step if step < len(seeds) else None)
            except RuntimeError as error:
                self.loop_reason = str(error).split("\n")[0]
        rows = [self._single(batch, {n: x[i] for n, x in state.items()}, s, draw) for i, s in enumerate(seeds)]
        return [torch.stack(column) for column in zip(*rows)]

    def _at_once(self, batch: Batch, state: dict[str, Tensor], restarts: int) -> int:
        if self.device.type != "cpu":
            return restarts
        inputs = batch.inputs.values() if isinstance(batch.inputs, dict) else [batch.inputs]
        shapes = tuple(x.shape for x in inputs if isinstance(x, Tensor))
        if shapes not in self._kept:
            self._kept[shapes] = self._bytes_kept(batch, {name: x[0] for name, x in state.items()})
        fit = _CACHE_BYTES // max(self._kept[shapes], 1)
        return min(fit, restarts) if fit >= min(_FEWEST, restarts) else 1

    def _bytes_kept(self, batch: Batch, state: dict[str, Tensor]) -> int:
        """Size of what a forward pass at one restart keeps for the backward pass, parameters aside."""
        kept: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            kept[x.data_ptr()] = x.nbytes
            return x

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            _loss, wanted = self._loss_at(batch, state, 0)
        parameters = {x.data_ptr() for x in (*wanted, *state.values(), *self._fixed.values())}
        return sum(size for place, size in kept.items() if place not in parameters)

    def _loss(self, batch: Batch, values: dict[str, Tensor]) -> Tensor:
        logits = batch.run(self.module, values)
        return F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten())

    def _loss_at(self, batch: Batch, state: dict[str, Tensor], seed: int) -> tuple[Tensor, list[Tensor]]:
        """The loss at one restart, and the parameters in ``names`` that it was taken at."""
        values = {name: value if name in self._drawn else value.clone() for name, value in state.items()}
        values = {**self._fixed, **values}
        wanted = [values[name].detach().requires_grad_() for name in self.names]
        with seeded(seed, self.device):
            return self._loss(batch, values | dict(zip(self.names, wanted))), wanted

    def _batched(self, batch: Batch, state: dict[str, Tensor], step: int | None) -> list[Tensor]:
        # In train mode batch normalisation changes its buffers, here those of this call.
        state = {name: value if name in self._drawn else value.clone() for name, value in state.items()}
        wanted = {name: state.pop(name) if name in state else self._fixed[name] for name in self.names}
        fixed = {name: value for name, value in self._fixed.items() if name not in wanted}

        def loss(own: dict[str, Tensor], others: dict[str, Tensor]) -> Tensor:
            return self._loss(batch, {**fixed, **others, **own})

        in_dims = ({name: 0 if name in self._drawn else None for name in wanted}, 0)
        with function_transforms(gradients=True):
            found = vmap(grad(loss), in_dims=in_dims, randomness="error", chunk_size=step)(wanted, state)
        return [found[name] for name in self.names]

    def _single(self, batch: Batch, state: dict[str, Tensor], seed: int, draw: int) -> list[Tensor]:
        with torch.enable_grad():
            loss, wanted = self._loss_at(batch, state, seed + draw + 1)
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, wanted)]


def _children_first(module: nn.Module) -> list[nn.Module]:
    order: list[nn.Module] = []
    module.apply(order.append)
    return list(dict.fromkeys(order))


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if reset is not None:
        reset()


def _check_resettable(model: nn.Module, modules: list[nn.Module]) -> None:
    drawn = {id(module) for module in modules}
    for name, module in model.named_modules():
        own = next((n for n, _ in module.named_parameters(recurse=False)), None)
        if id(module) in drawn and own and not any(hasattr(module, f"{x}reset_parameters") for x in ("", "_")):
            expected = "modules with reset_parameters (or initialize=, which draws a module's parameters anew)"
            fail("model", expected, f"{type(module).__name__} {name!r} without, which has the parameter {own!r}")


def _outputs(module: nn.Module) -> int | None:
    found = getattr(module, "out_features", getattr(module, "out_channels", None))
    return found if isinstance(found, int) else None


def _resize(model: nn.Module, name: str, classes: int) -> None:
    """Gives the module of this name so many outputs; the new one is not initialised in any particular way."""
    module = model.get_submodule(name)
    if _outputs(module) == classes:
        return
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        new: nn.Module = nn.Linear(module.in_features, classes, module.bias is not None)
    elif isinstance(module, _CONVOLUTIONS):
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        options = {key: getattr(module, key) for key in names}
        new = type(module)(module.in_channels, classes, bias=module.bias is not None, **options)
    else:
        fail("head", f"a linear layer or convolution, to make one of {classes} outputs", describe(module))
    assert isinstance(weight, Tensor)
    new = new.to(weight.device, weight.dtype).requires_grad_(weight.requires_grad)
    if not name:
        fail("model", "parameters that ask for gradients besides the head's", "none")
    model.set_submodule(name, new)
