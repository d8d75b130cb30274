"""Files from strangers run nothing, take no memory that they do not fill, and lead nowhere else."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from bad_input_files import boasting, pickled

import transferops
from transferops import _checkpoint as checkpoint
from transferops.adapt.checkpoints import load_state
from transferops.data import load_folder, load_npz
from transferops.rank import load_candidate

SOURCES = sorted(Path(transferops.__file__).parent.rglob("*.py"))


def calls() -> list[tuple[Path, str, ast.Call]]:
    """Every call of the package, with the dotted name of what is called."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
                found.append((path, ast.unparse(node.func), node))
    return found


def keyword(call: ast.Call, name: str) -> object:
    """The constant that is passed under a name; ``None`` if there is none."""
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def test_no_source_unpickles_evaluates_or_uses_a_shell() -> None:
    forbidden = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load"}
    for path, name, call in calls():
        assert name not in forbidden, f"{path}:{call.lineno}: {name}"
        assert keyword(call, "shell") is None, f"{path}:{call.lineno}"
        if name == "torch.load":
            assert keyword(call, "weights_only") is True, f"{path}:{call.lineno}"
        if name == "np.load":
            assert keyword(call, "allow_pickle") is False, f"{path}:{call.lineno}"


def test_programs_are_started_by_the_doctor_only() -> None:
    starters = {path.name for path, name, _ in calls() if name.startswith("subprocess.")}
    assert starters <= {"doctor.py"}


def test_a_pickle_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Weights only load failed"):
        load_state(pickled("evil.pt"))
    content = Path("evil.pt").read_bytes()
    Path("evil.ckpt").write_bytes(b"transferops checkpoint 1 " + b"0" * 64 + b"\n" + content)
    with pytest.raises(ValueError, match="another checksum"):
        checkpoint.load(Path("evil.ckpt"))
    assert capsys.readouterr().out == ""


def test_a_header_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="a header of 8000000000000000 bytes and 0 of them"):
        load_npz(boasting("huge.npz"))


def test_an_image_that_would_take_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "domain" / "class"
    folder.mkdir(parents=True)
    image.new("1", (400, 400)).save(folder / "bomb.png")
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 70_000)  # Pillow refuses from twice that on
    with pytest.raises(ValueError, match=r"data: expected an image, got .*bomb\.png, which cannot be decoded"):
        load_folder(tmp_path)


def test_only_the_named_module_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "named.py").write_text("import torch\nmake = lambda: torch.nn.Linear(2, 2)\n")
    (tmp_path / "unnamed.py").write_text("raise RuntimeError('imported')\n")
    assert isinstance(load_candidate("named:make").model, torch.nn.Linear)
    assert "unnamed" not in sys.modules
    for name in ("../named:make", "/named:make", "named.py/:make", ".named:make"):
        with pytest.raises(ValueError, match="model: expected a module's name"):
            load_candidate(name)
