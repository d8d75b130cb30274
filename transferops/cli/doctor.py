"""``transferops doctor``: what is built, what it runs on, what is missing, and the command that repairs it."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import click
import torch

from transferops import ops, show_config
from transferops.cli import _options
from transferops.cli._command import Command

_PACKAGE = "transferops"
_DEVELOPMENT = {"test", "bench", "lint", "docs", "dev"}  # extras that a user does not miss
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the command that repairs it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Extra:
    """A group of optional packages.

    Attributes:
        missing: requirements that are not met.
        fix: the command that meets them; empty if nothing is missing.
    """

    missing: tuple[str, ...]
    fix: str


def examine() -> dict[str, Any]:
    """The facts of this build and machine.

    Returns:
        The facts of :func:`transferops.show_config`; ``torch_least``, what the stable ABI needs; ``platform``;
        ``nvcc``, its CUDA release, or None; ``gpu_architecture``, such as "90", or None; ``gpu_absent``, why there is
        no GPU, or None; ``kernels``, "right" or an error by device; ``extras`` by name; and ``problems``.
    """
    facts: dict[str, Any] = {**show_config(), "platform": platform.platform()}
    requirements, extras = _requirements()
    facts["torch_least"] = next((str(r.specifier) for r in requirements if r.name == "torch"), None)
    facts["nvcc"] = nvcc_release()
    facts["gpu_architecture"] = "".join(map(str, torch.cuda.get_device_capability())) if facts["gpu"] else None
    facts["gpu_absent"] = None if facts["gpu"] else gpu_absent()
    devices = ["cpu", *(["cuda"] if facts["gpu"] and facts["cuda_built"] else [])]
    facts["kernels"] = {device: check_kernels(device) for device in devices}
    facts["extras"] = {name: asdict(_extra(needed)) for name, needed in extras.items() if name not in _DEVELOPMENT}
    facts["problems"] = [asdict(problem) for problem in _problems(facts, requirements)]
    return facts


def gpu_absent() -> str:
    """Why torch sees no GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides all of them"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().split("\n")[0]
    return "the driver reports none"


def nvcc_release() -> str | None:
    """The CUDA release of the compiler that a build would find, such as "13.0"."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [*(os.path.join(home, "bin") for home in [*homes, "/usr/local/cuda"]), os.environ.get("PATH", "")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        return None
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", printed)
    return release[1] if release else None


def check_kernels(device: str) -> str:
    """Run a kernel on a small problem whose answer is known exactly: "right", or what went wrong."""
    try:
        features = torch.arange(12, dtype=torch.float32, device=device).reshape(4, 3).square()
        labels = torch.tensor([0, 1, 0, 1], device=device)
        found = ops.class_moments(features, labels, 2)
        centred = features.double() - features.double().mean(0)
        error = float((found.gram - centred.mT @ centred).abs().max())
    except (RuntimeError, ValueError) as failure:  # no kernel for this GPU, for instance
        return str(failure).strip().split("\n")[0]
    return "right" if error < 1e-6 else f"a result that is wrong by {error:.3g}"


def _requirements() -> tuple[list[Any], dict[str, list[Any]]]:
    """What the package needs, and what its extras need beyond that, as ``packaging.requirements.Requirement``."""
    from packaging.requirements import Requirement  # comes with Matplotlib

    try:
        distribution = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:  # used from a source tree that is not installed
        return [], {}
    declared = [Requirement(line) for line in distribution.requires or []]
    core = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]

    def of(extra: str) -> list[Any]:
        own = [r for r in declared if r not in core and r.marker is not None and r.marker.evaluate({"extra": extra})]
        inner = [r for part in own if part.name == _PACKAGE for name in sorted(part.extras) for r in of(name)]
        return [r for r in own if r.name != _PACKAGE] + inner

    return core, {name: of(name) for name in distribution.metadata.get_all("Provides-Extra") or []}


def _unmet(requirements: list[Any]) -> list[str]:
    """Those not installed in a version that will do, without their markers."""
    unmet = []
    for requirement in requirements:
        try:
            met = requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
        except metadata.PackageNotFoundError:
            met = False
        if not met:
            unmet.append(f"{requirement.name}{requirement.specifier}")
    return unmet


def _extra(requirements: list[Any]) -> Extra:
    missing = _unmet(requirements)
    return Extra(tuple(missing), _pip(missing) if missing else "")


def _pip(requirements: list[str]) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", *requirements])


def _problems(facts: dict[str, Any], requirements: list[Any]) -> list[Problem]:
    problems = [
        Problem(f"the {device} kernels do not work: {state}", _rebuild(facts))
        for device, state in facts["kernels"].items()
        if state != "right"
    ]
    unmet = _unmet(requirements)
    if unmet:
        problems.append(Problem(f"installed versions do not meet {', '.join(unmet)}", _pip(unmet)))
    if facts["gpu"] and not facts["cuda_built"]:
        what = f"torch sees {facts['gpu']}, but this build has CPU kernels only"
        problems.append(Problem(what, _nvcc_first(facts) + _rebuild(facts)))
    return problems


def _rebuild(facts: dict[str, Any]) -> str:
    """For the GPU that is here: the build never guesses."""
    architecture = facts["gpu_architecture"]
    setting = f"TRANSFEROPS_CUDA_ARCHITECTURES={architecture} " if architecture else ""
    return f"in the source tree: {setting}{shlex.quote(sys.executable)} -m {_REBUILD}"


def _nvcc_first(facts: dict[str, Any]) -> str:
    """What has to be done before CUDA kernels can be built, if anything."""
    needed = str(torch.version.cuda).split(".")[0]
    if facts["nvcc"] is None:
        return f"install the CUDA {needed} toolkit, with its nvcc on PATH; then "
    if facts["nvcc"].split(".")[0] != needed:
        found = f"nvcc is of CUDA {facts['nvcc']}, torch of {torch.version.cuda}"
        return f"{found}: put one of CUDA {needed} on PATH; then "
    return ""


@click.command(
    "doctor",
    cls=Command,
    examples=[
        ("Before the first run, and when something is odd", "transferops doctor"),
        ("The facts for a bug report or a script", "transferops doctor --json -"),
    ],
    results="--json holds all facts.",
)
@_options.output()
def command(output: _options.Output) -> None:
    """What is built, what does it run on, and what is missing?

    Runs a kernel on every device that this build has kernels for, and says for every group of optional
    packages whether it is complete, with the command that completes it. Exits with 1 if something does
    not work; missing options and a missing GPU are no fault.
    """
    output.prepare()
    facts = examine()
    _print(facts, output)
    output.write(facts)
    if facts["problems"]:
        raise click.exceptions.Exit(1)


def _print(facts: dict[str, Any], output: _options.Output) -> None:
    architectures = f" for {', '.join(facts['cuda_architectures'])}" if facts["cuda_architectures"] else ""
    lines = {
        "transferops": f"{facts['version']} ({facts['build_type']}, {facts['compiler']})",
        "python": f"{facts['python']} on {facts['platform']}",
        "torch": f"{facts['torch_running']}; built against {facts['torch_built']}, "
        f"runs with {facts['torch_least'] or 'unknown versions'} (stable ABI)",
        "cpu": f"{facts['cpu_level']}, {facts['threads']} threads",
        "cuda build": f"toolkit {facts['cuda_built']}{architectures}" if facts["cuda_built"] else "none",
        "nvcc": facts["nvcc"] or "none",
        "gpu": f"{facts['gpu']} ({facts['gpu_architecture']})" if facts["gpu"] else f"none: {facts['gpu_absent']}",
        **{f"{device} kernels": state for device, state in facts["kernels"].items()},
    }
    for name, text in lines.items():
        output.say(f"{name:<14}{text}")
    for name, extra in facts["extras"].items():
        state = f"missing {', '.join(extra['missing'])}: {extra['fix']}" if extra["missing"] else "complete"
        output.say(f"{'[' + name + ']':<14}{state}")
    for problem in facts["problems"]:
        output.say(f"problem: {problem['what']}\n  fix: {problem['fix']}")
    if not facts["problems"]:
        output.say("no problem found")
