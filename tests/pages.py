"""The pages of the documentation, and the fenced blocks on them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the text right after it that it prints."""

    language: str
    text: str
    line: int
    shown: str | None


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    source = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(source))
    result = []
    for this, following in zip(found, [*found[1:], None]):
        shown = None
        if following is not None and following[1] == "text" and not source[this.end() : following.start()].strip():
            shown = following[2]
        result.append(Block(this[1], this[2], source.count("\n", 0, this.start()) + 2, shown))
    return result
