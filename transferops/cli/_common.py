"""What the commands share: how errors are reported, options are read and text is printed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_EXTRA = 'pip install "transferops[cli]"'

try:
    import click
    from rich.console import Console
except ImportError as missing:
    raise SystemExit(f"error: the command line needs {missing.name}; install it with: {_EXTRA}") from None

__all__ = ["click", "console", "names", "reports_errors"]

_INPUT_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    PermissionError,
)


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn exceptions into a line on stderr: exit code 2 for bad input, 1 for a failure."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if debug:
                raise
            code = 2 if isinstance(error, _INPUT_ERRORS) else 1
            if isinstance(error, ImportError):
                message = f"{error}; install what is missing with: {_EXTRA}"
            elif isinstance(error, (ValueError, TypeError, OSError)):
                message = str(error)
            else:
                message = f"{type(error).__name__}: {error} (--debug shows where)"
            click.echo(f"error: {message}", err=True)
            raise click.exceptions.Exit(code) from None

    return click.option("--debug", is_flag=True, help="Show the traceback of an error.")(run)


def names(_: click.Context, __: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [name.strip() for name in value.split(",")]


def console(quiet: bool, stderr: bool = False) -> Console:
    """A console that prints names as they are: no markup, emoji or highlighting."""
    return Console(quiet=quiet, stderr=stderr, markup=False, emoji=False, highlight=False)
