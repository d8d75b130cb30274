"""Settings: the options of a command under the names that they have in a configuration file and in results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click
from click.core import ParameterSource

RESULTS = "Results"
"""The heading of the options that say where results go: they do not change them."""


class Failure(click.ClickException):
    """The run failed: a line on stderr, and an exit code."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line."""
        click.echo(f"error: {self.message}", file=file, err=file is None)


class BadInput(Failure):
    """The input is at fault."""

    exit_code = 2


class Interrupted(Failure):
    """Somebody pressed Ctrl-C: the code that shells give it."""

    exit_code = 130


class Option(click.Option):
    """An option with a heading in the help.

    Args:
        group: The heading.
        listed: Whether it takes values separated by commas: in a configuration file they may be an array, too.
        accepts: The types that a configuration file may give for it, if they are not those of its own type.
        setting: Whether a configuration file may have it.
    """

    def __init__(
        self,
        *arguments: Any,
        group: str = "Other",
        listed: bool = False,
        accepts: tuple[type, ...] = (),
        setting: bool = True,
        **attributes: Any,
    ) -> None:
        super().__init__(*arguments, **attributes)
        self.group = group
        self.listed = listed
        self.accepts = accepts
        self.setting = setting


@dataclass(frozen=True)
class Setting:
    """The value that an option has in this run.

    Attributes:
        value: Fit for JSON; ``None`` if it is not set.
        origin: "command line", "configuration" or "default".
        of_results: Whether it only says where results go.
    """

    value: Any
    origin: str
    of_results: bool


def parameters_of(command: click.Command) -> dict[str, click.Parameter]:
    """What a configuration file may set for a command, by key: an option's long name, an argument's name."""
    if not getattr(command, "configurable", False):
        return {}
    return {_key(parameter): parameter for parameter in command.params if getattr(parameter, "setting", True)}


def settings_of(context: click.Context) -> dict[str, Setting]:
    """The settings of a run by key, from wherever they come."""
    return {
        key: Setting(
            _plain(context.params.get(parameter.name or "")),
            _ORIGINS.get(context.get_parameter_source(parameter.name or ""), "default"),
            getattr(parameter, "group", None) == RESULTS,
        )
        for key, parameter in parameters_of(context.command).items()
    }


_ORIGINS: dict[ParameterSource | None, str] = {
    ParameterSource.COMMANDLINE: "command line",
    ParameterSource.DEFAULT_MAP: "configuration",
}


def _key(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len).removeprefix("--")
    return parameter.name or ""


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value) or None
    return str(value) if isinstance(value, Path) else value
