"""``transferops rank``, end to end and in the ways it can be misused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from bundles import feature_bundle
from commands import run

FAST = ("--threads", 1, "--source-steps", 20)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One domain is like the target, another has its classes permuted, and one has none."""
    path = tmp_path_factory.mktemp("data") / "bundle.npz"
    return feature_bundle(path, {"target": (0, 2), "same": (0, 2), "other": (1, 2), "[noise]": (0, 0)}, samples=90)


def test_sources(bundle: Path, tmp_path: Path) -> None:
    out, pictures, cache = tmp_path / "result.json", tmp_path / "deep" / "pictures", tmp_path / "cache"
    command = ["--data", bundle, "--target", "target", *FAST, "--json", out, "--output", pictures, "--cache", cache]
    result = run("rank", *command)
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
    again = run("rank", *command)
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
        "rank",
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


def test_scores_that_compare_sources(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("ot")
    out = tmp_path / "result.json"
    chosen = ("--sources", "same,[noise]", "--scores", "otce,task2vec", "--json", out, "--quiet")
    result = run("rank", "--data", bundle, "--target", "target", *FAST, *chosen)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert document["scores"] == ["otce", "task2vec", "knn", "parameters"]
    same, noise = (candidate["scores"] for candidate in document["candidates"])
    assert same["otce"] > noise["otce"]
    assert all(-1 <= scores["task2vec"] <= 0 for scores in (same, noise))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scores", "best"], "energy, pge, pge_cosine, task2vec, otce, got 'best'"),
        (["--layers", "nothing"], "error: layers: expected 'head input' or modules of the model"),
        (
            ["--model", "x"],
            "error: model: expected module:function, timm:NAME or hf:NAME, got 'x'",
        ),
        (["--model", "a:b", "--sources", "same"], "error: sources: expected none beside --model"),
        (["--model", "a:b", "--scores", "knn,pge"], "error: scores: expected none that compares sources, beside"),
    ],
)
def test_bad_input(bundle: Path, arguments: list[str], message: str) -> None:
    result = run("rank", "--data", bundle, "--target", "target", *FAST, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "training" not in result.output
