"""``transferops adapt``, end to end and in the ways it can be misused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import run

FAST = ("--shots", 3, "--seeds", 2, "--epochs", 2, "--threads", 1)


def test_files_and_tables(alike: Path, tmp_path: Path) -> None:
    out, pictures = tmp_path / "result.json", tmp_path / "deep" / "pictures"
    arms = "unadapted,adapted,ridge,gradient,pinv"
    result = run(
        "adapt", "--data", alike, "--target", "one", *FAST, "--arms", arms, "--json", out, "--output", pictures
    )
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert (document["target"], document["shots"], document["seeds"]) == ("one", 3, [0, 1])
    assert document["sources"] == {"two": 24, "[bold]": 24}
    assert list(document["arms"]) == arms.split(",")
    for entry in document["arms"].values():
        assert len(entry["accuracy"]) == len(entry["seconds"]) == 2
        assert all(0 <= accuracy <= 1 for accuracy in entry["accuracy"])
    assert [report["samples"] for report in document["reports"]] == [9, 9]
    assert document["reports"][0]["outputs"] == 3
    for expected in ("[bold] (24)", "held-out loss", "adapted is ", "unadapted", " points (± ", " ridge, no clear "):
        assert expected in result.output
    for path in (out, pictures / "adapt-accuracy.png", pictures / "adapt-penalty.png"):
        assert path.stat().st_size > 500
        assert f"wrote {path}\n" in result.output


def test_features_have_a_linear_model(alike: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = run("adapt", "--data", alike, "--target", "one", *FAST, "--features", "--quiet", "--json", out)
    assert (result.exit_code, result.output) == (0, "")
    document = json.loads(out.read_text())
    assert document["reports"][0]["features"] == 5
    assert list(document["arms"]) == ["unadapted", "adapted", "ridge"]


def test_one_shot_cannot_be_left_out(alike: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = run("adapt", "--data", alike, "--target", "one", *FAST, "--shots", 1, "--arms", "adapted", "--json", out)
    assert result.exit_code == 0, result.output
    assert "blind" in json.loads(out.read_text())["reports"][0]["chosen_by"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "seeds: expected an integer of at least 1, got 0"),
        (["--epochs", "0"], "epochs: expected an integer of at least 1, got 0"),
        (["--batch-size", "0"], "batch_size: expected an integer of at least 1, got 0"),
        (["--lr", "inf"], "lr: expected a positive number, got inf"),
        (
            ["--arms", "best"],
            "arms: expected names among unadapted, adapted, ridge, gradient, pinv, got 'best'",
        ),
        (["--arms", "ridge,ridge"], "arms: expected each name once, got ridge, ridge"),
    ],
)
def test_bad_input(alike: Path, arguments: list[str], message: str) -> None:
    result = run("adapt", "--data", alike, "--target", "one", *arguments)
    assert (result.exit_code, result.output) == (2, f"error: {message}\n")


def test_features_need_vectors() -> None:
    pytest.importorskip("sklearn")
    result = run("adapt", "--features")
    expected = "error: features: expected feature vectors with --features, got samples of shape [1, 8, 8]\n"
    assert (result.exit_code, result.output) == (2, expected)


def test_diverging_training(alike: Path) -> None:
    result = run("adapt", "--data", alike, "--target", "one", *FAST, "--lr", "1e30")
    assert result.exit_code == 1
    assert "error: RuntimeError: the training diverged" in result.output
