"""Packages that single scores need, imported when they do."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def load(module: str, package: str, score: str) -> Any:
    """Import ``module``, or say which package is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{score} needs {package}: pip install {package}") from error


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Keep the texts of a package's warnings, for the score's own."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts.extend(dict.fromkeys(" ".join(str(item.message).split()) for item in caught))
