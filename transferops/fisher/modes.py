"""States in which a model is differentiated, each left as it was found."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from transferops._validate import fail


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, uncompiled, unsynchronised, without fused inference paths; restored module by module.

    The flags are set directly: ``eval()`` may be overridden, to merge adapters for instance.
    """
    modules = dict(model.named_modules())  # one walk: of many layers on a GPU, each costs as much as a layer
    _refuse_unfit(modules)
    modes = [(module, module.training) for module in modules.values()]
    wrappers = [module for module in modules.values() if isinstance(module, DistributedDataParallel)]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # A compiled module would run without the hooks; only if dynamo is loaded can there be one.
    compiled = "torch._dynamo" in sys.modules
    try:
        _set_modes((module, False) for module in modules.values())
        torch.backends.mha.set_fastpath_enabled(False)
        with (
            torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext(),
            torch.inference_mode(False),
            _unsynchronised(wrappers),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        _set_modes(modes)


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        if module.training != training:  # setting an attribute of a module is slow
            module.training = training


@contextlib.contextmanager
def _unsynchronised(wrappers: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """DistributedDataParallel does nothing: processes need not see equally many batches, none may wait for another."""
    own = [vars(wrapper).get("forward") for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            vars(wrapper)["forward"] = partial(nn.Module.__call__, wrapper.module)
        yield
    finally:
        for wrapper, forward in zip(wrappers, own):
            del vars(wrapper)["forward"]
            if forward is not None:
                vars(wrapper)["forward"] = forward


@contextlib.contextmanager
def function_transforms(*, gradients: bool) -> Iterator[None]:
    """For torch.func: scaled dot-product attention without the fused backends, which it cannot transform."""
    with torch.set_grad_enabled(gradients), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # PyTorch scripts its own forward-mode rules on first use; the warning's class varies by version.
        warnings.filterwarnings("ignore", message=".*torch.jit.script")
        warnings.filterwarnings("ignore", message=".*performance drop")  # an operation without a vmap rule
        yield


@contextlib.contextmanager
def gradients_for(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Gradients on, for these parameters only; for none, a backward pass goes through activations alone.

    The user's hooks on parameters do not run: what they make of a sum of gradients is not its derivative.
    """
    parameters = dict(model.named_parameters())
    before = [(p, p.requires_grad) for p in parameters.values()]
    hooks = [p._backward_hooks for p in parameters.values() if p._backward_hooks]
    contents = [list(own.items()) for own in hooks]
    try:
        for own in hooks:
            own.clear()
        for name, p in parameters.items():
            p.requires_grad_(name in names)
        with torch.enable_grad():
            yield
    finally:
        for p, asks in before:
            p.requires_grad_(asks)
        for own, content in zip(hooks, contents):
            own.update(content)


@contextlib.contextmanager
def recurrent_gradients(model: nn.Module) -> Iterator[None]:
    """Recurrent layers of a GPU without cuDNN, whose backward pass refuses evaluation mode."""
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    enabled = torch.backends.cudnn.enabled
    try:
        if any(p.is_cuda for layer in layers for p in layer.parameters()):
            torch.backends.cudnn.enabled = False
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextlib.contextmanager
def unfused_recurrence(model: nn.Module) -> Iterator[None]:
    """LSTMs on a CPU without oneDNN, whose layer torch.func cannot transform."""
    switch: Any = torch.backends.mkldnn
    enabled = switch.enabled
    try:
        if any(isinstance(module, nn.LSTM) for module in model.modules()):
            switch.enabled = False
        yield
    finally:
        switch.enabled = enabled


def _refuse_unfit(modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        for own, p in module._parameters.items():
            if p is not None:
                _refuse_unfit_parameter(f"{path}.{own}" if path else own, p)
    for name, module in modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            expected = f"running statistics in {name!r}, without which the samples of a batch are coupled"
            fail("model", expected, f"{type(module).__name__} that keeps none")


def _refuse_unfit_parameter(name: str, p: Tensor) -> None:
    if p.is_meta or is_lazy(p):
        got = "one on meta" if p.is_meta else "a lazy one"
        fail("model", f"parameters that have values, {name!r} among them", got)
    # A part of a parameter, of DTensor or FSDP, is not the parameter.
    if hasattr(p, "placements") or hasattr(p, "_is_flat_param"):
        fail("model", f"parameters that are whole in every process, {name!r} among them", type(p).__name__)
