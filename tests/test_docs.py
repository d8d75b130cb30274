"""The documentation does what it says: Python blocks run and print what they show, command lines parse.

A page's Python blocks run in order, in one namespace. A ``text`` block right after one is its output; numbers in it are
compared to 1 %, being those of one machine.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from click import ClickException

from transferops.cli import cli
from transferops.otqms import STRATEGIES
from transferops.scores import SCORES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


class Block(NamedTuple):
    """A fenced block: its language, its text, and the text right after it that it prints."""

    language: str
    text: str
    line: int
    shown: str | None


def blocks(page: Path) -> list[Block]:
    source = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(source))
    result = []
    for this, following in zip(found, [*found[1:], None]):
        shown = None
        if following is not None and following[1] == "text" and not source[this.end() : following.start()].strip():
            shown = following[2]
        result.append(Block(this[1], this[2], source.count("\n", 0, this.start()) + 2, shown))
    return result


def lines(program: str) -> list[tuple[str, str]]:
    """Every line of a shell block that calls a program, after where it is from."""
    return [
        (f"{page.relative_to(ROOT)}:{block.line + offset}", line)
        for page in PAGES
        for block in blocks(page)
        if block.language in ("", "sh")
        for offset, line in enumerate(block.text.split("\n"))
        if line.startswith(f"{program} ")
    ]


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


@pytest.mark.parametrize("line", [pytest.param(line, id=where) for where, line in lines("transferops")])
def test_command_line_parses(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    try:
        cli.commands[name].make_context(name, arguments)  # runs nothing
    except ClickException as error:
        pytest.fail(f"{line}\n{error.format_message()}")


@pytest.mark.parametrize("line", [pytest.param(line, id=where) for where, line in lines("make")])
def test_make_target_exists(line: str) -> None:
    (target,) = shlex.split(line, comments=True)[1:]
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M)


def test_pages_have_what_is_tested() -> None:
    assert {line.split()[1] for _, line in lines("transferops")} == set(cli.commands)
    assert {page.stem for page in PAGES} >= {"README", "index", "rank", "otqms", "adapt", "inherit", "fisher"}


def test_guides_name_what_there_is() -> None:
    def named(guide: str, heading: str) -> set[str]:
        """Backticked names in the first column of the table under a heading."""
        table = (ROOT / "docs" / "guides" / guide).read_text().split(heading)[1].split("\n\n|")[1].split("\n\n")[0]
        cells = re.findall(r"^\| ([^|]*) \|", table, re.M)
        return {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}

    assert named("rank.md", "## The scores") >= {*SCORES, "h_score_regularized"}
    assert "recommended" in named("otqms.md", "## The trainer") <= set(STRATEGIES)


def test_every_benchmark_result_is_on_the_performance_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "docs_performance", raising=False)
    import docs_performance

    page = docs_performance.sections()
    results = [path for path in docs_performance.RESULTS.glob("*.json") if '"benchmarks"' in path.read_text()]
    assert page.count("\n| benchmark |") == len(results) >= 3
    assert page.count("\n| h_score[plain] | N=10000, D=1024, C=100 |") >= 1
