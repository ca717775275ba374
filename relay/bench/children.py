"""relay's own part in processes of its own, so that its processor time and memory can be told apart from the benchmark's.

A child is `python -m relay.bench.child LOOP`. It reads one line of JSON (what to do, with the settings: secrets never appear
on a command line), tells `ready`, does the measured part when it is told `go`, and tells a line of figures. It ends when its
standard input does, so none outlives the benchmark, whichever way that one ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import IO, Any

from pydantic import SecretStr

from relay.bench.figures import MeasurementFailed
from relay.event_loop import EventLoop
from relay.settings import Settings

ANSWER_TIMEOUT_S = 600.0
"""Longest measured part: a stage that takes longer has too many events for this machine."""

_LINE_BYTES = 256 * 1024 * 1024
"""Longest line of an answer: the stamps of every transaction of a stage with a rate."""

_TAIL_BYTES = 4000


class Child:
    """One process of ours that measures something."""

    def __init__(self, role: str, process: asyncio.subprocess.Process, log: IO[bytes]) -> None:
        self._role = role
        self._process = process
        self._log = log

    async def tell(self, word: str) -> None:
        """Send a word: go, count or stop."""
        assert self._process.stdin is not None  # noqa: S101
        self._process.stdin.write(word.encode() + b"\n")
        try:
            await self._process.stdin.drain()
        except ConnectionError:
            raise await self._ended() from None

    async def answer(self, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """The next line of figures. Raises MeasurementFailed with the end of its log when there is none."""
        assert self._process.stdout is not None  # noqa: S101
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise MeasurementFailed(f"{self._role}: no answer after {timeout_s:g} s\n{self._tail()}") from None
        if not line:
            raise await self._ended()
        found: dict[str, Any] = json.loads(line)
        return found

    async def ask(self, word: str, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """Send a word and wait for the answer."""
        await self.tell(word)
        return await self.answer(timeout_s)

    async def end(self) -> None:
        """Kill it if it is still there."""
        if self._process.returncode is None:
            self._process.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()

    async def _ended(self) -> MeasurementFailed:
        code = await self._process.wait()
        return MeasurementFailed(f"{self._role} ended by itself with exit code {code}\n{self._tail()}")

    def _tail(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return self._log.read().decode(errors="replace").strip()


@asynccontextmanager
async def child(role: str, settings: Settings, *, event_loop: EventLoop, **spec: Any) -> AsyncIterator[Child]:
    """A process in its role, ready; killed at the end if it has not ended."""
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "relay.bench.child", event_loop),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=_environment(),
            start_new_session=True,  # a Ctrl-C on the terminal is the benchmark's to handle
            limit=_LINE_BYTES,
        )
        made = Child(role, process, log)
        try:
            await made.tell(json.dumps({"role": role, "settings": revealed(settings), **spec}))
            await made.answer()
            yield made
        finally:
            await made.end()


def revealed(settings: Settings) -> dict[str, Any]:
    """The settings as JSON, secrets included."""

    def plain(value: Any) -> Any:
        if isinstance(value, SecretStr):
            return value.get_secret_value()
        return {name: plain(inner) for name, inner in value.items()} if isinstance(value, dict) else value

    found: dict[str, Any] = plain(settings.model_dump())
    return found


def _environment() -> dict[str, str]:
    """Nothing of the caller's settings: they come in the first line."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "PG"))}
