"""The command line: one command per question, ``transferops COMMAND --help`` for each, a file for each here."""

from __future__ import annotations

import transferops.cli._extra  # noqa: F401  isort: skip  (says what is missing, before anything asks for it)

import click

from transferops import __version__
from transferops.cli import adapt, completion, doctor, inherit, otqms, rank


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Settings may come from a file (--config), results go to a file (--json): see the help of a command.",
)
@click.version_option(__version__, prog_name="transferops")
def cli() -> None:
    """Decide what to transfer, from where, and how much."""


for _module in (adapt, completion, doctor, inherit, otqms, rank):
    cli.add_command(_module.command)


def main() -> None:
    """Entry point of the ``transferops`` script."""
    cli(prog_name="transferops")
