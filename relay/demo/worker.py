"""`python -m relay.demo.worker`: billing's inbox as a process that can be killed.

Like `relay inbox run relay.demo.billing:inbox`, and prints a line of counts after each committed batch.
"""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import asdict

from relay.demo.billing import inbox
from relay.event_loop import run_on
from relay.inbox import Stats
from relay.log import configure_logging
from relay.settings import Settings, load_settings


async def main(settings: Settings) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await inbox.run(settings, stop=stop, on_commit=tell)


def tell(stats: Stats) -> None:
    """One line of JSON for the screen."""
    print(json.dumps({"event": "batch", **asdict(stats)}), flush=True)  # noqa: T201


if __name__ == "__main__":
    found = load_settings()  # from RELAY_* variables
    configure_logging(found.daemon)
    run_on(found.daemon.event_loop, main(found))
