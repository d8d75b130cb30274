"""``transferops otqms``, end to end and in the ways it can be misused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bundles import image_tree
from commands import run

from transferops.otqms import STRATEGIES, read_log

FAST = ("--shots", 3, "--seeds", 2, "--epochs", 2, "--threads", 1)


def test_files_and_tables(alike: Path, tmp_path: Path) -> None:
    out, pictures = tmp_path / "result.json", tmp_path / "deep" / "pictures"
    result = run("otqms", "--data", alike, "--target", "one", *FAST, "--json", out, "--output", pictures)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert (document["target"], document["shots"], document["seeds"]) == ("one", 3, [0, 1])
    assert document["sources"] == ["two", "[bold]"]
    assert document["dimension"] == 3 * 3 * (3 - 1)
    assert document["options"]["epochs"] == 2
    assert set(document["strategies"]) == {"target-only", "all-sources", "quantities-dynamic", "recommended"}
    for entry in document["strategies"].values():
        for key in ("accuracy", "samples_per_epoch", "seconds"):
            assert len(entry[key]) == 2
        assert all(0 <= accuracy <= 1 for accuracy in entry["accuracy"])
        assert all(seconds > 0 for seconds in entry["seconds"])
    assert document["strategies"]["target-only"]["samples_per_epoch"] == [9, 9]
    assert document["strategies"]["all-sources"]["samples_per_epoch"] == [57, 57]
    assert {path.name for path in pictures.iterdir()} == {"accuracy.png", "quantities.png"}
    for expected in (
        "[bold] (24)",
        "Fisher+QP",
        "quantities-dynamic took",
        "seed 1 all-sources: epoch 2/2",
        "recommended",
    ):
        assert expected in result.output
    for path in (out, pictures / "accuracy.png", pictures / "quantities.png"):
        assert f"wrote {path}\n" in result.output


def test_chosen_sources_and_strategies(alike: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ("--sources", "two", "--strategy", "quantities,target-only", "--dimension", 7)
    result = run("otqms", "--data", alike, "--target", "[bold]", *FAST, *arguments, "--json", out)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert document["sources"] == ["two"]
    assert document["dimension"] == 7
    assert list(document["strategies"]) == ["quantities", "target-only"]
    assert list(document["strategies"]["quantities"]["quantities"]) == ["two"]


def test_an_interrupted_command_goes_on(alike: Path, tmp_path: Path) -> None:
    """What a checkpoint has is not trained again: its epochs are not logged a second time."""
    common = ("otqms", "--data", alike, "--target", "one", *FAST, "--checkpoint", tmp_path / "kept")
    result = run(*common, "--strategy", "target-only", "--jsonl", tmp_path / "first.jsonl")
    assert result.exit_code == 0, result.output
    out, log = tmp_path / "out.json", tmp_path / "log.jsonl"
    result = run(*common, "--strategy", "target-only,weights", "--jsonl", log, "--json", out)
    assert result.exit_code == 0, result.output
    assert len(read_log(tmp_path / "first.jsonl")) == 4
    assert {entry["strategy"] for entry in read_log(log)} == {"weights"}
    weights = json.loads(out.read_text())["strategies"]["weights"]["weights"]
    assert set(weights) == {"two", "[bold]"}
    assert all(0 <= share <= 1 for shares in weights.values() for share in shares)
    result = run(*common, "--lr", 0.5)
    assert result.exit_code == 2
    assert result.output.endswith("got 0.008\n")


def test_early_stopping(alike: Path, tmp_path: Path) -> None:
    """Needs a shot to validate on, which is then not trained on."""
    out = tmp_path / "o.json"
    common = ("--data", alike, "--target", "one", "--seeds", 1, "--epochs", 1, "--strategy", "target-only")
    for shots, flags, samples in ((3, ["--early-stopping"], 6), (1, [], 3)):
        result = run("otqms", *common, "--shots", shots, *flags, "--json", out)
        assert result.exit_code == 0, result.output
        assert json.loads(out.read_text())["strategies"]["target-only"]["samples_per_epoch"] == [samples]
    result = run("otqms", *common, "--shots", 1, "--early-stopping")
    message = "error: shots: expected at least 2 with early stopping, one of them for validation, got 1\n"
    assert (result.exit_code, result.output) == (2, message)


def test_image_folder(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "tree", {"photo": ("cat", "dog"), "sketch": ("cat",)})
    result = run("otqms", "--data", tree, "--target", "photo", *FAST, "--strategy", "all-sources")
    assert result.exit_code == 0, result.output
    assert "note: sketch has no sample of class dog" in result.output


def test_diverging_training(alike: Path) -> None:
    arguments = ("--data", alike, "--target", "one", *FAST, "--lr", "1e30", "--strategy", "all-sources")
    result = run("otqms", *arguments)
    assert result.exit_code == 1
    assert "error: RuntimeError: the training diverged: its mean loss is " in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "seeds: expected an integer of at least 1, got 0"),
        (["--epochs", "-1"], "epochs: expected an integer of at least 1, got -1"),
        (["--lr", "inf"], "lr: expected a positive number, got inf"),
        (["--dimension", "x"], "dimension: expected 'auto', 'parameters' or an integer of at least 1, got 'x'"),
        (["--strategy", "best"], f"strategy: expected names among {', '.join(STRATEGIES)}, got 'best'"),
    ],
)
def test_bad_input(alike: Path, arguments: list[str], message: str) -> None:
    result = run("otqms", "--data", alike, "--target", "one", *arguments)
    assert (result.exit_code, result.output) == (2, f"error: {message}\n")


def test_one_domain_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", a_x=np.eye(4), a_y=[0, 0, 1, 1])
    result = run("otqms", "--data", tmp_path / "b.npz", "--target", "a")
    expected = "error: sources: expected at least one domain beside the target, got none\n"
    assert (result.exit_code, result.output) == (2, expected)
