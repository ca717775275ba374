"""`relay counters`: how far the producer has counted each aggregate, as JSON Lines for `relay inbox seed`."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import click

from relay.cli.options import config_option, set_option, settings_from
from relay.operate import counters as producer
from relay.postgres.connect import connection
from relay.postgres.migrate import require_current
from relay.settings import Settings

types_option = click.option(
    "--type", "types", multiple=True, metavar="TYPE", help="Only of this aggregate type. Repeatable. Default: all."
)


@click.command()
@config_option
@set_option
@types_option
def counters(config: Path | None, assignments: tuple[str, ...], *, types: tuple[str, ...]) -> None:
    """Print the newest number of each aggregate, for inbox seed.

    That is where a consumer that starts from now begins.
    Runs on the producer's side (postgres.dsn is the producer's database; the role relay_monitor suffices). JSON Lines, as of
    one moment, for `relay inbox seed --counters`. What is committed is counted, published or not.

    \b
    relay counters --type order > counters.jsonl
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    asyncio.run(_print(settings_from(config, assignments), types))


async def _print(settings: Settings, types: tuple[str, ...]) -> None:
    async with connection(settings.postgres, application="relay counters") as opened:
        await require_current(opened)
        source = await producer.source_of(opened, settings.source)
        count = 0
        async with aclosing(producer.read(opened, types)) as portions:
            async for portion in portions:
                click.echo(producer.to_lines(source, portion), nl=False)
                count += len(portion)
    click.echo(producer.last_line(source, count), nl=False)
