"""What --help says to somebody who knows nothing but it."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from relay.cli.main import cli


@pytest.mark.parametrize("group", [(), ("inbox",)])
def test_each_command_is_told_in_one_line_that_a_terminal_does_not_cut(group: tuple[str, ...]) -> None:
    text = CliRunner().invoke(cli, [*group, "--help"], env={"COLUMNS": "80"}).output
    commands = cli.commands["inbox"] if group else cli
    assert isinstance(commands, click.Group)
    told = text.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in told] == sorted(commands.commands)
    assert [line for line in told if not line.endswith(".") or line.endswith("...")] == []
