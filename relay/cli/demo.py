"""`relay demo`: the whole system on throwaway servers, with faults, live on the terminal."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine
from typing import Any

import click
from rich.console import Console

from relay.log import configure_logging
from relay.settings import DaemonSettings

EXIT_STOPPED = 128 + signal.SIGINT
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@click.command()
@click.option(
    "--orders", default=1000, show_default=True, type=click.IntRange(min=1), help="How many orders the shop gets."
)
@click.option(
    "--seconds", default=30.0, show_default=True, type=click.FloatRange(min=1), help="In how many seconds they come in."
)
@click.option("--seed", default=1, show_default=True, help="Of what is random in the shop and in the faults.")
@click.option(
    "--plain", is_flag=True, help="Plain lines instead of the live view (the default where there is no terminal)."
)
def demo(orders: int, seconds: float, seed: int, *, plain: bool) -> None:
    """A small shop on throwaway servers, with all that goes wrong.

    kill -9, a broker that dies, duplicates and swapped messages.
    Beside relay's inbox the same events go through naive consumers. At the end the tables are compared: what each lost, did
    twice, did too early. Needs no configuration and touches no server of yours; about a minute.

    \b
    Exit codes: 0   relay got nothing wrong, and the faults really happened
                9   inconclusive: not every kind of fault really happened
                10  relay got something wrong
    """  # noqa: D301 - click wants the character itself
    from relay.demo.run import run  # not before it is asked for: a daemon needs neither this nor the sandbox
    from relay.demo.stage import Options

    configure_logging(DaemonSettings(log_level="error"))
    for library in ("aiormq", "aio_pika"):  # that RabbitMQ went away is no news here
        logging.getLogger(library).setLevel(logging.CRITICAL)
    code = asyncio.run(
        _until_signalled(run(Options(orders=orders, seconds=seconds, seed=seed, plain=plain), Console()))
    )
    sys.exit(code)


async def _until_signalled(work_to_do: Coroutine[Any, Any, int]) -> int:
    """The first Ctrl-C or SIGTERM stops everything; the second does not wait for that (the servers end all the same)."""
    loop = asyncio.get_running_loop()
    work = asyncio.create_task(work_to_do)

    def stop() -> None:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        work.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        return await work
    except asyncio.CancelledError:
        click.echo("relay: the demo was stopped, its servers are gone", err=True)
        return EXIT_STOPPED
