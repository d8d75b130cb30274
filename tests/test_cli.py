"""What all commands share: help, settings, streams, errors and exit codes."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import cli, run, testing
from PIL import Image

from transferops.cli._screen import Progress

DATA_COMMANDS = ("adapt", "otqms", "rank")
FASTEST = {
    "adapt": ("--shots", 2, "--seeds", 1, "--epochs", 1),
    "otqms": ("--shots", 2, "--seeds", 1, "--epochs", 1, "--strategy", "target-only"),
    "rank": ("--scores", "h_score", "--source-steps", 5),
    "inherit": ("--check", "--upstream", "two", "--shots", 2, "--seeds", 2, "--epochs", 1, "--alphas", "0,1"),
}


@pytest.fixture(params=sorted(FASTEST))
def quick(request: pytest.FixtureRequest, alike: Path) -> tuple[object, ...]:
    """A command line that takes little time."""
    return (request.param, "--data", alike, "--target", "one", "--threads", 1, *FASTEST[request.param])


class TestHelp:
    def test_group_names_the_commands(self) -> None:
        result = testing.CliRunner().invoke(cli, ["--help"])
        assert result.exit_code == 0
        assert all(f"\n  {name} " in result.output for name in cli.commands)
        assert testing.CliRunner().invoke(cli, ["--version"]).output.startswith("transferops, version ")

    @pytest.mark.parametrize("name", sorted(cli.commands))
    def test_teaches(self, name: str) -> None:
        """A question, at least two examples, where results go, and every exit code; every option says what it is."""
        result = run(name, "--help")
        assert result.exit_code == 0
        assert cli.commands[name].help.split("\n")[0].endswith("?")
        assert result.output.count(f" transferops {name}") >= 2
        parts = ["Examples:", "Other:", "Where the results go:", "Exit codes:", "\n  130  interrupted\n"]
        places = [result.output.index(part) for part in parts]
        assert places == sorted(places)
        assert all(option.help for option in cli.commands[name].params if option.param_type_name == "option")
        if name in DATA_COMMANDS:
            places = [result.output.index(f"\n{group}:") for group in ("Data", "Results", "Machine", "Other")]
            assert places == sorted(places)


class TestStreams:
    def test_document_alone_on_stdout(self, quick: tuple[object, ...]) -> None:
        result = run(*quick, "--json", "-")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document["target"] == "one"
        settings = document["settings"]
        assert (settings["target"], settings["threads"], settings["device"]) == ("one", 1, "cpu")
        assert "json" not in settings
        assert "target one" in result.stderr
        again = run(*quick, "--json", "-", "--quiet")
        assert json.loads(again.stdout)["settings"] == settings
        assert (again.exit_code, again.stderr) == (0, "")

    def test_quiet_prints_nothing(self, quick: tuple[object, ...]) -> None:
        result = run(*quick, "--quiet")
        assert (result.exit_code, result.output) == (0, "")

    def test_log_files_have_lines_and_no_bars(self, quick: tuple[object, ...]) -> None:
        """Also where FORCE_COLOR makes a terminal of everything: nothing moves the cursor."""
        result = run(*quick, FORCE_COLOR="1")
        assert "\x1b[" in result.stdout or quick[0] == "inherit"  # which has no table
        assert result.stderr.count("\n") >= 1
        assert not {"\x1b", "\r"} & set(result.stderr)
        assert "\x1b[3" not in run(*quick, FORCE_COLOR="1", NO_COLOR="1").output

    @pytest.mark.parametrize("terminal", ["xterm", "dumb"])
    def test_a_terminal_has_a_bar(self, monkeypatch: pytest.MonkeyPatch, terminal: str) -> None:
        """If it can move its cursor; names are shown as they are."""
        stderr = io.StringIO()
        stderr.isatty = lambda: True
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("TERM", terminal)
        with Progress(total=2, quiet=False) as progress:
            progress.show("training [bold]")
            progress.advance()
            progress.finished("trained [bold]")
        printed = stderr.getvalue()
        if terminal == "dumb":
            assert printed == "trained [bold]\n"
        else:
            assert "training [bold]" in printed
            assert "50 %" in printed
            assert "trained" not in printed


class TestErrors:
    @pytest.mark.parametrize("command", DATA_COMMANDS)
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "target: expected one of one, two, [bold], got none"),
            (["--target", "three"], "target: expected one of one, two, [bold], got 'three'"),
            (["--target", "one", "--sources", "two,six"], "sources: expected names among one, two, [bold], got 'six'"),
            (["--target", "one", "--sources", "one"], "sources: expected domains other than the target, got 'one'"),
            (["--target", "one", "--shots", "0"], "shots: expected an integer of at least 1, got 0"),
            (
                ["--target", "one", "--shots", "8"],
                "shots: expected at most 7 for one (class 0 has 8 samples, one stays for the test), got 8",
            ),
            (["--target", "one", "--threads", "0"], "threads: expected an integer of at least 1, got 0"),
            (["--target", "one", "--device", "moon"], "device: expected one that works here, got 'moon'"),
            (
                ["--target", "one", "--json", "no/such/folder/out.json"],
                "json: expected a file in an existing folder, got no/such/folder/out.json",
            ),
            (
                ["--target", "one", "--image-size", "8"],
                "image_size: expected None for an .npz file (its images have one size), got 8",
            ),
        ],
    )
    def test_bad_input(self, alike: Path, command: str, arguments: list[str], message: str) -> None:
        result = run(command, "--data", alike, *arguments)
        assert (result.exit_code, result.output) == (2, f"error: {message}\n")

    def test_bad_files(self, alike: Path, tmp_path: Path) -> None:
        path = tmp_path / "b.npz"
        result = run("rank", "--data", path, "--target", "a")
        expected = f"error: data: expected an .npz file or an image folder, got nothing at {path}\n"
        assert (result.exit_code, result.output) == (2, expected)
        path.write_bytes(b"PK\x03\x04")
        result = run("rank", "--data", path, "--target", "a")
        expected = f"error: {path}: file: expected a complete .npz archive, got something unreadable as one\n"
        assert (result.exit_code, result.output) == (2, expected)
        result = run("rank", "--data", alike, "--target", "one", "--json", tmp_path)
        expected = f"error: json: expected a file in an existing folder, got {tmp_path}\n"
        assert (result.exit_code, result.output) == (2, expected)
        result = run("rank", "--data", alike, "--target", "one", "--output", alike)
        assert (result.exit_code, result.output) == (2, f"error: [Errno 17] File exists: '{alike}'\n")

    def test_images_that_do_not_decode(self, tmp_path: Path) -> None:
        """Refused, or left out and named on the screen and in the document."""
        generator = np.random.default_rng(0)
        for domain in ("near", "target"):
            for name in ("cat", "dog"):
                folder = tmp_path / "images" / domain / name
                folder.mkdir(parents=True)
                for i in range(4):
                    Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        bad = tmp_path / "images" / "near" / "cat" / "3.png"
        bad.write_bytes(b"not an image")
        out = tmp_path / "out.json"
        arguments = ("--data", tmp_path / "images", "--target", "target", *FASTEST["rank"], "--json", out)
        result = run("rank", *arguments)
        expected = f"error: data: expected an image, got {bad}, which cannot be decoded\n"
        assert (result.exit_code, result.output) == (2, expected)
        result = run("rank", *arguments, "--skip-undecodable")
        assert result.exit_code == 0, result.output
        assert "note: left out 1 image that cannot be decoded: near/cat/3.png\n" in result.output
        document = json.loads(out.read_text())
        assert document["undecodable"] == ["near/cat/3.png"]
        assert document["settings"]["skip-undecodable"] is True

    def test_unknown_option_is_spelt_right(self) -> None:
        result = run("otqms", "--tarket", "one")
        assert result.exit_code == 2
        assert "No such option" in result.output
        assert "--target" in result.output

    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (RuntimeError("out of luck"), 1, "RuntimeError: out of luck (--debug shows where)"),
            (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
            (
                ModuleNotFoundError("No module named 'clarabel'"),
                1,
                "No module named 'clarabel'; install what is missing with: pip install \"transferops[cli]\"",
            ),
            (ImportError("otce needs POT: pip install POT"), 1, "otce needs POT: pip install POT"),
            (ValueError("labels: expected classes, got none"), 2, "labels: expected classes, got none"),
            (KeyboardInterrupt(), 130, "interrupted"),
        ],
    )
    def test_exit_codes(
        self, alike: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
    ) -> None:
        def fails(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("transferops.cli.otqms.compare", fails)
        result = run("otqms", "--data", alike, "--target", "one", "--shots", 2)
        assert result.exit_code == code
        assert result.stderr == f"error: {line}\n"

    def test_debug_shows_the_traceback(self, alike: Path) -> None:
        arguments = ("otqms", "--data", alike, "--target", "three")
        assert isinstance(run(*arguments, "--debug").exception, ValueError)
        assert isinstance(run(*arguments).exception, SystemExit)

    def test_a_closed_pipe_ends_quietly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def closed() -> None:
            raise BrokenPipeError(32, "Broken pipe")

        monkeypatch.setattr("transferops.cli.doctor.examine", closed)
        result = run("doctor")
        assert (result.exit_code, result.output) == (1, "")

    def test_missing_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Said before anything else asks for the package."""
        from transferops.cli import _extra

        monkeypatch.setitem(sys.modules, "rich", None)
        with pytest.raises(SystemExit, match=r'^error: the command line needs rich; install it with: pip install "'):
            importlib.reload(_extra)
        code = "import sys; sys.modules['click'] = None; import transferops.cli"
        finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        expected = 'error: the command line needs click; install it with: pip install "transferops[cli]"\n'
        assert (finished.returncode, finished.stderr) == (1, expected)


class TestCompletion:
    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_script(self, shell: str, tmp_path: Path) -> None:
        result = run("completion", shell)
        assert result.exit_code == 0
        assert f"_TRANSFEROPS_COMPLETE={shell}_complete" in result.stdout
        if shutil.which(shell):
            (tmp_path / "script").write_text(result.stdout)
            subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)

    @pytest.mark.parametrize(
        ("words", "completed"),
        [
            ("transferops ot", {"otqms"}),
            ("transferops rank --sou", {"--sources", "--source-steps"}),
            ("transferops inherit --select m", {"magnitude"}),
            ("transferops adapt --arms unadapted,p", {"unadapted,pinv"}),
            ("transferops otqms --strategy target-only,all-b", {"target-only,all-baselines"}),
        ],
    )
    def test_words(self, words: str, completed: set[str]) -> None:
        """What a shell asks for on TAB."""
        count = str(len(words.split()) - 1)
        asked = {"_TRANSFEROPS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": count}
        result = testing.CliRunner(env=asked).invoke(cli, [], prog_name="transferops")
        assert {line.partition(",")[2] for line in result.output.split()} == completed


def test_torchrun_lets_one_process_speak(alike: Path) -> None:
    arguments = ("--data", alike, "--target", "one", *FASTEST["rank"])
    assert run("rank", *arguments, RANK="1").output == ""
    assert run("rank", *arguments, RANK="0").output != ""
    assert "RANK" not in os.environ
