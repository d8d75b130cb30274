"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch


def cuda_ready() -> bool:
    """Whether there is a GPU and a build with CUDA kernels."""
    import transferops

    return transferops.show_config()["cuda_built"] is not None and torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not cuda_ready():
        reason = pytest.mark.skip(reason="needs a CUDA device and a CUDA build of transferops")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(reason)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator of random inputs."""
    return torch.Generator().manual_seed(0)
