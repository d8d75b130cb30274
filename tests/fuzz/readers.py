"""What reads files, with a valid file for each to be damaged: read as something, or refused, whatever the bytes.

Run as a program it is an atheris harness, which looks for the bytes that reach new code:
``python tests/fuzz/readers.py NAME -max_total_time=60`` (with ``pip install atheris``).
"""

from __future__ import annotations

import io
import json
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch


@dataclass(frozen=True)
class Reader:
    """A kind of file.

    Attributes:
        place: where it is within a folder.
        valid: bytes that are read without complaint.
        read: reads what is in the folder.
        refuses: exceptions that are its documented refusals.
        seeds: of damages that it once failed on.
    """

    place: str
    valid: Callable[[], bytes]
    read: Callable[[Path], Any]
    refuses: tuple[type[Exception], ...] = (ValueError, TypeError)
    seeds: tuple[int, ...] = ()


def _npz(*, compressed: bool) -> bytes:
    generator, buffer = np.random.default_rng(0), io.BytesIO()
    arrays = {}
    for name in ("a", "b"):
        arrays[f"{name}_x"] = generator.integers(0, 255, (5, 4, 4), dtype=np.uint8)
        arrays[f"{name}_y"] = np.arange(5) % 2
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def _load_npz(folder: Path) -> Any:
    from transferops.data import load_bundle

    return load_bundle(folder / "bundle.npz")


def _image(kind: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _load_folder(folder: Path) -> Any:
    from transferops.data import load_folder

    return load_folder(folder / "images", image_size=4)


def _state(*, safetensors: bool) -> bytes:
    state = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.zeros(2)}
    if safetensors:
        from safetensors.torch import save

        return bytes(save(state))
    buffer = io.BytesIO()
    torch.save({"state_dict": state}, buffer)
    return buffer.getvalue()


def _load_state(folder: Path) -> Any:
    from transferops.adapt.checkpoints import load_state

    (file,) = folder.iterdir()
    return load_state(file)


def _checkpoint() -> bytes:
    from transferops import _checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        _checkpoint.save({"features": {"head input": torch.ones(3, 2)}, "epoch": 3}, path)
        return path.read_bytes()


def _load_checkpoint(folder: Path) -> Any:
    from transferops import _checkpoint

    found = _checkpoint.load(folder / "checkpoint")
    assert found is not None
    assert found["epoch"] == 3, "damaged, and read all the same"
    return found


def _cache() -> bytes:
    from transferops import _checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part"
        state = {"features": {"head input": torch.ones(3, 2)}, "outputs": torch.ones(3, 1), "labels": torch.arange(3)}
        _checkpoint.save(state, path)
        return path.read_bytes()


def _load_cache(folder: Path) -> Any:
    from transferops.rank import cache

    found = cache._read(folder / "part.features", ["head input"])
    assert found is None or torch.equal(found.labels, torch.arange(3)), "damaged, and read all the same"
    return found


def _journal() -> bytes:
    from transferops.adapt.journal import Journal

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        Journal(path, {"alphas": [0.0, 1.0]}).add({"alpha": 0.0, "seed": 0, "metric": 0.5})
        return path.read_bytes()


def _load_journal(folder: Path) -> Any:
    from transferops.adapt.journal import Journal

    found = Journal(folder / "journal", {"alphas": [0.0, 1.0]}).results
    assert found in ([], [{"alpha": 0.0, "seed": 0, "metric": 0.5}]), "damaged, and read all the same"
    return found


def _log() -> bytes:
    entries = [{"strategy": "quantities", "seed": 0, "epoch": epoch, "train_loss": 0.5} for epoch in range(3)]
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def _load_log(folder: Path) -> Any:
    from transferops.otqms import read_log

    return read_log(folder / "log.jsonl")


def _load_config(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from transferops.cli import _config, cli

        commands = list(cli.commands.values())
        return _config.read(folder / name, cli.commands["otqms"], commands)

    return read


READERS = {
    "npz": Reader("bundle.npz", lambda: _npz(compressed=False), _load_npz, seeds=(71, 460, 1452)),
    "compressed npz": Reader("bundle.npz", lambda: _npz(compressed=True), _load_npz, seeds=(739, 1765)),
    "png": Reader("images/a/cat/1.png", lambda: _image("png"), _load_folder),
    "jpeg": Reader("images/a/cat/1.jpeg", lambda: _image("jpeg"), _load_folder),
    "gif": Reader("images/a/cat/1.gif", lambda: _image("gif"), _load_folder),
    "state dict": Reader("state.pt", lambda: _state(safetensors=False), _load_state),
    "safetensors": Reader("state.safetensors", lambda: _state(safetensors=True), _load_state),
    "checkpoint": Reader("checkpoint", _checkpoint, _load_checkpoint),
    "feature cache": Reader("part.features", _cache, _load_cache),
    "journal": Reader("journal", _journal, _load_journal),
    "epoch log": Reader("log.jsonl", _log, _load_log),
    "toml": Reader(
        "c.toml",
        lambda: b'target = "usps"\n[otqms]\nshots = 5\nepochs = 3\n',
        _load_config("c.toml"),
        (ValueError, TypeError, click.ClickException),
    ),
    "yaml": Reader(
        "c.yaml",
        lambda: b"target: usps\notqms:\n  shots: 5\n  epochs: 3\n",
        _load_config("c.yaml"),
        (ValueError, TypeError, click.ClickException),
    ),
}


def try_bytes(reader: Reader, content: bytes) -> bool:
    """Whether they were read; raises what is neither an answer nor a documented refusal."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
        place = Path(folder) / reader.place
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        try:
            reader.read(Path(folder))
        except reader.refuses as error:
            if "expected" not in str(error):
                raise AssertionError(f"not in the house's form: {error!r}") from error
            return False
        return True


def damaged(content: bytes, seed: int) -> bytes:
    """A file cut short, with bits flipped, bytes overwritten, a stretch removed or repeated, or text inserted."""
    chance = random.Random(seed)
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5])):
        at = chance.randrange(len(data) + 1)
        length = chance.choice([1, 2, 8, 64])
        kind = chance.randrange(7)
        if kind == 0:
            del data[at:]
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            data[at : at + length] = chance.randbytes(length)
        elif kind == 3:
            data[at : at + length] = chance.choice([b"\0", b"\xff"]) * length
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at:at] = data[max(at - length, 0) : at] * chance.choice([1, 100])
        else:
            data[at:at] = chance.choice(
                [b"-1", b"1e999", b"NaN", b"\n", b'"', b"[" * 5000, b"9" * 50, b"../", b"\xed\xa0"]
            )
        if not data:
            break
    return bytes(data)


def main() -> None:
    import atheris

    reader = READERS[sys.argv.pop(1)]
    with atheris.instrument_imports(include=["transferops", "numpy.lib", "safetensors", "zipfile", "tomllib", "yaml"]):
        try_bytes(reader, reader.valid())
    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "valid").write_bytes(reader.valid())
        atheris.Setup([sys.argv[0], corpus, *sys.argv[1:]], lambda content: try_bytes(reader, content))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
