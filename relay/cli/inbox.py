"""`relay inbox`: the consuming side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from relay.cli.commands import Commands
from relay.cli.options import config_option, set_option, settings_from
from relay.cli.signals import stop_on_signals
from relay.collector import calm
from relay.errors import ConfigError
from relay.event_loop import run_on
from relay.log import configure_logging
from relay.settings import InboxSettings, Settings

if TYPE_CHECKING:
    from relay.inbox import Inbox


ELSEWHERE = Commands(
    {
        "dismiss": "relay.cli.inbox_acts:dismiss",
        "gaps": "relay.cli.inbox_look:gaps",
        "held": "relay.cli.inbox_look:held",
        "purge": "relay.cli.inbox_acts:purge",
        "quarantine": "relay.cli.inbox_look:quarantine",
        "reset": "relay.cli.inbox_acts:reset",
        "retry": "relay.cli.inbox_acts:retry",
        "seed": "relay.cli.seed:seed_command",
        "skip": "relay.cli.inbox_acts:skip",
    }
)
"""What is not in this module."""


@click.group("inbox", commands=ELSEWHERE)
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
    run_on(settings.daemon.event_loop, _run(application_inbox, settings))


def _inbox(application: str | None, settings: InboxSettings) -> Inbox:
    from relay.inbox import Inbox, load

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
