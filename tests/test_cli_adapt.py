"""``transferops adapt``, end to end and in the ways it can be misused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
testing = pytest.importorskip("click.testing")

from transferops import cli  # noqa: E402  (needs the extras)

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
        labels = np.arange(36) % 3
        arrays[f"{name}_x"] = np.eye(3, 5)[labels] + generator.normal(size=(36, 5))
        arrays[f"{name}_y"] = labels
    path = tmp_path_factory.mktemp("data") / "bundle.npz"
    np.savez(path, **arrays)
    return path


def run(*arguments: str | Path) -> Any:
    return testing.CliRunner().invoke(cli.cli, ["adapt", *map(str, arguments)])


def test_files_and_tables(bundle: Path, tmp_path: Path) -> None:
    out, pictures = tmp_path / "result.json", tmp_path / "deep" / "pictures"
    arms = "unadapted,adapted,ridge,gradient,pinv"
    result = run("--data", bundle, "--target", "one", *FAST, "--arms", arms, "--json", out, "--output", pictures)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert (document["target"], document["shots"], document["seeds"]) == ("one", 3, [0, 1])
    assert document["sources"] == {"two": 36, "[bold]": 36}
    assert list(document["arms"]) == arms.split(",")
    for entry in document["arms"].values():
        assert len(entry["accuracy"]) == len(entry["seconds"]) == 2
        assert all(0 <= accuracy <= 1 for accuracy in entry["accuracy"])
    assert [report["samples"] for report in document["reports"]] == [9, 9]
    assert document["reports"][0]["outputs"] == 3
    for expected in ("[bold] (36)", "held-out loss", "adapted is ", "unadapted", "ridge (± "):
        assert expected in result.output
    for path in (out, pictures / "adapt-accuracy.png", pictures / "adapt-penalty.png"):
        assert path.stat().st_size > 500
        assert f"wrote {path}\n" in result.output


def test_features_have_a_linear_model(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = run("--data", bundle, "--target", "one", *FAST, "--features", "--quiet", "--json", out)
    assert (result.exit_code, result.output) == (0, "")
    document = json.loads(out.read_text())
    assert document["reports"][0]["features"] == 5
    assert list(document["arms"]) == ["unadapted", "adapted", "ridge"]


def test_embedded_digits_with_one_shot(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "result.json"
    result = run("--seeds", "1", "--epochs", "1", "--shots", "1", "--arms", "adapted", "--json", out)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert (document["data"], document["target"]) == ("embedded digits", "rotated-30")
    assert "blind" in document["reports"][0]["chosen_by"]


def test_image_folder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for domain in ("photo", "sketch"):
        for kind in ("cat", "dog"):
            folder = tmp_path / "tree" / domain / kind
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / f"{i}.png")
    result = run("--data", tmp_path / "tree", "--target", "photo", *FAST)
    assert result.exit_code == 0, result.output
    assert "sources sketch (8)" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "target: expected one of one, two, [bold], got none"),
        (["--target", "three"], "target: expected one of one, two, [bold], got 'three'"),
        (["--target", "one", "--sources", "one"], "sources: expected domains other than the target, got 'one'"),
        (["--target", "one", "--shots", "0"], "shots: expected an integer of at least 1, got 0"),
        (["--target", "one", "--seeds", "0"], "seeds: expected an integer of at least 1, got 0"),
        (["--target", "one", "--epochs", "0"], "epochs: expected an integer of at least 1, got 0"),
        (["--target", "one", "--batch-size", "0"], "batch_size: expected an integer of at least 1, got 0"),
        (["--target", "one", "--lr", "inf"], "lr: expected a positive number, got inf"),
        (["--target", "one", "--device", "moon"], "device: expected one that works here, got 'moon'"),
        (
            ["--target", "one", "--arms", "best"],
            "arms: expected names among unadapted, adapted, ridge, gradient, pinv, got 'best'",
        ),
        (
            ["--target", "one", "--json", "no/such/folder/out.json"],
            "json: expected a file in an existing folder, got no/such/folder/out.json",
        ),
    ],
)
def test_bad_input(bundle: Path, arguments: list[str], message: str) -> None:
    result = run("--data", bundle, *arguments)
    assert (result.exit_code, result.output) == (2, f"error: {message}\n")


def test_features_need_vectors() -> None:
    pytest.importorskip("sklearn")
    result = run("--features")
    expected = "error: features: expected feature vectors with --features, got samples of shape [1, 8, 8]\n"
    assert (result.exit_code, result.output) == (2, expected)


def test_diverging_training(bundle: Path) -> None:
    result = run("--data", bundle, "--target", "one", *FAST, "--lr", "1e30")
    assert result.exit_code == 1
    assert "error: RuntimeError: the training diverged" in result.output


def test_help_teaches_by_example() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "transferops adapt --data digits.npz --target usps" in result.output
