"""Malformed calls that read files, rank candidates or are commands, each with its exact message.

The files are made where the tests run, in a folder of their own.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import commands
import numpy as np
import torch
from bad_input_table import Case
from test_bad_input import NAN, X, Y
from torch import nn

from transferops.adapt.checkpoints import load_state
from transferops.compat import tllib, transformer_ranker
from transferops.compat.logme import LogME
from transferops.data import Domain, DomainBundle, few_shot_split, load_bundle, load_folder, load_npz
from transferops.rank import (
    HEAD_INPUT,
    Extraction,
    evaluate_ranking,
    extract,
    load_candidate,
    rank_candidates,
)

NET = nn.Linear(3, 2)
EXTRACTION = Extraction({HEAD_INPUT: X}, X[:, :2], Y)
OTHER = Extraction({HEAD_INPUT: X[:2]}, X[:2, :2], Y[:2])
F, L = X.double().numpy() / 7, Y.numpy()
DOMAIN = Domain("a", X, Y)
BUNDLE = DomainBundle({"a": DOMAIN, "b": Domain("b", X, Y)})


class Printing:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return print, ("executed",)


def written(name: str, content: bytes) -> str:
    """A file, in folders that are made."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)
    return name


def archive(name: str, **arrays: Any) -> str:
    """An .npz file."""
    np.savez(name, **arrays)
    return name


def truncated(name: str, **arrays: Any) -> str:
    """Half of an .npz file."""
    content = Path(archive(name, **arrays)).read_bytes()
    return written(name, content[: len(content) // 2])


def array(name: str) -> str:
    """A file with one array, as np.save writes it."""
    with open(name, "wb") as file:
        np.save(file, F)
    return name


def boasting(name: str) -> str:
    """An .npz file whose one member has a header of 10^15 numbers, and none of them."""
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,)}".ljust(117) + "\n"
    with zipfile.ZipFile(name, "w") as file:
        file.writestr("a_x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    return name


def folder(name: str) -> str:
    """The first of nested folders that are made."""
    Path(name).mkdir(parents=True, exist_ok=True)
    return name.split("/")[0]


def pickled(name: str) -> str:
    """A checkpoint that would print something when it is unpickled."""
    return written(name, pickle.dumps({"weight": Printing()}, protocol=2))


def saved(name: str, content: Any) -> str:
    """What torch.save writes."""
    torch.save(content, name)
    return name


class CommandError(Exception):
    """What a command printed as its error."""


def command(line: str) -> None:
    """Run ``transferops LINE``."""
    result = commands.run(*line.split())
    assert result.exit_code == 2, result.output
    raise CommandError(result.stderr.strip().splitlines()[-1])


RANKING: dict[str, Case] = {
    "no candidates": (
        lambda: rank_candidates({}),
        ValueError,
        "extractions: expected at least one candidate, got none",
    ),
    "an unknown score": (
        lambda: rank_candidates({"a": EXTRACTION}, scores=["best"]),
        ValueError,
        "scores: expected names among h_score_regularized, h_score, log_me, trans_rate, knn, gbc, sfda, etran, parc, "
        "n_leep, leep, nce, energy, got 'best'",
    ),
    "no scores": (
        lambda: rank_candidates({"a": EXTRACTION}, scores=[]),
        ValueError,
        "scores: expected at least one name, got none",
    ),
    "candidates on different samples": (
        lambda: rank_candidates({"a": EXTRACTION, "b": OTHER}),
        ValueError,
        "extractions: expected the same target samples for every candidate, got others for 'b'",
    ),
    "no batches to extract from": (
        lambda: extract(NET, []),
        ValueError,
        "batches: expected at least one batch, got none",
    ),
    "a batch without labels": (lambda: extract(NET, [X]), ValueError, "batches[0]: expected labels, got none"),
    "labels of a batch that are floats": (
        lambda: extract(NET, [(X, Y.float())]),
        TypeError,
        "batches[0] labels: expected integers, got a float32 tensor of shape [4] on cpu",
    ),
    "labels of a batch too few": (
        lambda: extract(NET, [(X, Y[:3])]),
        ValueError,
        "batches[0] labels: expected shape [4], got shape [3]",
    ),
    "an unknown layer": (
        lambda: extract(NET, [(X, Y)], layers=["fc"]),
        ValueError,
        "layers: expected 'head input' or modules of the model (, ...), got 'fc'",
    ),
    "a layer twice": (
        lambda: extract(NET, [(X, Y)], layers=["", ""]),
        ValueError,
        "layers: expected at least one layer, each once, got ['', '']",
    ),
    "one candidate to evaluate": (
        lambda: evaluate_ranking([1.0], [0.5]),
        ValueError,
        "scores: expected at least 2 candidates, got shape [1, 1]",
    ),
    "accuracies of another shape": (
        lambda: evaluate_ranking([1.0, 2.0], [0.5]),
        ValueError,
        "accuracies: expected shape [2] like scores, got shape [1]",
    ),
    "NaN in scores": (
        lambda: evaluate_ranking([1.0, math.nan], [0.5, 0.6]),
        ValueError,
        "scores: expected finite numbers, got nan at index [1]",
    ),
    "k above the number of candidates": (
        lambda: evaluate_ranking([1.0, 2.0], [0.5, 0.6], k=3),
        ValueError,
        "k: expected at most 2, the number of candidates, got 3",
    ),
    "confidence 0": (
        lambda: evaluate_ranking([1.0, 2.0], [0.5, 0.6], confidence=0),
        ValueError,
        "confidence: expected a number between 0 and 1, got 0",
    ),
    "a candidate without a colon": (
        lambda: load_candidate("resnet18"),
        ValueError,
        "model: expected module:function, timm:NAME or hf:NAME, got 'resnet18'",
    ),
    "a candidate in a missing module": (
        lambda: load_candidate("no_such_module:make"),
        ValueError,
        "model: expected a module that can be imported before ':' in 'no_such_module:make', got no module named "
        "'no_such_module'",
    ),
    "a candidate that is no function": (
        lambda: load_candidate("math:no_such_function"),
        ValueError,
        "model: expected a function 'no_such_function' in math, got none",
    ),
    "a candidate that is no module": (
        lambda: load_candidate("math:gcd"),
        TypeError,
        "model: expected a torch.nn.Module from math:gcd, got 0",
    ),
    "a path as a module": (
        lambda: load_candidate("../evil:make"),
        ValueError,
        "model: expected a module's name, such as package.module, before ':', got '../evil:make'",
    ),
}

COMPATIBILITY: dict[str, Case] = {
    "tllib: NaN": (
        lambda: tllib.h_score(NAN, Y),
        ValueError,
        "features: expected finite values, got nan at position [2, 1]",
    ),
    "tllib: too few labels": (
        lambda: tllib.leep(torch.full((4, 2), 0.5), Y[:3]),
        ValueError,
        "labels: expected one label for each of the 4 rows of source_probabilities, got 3",
    ),
    "tllib: rows that do not sum to 1": (
        lambda: tllib.leep(torch.ones(4, 2), Y),
        ValueError,
        "source_probabilities: expected rows that sum to 1, got a sum of 2 in row 0",
    ),
    "LogME: predict before fit": (
        lambda: LogME().predict(X),
        RuntimeError,
        "LogME: expected fit before its weights are used, got no fit",
    ),
    "LogME: floating labels": (
        lambda: LogME().fit(X, Y.float()),
        TypeError,
        "labels: expected integers, or regression=True, got a float32 tensor of shape [4] on cpu",
    ),
    "transformer_ranker: regression": (
        lambda: transformer_ranker.HScore(regression=True),
        ValueError,
        "regression: expected False for HScore, got True",
    ),
}

FILES: dict[str, Case] = {
    "no file": (
        lambda: load_npz("missing.npz"),
        FileNotFoundError,
        "data: expected an .npz file, got no file at missing.npz",
    ),
    "no bundle": (
        lambda: load_bundle("missing"),
        FileNotFoundError,
        "data: expected an .npz file or an image folder, got nothing at missing",
    ),
    "not an archive": (
        lambda: load_npz(written("text.npz", b"hello")),
        ValueError,
        "text.npz: file: expected a complete .npz archive, got something unreadable as one",
    ),
    "an empty file": (
        lambda: load_npz(written("empty.npz", b"")),
        ValueError,
        "empty.npz: file: expected a complete .npz archive, got something unreadable as one",
    ),
    "a truncated archive": (
        lambda: load_npz(truncated("cut.npz", a_x=F, a_y=L)),
        ValueError,
        "cut.npz: file: expected a complete .npz archive, got something unreadable as one",
    ),
    "a single array": (
        lambda: load_npz(array("one.npz")),
        ValueError,
        "one.npz: file: expected an .npz archive of several arrays, got a single .npy array",
    ),
    "an archive without arrays": (
        lambda: load_npz(archive("none.npz")),
        ValueError,
        "none.npz: keys: expected <domain>_x and <domain>_y, got no arrays",
    ),
    "pickled objects": (
        lambda: load_npz(archive("pickle.npz", a_x=np.array([{}], dtype=object), a_y=L)),
        ValueError,
        "pickle.npz: a_x: expected a readable array without pickled objects, got one with: Object arrays cannot be "
        "loaded when allow_pickle=False",
    ),
    "inputs without labels": (
        lambda: load_npz(archive("half.npz", a_x=F)),
        ValueError,
        "half.npz: keys: expected a_y beside a_x, got no such array",
    ),
    "an array of another name": (
        lambda: load_npz(archive("names.npz", train=F)),
        ValueError,
        "names.npz: keys: expected <domain>_x and <domain>_y, got 'train'",
    ),
    "labels for other rows": (
        lambda: load_npz(archive("short.npz", a_x=F, a_y=L[:3])),
        ValueError,
        "short.npz: a_y: expected shape [4], one label per row of a_x, got shape [3]",
    ),
    "floating labels": (
        lambda: load_npz(archive("floats.npz", a_x=F, a_y=L.astype(float))),
        TypeError,
        "floats.npz: a_y: expected integer labels, got dtype float64",
    ),
    "negative labels": (
        lambda: load_npz(archive("negative.npz", a_x=F, a_y=L - 1)),
        ValueError,
        "negative.npz: a.labels: expected classes counted from 0, got -1 at position 0",
    ),
    "no samples": (
        lambda: load_npz(archive("zero.npz", a_x=F[:0], a_y=L[:0])),
        ValueError,
        "zero.npz: a_x: expected at least one sample, got shape [0, 3]",
    ),
    "NaN in features": (
        lambda: load_npz(archive("nan.npz", a_x=F * np.nan, a_y=L)),
        ValueError,
        "nan.npz: a.inputs: expected finite numbers, got NaN or infinity in sample 0",
    ),
    "features of words": (
        lambda: load_npz(archive("words.npz", a_x=np.array([["a"]] * 4), a_y=L)),
        TypeError,
        "words.npz: a_x: expected real numbers, got dtype <U1",
    ),
    "images of two channels": (
        lambda: load_npz(archive("two.npz", a_x=np.zeros((4, 8, 8, 2), np.uint8), a_y=L)),
        ValueError,
        "two.npz: a_x: expected images [N, H, W, C] with C 1 or 3, got shape [4, 8, 8, 2]",
    ),
    "floating images": (
        lambda: load_npz(archive("images.npz", a_x=np.zeros((4, 8, 8)), a_y=L)),
        ValueError,
        "images.npz: a_x: expected uint8 images [N, H, W, C] or features [N, D], got float64 of shape [4, 8, 8]",
    ),
    "domains of different shapes": (
        lambda: load_npz(archive("mixed.npz", a_x=F, a_y=L, b_x=F[:, :2], b_y=L)),
        ValueError,
        "mixed.npz: b.inputs: expected samples of shape [3] as in a, got [2]",
    ),
    "image_size for arrays": (
        lambda: load_bundle(archive("size.npz", a_x=F, a_y=L), image_size=8),
        ValueError,
        "image_size: expected None for an .npz file (its images have one size), got 8",
    ),
    "a header of 10^15 numbers": (
        lambda: load_npz(boasting("huge.npz")),
        ValueError,
        "huge.npz: a_x: expected a readable array without pickled objects, got one with: a header of "
        "8000000000000000 bytes and 0 of them",
    ),
    "a name that climbs out of its folder": (
        lambda: load_npz(archive("climb.npz", **{"../a_x": F, "../a_y": L})),
        ValueError,
        "climb.npz: keys: expected names of domains without separators of paths or control characters, got '../a_x'",
    ),
    "an empty folder": (
        lambda: load_folder(folder("bare")),
        ValueError,
        "data: expected domain folders in bare (domain/class/image), got none",
    ),
    "a domain without classes": (
        lambda: load_folder(folder("tree/domain")),
        ValueError,
        "data: expected class folders in tree/domain (domain/class/image), got none",
    ),
    "an image that does not decode": (
        lambda: load_folder(written("broken/domain/class/1.png", b"no image").split("/")[0]),
        ValueError,
        "data: expected an image, got broken/domain/class/1.png, which cannot be decoded",
    ),
    "an image that does not decode, the only one of its domain": (
        lambda: load_folder(written("broken/domain/class/1.png", b"no image").split("/")[0], skip_undecodable=True),
        ValueError,
        "data: expected an image in broken/domain that can be decoded, got none among 1",
    ),
    "undecodable images of arrays": (
        lambda: load_bundle(archive("whole.npz", a_x=F, a_y=L), skip_undecodable=True),
        ValueError,
        "skip_undecodable: expected False for an .npz file (it has no images to decode), got True",
    ),
    "image_size 0": (
        lambda: load_folder(folder("sized"), image_size=0),
        ValueError,
        "image_size: expected an integer of at least 1, got 0",
    ),
    "an unknown target": (lambda: BUNDLE.choose("c"), ValueError, "target: expected one of a, b, got 'c'"),
    "shots above the samples": (
        lambda: few_shot_split(DOMAIN, 9),
        ValueError,
        "shots: expected at most 1 for a (class 0 has 2 samples, one stays for the test), got 9",
    ),
    "shots 0": (lambda: few_shot_split(DOMAIN, 0), ValueError, "shots: expected an integer of at least 1, got 0"),
    "validation_fraction 1": (
        lambda: few_shot_split(DOMAIN, 1, validation_fraction=1.0),
        ValueError,
        "validation_fraction: expected a number in [0, 1), got 1.0",
    ),
    "a checkpoint that is none": (
        lambda: load_state(written("text.pt", b"hello")),
        ValueError,
        "checkpoint: expected a file that torch.load(weights_only=True) takes, got text.pt (...",
    ),
    "a missing checkpoint": (
        lambda: load_state("missing.pt"),
        FileNotFoundError,
        "checkpoint: expected a file, got nothing at missing.pt",
    ),
    "a checkpoint that runs code": (
        lambda: load_state(pickled("evil.pt")),
        ValueError,
        "checkpoint: expected a file that torch.load(weights_only=True) takes, got evil.pt (UnpicklingError: "
        "Weights only load failed. ...",
    ),
    "a checkpoint of numbers": (
        lambda: load_state(saved("numbers.pt", [1, 2])),
        ValueError,
        "checkpoint: expected a state dict, got list in numbers.pt",
    ),
    "a checkpoint without tensors": (
        lambda: load_state(saved("none.pt", {"epoch": 3})),
        ValueError,
        "checkpoint: expected tensors by name, got none in none.pt",
    ),
    "safetensors that are none": (
        lambda: load_state(written("text.safetensors", b"hello")),
        ValueError,
        "checkpoint: expected a safetensors file, got text.safetensors (...",
    ),
    "a safetensors header longer than the file": (
        lambda: load_state(written("long.safetensors", (2**40).to_bytes(8, "little"))),
        ValueError,
        "checkpoint: expected a safetensors file, got long.safetensors (...",
    ),
}

COMMANDS: dict[str, Case] = {
    "no such data": (
        lambda: command("otqms --data missing.npz"),
        CommandError,
        "error: data: expected an .npz file or an image folder, got nothing at missing.npz",
    ),
    "an unknown strategy of a command": (
        lambda: command("otqms --strategy best"),
        CommandError,
        "error: strategy: expected names among ...",
    ),
    "no seeds": (
        lambda: command("otqms --seeds 0"),
        CommandError,
        "error: seeds: expected an integer of at least 1, got 0",
    ),
    "an unknown target of a command": (
        lambda: command("otqms --target sketch"),
        CommandError,
        "error: target: expected one of rotated-30, rotated-15, plain, blurred, inverted, mirrored, rotated-90, got "
        "'sketch'",
    ),
    "shots above the samples of a command": (
        lambda: command("otqms --shots 99999"),
        CommandError,
        "error: shots: expected at most 38 for rotated-30 (class 0 has 39 samples, one stays for the test), got 99999",
    ),
    "a document in a missing folder": (
        lambda: command("otqms --json missing/run.json"),
        CommandError,
        "error: json: expected a file in an existing folder, got missing/run.json",
    ),
    "a missing configuration": (
        lambda: command("otqms --config missing.toml"),
        CommandError,
        "error: config: expected a file that can be read, got missing.toml: No such file or directory",
    ),
    "an unknown key of a configuration": (
        lambda: command("otqms --config " + written("key.toml", b"[otqms]\nepoch = 3")),
        CommandError,
        "error: key.toml:2: otqms.epoch: expected an option of otqms, got 'epoch' (did you mean 'epochs'?)",
    ),
    "code in a configuration": (
        lambda: command("otqms --config " + written("code.toml", b"[otqms]\nepochs = __import__('os')")),
        CommandError,
        "error: code.toml: expected TOML, got an error: ...",
    ),
    "a model without a colon": (
        lambda: command("rank --model resnet18"),
        CommandError,
        "error: model: expected module:function, timm:NAME or hf:NAME, got 'resnet18'",
    ),
    "no model to inherit": (
        lambda: command("inherit"),
        CommandError,
        "error: arguments: expected MODEL and --from, or --check, got neither",
    ),
    "shots 0 of a command": (
        lambda: command("adapt --shots 0"),
        CommandError,
        "error: shots: expected an integer of at least 1, got 0",
    ),
}
