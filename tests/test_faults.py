"""A full disk, a folder that cannot be written, damaged files, a clock that runs back, and a process that dies."""

from __future__ import annotations

import errno
import hashlib
import io
import locale
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from transferops import _checkpoint as checkpoint
from transferops._atomic import replacing
from transferops.adapt import HeadSolver
from transferops.adapt.journal import Journal
from transferops.otqms import write_json
from transferops.rank import extract_cached

STATE = {"weight": torch.arange(6.0), "epoch": 3}
WRITERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": lambda path: checkpoint.save(STATE, path),
    "document": lambda path: write_json({"risk": 0.5}, path),
    "solver": lambda path: HeadSolver(classes=2).update(torch.eye(3), torch.tensor([0, 1, 1])).save(path),
}


def inputs(samples: int) -> torch.Tensor:
    return torch.randn(samples, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("function", ["fsync", "replace", "fdopen"])
def test_a_full_disk_leaves_what_was_there(
    writer: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def full(*arguments: Any, **_: Any) -> None:
        if function == "fdopen":
            os.close(arguments[0])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[writer](path)
    monkeypatch.undo()
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_file_that_may_not_grow_is_not_half_written(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys, torch; from pathlib import Path; from transferops import _checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: _checkpoint.save({'w': torch.ones(10**5)}, Path(sys.argv[1]) / 'state.ckpt')\n"
        "except OSError as error: print(error.strerror)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == os.strerror(errno.EFBIG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_cannot_be_written(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()

    def refuse(*_: object, **__: object) -> None:  # to be root, as in containers, a mode of the folder is no obstacle
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("transferops._atomic.tempfile.mkstemp", refuse)
    with pytest.raises(PermissionError):
        WRITERS[writer](tmp_path / "folder" / "file")
    assert list((tmp_path / "folder").iterdir()) == []


def test_every_file_has_the_mode_that_open_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    with replacing(tmp_path / "file") as file:
        file.write(b"content")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_a_killed_writer_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (".file.a.part", ".file.b.part", ".files.c.part"))
    for path in (old, new, other):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    os.utime(new)
    with replacing(tmp_path / "file") as file:
        file.write(b"content")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".file.b.part", ".files.c.part", "file"]


def test_what_another_process_removed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".file.a.part"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    unlink = os.unlink

    def twice(path: Any) -> None:
        unlink(path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", twice)
    with replacing(tmp_path / "file") as file:
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_folders_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows; then names reach the disk when the system sees fit."""

    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    with replacing(tmp_path / "file") as file:
        file.write(b"content")
        monkeypatch.setattr(os, "open", refuse)
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"before")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replacing(tmp_path / "link") as file:
        file.write(b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"after"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with replacing(tmp_path / "pipe") as file:
        file.write(b"content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_of_two_writers_the_last_wins(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as first:
        first.write(b"first")
        with replacing(tmp_path / "file") as second:
            second.write(b"second")
        assert (tmp_path / "file").read_bytes() == b"second"
    assert (tmp_path / "file").read_bytes() == b"first"
    assert len(list(tmp_path.iterdir())) == 1


def test_every_damaged_byte_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state.ckpt"
    checkpoint.save(STATE, path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for position in generator.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="checkpoint: expected"):
            checkpoint.load(path)
    for kept in (0, 1, 24, 90, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="checkpoint: expected"):
            checkpoint.load(path)


def test_whoever_writes_a_checksum_gets_no_further(tmp_path: Path) -> None:
    """It is against accidents, and what is behind it is checked all the same."""
    path = tmp_path / "state.ckpt"
    checkpoint.save(STATE, path)
    content = path.read_bytes().partition(b"\n")[2]
    plain = io.BytesIO()
    torch.save(torch.ones(2), plain)
    for forged in (b"", content[:-30], content[:200] + b"?" + content[201:], pickle.dumps(print), plain.getvalue()):
        path.write_bytes(b"transferops checkpoint 1 " + hashlib.sha256(forged).hexdigest().encode() + b"\n" + forged)
        with pytest.raises(ValueError, match="checkpoint: expected"):
            checkpoint.load(path)


def test_a_damaged_solver_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "solver"
    WRITERS["solver"](path)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"checkpoint: expected .*solver as it was written"):
        HeadSolver.load(path)
    with pytest.raises(FileNotFoundError, match="path: expected a file that save wrote"):
        HeadSolver.load(tmp_path / "missing")


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: content[:-1] + b"?", lambda _: b""])
def test_damaged_features_are_extracted_anew(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    model, labels = nn.Linear(3, 2), torch.tensor([0, 1, 0])
    before = extract_cached(model, inputs(3), labels, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    after = extract_cached(model, inputs(3), labels, tmp_path)
    assert torch.equal(before.outputs, after.outputs)
    assert checkpoint.load(path) is not None


def test_a_damaged_journal_is_refused_and_a_torn_line_dropped(tmp_path: Path) -> None:
    path = tmp_path / "check.jsonl"
    journal = Journal(path, {"seeds": [0, 1]})
    for seed in (0, 1):
        journal.add({"seed": seed, "metric": 0.5})
    whole = path.read_bytes()
    for kept in range(1, len(whole)):
        path.write_bytes(whole[:kept])
        found = Journal(path, {"seeds": [0, 1]}).results
        assert found == journal.results[: max(0, whole[:kept].count(b"\n") - 1)]
    path.write_bytes(whole.replace(b'{"seed": 0', b'["seed": 0'))
    with pytest.raises(ValueError, match="journal: expected a file written by this check"):
        Journal(path, {"seeds": [0, 1]})


def test_a_damaged_number_in_a_journal_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "check.jsonl"
    Journal(path, {"seeds": [0]}).add({"seed": 0, "metric": 0.5})
    path.write_bytes(path.read_bytes().replace(b'"metric": 0.5', b'"metric": 0.7'))
    with pytest.raises(ValueError, match=r"journal: expected .* as it was written"):
        Journal(path, {"seeds": [0]})


def test_a_clock_that_runs_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: 3600.0 * next(hours))
    for epoch in (1, 2):
        checkpoint.save({"epoch": epoch}, tmp_path / "state.ckpt")
    assert checkpoint.load(tmp_path / "state.ckpt") == {"epoch": 2}


@pytest.mark.parametrize("name", ["de_DE.UTF-8", "C"])
def test_numbers_in_files_do_not_depend_on_the_locale(name: str, tmp_path: Path) -> None:
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, name)
    except locale.Error:
        pytest.skip(f"this machine has no locale {name}")
    try:
        write_json({"risk": 0.5}, tmp_path / "run.json")
        Journal(tmp_path / "check.jsonl", {"source": "Größe"}).add({"metric": 1234.5})
        assert (tmp_path / "run.json").read_text(encoding="utf-8") == '{\n "risk": 0.5\n}\n'
        assert Journal(tmp_path / "check.jsonl", {"source": "Größe"}).results == [{"metric": 1234.5}]
    finally:
        locale.setlocale(locale.LC_ALL, before)


WORKER = """
import os, signal, sys
import torch
from torch import nn
from transferops.otqms import OTQMS, TrainingOptions
from transferops.otqms.distributed import launched
from transferops.otqms.pool import TensorSamples
torch.set_num_threads(1)
part = TensorSamples(torch.eye(4).repeat(6, 1), torch.arange(24) % 2)
with launched(torch.device("cpu")) as world:
    def watch(record):
        if world.rank == 1 and record.epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    options = TrainingOptions(epochs=10**6, min_steps=1, source_steps=1)
    OTQMS(lambda: nn.Linear(4, 2), part, {"a": part}, options=options).fit("all-sources", watch)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL and Gloo")
def test_a_worker_that_dies_ends_all_of_them(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode != 0
    assert "Signal 9 (SIGKILL)" in finished.stderr
