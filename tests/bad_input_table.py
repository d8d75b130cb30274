"""Every table of malformed calls, and the page of the documentation that lists them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest

_LONGEST = 240  # characters of a message on the page; what is longer enumerates names

Case = tuple[Callable[[], Any], type[Exception], str]


def check_refused(case: Case) -> None:
    """The call raises its error with its message.

    What torch adds on later lines is not compared, nor what stands in place of ``...`` at the end: another package's
    words, or names that become more.
    """
    call, error, message = case
    with pytest.raises(error) as caught:
        call()
    raised = str(caught.value).split("\n")[0]
    if message.endswith("..."):
        assert raised.startswith(message[:-3])
    else:
        assert raised == message


def tables() -> Iterator[tuple[str, ModuleType, Mapping[str, Case]]]:
    """Title, module and cases of every table."""
    import bad_input_adaptation
    import bad_input_files
    import bad_input_fisher
    import bad_input_training
    import test_bad_input
    import test_ops_fisher_faces
    import test_scores
    import test_scores_bad_input

    yield "Ops and the H-score", test_bad_input, test_bad_input.CASES
    yield "Ops of the Fisher information", test_ops_fisher_faces, test_ops_fisher_faces.BAD
    yield "Scores", test_scores, test_scores.BAD_INPUT
    yield "Further scores", test_scores_bad_input, test_scores_bad_input.CASES
    yield "Fisher information", bad_input_fisher, bad_input_fisher.FISHER
    yield "Quantities and training", bad_input_training, bad_input_training.TRAINING
    yield "Heads, inheritance and its check", bad_input_adaptation, bad_input_adaptation.ADAPTATION
    yield "Ranking", bad_input_files, bad_input_files.RANKING
    yield "Other packages' names", bad_input_files, bad_input_files.COMPATIBILITY
    yield "Data and checkpoints", bad_input_files, bad_input_files.FILES
    yield "Commands", bad_input_files, bad_input_files.COMMANDS


def page() -> str:
    """docs/bad-input.md."""
    found = [(title, list(_rows(module, cases))) for title, module, cases in tables()]
    count = sum(len(rows) for _, rows in found)
    lines = [
        "# Malformed input",
        "",
        "<!-- Written by scripts/bad_input_page.py from the tables of the tests; do not edit. -->",
        "",
        f"What {count} malformed calls raise. Every row is a test, which compares the message (up to `...`). Names in",
        "capitals stand for valid arguments of the tests, `NAN` for one with a NaN; operators of `torch.ops`",
        "raise what their C++ code says, for those who call them directly.",
    ]
    for title, rows in found:
        lines += ["", f"## {title}", "", "| call | error | message |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _rows(module: ModuleType, cases: Mapping[str, Case]) -> Iterator[str]:
    written = _calls(module)
    for name, (_, error, message) in cases.items():
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 4 :]}"
        cells = (f"`{written[name]}`" if name in written else _text(name), error.__name__, _text(message))
        yield f"| {' | '.join(cells)} |"


def _calls(module: ModuleType) -> dict[str, str]:
    """The source of a case's call, by the case's name, where it stands in a dictionary as it is."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(module)))
    found = {}
    for table in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
        for key, value in zip(table.keys, table.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and isinstance(value.elts[0], ast.Lambda):
                found[key.value] = ast.unparse(value.elts[0].body).replace("|", "\\|")
    return found


def _text(words: str) -> str:
    """As it is, for a cell of Markdown."""
    for sign in "\\`*_[]<>|":
        words = words.replace(sign, f"\\{sign}")
    return words
