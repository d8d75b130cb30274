"""What the commands share: how errors are reported, options are read and text is printed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from transferops._validate import check_positive_int, fail
from transferops.data import DEFAULT_TARGET, DomainBundle, load_bundle, load_digits_domains

_EXTRA = 'pip install "transferops[cli]"'

try:
    import click
    from rich.console import Console
except ImportError as missing:
    raise SystemExit(f"error: the command line needs {missing.name}; install it with: {_EXTRA}") from None

__all__ = [
    "check_file",
    "click",
    "console",
    "names",
    "prepare_outputs",
    "read_domains",
    "reports_errors",
    "set_threads",
]

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


def set_threads(threads: int | None, data: str | None) -> None:
    """As asked; one for the embedded digits, whose batches of 8x8 images are too small to share."""
    if threads is None and data is None:
        threads = 1
    if threads is not None:
        torch.set_num_threads(check_positive_int("threads", threads))


def check_file(option: str, path: Path | None) -> None:
    """Refuse a path that cannot become a file."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        fail(option, "a file in an existing folder", str(path), FileNotFoundError)


def prepare_outputs(json_path: Path | None, output: Path | None) -> None:
    """Refuse what cannot be written, and make the folder for pictures."""
    check_file("json", json_path)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)


def read_domains(data: str | None, target: str | None, image_size: int | None) -> tuple[DomainBundle, str]:
    """The domains and the target's name; without ``data`` the embedded digits and their usual target."""
    bundle = load_digits_domains() if data is None else load_bundle(data, image_size)
    if target is None:
        if data is not None:
            fail("target", f"one of {', '.join(bundle.domains)}", "none")
        target = DEFAULT_TARGET
    return bundle, target
