"""The warning category of all scores."""

from __future__ import annotations

import warnings


class ScoreWarning(UserWarning):
    """A score was computed, but its value needs a caveat, which the message gives with numbers."""


def warn(message: str, *, stacklevel: int = 2) -> None:
    """Issue a :class:`ScoreWarning` that points at the caller of the public function or method."""
    warnings.warn(message, ScoreWarning, stacklevel=stacklevel + 1)
