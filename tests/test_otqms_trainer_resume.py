"""Checkpoints: whole or not there, checked, and going on from one changes nothing."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from otqms_tasks import task
from torch import nn

from transferops._checkpoint import load, save
from transferops.otqms import OTQMS, EpochLog, EpochRecord, TrainingOptions, TrainingRun, compare, read_log
from transferops.otqms import run as run_module
from transferops.otqms.pool import TensorSamples

OPTIONS = TrainingOptions(
    epochs=4,
    early_stopping=True,
    patience=4,
    lr=2e-3,
    batch_size=8,
    min_steps=12,
    source_steps=20,
    checkpoint_steps=5,
)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def trainer(folder: Path | None = None, options: TrainingOptions = OPTIONS, **changes: Any) -> OTQMS:
    sources = {"near": task(1, 20), "far": task(2, 16, 1)}
    arguments = {"sources": sources, "validation": task(5, 4), "seed": 0, **changes}
    return OTQMS(network, task(0, 5), options=options, checkpoint=folder, **arguments)


def same(a: TrainingRun, b: TrainingRun) -> bool:
    """Whether weights and records, times apart, are the same to the bit."""
    records = [[dataclasses.replace(r, seconds=0, allocation_seconds=0) for r in run.epochs] for run in (a, b)]
    states = zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    return records[0] == records[1] and a.kept_epoch == b.kept_epoch and all(torch.equal(p, q) for p, q in states)


class TestFile:
    def test_what_is_saved_is_loaded(self, tmp_path: Path) -> None:
        state = {"a": torch.arange(5), "b": {"c": [1, 2.5, "x", None, True]}}
        save(state, tmp_path / "deep" / "a.ckpt")
        loaded = load(tmp_path / "deep" / "a.ckpt")
        assert loaded is not None
        assert torch.equal(loaded.pop("a"), torch.arange(5))
        assert loaded == {"b": {"c": [1, 2.5, "x", None, True]}}
        assert load(tmp_path / "none.ckpt") is None

    def test_damage_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "a.ckpt"
        save({"a": torch.arange(50)}, path)
        content = bytearray(path.read_bytes())
        for change in (slice(len(content) // 2, len(content)), slice(len(content) - 200, len(content) - 199)):
            damaged = bytes(content[: change.start]) + b"?" + bytes(content[change.stop :])
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"^checkpoint: expected .* as it was written"):
                load(path)
        path.write_bytes(b"PK something else")
        with pytest.raises(ValueError, match=r"^checkpoint: expected a file of this version"):
            load(path)

    def test_reading_runs_no_code(self, tmp_path: Path) -> None:
        class Harmful:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "harm",))

        save({"a": Harmful()}, tmp_path / "a.ckpt")
        with pytest.raises(Exception, match=r"(?i)weights"):
            load(tmp_path / "a.ckpt")
        assert not (tmp_path / "harm").exists()

    def test_an_interrupted_write_leaves_what_was_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.ckpt"
        save({"a": 1}, path)

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save({"a": 2}, path)
        assert load(path) == {"a": 1}
        assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


class Killed(Exception):
    """Stands for the end of a process right after a checkpoint."""


def die_after(saves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many checkpoints be written, then raise."""
    counter = itertools.count(1)

    def save_and_die(state: dict[str, Any], path: Path) -> None:
        save(state, path)
        if next(counter) == saves:
            raise Killed

    monkeypatch.setattr(run_module.checkpoint, "save", save_and_die)


class TestResume:
    @pytest.mark.parametrize("strategy", ["recommended", "quantities-dynamic"])
    def test_after_any_checkpoint_the_result_is_the_same(
        self, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Interrupted again and again: the second of the checkpoints written after each start is the last."""
        expected = trainer().fit(strategy)
        interruptions = 0
        while True:
            with monkeypatch.context() as patched:
                die_after(2, patched)
                try:
                    result = trainer(tmp_path).fit(strategy)
                    break
                except Killed:
                    interruptions += 1
        assert interruptions > 10
        assert same(result, expected)

    def test_checkpoints_change_nothing_and_are_not_repeated(self, tmp_path: Path) -> None:
        first = trainer(tmp_path).fit("quantities-dynamic")
        assert same(first, trainer().fit("quantities-dynamic"))
        seen: list[EpochRecord] = []
        again = trainer(tmp_path).fit("quantities-dynamic", seen.append)
        assert seen == []
        assert same(first, again)
        assert again.seconds == first.seconds
        assert again.source_model_seconds == first.source_model_seconds
        assert first.gram is not None
        assert again.gram is not None
        assert torch.equal(first.gram, again.gram)

    def test_another_run_is_refused(self, tmp_path: Path) -> None:
        trainer(tmp_path).fit("target-only")
        path = tmp_path / "seed-0" / "target-only.ckpt"
        options = dataclasses.replace(OPTIONS, lr=0.5)
        with pytest.raises(ValueError, match=rf"^checkpoint: expected a run with option lr 0.5 in {path}, got 0.002$"):
            trainer(tmp_path, options).fit("target-only")
        moved = TensorSamples(task(2, 16, 1).inputs + 1e-3, task(2, 16, 1).labels)
        with pytest.raises(ValueError, match=r"^checkpoint: expected a run with samples "):
            trainer(tmp_path, sources={"near": task(1, 20), "far": moved}).fit("target-only")
        fewer = dataclasses.replace(OPTIONS, checkpoint_steps=3, workers=0)
        assert len(trainer(tmp_path, fewer).fit("target-only").epochs) == 4

    def test_a_user_schedule_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def schedule(optimizer: torch.optim.Optimizer) -> Any:
            return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3], 0.5)

        options = dataclasses.replace(OPTIONS, schedule=schedule)
        expected = trainer(None, options).fit("all-sources")
        assert not same(expected, trainer(None, dataclasses.replace(OPTIONS, schedule="constant")).fit("all-sources"))
        with monkeypatch.context() as patched:
            die_after(7, patched)
            with pytest.raises(Killed):
                trainer(tmp_path, options).fit("all-sources")
        assert same(trainer(tmp_path, options).fit("all-sources"), expected)

    def test_a_study_goes_on(self, tmp_path: Path) -> None:
        @dataclasses.dataclass(frozen=True)
        class Split:
            train: TensorSamples
            validation: TensorSamples
            test: TensorSamples

        def study(strategies: tuple[str, ...]) -> tuple[list[float], int]:
            epochs: list[Any] = []
            result = compare(
                network,
                lambda seed: Split(task(seed, 5), task(10 + seed, 4), task(20, 30)),
                {"near": task(1, 20)},
                strategies=strategies,
                seeds=(0, 1),
                options=OPTIONS,
                on_epoch=lambda *epoch: epochs.append(epoch),
                checkpoint=tmp_path,
            )
            return [t.accuracy for t in result.trials["target-only"]], len(epochs)

        first, epochs = study(("target-only",))
        assert epochs == 8
        assert study(("target-only", "all-sources")) == (first, 8)


SCRIPT = """
import dataclasses, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import clarabel, torch, torch._dynamo
from test_otqms_trainer_resume import OPTIONS, same, trainer
torch.set_num_threads(1)
folder, options = Path(sys.argv[1]), dataclasses.replace(OPTIONS, epochs=8, patience=8, min_steps=80)
for wait in (0.05, 0.25, 0.5):
    child = os.fork()
    if child == 0:
        trainer(folder, options).fit("quantities-dynamic")
        os._exit(0)
    while not list(folder.rglob("*.ckpt")):
        time.sleep(0.01)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    print("killed" if os.WIFSIGNALED(os.waitpid(child, 0)[1]) else "too late")
seen = []
resumed = trainer(folder, options).fit("quantities-dynamic", seen.append)
print(same(resumed, trainer(None, options).fit("quantities-dynamic")))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    """kill -9 at three moments, then to the end: bit for bit the undisturbed result."""
    pytest.importorskip("clarabel")
    command = [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    *kills, verdict = finished.stdout.split("\n")[:4]
    assert kills[0] == "killed"
    assert verdict == "True"


class TestLog:
    def record(self, epoch: int, loss: float = 0.5) -> EpochRecord:
        return EpochRecord(epoch, {"near": 3}, 15, loss, None, None, 1.5, 2.0, 0.5, "train", {"near": 0.2})

    def test_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        log = EpochLog(path)
        for epoch in (1, 2):
            log("weights", 7, self.record(epoch))
        first, second = (json.loads(line) for line in path.read_text().splitlines())
        assert first == {"strategy": "weights", "seed": 7, **dataclasses.asdict(self.record(1))}
        assert second["epoch"] == 2

    def test_a_broken_line_and_a_repeated_epoch(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        EpochLog(path)("weights", 0, self.record(1))
        with path.open("a") as file:
            file.write('{"strategy": "wei')
        log = EpochLog(path)
        log("weights", 0, self.record(1, loss=0.25))
        log("quantities", 0, self.record(1))
        entries = read_log(path)
        assert [(e["strategy"], e["train_loss"]) for e in entries] == [("weights", 0.25), ("quantities", 0.5)]

    def test_killed_at_any_byte_of_a_line(self, tmp_path: Path) -> None:
        """What was whole stays, what was not goes, and the file is one object per line again."""
        path = tmp_path / "log.jsonl"
        log = EpochLog(path)
        for epoch in (1, 2, 3):
            log("weights", 0, self.record(epoch))
        lines = path.read_bytes().splitlines(keepends=True)
        for kept in range(len(lines[2])):
            path.write_bytes(b"".join(lines[:2]) + lines[2][:kept])
            whole = 3 if kept == len(lines[2]) - 1 else 2  # only the newline is missing
            assert len(read_log(path)) == whole
            EpochLog(path)("weights", 0, self.record(4))
            epochs = [json.loads(line)["epoch"] for line in path.read_text().splitlines()]
            assert epochs == [*range(1, whole + 1), 4]

    def test_what_is_no_log_is_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "notes"
        path.write_bytes(b"what I noted")
        EpochLog(path)("weights", 0, self.record(1))
        assert path.read_bytes().startswith(b"what I noted\n{")
        assert [entry["epoch"] for entry in read_log(path)] == [1]

    def test_a_line_is_on_the_disk_when_the_epoch_is_noted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        log = EpochLog(tmp_path / "log.jsonl")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            log("weights", 0, self.record(1))

    def test_a_device(self) -> None:
        EpochLog(os.devnull)("weights", 0, self.record(1))

    def test_tensorboard(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        log = EpochLog(None, tmp_path)
        log("weights", 0, self.record(1))
        log.close()
        assert list((tmp_path / "weights-seed-0").iterdir())

    def test_without_tensorboard(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ImportError):
            EpochLog(None, tmp_path)
