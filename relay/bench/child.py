"""The other end of `children.py`: one process in one role. `python -m relay.bench.child asyncio|uvloop`."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from relay.bench.parent import Parent
from relay.collector import calm
from relay.event_loop import run_on
from relay.log import configure_logging
from relay.settings import Settings

Role = Callable[[Settings, Mapping[str, Any], Parent], Awaitable[None]]

_MODULES = {
    "insert": "producers",
    "produce": "producers",
    "read": "outbox",
    "relay": "outbox",
    "publish": "messages",
    "consume": "messages",
    "statements": "inbox",
    "apply": "inbox",
}
"""Where a role is, in relay.bench.roles; imported when it is played, so that a producer has nothing of the daemons in memory."""

_PRODUCERS = ("insert", "produce")
"""Applications. The others are what `relay run` and `relay inbox run` are, and their ceilings: they begin as those do."""


async def _play() -> None:
    lines = asyncio.StreamReader(limit=2**24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    parent = Parent(lines)
    await play(await parent.first_line(), parent)


async def play(spec: dict[str, Any], parent: Parent) -> None:
    """The role that a first line names."""
    settings = Settings.model_validate(spec.pop("settings"))
    configure_logging(settings.daemon)
    name = spec.pop("role")
    role: Role = getattr(importlib.import_module(f"relay.bench.roles.{_MODULES[name]}"), name)
    if name not in _PRODUCERS:
        calm()
    await role(settings, spec, parent)


def main() -> None:
    """Play the role that the first line of standard input names."""
    run_on("asyncio" if sys.argv[1] == "asyncio" else "uvloop", _play())


if __name__ == "__main__":
    main()
