"""Studies: strategies compared over seeds, in numbers, sentences, files and pictures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from otqms_tasks import AVAILABLE, CLASSES, FAST, SOURCES, TARGET, network, timeless
from torch import nn

from transferops.data import Domain, few_shot_split
from transferops.otqms import (
    EpochRecord,
    Study,
    TrainingRun,
    Trial,
    compare,
    to_json,
    write_json,
)
from transferops.otqms.plots import plot_accuracy, plot_quantities
from transferops.otqms.summary import Mean, conclusions, summarize

pytestmark = pytest.mark.usefixtures("one_thread")


def study(**arguments: Any) -> Study:
    return compare(
        network,
        lambda seed: few_shot_split(TARGET, 5, seed=seed),
        SOURCES,
        options=FAST,
        **{"seeds": (0, 1), **arguments},
    )


class TestStudy:
    def test_the_test_part_has_no_influence(self) -> None:
        """The same trainings whatever it holds; only the accuracy changes."""

        def spoiled(seed: int) -> Any:
            split = few_shot_split(TARGET, 5, seed=seed)
            test = Domain("test", split.test.inputs, (split.test.labels + 1) % CLASSES)
            return dataclasses.replace(split, test=test)

        honest = study()
        other = compare(network, spoiled, SOURCES, options=FAST, seeds=(0, 1))
        for name in honest.trials:
            for a, b in zip(honest.trials[name], other.trials[name], strict=True):
                assert timeless(a.run) == timeless(b.run)
                assert a.run.kept_epoch == b.run.kept_epoch
                assert a.accuracy > 0.5 > b.accuracy

    def test_seeds_and_callbacks(self) -> None:
        seen: list[tuple[str, int, int]] = []
        result = study(
            strategies=("all-sources", "target-only"),
            seeds=(4, 2),
            on_epoch=lambda strategy, seed, record: seen.append((strategy, seed, record.epoch)),
        )
        assert list(result.trials) == ["all-sources", "target-only"]
        assert [trial.seed for trial in result.trials["target-only"]] == [4, 2]
        assert seen == list(
            itertools.chain(
                *(
                    [(name, seed, epoch) for epoch in (1, 2, 3, 4)]
                    for seed in (4, 2)
                    for name in ("all-sources", "target-only")
                )
            )
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seeds": ()}, "seeds: expected at least one seed, each once, got []"),
            ({"seeds": (1, 1)}, "seeds: expected at least one seed, each once, got [1, 1]"),
            ({"strategies": ()}, "strategy: expected at least one name, each once, got none"),
            (
                {"strategies": ("quantities", "quantities")},
                "strategy: expected at least one name, each once, got quantities, quantities",
            ),
        ],
    )
    def test_refuses(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            study(**change)


def made_up_trial(seed: int, accuracy: float, near: list[int], risk: float | None) -> Trial:
    """A trial that took ``near`` samples of the one source by epoch and kept the last epoch."""
    records = tuple(
        EpochRecord(i, {"near": n, "far": 0}, 12 + n, 0.5, 0.4, 0.9, risk, 2.0, 0.5) for i, n in enumerate(near, 1)
    )
    return Trial(seed, TrainingRun("made-up", records, len(records), 3.0, nn.Identity()), accuracy)


def made_up_study(ours: list[float], theirs: list[float]) -> Study:
    deciding = [made_up_trial(seed, a, [60, 30], 1.5) for seed, a in enumerate(ours)]
    other = [made_up_trial(seed, a, [60, 60], None) for seed, a in enumerate(theirs)]
    return Study({"quantities": deciding, "all-sources": other}, AVAILABLE, 24)


class TestSummary:
    def test_timeless(self) -> None:
        ours, theirs = summarize(made_up_study([0.9, 0.8], [0.7, 0.7]))
        assert ours.accuracy == Mean(pytest.approx(0.85), pytest.approx(0.05))
        assert (ours.samples_per_epoch, ours.seconds, ours.allocation_seconds) == (57, 4, 1)
        assert ours.quantities == {"near": 30, "far": 0}
        assert (ours.predicts, theirs.predicts) == (True, False)

    @pytest.mark.parametrize(
        ("ours", "theirs", "sentence"),
        [
            (
                [0.9, 0.8],
                [0.7, 0.6],
                "Its accuracy is 20.0 points (± 0.0) above all-sources, no clear difference.",  # of two seeds
            ),
            (
                [0.9, 0.91, 0.92],
                [0.7, 0.72, 0.71],
                "Its accuracy is 20.0 points (± 0.6) above all-sources, a clear difference.",
            ),
            (
                [0.7, 0.6],
                [0.9, 0.9],
                "Its accuracy is 25.0 points (± 5.0) below all-sources, no clear difference.",
            ),
            (
                [0.9, 0.7],
                [0.7, 0.8],
                "Its accuracy is 5.0 points (± 15.0) above all-sources, no clear difference.",
            ),
            (
                [0.9],
                [0.7],
                "Its accuracy is 20.0 points above all-sources; one seed cannot say how sure that is.",
            ),
        ],
    )
    def test_sentences(self, ours: list[float], theirs: list[float], sentence: str) -> None:
        first = (
            "quantities took 28% of the source samples in the epoch that was kept: "
            "most of near (50%), least of far (0%)."
        )
        assert conclusions(made_up_study(ours, theirs)) == [first, sentence]

    def test_an_epoch_that_takes_nothing_is_told_as_such(self) -> None:
        run = made_up_trial(0, 0.9, [60, 0], 1.5).run
        assert run.allocated is run.kept
        finish = dataclasses.replace(run.epochs[1], epoch=3, phase="finish")
        finished = dataclasses.replace(run, epochs=(*run.epochs, finish), kept_epoch=3)
        assert finished.allocated is run.epochs[1]


def test_the_guard_is_quoted() -> None:
    result = made_up_study([0.9, 0.8], [0.7, 0.6])
    ours = result.trials["quantities"]
    run = dataclasses.replace(ours[1].run, verdicts=("accept: so and so", "quantities is kept"))
    quoted = dataclasses.replace(
        result, trials={**result.trials, "quantities": [ours[0], dataclasses.replace(ours[1], run=run)]}
    )
    assert conclusions(quoted) == ["Seed 1: quantities is kept.", *conclusions(result)]
    assert to_json(quoted)["strategies"]["quantities"]["guard"] == [[], list(run.verdicts)]


class TestResults:
    def test_json(self, tmp_path: Path) -> None:
        path = tmp_path / "result.json"
        result = study()
        write_json(to_json(result, target="target", shots=5), path)
        document = json.loads(path.read_text())
        assert document["sources"] == ["near", "far"]
        assert document["source_samples"] == AVAILABLE
        assert (document["target"], document["shots"], document["seeds"]) == ("target", 5, [0, 1])
        assert document["dimension"] == 24
        assert set(document["versions"]) == {"transferops", "torch", "numpy", "python"}
        assert list(document["strategies"]) == ["target-only", "all-sources", "quantities"]
        for name, entry in document["strategies"].items():
            trials = result.trials[name]
            assert entry["accuracy"] == [trial.accuracy for trial in trials]
            assert entry["samples_per_epoch"] == [trial.run.samples_per_epoch for trial in trials]
            assert entry["seconds"] == [trial.run.seconds for trial in trials]
            assert entry["samples_by_epoch"] == [[r.samples for r in trial.run.epochs] for trial in trials]
            for source in AVAILABLE:
                assert entry["quantities"][source] == [trial.run.allocated.quantities[source] for trial in trials]
                by_epoch = [[r.quantities[source] for r in trial.run.epochs] for trial in trials]
                assert entry["quantities_by_epoch"][source] == by_epoch

    @pytest.mark.parametrize("document", [{"a": float("nan")}, {"a": object()}])
    def test_a_failed_write_leaves_what_was_there(self, tmp_path: Path, document: dict[str, Any]) -> None:
        path = tmp_path / "result.json"
        path.write_text("old")
        with pytest.raises((ValueError, TypeError)):
            write_json(document, path)
        assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
        assert path.read_text() == "old"

    def test_an_interrupted_write_leaves_what_was_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "result.json"
        path.write_text("old")

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_json({"a": 1}, path)
        assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
        assert path.read_text() == "old"


class TestPlots:
    @pytest.fixture(autouse=True)
    def _needs_matplotlib(self) -> None:
        pytest.importorskip("matplotlib")

    def test_files(self, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        result = made_up_study([0.9, 0.8], [0.7, 0.7])
        assert plot_quantities(result, tmp_path / "quantities.png")
        plot_accuracy(result, tmp_path / "accuracy.png")
        for name in ("quantities.png", "accuracy.png"):
            with image.open(tmp_path / name) as picture:
                assert picture.width > 900
                assert len(picture.convert("RGB").getcolors(10**6)) > 10

    def test_nothing_decided_nothing_drawn(self, tmp_path: Path) -> None:
        result = Study({"target-only": [made_up_trial(0, 0.5, [0], None)]}, AVAILABLE, 24)
        assert not plot_quantities(result, tmp_path / "quantities.png")
        assert not (tmp_path / "quantities.png").exists()
        plot_accuracy(result, tmp_path / "accuracy.png")
        assert (tmp_path / "accuracy.png").exists()
