"""``transferops rank``, end to end and in the ways it can be misused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
testing = pytest.importorskip("click.testing")

from transferops import cli  # noqa: E402  (needs the extras)

FAST = ["--threads", "1", "--source-steps", "20"]


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    """The command sets the number of threads of the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of three classes: "same" is like the target, "other" has its classes permuted, "noise" has none."""
    generator = np.random.default_rng(0)
    arrays = {}
    for name, shift, strength in (("target", 0, 2), ("same", 0, 2), ("other", 1, 2), ("[noise]", 0, 0)):
        labels = np.arange(90) % 3
        arrays[f"{name}_x"] = strength * np.eye(3, 5)[(labels + shift) % 3] + generator.normal(size=(90, 5))
        arrays[f"{name}_y"] = labels
    path = tmp_path_factory.mktemp("data") / "bundle.npz"
    np.savez(path, **arrays)
    return path


def run(*arguments: str | Path) -> Any:
    return testing.CliRunner().invoke(cli.cli, ["rank", *map(str, arguments)])


def test_sources(bundle: Path, tmp_path: Path) -> None:
    out, pictures, cache = tmp_path / "result.json", tmp_path / "deep" / "pictures", tmp_path / "cache"
    command = ["--data", bundle, "--target", "target", *FAST, "--json", out, "--output", pictures, "--cache", cache]
    result = run(*command)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert [candidate["name"] for candidate in document["candidates"]] == ["same", "other", "[noise]"]
    assert (document["target"], document["samples"], document["classes"]) == ("target", 90, 3)
    leep = {candidate["name"]: candidate["scores"]["leep"] for candidate in document["candidates"]}
    assert leep["same"] > leep["[noise]"]
    assert {"pge", "knn", "parameters"} <= set(document["scores"])
    assert "[noise]" in result.output
    assert "best mean rank" in result.output
    assert (pictures / "ranking.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(cache.iterdir())) == 3
    again = run(*command)
    assert json.loads(out.read_text()) == document
    assert again.exit_code == 0


def test_models_and_layers(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rank_models.py").write_text(
        "from torch import nn\n"
        "def small():\n    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))\n"
        "def large():\n    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 6))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "result.json"
    result = run(
        *("--data", bundle, "--target", "target", "--model", "my_rank_models:small", "--model", "my_rank_models:large"),
        *("--layers", "head input,0", "--scores", "log_me,nce", "--shots", "7", "--json", out, "--quiet"),
    )
    assert result.exit_code == 0, result.output
    assert result.output == ""
    document = json.loads(out.read_text())
    assert document["samples"] == 21
    assert document["scores"] == ["log_me", "nce", "knn", "parameters"]
    rows = [(row["name"], row["layer"], row["scores"]["parameters"]) for row in document["candidates"]]
    small, large = "my_rank_models:small", "my_rank_models:large"
    assert rows == [(small, "head input", 39), (small, "0", 39), (large, "head input", 114), (large, "0", 114)]
    assert all(math.isfinite(row["scores"]["log_me"]) for row in document["candidates"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "x"], "error: target: expected one of target, same, other, [noise], got 'x'\n"),
        ([], "error: target: expected one of target, same, other, [noise], got none\n"),
        (["--target", "target", "--scores", "best"], "'best'"),
        (["--target", "target", "--layers", "nothing"], "error: layers: expected 'head input' or modules of the model"),
        (
            ["--target", "target", "--model", "x"],
            "error: model: expected module:function, timm:NAME or hf:NAME, got 'x'",
        ),
        (["--target", "target", "--model", "a:b", "--sources", "same"], "error: sources: expected none beside --model"),
        (["--target", "target", "--shots", "30"], "error: shots: expected at most 29 for target"),
        (["--target", "target", "--device", "nowhere"], "error: device: expected one that works here"),
    ],
)
def test_bad_input(bundle: Path, arguments: list[str], message: str) -> None:
    result = run("--data", bundle, *FAST, *arguments)
    assert result.exit_code == 2
    assert message in result.output
