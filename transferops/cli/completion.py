"""``transferops completion``: TAB completes commands, options and the names that options take."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from transferops.cli._command import Command

_SHELLS = ("bash", "zsh", "fish")


@click.command(
    "completion",
    cls=Command,
    examples=[
        ("For bash", 'transferops completion bash > "$HOME/.local/share/bash-completion/completions/transferops"'),
        ("For zsh", 'transferops completion zsh > "${fpath[1]}/_transferops"'),
        ("For fish", 'transferops completion fish > "$HOME/.config/fish/completions/transferops.fish"'),
    ],
    results="The script goes to stdout.",
    configurable=False,
)
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """How do I get commands and options completed?

    Prints the script that a shell reads once; new shells complete on TAB from then on. Each TAB starts the
    program, torch included, which takes a second or two.
    """
    made = get_completion_class(shell)
    assert made is not None  # click has all three
    click.echo(made(context.find_root().command, {}, "transferops", "_TRANSFEROPS_COMPLETE").source())
