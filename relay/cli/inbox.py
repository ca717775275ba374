"""`relay inbox`: the consuming side."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from relay.cli import inbox_acts, inbox_look
from relay.cli.options import config_option, set_option, settings_from
from relay.cli.seed import seed_command
from relay.cli.signals import stop_on_signals
from relay.collector import calm
from relay.errors import ConfigError
from relay.inbox import Inbox, load
from relay.log import configure_logging
from relay.settings import InboxSettings, Settings


@click.group("inbox")
def inbox() -> None:
    """Apply events in the consumer's database, once, in order."""


@inbox.command("run")
@click.argument("application", metavar="[MODULE:OBJECT]", required=False)
@config_option
@set_option
@click.option("--consumer", help="Name of this consumer. Default: inbox.consumer, or the name given to Inbox(...).")
@click.option("--queue", help="The queue to consume. Default: inbox.queue, or the consumer's name.")
@click.option(
    "--store", is_flag=True, help='Write events into relay.inbox and call nobody. The same as inbox.mode = "store".'
)
def run(
    application: str | None,
    config: Path | None,
    assignments: tuple[str, ...],
    consumer: str | None,
    queue: str | None,
    store: bool,
) -> None:
    """The inbox daemon: each event once, in order.

    In one transaction with its effects.

    \b
    What becomes of an event is one of these:
      relay inbox run shop.billing:inbox           a handler of the Inbox that MODULE:OBJECT names is called
      relay inbox run --consumer billing           the SQL function that inbox.functions names for its type is called
      relay inbox run --consumer billing --store   it is written into relay.inbox, where a service in any language
                                                   takes it: SELECT * FROM relay.inbox_take(100)

    Python handlers and SQL functions may be used together, for different types of events.

    Several may run on one queue. The first SIGTERM or SIGINT finishes the batch in hand within daemon.shutdown_grace_s,
    the second stops at once; nothing is lost either way.
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    mode = "store" if store else None
    settings = settings_from(config, assignments, inbox__consumer=consumer, inbox__queue=queue, inbox__mode=mode)
    configure_logging(settings.daemon)
    application_inbox = _inbox(application, settings.inbox)
    calm()  # after the application's own imports
    asyncio.run(_run(application_inbox, settings))


def _inbox(application: str | None, settings: InboxSettings) -> Inbox:
    if application is not None and settings.mode == "store":
        raise ConfigError(
            f"in store mode events are written into relay.inbox and nobody is called: leave out {application}, or --store "
            '(inbox.mode = "store")'
        )
    if application is not None:
        return load(application)
    if settings.mode != "store" and not settings.functions:
        raise ConfigError(
            "nobody is named who handles the events: give MODULE:OBJECT (shop.billing:inbox), or name SQL functions in "
            "inbox.functions, or say --store"
        )
    if settings.consumer is None:
        raise ConfigError(
            "the consumer has no name: its cursors are kept under it. Say --consumer NAME, or set inbox.consumer"
        )
    return Inbox(settings.consumer)


async def _run(found: Inbox, settings: Settings) -> None:
    with stop_on_signals(settings.daemon.shutdown_grace_s) as stop:
        await found.run(settings, stop=stop)


for command in inbox_acts.COMMANDS:
    inbox.add_command(command)
for command in (inbox_look.held, inbox_look.gaps, inbox_look.quarantine):
    inbox.add_command(command)
inbox.add_command(seed_command)
