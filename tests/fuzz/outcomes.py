"""The two outcomes that a call may have: an answer, or the documented refusal; and the register of what is called."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cases import Spec
from hypothesis import strategies as st

from transferops.scores import ScoreWarning

_MESSAGE = re.compile(r"[^\n:]+: expected .+, got .+", re.DOTALL)


@dataclass(frozen=True)
class Refusal:
    """A ValueError or TypeError in the house's form."""

    message: str

    @property
    def argument(self) -> str:
        """The argument it names, without an index."""
        return re.split(r"[\[:]", self.message)[0]


@dataclass(frozen=True)
class Target:
    """One public function under fuzzing.

    Attributes:
        name: as in ``transferops.<name>``.
        specs: strategy of its examples.
        check: makes the call of an example and judges it: returns "agreed" or "refused", raises otherwise.
    """

    name: str
    specs: st.SearchStrategy[Spec]
    check: Callable[[Spec], str]


TARGETS: dict[str, Target] = {}


def target(*names: str, specs: st.SearchStrategy[Spec]) -> Callable[[Callable[[Spec], str]], Callable[[Spec], str]]:
    """Register a check for the function ``names[0]``; further names are covered by the same examples."""

    def register(check: Callable[[Spec], str]) -> Callable[[Spec], str]:
        for name in names:
            assert name not in TARGETS, name
            TARGETS[name] = Target(name, specs, check)
        return check

    return register


def outcome(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The function's result, or its Refusal. Any other exception, a warning of another kind, or a message that is not
    in the house's form is let through, and fails the example."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ScoreWarning)
        try:
            return function(*arguments, **options)
        except (ValueError, TypeError) as error:
            if not _MESSAGE.match(str(error)):
                raise
            return Refusal(str(error))


def refused(result: Any, *arguments: str) -> str:
    """ "refused", if the result is a Refusal that names one of ``arguments``."""
    assert isinstance(result, Refusal), f"expected a refusal of {arguments}, got {result}"
    assert result.argument in arguments, f"expected a refusal of {arguments}, got: {result.message}"
    return "refused"


def agreed(result: Any, *expected: tuple[Any, Any]) -> str:
    """ "agreed", if every part of the result (of a tuple, or all of it) is within its tolerance of its value.

    Where the value is NaN or infinite the result must be one of the two. Where the tolerance is, something left the
    range of its type on the way, or met such an input, and anything may stand there.
    """
    assert not isinstance(result, Refusal), f"expected an answer, got the refusal: {result.message}"
    parts = tuple(result) if isinstance(result, tuple) else (result,)
    assert len(parts) == len(expected)
    for number, (part, (value, tolerance)) in enumerate(zip(parts, expected, strict=True)):
        got, value, tolerance = (_numbers(x) for x in (part, value, tolerance))
        assert got.shape == value.shape, f"part {number}: expected shape {value.shape}, got {got.shape}"
        with np.errstate(invalid="ignore"):
            right = np.where(np.isfinite(value), np.abs(got - value) <= tolerance, ~np.isfinite(got))
            wrong = ~right & (np.isfinite(tolerance) | ~np.isfinite(value))
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            allowed = np.broadcast_to(tolerance, wrong.shape)[place]
            raise AssertionError(
                f"part {number} at {place}: {got[place]!r}, expected {value[place]!r} +- {allowed:.3g}"
            )
    return "agreed"


def _numbers(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach().double().numpy()
    return np.asarray(value, dtype=np.float64)
