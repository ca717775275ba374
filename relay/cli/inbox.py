"""`relay inbox`: the consuming side."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from relay.cli.options import config_option, set_option, settings_from
from relay.cli.signals import stop_on_signals
from relay.inbox import Inbox, load
from relay.log import configure_logging
from relay.settings import Settings


@click.group("inbox")
def inbox() -> None:
    """Apply events in the consumer's own database, once and in order."""


@inbox.command("run")
@click.argument("application", metavar="MODULE:OBJECT")
@config_option
@set_option
@click.option("--consumer", help="Name of this consumer. Default: inbox.consumer, or the name given to Inbox(...).")
@click.option("--queue", help="The queue to consume. Default: inbox.queue, or the consumer's name.")
def run(
    application: str, config: Path | None, assignments: tuple[str, ...], consumer: str | None, queue: str | None
) -> None:
    """The inbox daemon: call the handlers of MODULE:OBJECT, for example shop.billing:inbox.

    Several may run on one queue. The first SIGTERM or SIGINT finishes the batch in hand within daemon.shutdown_grace_s,
    the second stops at once; nothing is lost either way.
    """
    settings = settings_from(config, assignments, inbox__consumer=consumer, inbox__queue=queue)
    configure_logging(settings.daemon)
    asyncio.run(_run(load(application), settings))


async def _run(found: Inbox, settings: Settings) -> None:
    with stop_on_signals(settings.daemon.shutdown_grace_s) as stop:
        await found.run(settings, stop=stop)
