"""Damaged files are refused in the documented way, or read where the damage does not matter; nothing else happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from readers import READERS, damaged, try_bytes

from transferops.otqms import read_log

pytest.importorskip("PIL")
pytest.importorskip("safetensors")


@pytest.mark.parametrize("name", READERS)
def test_damaged_file(name: str) -> None:
    reader = READERS[name]
    valid = reader.valid()
    assert try_bytes(reader, valid)
    for seed in (*range(40), *reader.seeds):
        content = damaged(valid, seed)
        try:
            try_bytes(reader, content)
        except Exception as error:
            raise AssertionError(f"damaged({name}, {seed})") from error


def test_lines_of_a_log_that_are_no_epochs_are_left_out(tmp_path: Path) -> None:
    epoch = '{"strategy": "quantities", "seed": 0, "epoch": 1}'
    lines = [
        "3",
        "[]",
        "null",
        '{"seed": 0}',
        epoch,
        epoch[:20],
        "[" * 100_000,
        '{"strategy": [], "seed": 0, "epoch": 1}',
    ]
    (tmp_path / "log").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    assert read_log(tmp_path / "log") == [{"strategy": "quantities", "seed": 0, "epoch": 1}]
