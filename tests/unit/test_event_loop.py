"""On which loop a daemon runs, and what is said where that one is missing."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
import uvloop
from click.testing import CliRunner

from relay.cli.main import cli
from relay.daemon import Outbox
from relay.errors import ConfigError
from relay.event_loop import EventLoop, run_on
from relay.inbox import Inbox
from relay.settings import Settings


async def kind_of_loop() -> EventLoop:
    return "uvloop" if isinstance(asyncio.get_running_loop(), uvloop.Loop) else "asyncio"


@pytest.mark.parametrize("kind", ["uvloop", "asyncio"])
def test_it_runs_on_the_loop_that_is_asked_for(kind: EventLoop) -> None:
    assert run_on(kind, kind_of_loop()) == kind


def test_without_uvloop_the_error_names_the_setting_that_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    work = kind_of_loop()
    with pytest.raises(ConfigError, match=r"daemon\.event_loop .* install uvloop, or set it to \"asyncio\""):
        run_on("uvloop", work)
    with pytest.raises(RuntimeError):  # it was closed: nobody is warned of a coroutine that was never awaited
        work.send(None)
    assert run_on("asyncio", kind_of_loop()) == "asyncio"


@pytest.fixture
def ran_on(monkeypatch: pytest.MonkeyPatch) -> list[EventLoop]:
    """The loop that a daemon found when it was to run."""
    found: list[EventLoop] = []

    async def run(self: object, *_: Any, **__: Any) -> None:
        found.append(await kind_of_loop())

    monkeypatch.setattr(Outbox, "run", run)
    monkeypatch.setattr(Inbox, "run", run)
    return found


@pytest.mark.parametrize("command", ["run", "inbox run --consumer billing --store"])
@pytest.mark.parametrize(("said", "kind"), [("", "uvloop"), ("--set daemon.event_loop=asyncio", "asyncio")])
def test_both_daemons_run_on_uvloop_unless_the_settings_say_otherwise(
    command: str, said: str, kind: EventLoop, ran_on: list[EventLoop]
) -> None:
    assert CliRunner().invoke(cli, [*command.split(), *said.split()]).exit_code == 0
    assert ran_on == [kind]
    assert Settings().daemon.event_loop == "uvloop"
