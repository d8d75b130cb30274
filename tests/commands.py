"""Commands, run in this process."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("rich")
testing = pytest.importorskip("click.testing")

from transferops.cli import cli


def run(command: str, *arguments: object, **environment: str) -> Any:
    """What ``transferops COMMAND ARGUMENTS`` prints and returns."""
    return testing.CliRunner(env=environment).invoke(cli, [command, *map(str, arguments)], prog_name="transferops")
