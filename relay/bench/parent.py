"""What a child knows of who started it, and how it measures itself."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from types import TracebackType
from typing import Any, Self

from relay.bench.proc import peak_rss_mib


class Meter:
    """Wall clock and processor time of this process between two moments."""

    def __init__(self) -> None:
        self.seconds = self.cpu_s = 0.0
        self._wall = self._cpu = 0.0

    def start(self) -> None:
        """From here."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """To here; may be called again, the last time counts."""
        self.seconds, self.cpu_s = time.perf_counter() - self._wall, time.process_time() - self._cpu

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class Parent:
    """Who started us, at the other end of our standard input and output."""

    def __init__(self, lines: asyncio.StreamReader) -> None:
        self._words: asyncio.Queue[str] = asyncio.Queue()
        self._lines = lines
        self._listening = asyncio.create_task(self._listen())

    async def first_line(self) -> dict[str, Any]:
        """What to do."""
        found: dict[str, Any] = json.loads(await self.word())
        return found

    async def word(self) -> str:
        """The next word."""
        return await self._words.get()

    async def go(self) -> None:
        """Tell that all is prepared, and wait until the measured part may begin."""
        self.tell(ready=True)
        while await self.word() != "go":
            pass

    def tell(self, **values: Any) -> None:
        """A line of figures. Blocks while the pipe is full: only after the measured part."""
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()

    def tell_measured(self, meter: Meter, *, events: int, **values: Any) -> None:
        """The figures that every role has."""
        self.tell(events=events, seconds=meter.seconds, cpu_s=meter.cpu_s, rss_mib=peak_rss_mib(), **values)

    async def _listen(self) -> None:
        while line := await self._lines.readline():
            self._words.put_nowait(line.decode().strip())
        os._exit(1)  # whoever started us is gone, whichever way: what we do is of no use to anybody
