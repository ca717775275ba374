"""Commands are imported when they are asked for, and nobody can tell from anything but the time it takes."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from relay.cli.commands import Commands
from relay.cli.main import cli

HEAVY = ("aio_pika", "relay.daemon", "relay.inbox.consumer", "structlog")
"""Of the daemons only."""


def loaded_by(*arguments: str) -> set[str]:
    """The modules that are there when the program has done this."""
    program = (
        "import sys; from relay.cli.main import cli; "
        "cli(sys.argv[1:], standalone_mode=False); print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("group", [(), ("inbox",)])
def test_each_command_is_where_it_is_looked_for_and_bears_the_name_it_is_called_by(group: tuple[str, ...]) -> None:
    commands = cli.commands["inbox"] if group else cli
    assert isinstance(commands, click.Group)
    assert {name: command.name for name, command in commands.commands.items()} == {n: n for n in commands.commands}


@pytest.mark.parametrize("command", [("status",), ("migrate",), ("inbox", "retry")], ids=" ".join)
def test_a_command_that_does_not_need_the_broker_does_not_wait_for_its_client(command: tuple[str, ...]) -> None:
    assert loaded_by(*command, "--help").isdisjoint(HEAVY)


def test_an_unknown_command_is_refused_as_click_refuses_it() -> None:
    told = CliRunner().invoke(cli, ["statsu"])
    assert told.exit_code == 2
    assert "No such command 'statsu'" in told.output


def test_commands_are_a_mapping_like_any_other() -> None:
    commands = Commands({"status": "relay.cli.status:status", "stuck": "relay.cli.stuck:stuck"})
    other = click.Command("other")
    commands["other"] = other
    assert sorted(commands) == ["other", "status", "stuck"]
    assert len(commands) == 3
    assert commands["other"] is other
    assert commands["status"] is commands["status"]
    assert commands.get("nothing") is None
    del commands["status"]
    assert "status" not in commands
    with pytest.raises(KeyError):
        del commands["status"]
