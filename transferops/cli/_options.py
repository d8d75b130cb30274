"""The options that commands share: each bundle becomes one argument of the command's function."""

from __future__ import annotations

import functools
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from click.shell_completion import CompletionItem
from rich.console import RenderableType

from transferops._validate import check_positive_int, fail
from transferops.cli._command import option
from transferops.cli._screen import Progress, console
from transferops.cli._settings import RESULTS, settings_of
from transferops.data import DEFAULT_TARGET, DomainBundle, load_bundle, load_digits_domains
from transferops.data.folder import left_out
from transferops.otqms import TrainingOptions, write_json

DATA, TRAINING, MACHINE = "Data", "Training", "Machine"
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Domains:
    """Where the samples come from."""

    data: str | None
    target: str | None
    image_size: int | None
    skip_undecodable: bool
    sources: list[str] | None = None

    @property
    def origin(self) -> str:
        """What the results call the data."""
        return self.data or "embedded digits"

    def read(self, output: Output) -> tuple[DomainBundle, str]:
        """The domains and the target's name; without ``data`` the embedded digits and their usual target."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "data: left out")  # the output says it
            bundle = (
                load_digits_domains()
                if self.data is None
                else load_bundle(self.data, self.image_size, skip_undecodable=self.skip_undecodable)
            )
        output.leave_out(bundle.undecodable)
        if self.target is None and self.data is not None:
            fail("target", f"one of {', '.join(bundle.domains)}", "none")
        return bundle, self.target or DEFAULT_TARGET


@dataclass(frozen=True)
class Machine:
    """What the command runs on."""

    device: str
    threads: int | None

    def set_threads(self, domains: Domains) -> None:
        """As asked; one for the embedded digits, whose batches of 8x8 images are too small to share."""
        threads = 1 if self.threads is None and domains.data is None else self.threads
        if threads is not None:
            torch.set_num_threads(check_positive_int("threads", threads))


class Output:
    """Where results go: tables and sentences, a JSON document, pictures.

    Under torchrun the first process speaks. With the document on stdout, everything else goes to stderr.
    """

    def __init__(self, json_path: str | None, quiet: bool, folder: Path | None = None) -> None:
        self.quiet = quiet or os.environ.get("RANK", "0") != "0"
        self._json = json_path
        self._folder = folder
        self._undecodable: tuple[str, ...] = ()
        self._screen = console(self.quiet, stderr=json_path == "-")

    @property
    def width(self) -> int:
        """Columns of the screen."""
        return self._screen.width

    def prepare(self) -> None:
        """Refuse what cannot be written, and make the folder for pictures."""
        if self._json not in (None, "-"):
            check_file("json", Path(self._json))
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def say(self, line: object) -> None:
        """Print a line, however long."""
        self._screen.print(str(line), soft_wrap=True)

    def leave_out(self, undecodable: tuple[str, ...]) -> None:
        """Say which images were, here and in the document."""
        self._undecodable = undecodable
        if undecodable:
            self.say(f"note: {left_out(undecodable)}")

    def show(self, table: RenderableType) -> None:
        """Print a table."""
        self._screen.print(table)

    def progress(self, total: float) -> Progress:
        """Of something that takes a while."""
        return Progress(total, self.quiet)

    def write(self, document: Mapping[str, Any]) -> None:
        """Write the JSON document, if asked for, with the settings that led to it."""
        if self._json is None:
            return
        settings = settings_of(click.get_current_context())
        if self._undecodable:
            document = {**document, "undecodable": list(self._undecodable)}
        whole = {**document, "settings": {key: each.value for key, each in settings.items() if not each.of_results}}
        if self._json == "-":
            click.echo(json.dumps(whole, indent=1, allow_nan=False))
        else:
            write_json(whole, self._json)
            self.say(f"wrote {self._json}")

    def draw(self, name: str, plot: Callable[[Path], object]) -> None:
        """Let ``plot`` write a picture into the folder, if there is one; False from it says that there is none."""
        if self._folder is not None and plot(self._folder / name) is not False:
            self.say(f"wrote {self._folder / name}")


def check_file(name: str, path: Path | None) -> None:
    """Refuse a path that cannot become a file."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        fail(name, "a file in an existing folder", str(path), FileNotFoundError)


def names(
    *declarations: str,
    group: str,
    known: Iterable[str] = (),
    parse: Callable[[list[str]], list[str]] = list,
    **attributes: Any,
) -> Decorator:
    """An option that takes names separated by commas.

    Args:
        declarations: Of the option.
        group: Its heading.
        known: Names that TAB completes; others may be right, too.
        parse: From the names given to those meant.
        attributes: As of :class:`click.Option`.
    """

    def split(_: click.Context, __: click.Parameter, value: str | None) -> list[str] | None:
        return None if value is None else parse([name.strip() for name in value.split(",")])

    def complete(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
        before, comma, last = typed.rpartition(",")
        return [CompletionItem(before + comma + name) for name in known if name.startswith(last)]

    return option(
        *declarations,
        group=group,
        listed=True,
        callback=split,
        shell_complete=complete,
        **{"metavar": "A,B", **attributes},
    )


def domains(target: str, sources: str | None = None, group: str = DATA) -> Decorator:
    """``domains``, a :class:`Domains`, from --data, --target, --sources if there is help for it, and for folders."""
    own = [] if sources is None else [names("--sources", group=group, help=f"{sources}; all others if left out.")]
    return _bundle(
        "domains",
        Domains,
        option(
            "--data",
            group=group,
            type=click.Path(),
            metavar="FILE.npz|FOLDER",
            help="Domains to use; without it, the embedded digits.",
        ),
        option(
            "--target",
            group=group,
            metavar="DOMAIN",
            help=f"Domain to {target}; for the embedded digits {DEFAULT_TARGET}.",
        ),
        *own,
        option("--image-size", group=group, type=int, help="Resize the images of a folder to this many pixels square."),
        option(
            "--skip-undecodable",
            group=group,
            is_flag=True,
            help="Leave out images of a folder that cannot be decoded, and say which.",
        ),
    )


def machine(group: str = MACHINE) -> Decorator:
    """``machine``, a :class:`Machine`, from --device and --threads."""
    return _bundle(
        "machine",
        Machine,
        option("--device", group=group, default=TrainingOptions.device, show_default=True, help="For example cuda."),
        option(
            "--threads",
            group=group,
            type=int,
            help="CPU threads; if left out one for the embedded digits, else torch's choice.",
        ),
    )


def output(pictures: str | None = None) -> Decorator:
    """``output``, an :class:`Output`, from --json, --output if there are ``pictures``, and --quiet."""
    folder = click.Path(path_type=Path)
    text = f"Write {pictures} into this folder."
    own = [option("--output", "folder", group=RESULTS, metavar="DIR", type=folder, help=text)]
    return _bundle(
        "output",
        Output,
        option(
            "--json",
            "json_path",
            group=RESULTS,
            metavar="OUT",
            type=click.Path(allow_dash=True),
            help="Write all results and settings there; - for stdout, with everything else on stderr.",
        ),
        *([] if pictures is None else own),
        option("--quiet", group=RESULTS, is_flag=True, help="Print errors only."),
    )


def count(name: str, default: int | None, help: str, group: str = TRAINING) -> Decorator:
    """A number of something, with its default in the help."""
    return option(name, group=group, type=int, default=default, show_default=default is not None, help=help)


def shots(default: int | None, group: str = DATA) -> Decorator:
    """--shots."""
    left_out = "" if default else "; all samples if left out"
    return count("--shots", default, f"Labelled target samples per class{left_out}.", group)


def learning_rate(default: float, group: str = TRAINING) -> Decorator:
    """--lr."""
    return option("--lr", group=group, default=default, show_default=True, help="Learning rate, with Adam.")


def _bundle(name: str, make: Callable[..., Any], *options: Decorator) -> Decorator:
    """Options whose values become one argument ``name``, which ``make`` makes of them."""
    taken = inspect.signature(make).parameters

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(**arguments: Any) -> Any:
            parts = {key: arguments.pop(key) for key in taken if key in arguments}
            return function(**arguments, **{name: make(**parts)})

        decorated: Callable[..., Any] = run
        for each in reversed(options):
            decorated = each(decorated)
        return decorated

    return decorate
