"""The public API is documented: every object, every argument, every error that it raises itself."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import pkgutil
import re
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import transferops

PUBLIC = ["transferops", *(f"transferops.{name}" for name in transferops._LAZY | {"ops"})]


def modules() -> Iterator[Any]:
    """The public modules, with those of compat and integrations whose packages are installed."""
    for name in sorted(PUBLIC):
        module = importlib.import_module(name)
        yield module
        if name in ("transferops.compat", "transferops.integrations"):
            for part in pkgutil.iter_modules(module.__path__):
                if not part.name.startswith("_"):
                    # The package that it is for may be missing, or warn of its own dependencies.
                    with contextlib.suppress(ImportError), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        yield importlib.import_module(f"{name}.{part.name}")


def public() -> dict[str, Any]:
    """Classes and functions of this library by the name that a user writes."""
    found = {}
    for module in modules():
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
            value = getattr(module, name)
            if inspect.isroutine(value) or inspect.isclass(value):
                found[f"{module.__name__}.{name}"] = value
    return {name: value for name, value in found.items() if value.__module__.startswith("transferops")}


def members(owner: type) -> dict[str, Any]:
    """What a class defines itself: public methods and properties, as functions."""
    plain = {name: getattr(value, "__func__", value) for name, value in vars(owner).items() if name[0] != "_"}
    functions = {name: value.fget if isinstance(value, property) else value for name, value in plain.items()}
    return {name: value for name, value in functions.items() if inspect.isfunction(value)}


API = public()
CALLABLES = {
    **{name: (value, value) for name, value in API.items() if inspect.isfunction(value)},
    **{name: (value, value.__init__) for name, value in API.items() if "__init__" in vars(value)},
}
"""By name: whose docstring it is, and the function that takes the arguments."""


def documentation(value: Any) -> str:
    """A docstring; of a class those of the classes that it extends, too."""
    own = value.__mro__ if inspect.isclass(value) else [value]
    return "\n".join(inspect.getdoc(part) or "" for part in own if part.__module__.startswith("transferops"))


def refers(text: str) -> bool:
    """Whether a docstring leaves a part of the description to that of another object."""
    return (
        re.search(r"\b(?:as|of|for|see|than) (?:the function |there|.{0,12}:(?:func|meth|class):`)", text, re.I)
        is not None
    )


def raises_itself(function: Any) -> bool:
    """Whether the body has a ``raise``, or a call of one of the checks that raise."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):  # what a dataclass or a named tuple has generated
        return False
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree)) or any(
        name == "fail" or name.startswith("check_") for name in names
    )


def test_there_is_an_api() -> None:
    assert len(API) > 150
    assert {"transferops.ops.class_moments", "transferops.scores.HScore", "transferops.otqms.allocate"} <= set(API)


@pytest.mark.parametrize("name", API)
def test_everything_has_a_docstring(name: str) -> None:
    value = API[name]
    assert value.__doc__
    for member in members(value) if inspect.isclass(value) else ():
        assert inspect.getdoc(getattr(value, member)), f"{name}.{member} has no docstring"


@pytest.mark.parametrize("name", CALLABLES)
def test_every_argument_is_described(name: str) -> None:
    documented, function = CALLABLES[name]
    text = documentation(documented)
    if re.search(r"\bmade by\b", text, re.I):
        return  # not by the user
    for parameter in inspect.signature(function).parameters:
        if parameter != "self" and not refers(text):
            assert re.search(rf"\b{parameter}\b", text), f"{name} says nothing of {parameter}"


@pytest.mark.parametrize("name", CALLABLES)
def test_every_error_is_described(name: str) -> None:
    documented, function = CALLABLES[name]
    if raises_itself(function):
        assert re.search(r"\b[Rr]aises?\b", documentation(documented)) or refers(documentation(documented))


@pytest.mark.parametrize("name", [name for name, value in API.items() if inspect.isclass(value)])
def test_every_error_of_a_method_is_described(name: str) -> None:
    for member, function in members(API[name]).items():
        text = inspect.getdoc(getattr(API[name], member)) or ""
        if raises_itself(function):
            assert re.search(r"\b[Rr]aises?\b", text) or refers(text), f"{name}.{member} does not say what it raises"


@pytest.mark.parametrize("name", CALLABLES)
def test_every_argument_has_a_type(name: str) -> None:
    """And every result has one."""
    _, function = CALLABLES[name]
    parameters = {p for p in inspect.signature(function).parameters if p != "self"}
    assert parameters | {"return"} <= set(inspect.get_annotations(function))
