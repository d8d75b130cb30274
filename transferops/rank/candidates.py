"""Models to rank, from the names a user gives them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from transferops._validate import describe, fail


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model that may suit the target.

    Attributes:
        name: In tables and files.
        model: From inputs to outputs for the classes it was trained on.
    """

    name: str
    model: nn.Module

    @property
    def parameters(self) -> int:
        """Number of parameters: the plainest baseline of any ranking."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def load_candidate(name: str, *, pretrained: bool = True) -> Candidate:
    """The model that a name stands for.

    Args:
        name: ``module:function``, a function without arguments that returns the module, imported from the current
            folder or the installed packages; ``timm:NAME``; or ``hf:NAME``, an image classifier of Hugging Face
            transformers. Only what is named is imported.
        pretrained: Load the trained weights of timm and Hugging Face models; otherwise they are random.

    Raises:
        ValueError: A name of another form, or one that leads nowhere.
        TypeError: What the function returns is no module.
        ImportError: timm or transformers is not installed.
    """
    origin, separator, rest = name.partition(":")
    if not separator or not origin or not rest:
        fail("model", "module:function, timm:NAME or hf:NAME", repr(name))
    model = _LOADERS.get(origin, _from_function)(name, rest, pretrained)
    if not isinstance(model, nn.Module):
        fail("model", f"a torch.nn.Module from {name}", describe(model), TypeError)
    return Candidate(name, model)


def _from_function(name: str, function: str, _: bool) -> Any:
    module_name = name.partition(":")[0]
    if not all(part.isidentifier() for part in module_name.split(".")):
        fail("model", "a module's name, such as package.module, before ':'", repr(name))
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is not None and (module_name + ".").startswith(missing.name + "."):
            fail("model", f"a module that can be imported before ':' in {name!r}", f"no module named {missing.name!r}")
        raise
    maker = getattr(module, function, None)
    if not callable(maker):
        fail("model", f"a function {function!r} in {module_name}", "none")
    return maker()


def _from_timm(_: str, model: str, pretrained: bool) -> Any:
    try:
        import timm
    except ImportError as missing:
        raise ImportError('timm: models need timm: pip install "transferops[timm]"') from missing
    if not timm.is_model(model):
        fail("model", "a model that timm knows (timm.list_models())", repr(model))
    return timm.create_model(model, pretrained=pretrained)


def _from_transformers(_: str, model: str, pretrained: bool) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
    except ImportError as missing:
        raise ImportError('hf: models need transformers: pip install "transferops[transformers]"') from missing
    classifier: Any = AutoModelForImageClassification
    if pretrained:
        return classifier.from_pretrained(model)
    return classifier.from_config(AutoConfig.from_pretrained(model))


_LOADERS: dict[str, Callable[[str, str, bool], Any]] = {"timm": _from_timm, "hf": _from_transformers}
