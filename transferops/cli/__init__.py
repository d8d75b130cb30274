"""The command line: one command per question, ``transferops COMMAND --help`` for each, a file for each here."""

from __future__ import annotations

from transferops import __version__

# _common first: it says which extra is missing
from transferops.cli import _common, adapt, doctor, inherit, otqms, rank


@_common.click.group(context_settings={"help_option_names": ["-h", "--help"]})
@_common.click.version_option(__version__, prog_name="transferops")
def cli() -> None:
    """Decide what to transfer, from where, and how much."""


cli.add_command(otqms.command)
cli.add_command(adapt.command)
cli.add_command(inherit.command)
cli.add_command(rank.command)
cli.add_command(doctor.command)


def main() -> None:
    """Entry point of the ``transferops`` script."""
    cli(prog_name="transferops")
