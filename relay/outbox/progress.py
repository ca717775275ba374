"""What a shard did: for the log, the tests and the benchmark, and what one session remembers for the next."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass(slots=True)
class Progress:
    """Counts rows; the counts only ever grow. `changed` is set whenever one does."""

    published: int = 0
    parked: int = 0
    unparked: int = 0
    pages: int = 0
    checkpoints: int = 0
    sleeps: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    # What the next session must know, because the last one broke over a row.
    careful: int = 0  # rows still to be published one at a time, to find the one that closes the channel
    careful_retry: bool = False  # the parked rows are tried alone
    unconfirmed: dict[int, int] = field(
        default_factory=dict
    )  # row id: how often it was not confirmed while others were
