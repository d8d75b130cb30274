"""The command line, end to end and in the ways it can be misused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
testing = pytest.importorskip("click.testing")

from transferops import cli  # noqa: E402  (needs the extras)
from transferops.otqms import STRATEGIES, read_log  # noqa: E402

FAST = ["--shots", "3", "--seeds", "2", "--epochs", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    """The command sets the number of threads of the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of three classes in three domains; one is named so that it would be lost as markup."""
    generator = np.random.default_rng(0)
    arrays = {}
    for name in ("one", "two", "[bold]"):
        labels = np.arange(24) % 3
        arrays[f"{name}_x"] = np.eye(3, 5)[labels] + generator.normal(size=(24, 5))
        arrays[f"{name}_y"] = labels
    path = tmp_path_factory.mktemp("data") / "bundle.npz"
    np.savez(path, **arrays)
    return path


def run(*arguments: str | Path) -> Any:
    return testing.CliRunner().invoke(cli.cli, ["otqms", *map(str, arguments)])


class TestEndToEnd:
    def test_files_and_tables(self, bundle: Path, tmp_path: Path) -> None:
        out, pictures = tmp_path / "result.json", tmp_path / "deep" / "pictures"
        result = run("--data", bundle, "--target", "one", *FAST, "--json", out, "--output", pictures)
        assert result.exit_code == 0, result.output
        document = json.loads(out.read_text())
        assert (document["target"], document["shots"], document["seeds"]) == ("one", 3, [0, 1])
        assert document["sources"] == ["two", "[bold]"]
        assert document["dimension"] == 3 * 3 * (3 - 1)
        assert document["options"]["epochs"] == 2
        assert set(document["strategies"]) == {"target-only", "all-sources", "quantities", "recommended"}
        for entry in document["strategies"].values():
            for key in ("accuracy", "samples_per_epoch", "seconds"):
                assert len(entry[key]) == 2
            assert all(0 <= accuracy <= 1 for accuracy in entry["accuracy"])
            assert all(seconds > 0 for seconds in entry["seconds"])
        assert document["strategies"]["target-only"]["samples_per_epoch"] == [9, 9]
        assert document["strategies"]["all-sources"]["samples_per_epoch"] == [57, 57]
        assert {path.name for path in pictures.iterdir()} == {"accuracy.png", "quantities.png"}
        for expected in ("[bold] (24)", "Fisher+QP", "quantities took", "seed 1 quantities: epoch 2/2", "recommended"):
            assert expected in result.output
        for path in (out, pictures / "accuracy.png", pictures / "quantities.png"):
            assert f"wrote {path}\n" in result.output

    def test_chosen_sources_and_strategies(self, bundle: Path, tmp_path: Path) -> None:
        out = tmp_path / "result.json"
        arguments = ["--sources", "two", "--strategy", "quantities,target-only", "--dimension", "7"]
        result = run("--data", bundle, "--target", "[bold]", *FAST, *arguments, "--json", out)
        assert result.exit_code == 0, result.output
        document = json.loads(out.read_text())
        assert document["sources"] == ["two"]
        assert document["dimension"] == 7
        assert list(document["strategies"]) == ["quantities", "target-only"]
        assert list(document["strategies"]["quantities"]["quantities"]) == ["two"]

    def test_an_interrupted_command_goes_on(self, bundle: Path, tmp_path: Path) -> None:
        """What a checkpoint has is not trained again: its epochs are not logged a second time."""
        common = ["--data", bundle, "--target", "one", *FAST, "--checkpoint", tmp_path / "kept"]
        result = run(*common, "--strategy", "target-only", "--jsonl", tmp_path / "first.jsonl")
        assert result.exit_code == 0, result.output
        arguments = [
            "--strategy",
            "target-only,weights",
            "--jsonl",
            tmp_path / "log.jsonl",
            "--json",
            tmp_path / "o.json",
        ]
        result = run(*common, *arguments)
        assert result.exit_code == 0, result.output
        assert len(read_log(tmp_path / "first.jsonl")) == 4
        assert {entry["strategy"] for entry in read_log(tmp_path / "log.jsonl")} == {"weights"}
        weights = json.loads((tmp_path / "o.json").read_text())["strategies"]["weights"]["weights"]
        assert set(weights) == {"two", "[bold]"}
        assert all(0 <= share <= 1 for shares in weights.values() for share in shares)
        result = run("--data", bundle, "--target", "one", *FAST, "--checkpoint", tmp_path / "kept", "--lr", "0.5")
        assert result.exit_code == 2
        assert result.output.endswith("got 0.008\n")

    def test_quiet_prints_nothing(self, bundle: Path) -> None:
        result = run("--data", bundle, "--target", "one", *FAST, "--quiet", "--strategy", "target-only")
        assert (result.exit_code, result.output) == (0, "")

    def test_early_stopping(self, bundle: Path, tmp_path: Path) -> None:
        """Needs a shot to validate on, which is then not trained on."""
        out = tmp_path / "o.json"
        common = ["--data", bundle, "--target", "one", "--seeds", "1", "--epochs", "1", "--strategy", "target-only"]
        for shots, flags, samples in ((3, ["--early-stopping"], 6), (1, [], 3)):
            result = run(*common, "--shots", str(shots), *flags, "--json", out)
            assert result.exit_code == 0, result.output
            entry = json.loads(out.read_text())["strategies"]["target-only"]
            assert entry["samples_per_epoch"] == [samples]
        result = run(*common, "--shots", "1", "--early-stopping")
        message = "error: shots: expected at least 2 with early stopping, one of them for validation, got 1\n"
        assert (result.exit_code, result.output) == (2, message)

    def test_embedded_digits(self, tmp_path: Path) -> None:
        pytest.importorskip("sklearn")
        out = tmp_path / "result.json"
        arguments = ["--seeds", "1", "--epochs", "1", "--strategy", "target-only", "--json", out]
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        document = json.loads(out.read_text())
        assert (document["data"], document["target"]) == ("embedded digits", "rotated-30")
        assert len(document["sources"]) == 6

    def test_image_folder(self, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        generator = np.random.default_rng(0)
        for domain in ("photo", "sketch"):
            for kind in ("cat", "dog") if domain == "photo" else ("cat",):
                folder = tmp_path / "tree" / domain / kind
                folder.mkdir(parents=True)
                for i in range(4):
                    pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                    image.fromarray(pixels).save(folder / f"{i}.png")
        result = run("--data", tmp_path / "tree", "--target", "photo", *FAST, "--strategy", "all-sources")
        assert result.exit_code == 0, result.output
        assert "note: sketch has no sample of class dog" in result.output

    def test_as_a_module(self, bundle: Path, tmp_path: Path) -> None:
        out = tmp_path / "result.json"
        arguments = ["otqms", "--data", bundle, "--target", "one", *FAST, "--json", out]
        finished = subprocess.run(
            [sys.executable, "-m", "transferops", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        assert "quantities took" in finished.stdout
        assert "seed 0 target-only: epoch 2/2" in finished.stderr
        assert out.exists()


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--target", "three"], "target: expected one of one, two, [bold], got 'three'"),
            ([], "target: expected one of one, two, [bold], got none"),
            (
                ["--target", "one", "--sources", "two,six"],
                "sources: expected names among one, two, [bold], got 'six'",
            ),
            (
                ["--target", "one", "--sources", "one"],
                "sources: expected domains other than the target, got 'one'",
            ),
            (["--target", "one", "--shots", "0"], "shots: expected an integer of at least 1, got 0"),
            (
                ["--target", "one", "--shots", "8"],
                "shots: expected at most 7 for one (class 0 has 8 samples, one stays for the test), got 8",
            ),
            (["--target", "one", "--seeds", "0"], "seeds: expected an integer of at least 1, got 0"),
            (["--target", "one", "--epochs", "-1"], "epochs: expected an integer of at least 1, got -1"),
            (["--target", "one", "--threads", "0"], "threads: expected an integer of at least 1, got 0"),
            (["--target", "one", "--lr", "inf"], "lr: expected a positive number, got inf"),
            (
                ["--target", "one", "--dimension", "x"],
                "dimension: expected 'auto', 'parameters' or an integer of at least 1, got 'x'",
            ),
            (["--target", "one", "--device", "moon"], "device: expected one that works here, got 'moon'"),
            (
                ["--target", "one", "--strategy", "best"],
                f"strategy: expected names among {', '.join(STRATEGIES)}, got 'best'",
            ),
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
    def test_bad_input(self, bundle: Path, arguments: list[str], message: str) -> None:
        result = run("--data", bundle, *arguments)
        assert (result.exit_code, result.output) == (2, f"error: {message}\n")

    def test_bad_files(self, tmp_path: Path) -> None:
        path = tmp_path / "b.npz"
        result = run("--data", path, "--target", "a")
        expected = f"error: data: expected an .npz file or an image folder, got nothing at {path}\n"
        assert (result.exit_code, result.output) == (2, expected)
        path.write_bytes(b"PK\x03\x04")
        result = run("--data", path, "--target", "a")
        expected = f"error: {path}: file: expected a complete .npz archive, got something unreadable as one\n"
        assert (result.exit_code, result.output) == (2, expected)

    def test_output_is_a_file(self, bundle: Path) -> None:
        result = run("--data", bundle, "--target", "one", "--output", bundle)
        assert (result.exit_code, result.output) == (2, f"error: [Errno 17] File exists: '{bundle}'\n")

    def test_one_domain_only(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "b.npz", a_x=np.eye(4), a_y=[0, 0, 1, 1])
        result = run("--data", tmp_path / "b.npz", "--target", "a")
        expected = "error: sources: expected at least one domain beside the target, got none\n"
        assert (result.exit_code, result.output) == (2, expected)

    def test_unknown_option(self) -> None:
        result = run("--tarket", "one")
        assert result.exit_code == 2
        assert "No such option" in result.output

    def test_diverging_training(self, bundle: Path) -> None:
        result = run("--data", bundle, "--target", "one", *FAST, "--lr", "1e30", "--strategy", "all-sources")
        assert result.exit_code == 1
        assert "error: RuntimeError: the training diverged: its mean loss is " in result.output

    def test_json_is_a_folder(self, bundle: Path, tmp_path: Path) -> None:
        result = run("--data", bundle, "--target", "one", "--json", tmp_path)
        expected = f"error: json: expected a file in an existing folder, got {tmp_path}\n"
        assert (result.exit_code, result.output) == (2, expected)

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (RuntimeError("out of luck"), "error: RuntimeError: out of luck (--debug shows where)\n"),
            (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device\n"),
            (
                ModuleNotFoundError("No module named 'clarabel'"),
                "error: No module named 'clarabel'; install what is missing with: pip install \"transferops[cli]\"\n",
            ),
        ],
    )
    def test_failures(self, bundle: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
        def fails(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(cli.otqms, "compare", fails)
        result = run("--data", bundle, "--target", "one", *FAST)
        assert result.exit_code == 1
        assert result.output.endswith(line)
        assert "Traceback" not in result.output

    def test_debug_shows_the_traceback(self, bundle: Path) -> None:
        result = run("--data", bundle, "--target", "three", "--debug")
        assert isinstance(result.exception, ValueError)
        arguments = ["otqms", "--data", str(bundle), "--target", "three"]
        for debug in ([], ["--debug"]):
            finished = subprocess.run(
                [sys.executable, "-m", "transferops", *arguments, *debug],
                capture_output=True,
                text=True,
                check=False,
            )
            assert ("Traceback" in finished.stderr) == bool(debug)

    @pytest.mark.parametrize("module", ["click", "rich"])
    def test_missing_extra(self, module: str) -> None:
        code = f"import sys; sys.modules['{module}'] = None; from transferops.cli import main; main()"
        finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert finished.returncode == 1
        assert finished.stderr.startswith(f"error: the command line needs {module}")
        assert finished.stderr.endswith('install it with: pip install "transferops[cli]"\n')
        assert "Traceback" not in finished.stderr


def test_help_teaches_by_example() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "transferops otqms --data digits.npz --target usps" in result.output
    assert testing.CliRunner().invoke(cli.cli, ["--help"]).exit_code == 0
    assert testing.CliRunner().invoke(cli.cli, ["--version"]).output.startswith("transferops, version ")
