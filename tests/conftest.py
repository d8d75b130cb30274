"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bundles import feature_bundle


def cuda_ready() -> bool:
    """Whether there is a GPU and a build with CUDA kernels."""
    import transferops

    return transferops.show_config()["cuda_built"] is not None and torch.cuda.is_available()


def pytest_configure() -> None:
    """Where pytest-xdist runs several processes they share the processors, with the commands that they start."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


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


@pytest.fixture(scope="session")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains "one", "two" and "[bold]" of 24 samples, alike; a name in brackets would be lost as markup."""
    path = tmp_path_factory.mktemp("data") / "alike.npz"
    return feature_bundle(path, {"one": (0, 1), "two": (0, 1), "[bold]": (0, 1)}, samples=24)


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    """Commands set the number of threads of the process."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a few numbers are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
