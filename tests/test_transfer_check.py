"""The negative-transfer check: intervals, verdicts, resuming, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import mlp

from transferops.adapt import paired_effects, transfer_check
from transferops.adapt.checkpoints import load_state
from transferops.adapt.transfer_check import TransferCheck
from transferops.adapt.verdict import overall

ALPHAS = (0.0, 0.5, 1.0)


def noisy(effect: dict[float, float], noise: float = 0.01) -> Any:
    """A training whose metric is shared by the seed, plus an effect of alpha, plus noise."""

    def train(alpha: float, seed: int) -> float:
        own = np.random.default_rng([seed, int(100 * alpha)]).normal()
        return float(np.random.default_rng(seed).normal() + effect.get(alpha, 0.0) + noise * own)

    return train


class TestVerdict:
    def test_intervals_are_students_with_bonferroni(self) -> None:
        stats = pytest.importorskip("scipy.stats")
        metrics = np.random.default_rng(0).normal(size=(3, 7))
        effects = paired_effects(metrics, ALPHAS, confidence=0.9)
        for row, effect in zip(metrics[1:], effects, strict=True):
            difference = row - metrics[0]
            low, high = stats.t.interval(0.95, 6, difference.mean(), stats.sem(difference))
            assert effect.low == pytest.approx(low, rel=1e-12)
            assert effect.high == pytest.approx(high, rel=1e-12)
            assert effect.difference == pytest.approx(difference.mean())
            assert effect.metric == pytest.approx(row.mean())

    def test_bootstrap_agrees_with_many_seeds(self) -> None:
        metrics = np.random.default_rng(2).normal(size=(2, 400))
        t, bootstrap = (paired_effects(metrics, (0, 1), interval=kind)[0] for kind in ("t", "bootstrap"))
        assert bootstrap.low == pytest.approx(t.low, abs=0.02)
        assert bootstrap.high == pytest.approx(t.high, abs=0.02)
        assert paired_effects(metrics, (0, 1), interval="bootstrap")[0] == bootstrap

    @pytest.mark.parametrize(("seeds", "verdict"), [(5, "undecided"), (6, "positive")])
    def test_equal_differences_need_enough_seeds(self, seeds: int, verdict: str) -> None:
        # A sign test on n equal signs has p = 2^(1-n): 0.0625 for 5 seeds, 0.03125 for 6.
        (effect,) = paired_effects([[0.25] * seeds, [0.5] * seeds], (0, 1))
        assert effect.verdict == verdict
        assert (effect.low, effect.high) == ((0.25, 0.25) if seeds == 6 else (-math.inf, math.inf))

    def test_no_difference_at_all(self) -> None:
        (effect,) = paired_effects([[0.25] * 9, [0.25] * 9], (0, 1))
        assert (effect.low, effect.high, effect.verdict) == (0, 0, "undecided")

    def test_overall(self) -> None:
        effects = paired_effects(np.array([[0.0] * 4, [1, 1.1, 0.9, 1], [-1, -1.1, -0.9, -1]]), ALPHAS)
        assert [e.verdict for e in effects] == ["positive", "negative"]
        assert overall(effects) == "undecided"
        assert overall(effects[:1]) == "positive"
        assert overall(effects[1:]) == "negative"
        assert overall(()) == "undecided"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([[1.0, 2.0]], (0.0,)), "alphas: expected 0 and at least one other share"),
            (([[1.0, 2.0]] * 2, (0.5, 1.0)), "alphas: expected 0 and"),
            (([[1.0, 2.0]] * 3, (0.0, 1.0)), r"metrics: expected shape \[2, seeds\]"),
            (([[1.0]] * 2, (0.0, 1.0)), "metrics: expected shape .* with at least 2 seeds"),
            (([[1.0, math.nan]] * 2, (0.0, 1.0)), "metrics: expected finite numbers"),
        ],
    )
    def test_errors(self, arguments: tuple[Any, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            paired_effects(*arguments)


class TestCheck:
    @pytest.mark.parametrize(("effect", "verdict"), [(0.1, "positive"), (-0.1, "negative"), (0.0, "undecided")])
    def test_verdicts(self, effect: float, verdict: str) -> None:
        check = transfer_check(noisy({0.5: effect, 1.0: effect}), ALPHAS, range(8))
        assert check.verdict == verdict
        assert [e.verdict for e in check.effects] == [verdict] * 2
        assert check.scratch == pytest.approx(np.mean(check.metrics[0]))
        for word in {"positive": "helps", "negative": "negative transfer", "undecided": "Undecided"}[verdict].split():
            assert word in str(check)

    def test_mixed(self) -> None:
        check = transfer_check(noisy({0.5: 0.1, 1.0: -0.1}), ALPHAS, range(8))
        assert check.verdict == "undecided"
        assert "helps at alpha 0.5 and hurts at 1" in check.conclusion()

    def test_tensors_are_numbers(self) -> None:
        check = transfer_check(lambda alpha, seed: torch.tensor(alpha + seed), ALPHAS, range(3))
        assert check.metrics == ((0, 1, 2), (0.5, 1.5, 2.5), (1, 2, 3))

    def test_document(self) -> None:
        document = json.loads(json.dumps(transfer_check(lambda a, s: a, ALPHAS, range(3)).to_dict(), allow_nan=False))
        assert document["verdict"] == "undecided"
        assert document["effects"][0]["low"] is None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"alphas": (0.5, 1.0)}, "alphas: expected 0 and at least one other share, each once"),
            ({"alphas": (0.0, 1.5)}, r"alphas: expected numbers in \[0, 1\], got 1.5"),
            ({"alphas": (0.0, 0.5, 0.5)}, "alphas: expected 0 and"),
            ({"seeds": [1]}, "seeds: expected at least 2 seeds, each once"),
            ({"seeds": [1, 1]}, "seeds: expected at least 2 seeds, each once"),
            ({"interval": "normal"}, "interval: expected 't' or 'bootstrap', got 'normal'"),
            ({"confidence": 1.0}, r"confidence: expected a number in \(0, 1\), got 1.0"),
        ],
    )
    def test_errors_come_before_training(self, arguments: dict[str, Any], message: str) -> None:
        def train(alpha: float, seed: int) -> float:
            raise AssertionError

        with pytest.raises(ValueError, match=message):
            transfer_check(train, **arguments)

    @pytest.mark.parametrize("value", [math.nan, math.inf, None, "high"])
    def test_bad_metric(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"train: expected a finite metric, got .* at alpha 0, seed 0"):
            transfer_check(lambda alpha, seed: value, ALPHAS, range(2))


class TestJournal:
    def run(self, path: Path, limit: int | None = None, **about: Any) -> tuple[TransferCheck | None, list[Any]]:
        calls: list[Any] = []

        def train(alpha: float, seed: int) -> float:
            if limit is not None and len(calls) == limit:
                raise KeyboardInterrupt
            calls.append((alpha, seed))
            return noisy({1.0: 0.1})(alpha, seed)

        try:
            return transfer_check(train, ALPHAS, range(4), journal=path, about=about), calls
        except KeyboardInterrupt:
            return None, calls

    def test_a_killed_run_goes_on(self, tmp_path: Path) -> None:
        path = tmp_path / "check.jsonl"
        whole = transfer_check(noisy({1.0: 0.1}), ALPHAS, range(4))
        assert len(self.run(path, 5)[1]) == 5
        with path.open("a") as file:
            file.write('{"alpha": 0.5, "se')  # torn by the kill
        result, calls = self.run(path)
        assert len(calls) == 12 - 5
        assert result == whole
        result, calls = self.run(path)
        assert (result, calls) == (whole, [])

    def test_more_seeds_later(self, tmp_path: Path) -> None:
        path = tmp_path / "check.jsonl"
        self.run(path)
        seen: list[Any] = []
        train = noisy({1.0: 0.1})
        transfer_check(lambda alpha, seed: seen.append(seed) or train(alpha, seed), ALPHAS, range(5), journal=path)
        assert seen == [4, 4, 4]

    def test_a_first_line_torn(self, tmp_path: Path) -> None:
        path = tmp_path / "check.jsonl"
        path.write_text('{"about": {"da')
        assert len(self.run(path)[1]) == 12
        assert len(path.read_text().splitlines()) == 13

    def test_another_check(self, tmp_path: Path) -> None:
        path = tmp_path / "check.jsonl"
        self.run(path, data="one", shots=3)
        with pytest.raises(
            ValueError, match=r"journal: expected results of the same run as in .*, got a different data"
        ):
            self.run(path, data="two", shots=3)

    @pytest.mark.parametrize("content", ["precious notes", "precious\n", '{"results": []}\n', "[1]\n"])
    def test_a_file_of_someone_else_is_left_alone(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "notes"
        path.write_text(content)
        with pytest.raises(ValueError, match="journal: expected"):
            self.run(path)
        assert path.read_text() == content


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two feature domains that share their classes' means."""
    generator = np.random.default_rng(0)
    arrays = {}
    for name in ("up", "down"):
        labels = np.arange(60) % 3
        arrays[f"{name}_x"] = 2 * np.eye(3, 5)[labels] + generator.normal(size=(60, 5))
        arrays[f"{name}_y"] = labels
    path = tmp_path_factory.mktemp("data") / "bundle.npz"
    np.savez(path, **arrays)
    return path


class TestCommand:
    def run(self, *arguments: str | Path) -> Any:
        pytest.importorskip("rich")
        testing = pytest.importorskip("click.testing")
        from transferops.cli import cli

        threads = torch.get_num_threads()
        try:
            return testing.CliRunner().invoke(cli, ["inherit", *map(str, arguments)])
        finally:
            torch.set_num_threads(threads)

    def test_check(self, bundle: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        out, journal = tmp_path / "out.json", tmp_path / "check.jsonl"
        data = tmp_path / "data.npz"
        data.write_bytes(bundle.read_bytes())
        arguments = ["--check", "--data", data, "--upstream", "up", "--target", "down", "--shots", 2, "--seeds", 3]
        arguments += ["--alphas", "0,1", "--epochs", 2, "--threads", 1, "--journal", journal, "--select", "fisher"]
        result = self.run(*arguments, "--json", out, "--output", tmp_path / "pictures")
        assert result.exit_code == 0, result.output
        document = json.loads(out.read_text())
        assert (document["alphas"], document["seeds"], document["upstream"]) == ([0, 1], [0, 1, 2], "up")
        assert document["verdict"] in ("positive", "negative", "undecided")
        assert (tmp_path / "pictures" / "transfer.png").stat().st_size > 1000
        assert len(journal.read_text().splitlines()) == 7
        assert "seed 2 alpha 1: test accuracy" in result.output
        again = self.run(*arguments, "--json", tmp_path / "again.json")
        assert again.exit_code == 0, again.output
        assert json.loads((tmp_path / "again.json").read_text()) == document
        other = self.run(*arguments, "--lr", "0.1")
        assert other.exit_code == 2
        assert "journal: expected results of the same run" in other.output
        with np.load(data) as arrays:  # the name stays, the samples do not
            changed = {name: -array if name == "up_x" else array for name, array in arrays.items()}
        np.savez(data, **changed)
        other = self.run(*arguments)
        assert other.exit_code == 2
        assert "got a different content" in other.output

    def test_checkpoint_into_a_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / "my_small_nets.py").write_text(
            "from torch.nn import Linear, ReLU, Sequential\n\n"
            "def small():\n    return Sequential(Linear(4, 3), ReLU(), Linear(3, 2))\n"
        )
        upstream = mlp(4, 6, 2)
        torch.save({"epoch": 3, "state_dict": upstream.state_dict()}, tmp_path / "big.pt")
        arguments = ["my_small_nets:small", "--from", "big.pt", "--select", "magnitude"]
        result = self.run(*arguments, "--save", "start.pt", "--json", "report.json")
        assert result.exit_code == 0, result.output
        assert "3x4 <- 6x4" in result.output
        assert "inherited 23 of 23 elements" in result.output
        saved = torch.load(tmp_path / "start.pt", weights_only=True)
        assert torch.equal(saved["state_dict"]["2.bias"], upstream[2].bias)
        assert bool(saved["masks"]["0.weight"].all())
        assert json.loads((tmp_path / "report.json").read_text())["copied"] == 23

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "arguments: expected MODEL and --from, or --check, got neither"),
            (["--check", "--alphas", "1,x"], "expected numbers separated by commas, got '1,x'"),
            (["m:f", "--from", "nothing.pt"], "checkpoint: expected a file, got nothing at nothing.pt"),
            (["--check", "--seeds", "1"], "seeds: expected an integer of at least 2, got 1"),
            (["--check", "--seeds", "2", "--alphas", "0.5,1"], "alphas: expected 0 and at least one other share"),
        ],
    )
    def test_errors(self, arguments: list[str], message: str) -> None:
        result = self.run(*arguments)
        assert result.exit_code == 2
        assert message in result.output
        assert "Traceback" not in result.output

    def test_safetensors(self, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        state = mlp(4, 6, 2).state_dict()
        safetensors.save_file(state, tmp_path / "small.safetensors")
        loaded = load_state(tmp_path / "small.safetensors")
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
        (tmp_path / "bad.safetensors").write_bytes(b"nothing")
        with pytest.raises(ValueError, match="checkpoint: expected a safetensors file, got"):
            load_state(tmp_path / "bad.safetensors")

    def test_pickles_are_not_run(self, tmp_path: Path) -> None:
        import pickle

        class Evil:
            def __reduce__(self) -> Any:
                return (exec, ("raise SystemExit('run')",))

        path = tmp_path / "evil.pt"
        path.write_bytes(pickle.dumps({"weight": Evil()}))
        result = self.run("m:f", "--from", path)
        assert result.exit_code == 2
        assert "expected a file that torch.load(weights_only=True) takes" in result.output
