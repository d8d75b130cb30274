"""Settings from a file: what goes before what, and every mistake pointed at."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bundles import feature_bundle
from commands import cli, run

CONFIG = """\
target = "usps"
shots = 5

[otqms]
strategy = ["target-only", "quantities"]
seeds = 2
dimension = 7
early-stopping = true
lr = 1e-3

[inherit]
shots = 3
alphas = [0, 0.5]
model = "mynets:small"

[rank]
model = ["a:b", "c:d"]
"""

YAML = """\
target: usps
shots: 5
otqms:
  strategy: [target-only, quantities]
  seeds: 2
  dimension: 7
  early-stopping: true
  lr: 1.0e-3
inherit:
  shots: 3
  alphas: [0, 0.5]
  model: mynets:small
rank:
  model: ["a:b", "c:d"]
"""


@pytest.fixture(params=["toml", "yaml"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with settings for all commands and for each."""
    if request.param == "yaml":
        pytest.importorskip("yaml")
    path = tmp_path / f"config.{request.param}"
    path.write_text(CONFIG if request.param == "toml" else YAML)
    return path


def loads(text: str) -> Any:
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads(text)


def shown(command: str, *arguments: object) -> dict[str, Any]:
    """The settings that a command says it has."""
    result = run(command, *arguments, "--show-config")
    assert result.exit_code == 0, result.output
    (name, settings), *others = loads(result.stdout).items()
    assert (name, others) == (command, [])
    return settings


def test_a_section_goes_before_the_common_and_the_command_line_before_both(config: Path) -> None:
    otqms = shown("otqms", "--config", config, "--seeds", 1)
    assert otqms["strategy"] == ["target-only", "quantities"]
    assert (otqms["target"], otqms["shots"], otqms["seeds"]) == ("usps", 5, 1)
    assert (otqms["dimension"], otqms["early-stopping"], otqms["lr"]) == (7, True, 1e-3)
    assert otqms["epochs"] == 16
    inherit = shown("inherit", "--config", config)
    assert (inherit["shots"], inherit["alphas"], inherit["model"]) == (3, [0, 0.5], "mynets:small")
    assert shown("rank", "--config", config)["model"] == ["a:b", "c:d"]
    assert shown("rank", "--config", config, "--model", "e:f")["model"] == ["e:f"]


def test_origins_are_shown(config: Path) -> None:
    lines = run("otqms", "--config", config, "--seeds", 1, "--show-config").stdout.splitlines()
    for line in (
        "seeds = 1  # command line",
        "shots = 5  # configuration",
        "batch-size = 64",
        "# budget: not set",
        "dimension = 7  # configuration",
    ):
        assert line in lines


@pytest.mark.parametrize("name", sorted(set(cli.commands) - {"completion"}))
def test_shown_settings_are_a_configuration(name: str, tmp_path: Path) -> None:
    """Read again they are the same, also odd texts."""
    odd = 'a "b" \\ \t ü \x7f'
    arguments = [] if name == "doctor" else ["--data", odd, *(["--lr", "inf"] if name == "otqms" else [])]
    path = tmp_path / "shown.toml"
    path.write_text(run(name, *arguments, "--show-config").stdout)
    settings = shown(name, "--config", path)
    assert settings == loads(path.read_text())[name]
    assert settings.get("data", odd) == odd


def test_a_run_has_the_settings_of_its_file(tmp_path: Path) -> None:
    bundle = feature_bundle(tmp_path / "b.npz", {"one": (0, 1), "two": (0, 1)}, samples=24)
    path = tmp_path / "run.toml"
    path.write_text(f'data = "{bundle}"\ntarget = "one"\nquiet = true\n[rank]\nscores = "h_score"\nsource-steps = 5\n')
    result = run("rank", "--config", path, "--json", "-")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["scores"] == ["h_score", "knn", "parameters"]
    assert (document["settings"]["source-steps"], document["settings"]["scores"]) == (5, ["h_score"])
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[otqm]", "4: otqm: expected one of adapt, doctor, inherit, otqms, rank, got 'otqm' (did you mean 'otqms'?)"),
        ("tarket = 'usps'", "4: tarket: expected an option of a command, got 'tarket' (did you mean 'target'?)"),
        (
            "[otqms]\nseed = 3",
            "5: otqms.seed: expected an option of otqms, got 'seed' (did you mean 'seeds'?), an option of inherit",
        ),
        (
            "[otqms]\nbatch_size = 3",
            "5: otqms.batch_size: expected an option of otqms, got 'batch_size' (did you",
        ),
        ("[otqms]\nxyzzy = 3", "5: otqms.xyzzy: expected an option of otqms, got 'xyzzy'"),
        ("[otqms]\nseeds = '3'", "5: otqms.seeds: expected an integer, got the text '3'"),
        ("[otqms]\nseeds = 2.5", "5: otqms.seeds: expected an integer, got 2.5"),
        ("[otqms]\nseeds = true", "5: otqms.seeds: expected an integer, got true"),
        ("[otqms]\nseeds = [3]", "5: otqms.seeds: expected an integer, got an array"),
        ("[otqms]\nlr = 'fast'", "5: otqms.lr: expected a number, got the text 'fast'"),
        ("[otqms]\nquiet = 1", "5: otqms.quiet: expected true or false, got 1"),
        ("[otqms]\nstrategy = 3", "5: otqms.strategy: expected a text, or an array of such, got 3"),
        ("[otqms]\nstrategy = ['target-only', 3]", "5: otqms.strategy: expected a text, or an array of such, got 3"),
        ("[rank]\nmodel = [[]]", "5: rank.model: expected a text, or an array of such, got an array"),
        ("[otqms.more]\nseeds = 1", "4: otqms.more: expected an option of otqms, got 'more'"),
        ("[otqms]\n'config' = 'b.toml'", "5: otqms.config: expected an option of otqms, got 'config'"),
        (
            "[inherit]\nselect = 'magnitud'",
            "5: inherit.select: expected one of random, uniform, magnitude, fisher, got 'magnitud' (did you",
        ),
    ],
)
@pytest.mark.parametrize("command", ["otqms", "doctor"])
def test_mistakes_are_pointed_at(tmp_path: Path, command: str, line: str, message: str) -> None:
    """Those in the sections of other commands, too."""
    path = tmp_path / "c.toml"
    path.write_text(f"# settings\n\nshots = 5\n{line}\n")
    result = run(command, "--config", path)
    assert result.exit_code == 2
    assert result.output.replace(f"{path}:", "").startswith(f"error: {message}")
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "otqms:\n  lr: 1e-3\n",
            ":2: otqms.lr: expected a number, got the text '1e-3' (a number of YAML has a point: 1.0e-3)",
        ),
        ("shots: 1\notqms:\n  seeds: 1\n  seeds: 2\n", ":4: seeds: expected once, got again after line 3"),
        ("shots: [1\n", ":2: expected YAML, got an error: "),
        ("target:\n", ":1: target: expected a text, got nothing"),
        ("- shots\n", ": expected settings by name, got an array"),
        ("3: 4\n", ":1: 3: expected an option of a command, got '3'"),
    ],
)
def test_mistakes_in_yaml(tmp_path: Path, content: str, message: str) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "c.yml"
    path.write_text(content)
    result = run("otqms", "--config", path)
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {path}{message}")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(name: str, content: bytes | None = None) -> tuple[int, str]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        result = run("rank", "--config", tmp_path / name)
        return result.exit_code, result.output.replace(f"{tmp_path}/", "").removeprefix("error: ").rstrip()

    assert said("none.toml") == (
        2,
        "config: expected a file that can be read, got none.toml: No such file or directory",
    )
    assert said("c.ini", b"") == (2, "config: expected a .toml, .yaml or .yml file, got c.ini")
    assert said("c.toml", b"\xff") == (2, "config: expected UTF-8 text, got c.toml")
    code, line = said("d.toml", b"shots = \n")
    assert code == 2
    assert line.startswith("d.toml: expected TOML, got an error: ")
    assert "line 1" in line
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert said("c.yaml", b"") == (1, "config: expected PyYAML for a YAML file, got none: pip install pyyaml")


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.toml").touch()
    assert shown("rank", "--config", tmp_path / "c.toml") == shown("rank")
