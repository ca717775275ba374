"""Stopping on signals: the first asks, the second insists."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import click

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_on_signals(grace_s: float | None = None) -> Iterator[asyncio.Event]:
    """An event that the first SIGTERM or SIGINT sets; the second makes the process exit at once, with 128 + its number.

    For the main thread, inside a running event loop. Restores the handlers that it found. `grace_s` is only told to the
    person at the terminal: who waits on the event keeps it.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def received(number: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + number)  # nothing is awaited any more: what is unconfirmed is done again by the next start
        stop.set()
        within = "" if grace_s is None else f" within {grace_s:g} s"
        click.echo(f"relay: {number.name}: finishing what is in hand{within}; once more to stop at once", err=True)

    for number in _SIGNALS:
        loop.add_signal_handler(number, received, number)
    try:
        yield stop
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])
