"""The notebooks run from a fresh kernel's namespace, cell after cell, and are committed without outputs."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

plt = pytest.importorskip("matplotlib.pyplot")
for package in ("clarabel", "sklearn"):
    pytest.importorskip(package)

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples" / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="the examples are in the source tree only")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Notebooks choose threads, seeds and figures for the whole process."""
    threads, backend = torch.get_num_threads(), plt.get_backend()
    plt.switch_backend("agg")
    with torch.random.fork_rng():
        yield
    plt.close("all")
    plt.switch_backend(backend)
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    programs = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert programs
    names: dict[str, object] = {"__name__": "__main__"}
    for number, program in enumerate(programs):
        plt.close("all")
        exec(compile(program, f"{path.name}, code cell {number}", "exec"), names)
        shows = bool(plt.get_fignums()) or bool(capsys.readouterr().out)
        only_defines = all(
            isinstance(s, (ast.Import, ast.ImportFrom, ast.FunctionDef)) for s in ast.parse(program).body
        )
        assert shows or only_defines, f"code cell {number} shows nothing"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_committed(path: Path) -> None:
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
