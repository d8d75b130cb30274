"""The integrations stay out of the way until asked, name what they miss, and their examples run."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    packages = {"backpack", "curvlinops", "datasets", "laplace", "lightning", "sklearn", "transformers"}
    check = f"import sys, transferops, transferops.integrations; print({packages} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


@pytest.mark.parametrize(
    ("module", "package", "command"),
    [
        ("sklearn", "sklearn.base", "pip install 'scikit-learn>=1.6'"),
        ("lightning", "lightning.pytorch", "pip install lightning"),
        ("transformers", "transformers", "pip install transformers accelerate"),
        ("laplace", "laplace.curvature", "pip install laplace-torch"),
        ("curvlinops", "curvlinops._torch_base", "pip install curvlinops-for-pytorch"),
        ("backpack", "backpack", "pip install backpack-for-pytorch"),
        ("scipy", "scipy.sparse.linalg", "pip install scipy"),
    ],
)
def test_a_missing_package_is_named(module: str, package: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"transferops.integrations.{module}"
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=f"{re.escape(name)} needs .*{re.escape(command)}$"):
        importlib.import_module(name)


def run(path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the example prints."""
    script = EXAMPLES / path
    if not script.exists():
        pytest.skip("the examples are in the source tree only")
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with torch.random.fork_rng():
        runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out


def test_scikit_learn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", minversion="1.6")
    output = run("scikit_learn/few_shot_head.py", capsys, monkeypatch)
    old, few, near = (float(number) for number in re.findall(r"(\d\.\d{3})  penalty", output))
    assert near >= max(old, few)


def test_lightning(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning.pytorch", exc_type=ImportError)
    pytest.importorskip("sklearn")
    output = run("lightning/otqms_sampling.py", capsys, monkeypatch, "--epochs", "5", "--dimension", "300")
    near = [float(number) for number in re.findall(r"otqms/rotated-15 (\S+),", output)]
    far = [float(number) for number in re.findall(r"otqms/rotated-90 (\S+),", output)]
    assert len(near) == len(far) == 5
    assert near[-1] > far[-1]
    assert len(re.findall(r"transfer/h_score \d\.\d+\n", output)) == 5
    assert float(re.findall(r"test samples: (\S+)", output)[0]) > 0.3  # chance is 0.1


def test_hugging_face(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "datasets", "accelerate", "sklearn", "PIL"):
        pytest.importorskip(package, exc_type=ImportError)
    output = run("huggingface/trainer_scores.py", capsys, monkeypatch)
    scores = [float(score) for score in re.findall(r"H-score (\S+),", output)]
    assert len(scores) == 10
    assert scores[-1] > scores[0]
