"""What every command is: help that teaches, settings from a file, errors in one line and their exit codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from transferops.cli import _config
from transferops.cli._extra import EXTRA
from transferops.cli._settings import BadInput, Failure, Interrupted, Option, settings_of

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

EXIT_CODES = {
    0: "done",
    Failure.exit_code: "the run failed: training diverged, a package is missing, a disk is full",
    BadInput.exit_code: "the input is at fault: an option, a file, a configuration",
    Interrupted.exit_code: "interrupted",
}

_INPUT_ERRORS = (ValueError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)


def option(*declarations: str, group: str, **attributes: Any) -> Callable[[Decorated], Decorated]:
    """An option that stands under the heading ``group`` in the help."""
    return click.option(*declarations, cls=Option, group=group, **attributes)


class Command(click.Command):
    """A command with examples, grouped options, --config, --show-config and --debug.

    Args:
        examples: What each is for, and its command line.
        results: Where the results go.
        configurable: Whether it has --config and --show-config.
        attributes: As of :class:`click.Command`.
    """

    def __init__(
        self,
        *arguments: Any,
        examples: Sequence[tuple[str, str]] = (),
        results: str = "",
        configurable: bool = True,
        **attributes: Any,
    ) -> None:
        super().__init__(*arguments, **attributes)
        self.examples = examples
        self.results = results
        self.configurable = configurable
        if configurable:
            self.params += [
                Option(
                    ["--config"],
                    type=click.Path(path_type=Path),
                    metavar="FILE",
                    is_eager=True,
                    setting=False,
                    callback=_use_config,
                    help="Take settings from a TOML or YAML file; the command line goes before it.",
                ),
                Option(
                    ["--show-config"],
                    is_flag=True,
                    setting=False,
                    help="Print the settings, fit for --config; run nothing.",
                ),
            ]
        self.params.append(Option(["--debug"], is_flag=True, setting=False, help="Show the traceback of an error."))

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, then the options under the headings of their groups, in the order of their declaration."""
        with formatter.section("Examples"):
            for purpose, line in self.examples:
                formatter.write_text(f"{purpose}:")
                formatter.write(f"{'':{formatter.current_indent + 2}}{line}\n")
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        groups["Other"] = groups.pop("Other")
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Where the results go, the exit codes, and what to read."""
        with formatter.section("Where the results go"):
            streams = "Tables go to stdout, progress and errors to stderr. " if self.configurable else ""
            formatter.write_text(streams + self.results)
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])
        super().format_epilog(context, formatter)

    def invoke(self, context: click.Context) -> Any:
        """Run the command; an exception becomes a line on stderr and an exit code."""
        show_config, debug, _ = (context.params.pop(name, None) for name in ("show_config", "debug", "config"))
        if show_config:
            click.echo(_config.to_toml(self.name or "", settings_of(context)), nl=False)
            return None
        try:
            return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None
        except Exception as error:
            if debug:
                raise
            kind = BadInput if isinstance(error, _INPUT_ERRORS) else Failure
            raise kind(_in_a_line(error)) from None


def _in_a_line(error: Exception) -> str:
    if isinstance(error, ImportError):
        return str(error) if "pip install" in str(error) else f"{error}; install what is missing with: {EXTRA}"
    if isinstance(error, (ValueError, TypeError, OSError)):
        return str(error)
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _use_config(context: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Let a file's settings be the defaults of the other options."""
    if path is not None:
        group = context.find_root().command
        commands = group.commands if isinstance(group, click.Group) else {}
        context.default_map = _config.read(path, context.command, commands.values())
    return path
