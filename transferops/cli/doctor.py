"""``transferops doctor``: what is built, what it runs on, what is missing, and the command that repairs it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from transferops import ops, show_config
from transferops.cli._common import click, console, prepare_outputs, reports_errors
from transferops.otqms import write_json

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
        ``gpu_absent``, why there is no GPU, or None; ``kernels``, "right" or an error by device; ``extras`` by name;
        and ``problems``.
    """
    facts: dict[str, Any] = {**show_config(), "platform": platform.platform()}
    requirements, extras = _requirements()
    facts["torch_least"] = next((str(r.specifier) for r in requirements if r.name == "torch"), None)
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
    rebuild = f"{shlex.quote(sys.executable)} -m {_REBUILD}"
    problems = [
        Problem(f"the {device} kernels do not work: {state}", f"in the source tree: {rebuild}")
        for device, state in facts["kernels"].items()
        if state != "right"
    ]
    unmet = _unmet(requirements)
    if unmet:
        problems.append(Problem(f"installed versions do not meet {', '.join(unmet)}", _pip(unmet)))
    if facts["gpu"] and not facts["cuda_built"]:
        what = f"torch sees {facts['gpu']}, but this build has CPU kernels only"
        problems.append(Problem(what, f"in the source tree, with the CUDA toolkit's nvcc on PATH: {rebuild}"))
    return problems


@click.command("doctor")
@click.option(
    "--json",
    "json_path",
    is_flag=False,
    flag_value="-",
    metavar="[OUT]",
    help="Print the facts as JSON instead, or write them to OUT.",
)
@reports_errors
def command(json_path: str | None) -> None:
    """What is built, what does it run on, and what is missing?

    Runs a kernel on every device that this build has kernels for, and says for every group of optional
    packages whether it is complete, with the command that completes it. Exits with 1 if something does
    not work; missing options and a missing GPU are no fault.

    \b
      transferops doctor
      transferops doctor --json
    """
    facts = examine()
    if json_path == "-":
        click.echo(json.dumps(facts, indent=1))
    else:
        if json_path is not None:
            prepare_outputs(Path(json_path), None)
            write_json(facts, Path(json_path))
        _print(facts)
    if facts["problems"]:
        raise click.exceptions.Exit(1)


def _print(facts: dict[str, Any]) -> None:
    screen = console(quiet=False)
    architectures = f" for {', '.join(facts['cuda_architectures'])}" if facts["cuda_architectures"] else ""
    lines = {
        "transferops": f"{facts['version']} ({facts['build_type']}, {facts['compiler']})",
        "python": f"{facts['python']} on {facts['platform']}",
        "torch": f"{facts['torch_running']}; built against {facts['torch_built']}, "
        f"runs with {facts['torch_least'] or 'unknown versions'} (stable ABI)",
        "cpu": f"{facts['cpu_level']}, {facts['threads']} threads",
        "cuda build": f"toolkit {facts['cuda_built']}{architectures}" if facts["cuda_built"] else "none",
        "gpu": facts["gpu"] or f"none: {facts['gpu_absent']}",
        **{f"{device} kernels": state for device, state in facts["kernels"].items()},
    }
    for name, text in lines.items():
        screen.print(f"{name:<14}{text}", soft_wrap=True)
    for name, extra in facts["extras"].items():
        state = f"missing {', '.join(extra['missing'])}: {extra['fix']}" if extra["missing"] else "complete"
        screen.print(f"{'[' + name + ']':<14}{state}", soft_wrap=True)
    for problem in facts["problems"]:
        screen.print(f"problem: {problem['what']}\n  fix: {problem['fix']}", soft_wrap=True)
    if not facts["problems"]:
        screen.print("no problem found")
