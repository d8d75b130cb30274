"""Data that is not part of the project: real domains and published tables, where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_data(name: str) -> Path:
    """A file of the shared bundles, or a skip that says how to provide it."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("TRANSFEROPS_DATA", beside)) / name
    if not path.is_file():
        pytest.skip(f"no {name}: set TRANSFEROPS_DATA to the folder that holds it")
    return path
