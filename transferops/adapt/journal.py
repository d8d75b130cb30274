"""Results one by one in a file, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from transferops._atomic import append_line
from transferops._validate import fail

_CHECKSUM = "sha256"


class Journal:
    """JSON lines: what the run is about in the first, then one finished result in each.

    A line is written whole and reaches the disk before :meth:`add` returns; a line torn by a crash is dropped when
    the file is opened again, and one that is not as it was written, by the checksum in it, is refused.

    Args:
        path: The file; made if there is none.
        about: What the results depend on; must be what the file says if there is one.

    Raises:
        ValueError: The file is no journal, or damaged, or of another run.
        OSError: It cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
        self._path = os.fspath(path)
        self.results: list[dict[str, Any]] = []
        about = json.loads(json.dumps(dict(about)))
        whole = self._read()
        if not whole:
            self._append({"about": about}, anew=True)
            return
        first, *self.results = whole
        if first.get("about") != about:
            theirs = first.get("about")
            if not isinstance(theirs, dict):
                fail("journal", "results of an earlier run", f"{self._path}, which holds something else")
            keys = sorted(key for key in {*about, *theirs} if about.get(key) != theirs.get(key))
            fail("journal", f"results of the same run as in {self._path}", f"a different {', '.join(keys)}")

    def add(self, result: Mapping[str, Any]) -> None:
        """Keep one result.

        Raises:
            ValueError: A number in it is not finite.
            OSError: It cannot be written.
        """
        self._append(result)
        self.results.append(dict(result))

    def _read(self) -> list[dict[str, Any]]:
        if not os.path.exists(self._path):
            return []
        with open(self._path, "rb") as file:
            content = file.read()
        complete = content.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in content[:complete].splitlines()]
        except ValueError:
            lines = [None]
        # A crash can tear the first line, too; whatever else does not begin like a journal is not ours to change.
        ours = lines[0] if lines else content[:10] == b'{"about": '[: len(content)]
        if not ours or not all(isinstance(line, dict) for line in lines):
            if content:
                fail("journal", "a file written by this check", f"something else in {self._path}")
            return []
        for number, line in enumerate(lines, 1):
            if line.pop(_CHECKSUM, None) != _checksum(line):
                fail("journal", f"{self._path} as it was written", f"another line {number}; remove it to start anew")
        if complete < len(content):
            with open(self._path, "r+b") as file:
                file.truncate(complete)
        return lines

    def _append(self, line: Mapping[str, Any], anew: bool = False) -> None:
        line = json.loads(json.dumps(dict(line), allow_nan=False))
        append_line(self._path, json.dumps({**line, _CHECKSUM: _checksum(line)}), anew=anew)


def _checksum(line: Mapping[str, Any]) -> str:
    """Of what a line says."""
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()[:16]
