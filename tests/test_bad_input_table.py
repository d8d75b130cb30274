"""The tables of malformed calls that no other test runs, and the page that lists them all."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("scipy")

from bad_input_adaptation import ADAPTATION
from bad_input_files import COMMANDS, COMPATIBILITY, FILES, RANKING
from bad_input_fisher import FISHER
from bad_input_table import check_refused, page, tables
from bad_input_training import TRAINING
from test_bad_input import DEVICES

ROOT = Path(__file__).resolve().parents[1]
CASES = {**FISHER, **TRAINING, **ADAPTATION, **RANKING, **COMPATIBILITY, **FILES, **COMMANDS}


@pytest.mark.parametrize("name", CASES)
def test_malformed_call_is_refused_with_its_message(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word, module in (("safetensors", "safetensors"), ("image that", "PIL")):
        if word in name:
            pytest.importorskip(module)
    check_refused(CASES[name])


def test_no_name_hides_another() -> None:
    assert len(CASES) == sum(map(len, (FISHER, TRAINING, ADAPTATION, RANKING, COMPATIBILITY, FILES, COMMANDS)))


def test_the_page_lists_every_case() -> None:
    if DEVICES != "a CPU tensor":
        pytest.skip("the page is written by a build without CUDA, whose messages name fewer devices")
    written = (ROOT / "docs" / "bad-input.md").read_text(encoding="utf-8")
    assert written == page(), "out of date: python scripts/bad_input_page.py > docs/bad-input.md"
    assert written.count("Error | ") == sum(len(cases) for _, _, cases in tables())
