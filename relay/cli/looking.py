"""How a command that reads is put together: settings, one look at the database, then words or JSON."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import click

from relay.cli.options import settings_from
from relay.operate.look import Look, looking

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
limit_option = click.option(
    "--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Most rows to show."
)
payload_option = click.option(
    "--payload", is_flag=True, help="Show contents as well. Needs the rights of relay_operator."
)


def look_at(
    config: Path | None, assignments: tuple[str, ...], ask: Callable[[Look], Awaitable[T]], *, command: str
) -> T:
    """The answer of `ask`, from one look at the database that the settings name."""
    settings = settings_from(config, assignments)

    async def run() -> T:
        async with looking(settings.postgres, application=f"relay {command}") as look:
            return await ask(look)

    return asyncio.run(run())


def again(after: int) -> str:
    """The command that shows the next page."""
    given = sys.argv[1:]
    if "--after" in given:
        place = given.index("--after")
        given = given[:place] + given[place + 2 :]
    return shlex.join(["relay", *(a for a in given if not a.startswith("--after=")), "--after", str(after)])
