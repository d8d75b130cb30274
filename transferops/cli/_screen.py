"""What the commands print with: names as they are, and progress that suits a terminal and a log file."""

from __future__ import annotations

from rich import progress
from rich.console import Console


def console(quiet: bool = False, stderr: bool = False) -> Console:
    """A console that prints names as they are: no markup, emoji or highlighting. NO_COLOR takes its colours away."""
    return Console(quiet=quiet, stderr=stderr, markup=False, emoji=False, highlight=False)


class Progress:
    """A live bar on stderr where that is a terminal; elsewhere, as in a log file, a line for every finished part.

    Args:
        total: What :meth:`advance` adds up to.
        quiet: Show nothing at all.
    """

    def __init__(self, total: float, quiet: bool) -> None:
        self._console = console(quiet, stderr=True)
        # FORCE_COLOR lets rich take a file for a terminal; a moving bar has no place in one
        self._live = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TextColumn("{task.percentage:.0f} %"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left:"),
            progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> Progress:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()

    def show(self, text: str) -> None:
        """What is being done."""
        self._bar.update(self._task, description=text)

    def advance(self, amount: float = 1) -> None:
        """So much more is done."""
        self._bar.advance(self._task, amount)

    def reach(self, amount: float) -> None:
        """So much is done in all."""
        self._bar.update(self._task, completed=amount)

    def finished(self, line: str) -> None:
        """A part is done: what a log file is to say of it."""
        if not self._live:
            self._console.print(line, soft_wrap=True)
