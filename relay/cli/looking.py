"""How a command that reads is put together: settings, one look at the database, then words or JSON."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal, TypeVar

import click
from click.core import ParameterSource

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


def here(command: str) -> str:
    """The command, for the database that this one looks at: with the -c and --set that were given to it."""
    context = click.get_current_context()
    given: list[str] = []
    if context.get_parameter_source("config") is ParameterSource.COMMANDLINE:
        given += ["-c", str(context.params["config"])]
    for assignment in context.params.get("assignments", ()):
        given += ["--set", assignment]
    return " ".join([command, *map(shlex.quote, given)])


RIGHT_ONE = "(--config, or RELAY_POSTGRES_DSN)"


def nothing(look: Look, side: Literal["outbox", "inbox"], *, said: str, others: str | None) -> str:
    """Why there is nothing to show: the wrong database, filters that hold for none of the `others`, or really nothing."""
    if side == "inbox" and not look.inbox:
        return f"There is no inbox in database {look.database}: nothing was consumed there. Is postgres.dsn the consumer's? {RIGHT_ONE}"
    if side == "outbox" and not look.outbox:
        return f"There is no outbox in database {look.database}: nothing was published from there. Is postgres.dsn the producer's? {RIGHT_ONE}"
    if others is not None:
        return f"Nothing matches; without the filters {others} in database {look.database}."
    return f"{said} in database {look.database}."


def again(after: int) -> str:
    """The command that shows the next page."""
    given = sys.argv[1:]
    if "--after" in given:
        place = given.index("--after")
        given = given[:place] + given[place + 2 :]
    return shlex.join(["relay", *(a for a in given if not a.startswith("--after=")), "--after", str(after)])
