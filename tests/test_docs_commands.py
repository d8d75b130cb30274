"""Every command line in README, docs and ``--help`` is run: by .ci/run, by scripts/strangers_path.py, or here.

Here they run as they are written, in the order of the pages and in one folder, on small data under the names that they
use; options that make them shorter are added at the end.
"""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bundles import feature_bundle, image_tree
from commands import cli, testing
from pages import PAGES, ROOT, blocks
from torch import nn

from transferops.data import load_bundle

BY_HAND = {
    "make format": "changes files; `make lint` runs the same tools",
    "make audit": "asks pypi.org; CI need not have a network",
    "make bench": "needs a quiet machine",
    "make coverage": "builds everything once more, and runs the tests twice",
    "make cuda-build": "takes ten minutes and several GB; `make cuda-report` compiles the kernels and their bindings",
    "make dependencies": "changes files",
    "make fuzz": "takes ten minutes",
    "make mutants": "takes several minutes; the tests try one in 48",
    "make rates": "takes minutes; the tests run a tenth of it",
    "make test-minimum": "installs an old torch of several GB",
    "make test-peers": "installs every package that there is an integration for",
    "make wheels": "builds for several versions of Python",
    "bench/gpu.sh": "needs a GPU",
}
"""What neither a test nor .ci/run runs, and why; that it exists is tested."""

SHORTER = {
    "adapt": "--threads 1 --seeds 2 --epochs 1",
    "inherit": "--threads 1 --seeds 2 --epochs 1",
    "otqms": "--threads 1 --seeds 1 --epochs 1",
    "rank": "--threads 1 --source-steps 5",
}
"""What is added to the lines of a command."""

MODELS = """
from torch import nn

def resnet(width=4, depth=1):
    blocks = [nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()) for _ in range(depth)]
    stem = nn.Conv2d(3, width, 3, padding=1)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))

def small():
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
"""


def command_lines() -> dict[str, str]:
    """Where each line of a shell block, or of a command's examples, stands first."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.language in ("", "sh", "bash", "shell", "console"):
                for offset, line in enumerate(block.text.split("\n")):
                    line = re.sub(r"\s+#.*", "", line)
                    if line and not line.startswith("#"):
                        found.setdefault(line, f"{page.relative_to(ROOT)}:{block.line + offset}")
    for name, command in cli.commands.items():
        for _, line in command.examples:
            found.setdefault(line, f"{name} --help")
    return found


STRANGER = runpy.run_path(str(ROOT / "scripts" / "strangers_path.py"))
CI_TEXT = (ROOT / ".ci" / "run").read_text()
CI_TARGETS = " ".join(re.findall(r"^ *rest\+?=\((.*)\)$", CI_TEXT, re.M)).split()  # that run side by side
CI = [*map(str.strip, CI_TEXT.splitlines()), *(f"make {target}" for target in CI_TARGETS)]
LINES = command_lines()
OURS = [line for line in LINES if re.match(r"(torchrun .* -m )?transferops ", line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command lines read, under the names that they use."""
    path = tmp_path_factory.mktemp("docs")
    feature_bundle(path / "digits.npz", {"mnist": (0, 2), "usps": (0, 2), "svhn": (1, 1)}, samples=36)
    feature_bundle(path / "features.npz", {"photo": (0, 2), "sketch": (0, 1)}, samples=36)
    digits = {"plain": (0, 2), "rotated-15": (0, 2), "rotated-30": (0, 2), "rotated-90": (1, 1)}
    feature_bundle(path / "embedded.npz", digits, samples=36)
    image_tree(path / "images", {"photo": ("cat", "dog"), "sketch": ("cat", "dog")})
    for module in ("mynets", "my_models"):
        (path / f"{module}.py").write_text(MODELS)
    torch.save(nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).state_dict(), path / "big.pt")
    for block in blocks(ROOT / "docs" / "guides" / "cli.md"):
        if block.language in ("toml", "yaml"):
            (path / block.text.split("\n")[0].removeprefix("# ")).write_text(block.text)
    return path


@pytest.fixture
def stand_ins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder, small embedded data, and a timm that needs no download."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("transferops.cli._options.load_digits_domains", lambda: load_bundle("embedded.npz"))
    import my_models

    timm = ModuleType("timm")
    timm.is_model = lambda name: name == "resnet18"
    timm.create_model = lambda name, pretrained: my_models.resnet()
    monkeypatch.setitem(sys.modules, "timm", timm)
    yield
    for module in ("mynets", "my_models"):
        sys.modules.pop(module, None)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("line", [pytest.param(line, id=LINES[line]) for line in OURS])
def test_runs(line: str, folder: Path) -> None:
    if "resnet34.safetensors" in line:
        safetensors = pytest.importorskip("safetensors.torch")
        import my_models

        safetensors.save_file(my_models.resnet(width=6, depth=2).state_dict(), folder / "resnet34.safetensors")
    if ".yaml" in line:
        pytest.importorskip("yaml")
    launcher, called = re.match(r"(.*?)transferops (.*)", line).groups()
    called, _, into = called.partition(" > ")
    arguments = shlex.split(f"{called} {SHORTER.get(called.split()[0], '')}")
    if launcher:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *shlex.split(launcher)[1:]]
        finished = subprocess.run([*torchrun, "transferops", *arguments], capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.count("target usps") == 1  # one process speaks
        return
    result = testing.CliRunner().invoke(cli, arguments, prog_name="transferops")
    assert result.exit_code == 0 or called.startswith("doctor"), result.output  # which may find a fault here
    if into and "$" not in into:
        (folder / into).write_text(result.stdout)


@pytest.mark.parametrize("line", [pytest.param(line, id=where) for line, where in LINES.items() if line not in OURS])
def test_is_run_elsewhere(line: str) -> None:
    if line in BY_HAND:
        program, *arguments = shlex.split(line)
        checked = ["make", "--dry-run", *arguments] if program == "make" else ["bash", "-n", program]
        subprocess.run(checked, cwd=ROOT, check=True, capture_output=True)
    else:
        run = [*CI, *(line for step in STRANGER["steps"]() for line in step.lines)]
        assert line in run, f"{LINES[line]}: nothing runs {line!r}, and BY_HAND does not say why"


def test_the_strangers_path_is_walked() -> None:
    names = [step.name for step in STRANGER["steps"]()]
    assert names == ["install", *(f"transferops {each}" for each in ("doctor", "rank", "otqms", "adapt", "inherit"))]
    screen = "WARNING: Location 'file:///a/' is ignored: b\n/a.py:3: UserWarning: c\n"
    assert STRANGER["warnings_in"](screen) == ["/a.py:3: UserWarning: c"]
    assert "make stranger" in CI
    assert re.search(r"^stranger:.*\n\t.*scripts/strangers_path.py", (ROOT / "Makefile").read_text(), re.M)


def test_nothing_is_left_out_that_is_not_there() -> None:
    assert set(BY_HAND) <= set(LINES)


@pytest.mark.usefixtures("stand_ins")
def test_the_mistake_that_is_shown_is_pointed_at_so() -> None:
    page = blocks(ROOT / "docs" / "guides" / "cli.md")
    (shown,) = [block.text for block in page if block.text.startswith("error: study.toml")]
    (config,) = [block.text for block in page if block.text.startswith("# study.toml")]
    Path("study.toml").rename("kept.toml")
    Path("study.toml").write_text(config.replace("shots", "seed"))
    result = testing.CliRunner().invoke(cli, ["otqms", "--config", "study.toml"])
    Path("kept.toml").replace("study.toml")
    assert (result.exit_code, result.output) == (2, shown)


def test_every_command_is_shown() -> None:
    assert {name for line in OURS for name in cli.commands if f" {name}" in line} == set(cli.commands)
