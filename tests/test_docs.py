"""The documentation does what it says: Python blocks run and print what they show.

A page's Python blocks run in order, in one namespace. A ``text`` block right after one is its output; numbers in it are
compared to 1 %, being those of one machine.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks

from transferops.otqms import STRATEGIES
from transferops.scores import SCORES

_NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


def same(shown: str, printed: str) -> bool:
    skeleton = [_NUMBER.sub("#", text).split() for text in (shown, printed)]
    numbers = [[float(x) for x in _NUMBER.findall(text)] for text in (shown, printed)]
    return skeleton[0] == skeleton[1] and numbers[1] == pytest.approx(numbers[0], rel=0.01, abs=0.002)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.language == "python" for block in blocks(page))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page):
        if block.language != "python":
            continue
        code = "\n" * (block.line - 1) + block.text  # so that a traceback has the page's own lines
        exec(compile(code, str(page), "exec"), names)
        printed = capsys.readouterr().out
        assert printed, f"line {block.line}: a block prints something to look at"
        assert block.shown is None or same(block.shown, printed), f"line {block.line} prints\n{printed}"


@pytest.mark.parametrize("printed", ["b 1.00", "a 1.02", "a 1.00 2", "a"])
def test_other_outputs_are_told_apart(printed: str) -> None:
    assert same("a 1.00", "a  1.005")
    assert not same("a 1.00", printed)


def test_pages_have_what_is_tested() -> None:
    assert {page.stem for page in PAGES} >= {"README", "index", "rank", "otqms", "adapt", "inherit", "fisher"}


def test_guides_name_what_there_is() -> None:
    def named(guide: str, heading: str) -> set[str]:
        """Backticked names in the first column of the table under a heading."""
        table = (ROOT / "docs" / "guides" / guide).read_text().split(heading)[1].split("\n\n|")[1].split("\n\n")[0]
        cells = re.findall(r"^\| ([^|]*) \|", table, re.M)
        return {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}

    assert named("rank.md", "## The scores") >= {*SCORES, "h_score_regularized"}
    assert "recommended" in named("otqms.md", "## The trainer") <= set(STRATEGIES)


def test_the_architecture_shows_every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed picture has the script's labels, and these are the packages that there are."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from draw_architecture import PICTURE, ROWS

    labels = [text for layer, _, parts in ROWS for text in (layer, *dict(parts))]
    shown = re.findall(r">([^<>\n]+)</text>", PICTURE.read_text(encoding="utf-8"))
    assert [text for text in shown if text in labels] == labels
    packages = {path.parent.name for path in (ROOT / "transferops").glob("*/__init__.py")}
    assert packages <= set(labels)
    assert all(
        (ROOT / "csrc" / part).is_dir() for part in ("torch", "python", "include", "kernels/cpu", "kernels/cuda")
    )


def test_every_benchmark_result_is_on_the_performance_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "docs_performance", raising=False)
    import docs_performance

    page = docs_performance.sections()
    results = [path for path in docs_performance.RESULTS.glob("*.json") if '"benchmarks"' in path.read_text()]
    assert page.count("\n| benchmark |") == len(results) >= 3
    assert page.count("\n| h_score[plain] | N=10000, D=1024, C=100 |") >= 1
