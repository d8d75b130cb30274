"""``transferops doctor``: facts that agree with the machine, and faults that it finds when there are some."""

from __future__ import annotations

import json
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run

from transferops import ops, show_config
from transferops.cli import doctor


class Installed:
    """Stands for the package's metadata: it needs torch, and has three extras."""

    def __init__(self, *requirements: str) -> None:
        self.requires = ["torch>=2.11", 'transferops[two]; extra == "one"', *requirements]
        self.metadata = self

    def get_all(self, _: str) -> list[str]:
        return ["one", "two", "lint"]


def pretend(monkeypatch: pytest.MonkeyPatch, *requirements: str) -> None:
    """Let the package's metadata be others."""
    real = metadata.distribution
    found = Installed(*requirements)
    monkeypatch.setattr(metadata, "distribution", lambda name: found if name == "transferops" else real(name))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra with a package that nobody has and a version that nobody has, and one inside another."""
    pretend(
        monkeypatch, 'surely-absent>=1.5; extra == "two"', 'torch>=999; extra == "two"', 'ruff>=999; extra == "lint"'
    )


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, or a build for it, and no extras."""
    pretend(monkeypatch)
    monkeypatch.setattr(doctor, "show_config", lambda: {**show_config(), "gpu": None})
    monkeypatch.setattr(doctor, "nvcc_release", lambda: None)


@pytest.mark.usefixtures("whole")
def test_a_build_that_works() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    lines = dict(line.split(maxsplit=1) for line in result.output.splitlines())
    assert lines["torch"].startswith(f"{torch.__version__}; built against")
    assert "runs with >=2.11" in lines["torch"]
    assert "\ncpu kernels   right\n" in result.output
    assert lines["gpu"].startswith("none: ")
    assert lines["[one]"] == "complete"
    assert result.output.endswith("no problem found\n")


def test_json_is_printed_or_written(whole: None, tmp_path: Path) -> None:
    printed = run("doctor", "--json", "-")
    assert printed.exit_code == 0, printed.output
    facts = json.loads(printed.stdout)
    assert facts["torch_running"] == torch.__version__
    assert facts["kernels"] == {"cpu": "right"}
    assert facts["extras"] == {"one": {"missing": [], "fix": ""}, "two": {"missing": [], "fix": ""}}
    assert facts["problems"] == []
    path = tmp_path / "facts.json"
    assert "no problem found" in run("doctor", "--json", str(path)).output
    assert json.loads(path.read_text()) == facts
    assert run("doctor", "--json", str(tmp_path / "none" / "facts.json")).exit_code == 2


@pytest.mark.usefixtures("installed")
def test_missing_packages_come_with_the_command() -> None:
    facts = doctor.examine()
    missing = ["surely-absent>=1.5", "torch>=999"]
    assert set(facts["extras"]) == {"one", "two"}  # those of developers left out
    for extra in facts["extras"].values():
        assert list(extra["missing"]) == missing
        assert shlex.split(extra["fix"]) == [sys.executable, "-m", "pip", "install", *missing]
    assert all("absent" not in problem["what"] for problem in facts["problems"])


def test_a_package_that_is_needed_is_a_problem(whole: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "surely-absent>=1.5")
    result = run("doctor")
    assert result.exit_code == 1
    assert "problem: installed versions do not meet surely-absent>=1.5" in result.output


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_kernels_that_do_not_work_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.class_moments

    def broken(*arguments: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("no kernel image is available\nmore")
        return right(*arguments)._replace(gram=torch.zeros(3, 3, dtype=torch.float64))

    monkeypatch.setattr(ops, "class_moments", broken)
    result = run("doctor")
    assert result.exit_code == 1
    what = "no kernel image is available\n" if fault == "raises" else "a result that is wrong by"
    assert f"problem: the cpu kernels do not work: {what}" in result.output
    assert "pip install --no-build-isolation" in result.output


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    ("nvcc", "first"),
    [
        (None, "install the CUDA 13 toolkit, with its nvcc on PATH; then in the source tree: "),
        ("12.4", "nvcc is of CUDA 12.4, torch of 13.0: put one of CUDA 13 on PATH; then in the source tree: "),
        ("13.2", "in the source tree: "),
    ],
)
def test_a_gpu_that_the_build_does_not_serve(monkeypatch: pytest.MonkeyPatch, nvcc: str | None, first: str) -> None:
    facts = {**show_config(), "gpu": "NVIDIA A100", "cuda_built": None}
    monkeypatch.setattr(doctor, "show_config", lambda: facts)
    monkeypatch.setattr(doctor, "nvcc_release", lambda: nvcc)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    result = run("doctor")
    assert result.exit_code == 1
    assert "problem: torch sees NVIDIA A100, but this build has CPU kernels only" in result.output
    assert f"  fix: {first}TRANSFEROPS_CUDA_ARCHITECTURES=80 {shlex.quote(sys.executable)} -m pip" in result.output


def test_nvcc_is_asked_for_its_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.9'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert doctor.nvcc_release() == "13.1"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert doctor.nvcc_release() is None


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert doctor.gpu_absent() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert doctor.gpu_absent() == "CUDA_VISIBLE_DEVICES='-1' hides all of them"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert doctor.gpu_absent() == "Found no NVIDIA driver on your system."
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert doctor.gpu_absent() == "the driver reports none"


@pytest.mark.gpu
def test_cuda_kernels_are_run() -> None:
    facts = doctor.examine()
    assert facts["kernels"] == {"cpu": "right", "cuda": "right"}
    assert facts["gpu_absent"] is None
