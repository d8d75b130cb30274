"""Versions and dependencies: facts that stand in several files agree, and errors explain themselves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from transferops._extension import LEAST_TORCH

pytest.importorskip("packaging")

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "dependencies.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="the scripts are in the source tree only")


@pytest.fixture
def dependencies(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import dependencies

    return dependencies


def imported(preparation: str) -> str:
    """What an import of the ops says in a Python of which something was changed first."""
    program = f"import sys, torch\n{preparation}\nimport transferops.ops"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    return run.stderr.rpartition("\nImportError: ")[2].strip()


def test_an_older_torch_is_named() -> None:
    found = imported("torch.__version__ = torch.torch_version.TorchVersion('2.9.1+cpu')")
    assert re.match(
        r"transferops: expected torch 2\.11 or later, .* got 2\.9\.1\+cpu\.\nUpgrade it: \S+ -m pip ", found
    )


def test_a_module_that_does_not_load_is_explained() -> None:
    """Instead of an undefined symbol, what it means and the command that repairs it."""
    finder = (
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'transferops._C':\n"
        "            raise ImportError('_C.so: undefined symbol: _ZN3c105ErrorC2E')\n"
        "sys.meta_path.insert(0, Broken())"
    )
    found = imported(finder)
    assert found.startswith("transferops: its compiled module could not be loaded (_C.so: undefined symbol: _ZN3c105")
    assert re.search(
        r"this is Python 3\.\d+ with torch \d.*\nBuild it .*: \S+ -m pip install --no-build-isolation", found
    )


def test_one_least_torch(dependencies: ModuleType) -> None:
    (torch,) = [r for r in dependencies.declared()[""] if r.name == "torch"]
    assert str(torch.specifier) == f">={LEAST_TORCH}"
    target = re.search(r"TORCH_TARGET_VERSION 0x(\w\w)(\w\w)0{12}", (ROOT / "csrc" / "torch" / "stable.h").read_text())
    assert target is not None
    assert ".".join(str(int(part, 16)) for part in target.groups()) == LEAST_TORCH


def without_licence(table: str) -> list[str]:
    """The rows, but for the last column, which is known of installed packages only."""
    return [line.rpartition(" | ")[0] for line in table.splitlines() if line.startswith("| ")]


def test_the_page_of_dependencies_is_up_to_date(dependencies: ModuleType) -> None:
    committed = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert without_licence(committed) == without_licence(dependencies.page()), "run `make dependencies`"


def test_constraints_are_within_the_bounds(dependencies: ModuleType) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert len(pinned) == len(lines) - 1
    declared = [r for group in dependencies.declared().values() for r in group]
    for requirement in declared:
        name = dependencies.canonicalize_name(requirement.name)
        if name in pinned:
            assert requirement.specifier.contains(pinned[name]), f"{requirement}, pinned to {pinned[name]}"
    assert {"torch", "numpy", "click", "pytest", "ruff", "mypy"} <= set(pinned)


def test_the_oldest_versions_are_within_the_bounds(dependencies: ModuleType) -> None:
    oldest = dict(line.split("==") for line in dependencies.minimum().splitlines())
    assert oldest["torch"] == LEAST_TORCH
    assert oldest["scikit-learn"] == "1.6"  # the largest of several bounds
    for extra in dependencies.MINIMUM:
        for requirement in dependencies.declared()[extra]:
            assert requirement.specifier.contains(oldest[requirement.name]), requirement


def test_the_bill_of_materials_is_what_is_installed(dependencies: ModuleType) -> None:
    document = json.loads(dependencies.sbom())
    versions = {component["name"]: component["version"] for component in document["components"]}
    assert versions["torch"] == metadata.version("torch")
    assert versions["numpy"] == metadata.version("numpy")
    needs = {entry["ref"]: entry["dependsOn"] for entry in document["dependencies"]}
    assert {"torch", "numpy"} <= set(needs["transferops"])
    assert "sympy" in needs["torch"]
    assert {name for others in needs.values() for name in others} <= set(versions)
