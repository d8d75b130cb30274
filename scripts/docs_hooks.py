"""What MkDocs is told to do beyond its plugins: formulas, benchmark results and their pictures.

A fenced block of the language ``math`` holds LaTeX. It becomes MathML, which browsers draw themselves: no script, and
nothing fetched from elsewhere. ``<!-- benchmark results -->`` becomes the tables of the committed results.
Pictures among these are linked as the source tree has them, and copied into the site.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parent))
import docs_performance  # a neighbour: MkDocs loads this file by its path

_FORMULA = re.compile(r"^```math\n(.*?)^```$", re.M | re.S)
_RESULTS = "<!-- benchmark results -->"
_PICTURES = ("bench/results", "examples/lva/results")  # as guides link them, with ../../ in front


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Called by MkDocs with the files of the site."""
    root = Path(__file__).resolve().parent.parent
    for picture in (found for folder in _PICTURES for found in sorted((root / folder).glob("*.png"))):
        files.append(File.generated(config, f"images/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the source of every page."""
    if _RESULTS in markdown:
        markdown = markdown.replace(_RESULTS, docs_performance.sections())
    for folder in _PICTURES:
        markdown = markdown.replace(f"(../../{folder}/", "(../images/")
    return _FORMULA.sub(lambda found: f"<div>{convert(found[1].strip(), display='block')}</div>", markdown)
