"""relay's daemons as real processes: they can be killed with -9, and none outlives the demo."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relay.errors import SandboxError
from relay.sandbox.process import KeptProcess

STOP_TIMEOUT_S = 25.0


class Daemon:
    """One process of `python -m MODULE ...`, started again under the same name as often as it is killed."""

    def __init__(self, name: str, module: str, *arguments: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.kills = 0  # that ended a running process
        self._command = [sys.executable, "-m", module, *arguments]
        self._folder = folder
        self._log = folder / f"{name.replace(' ', '-')}.log"
        self._environment = {**_inherited(), **environment}
        self._process: KeptProcess | None = None
        self._read = 0

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self._process is not None and self._process.running else None

    async def start(self) -> None:
        """Start the process; does not wait until it is at work."""
        self._process = await asyncio.to_thread(
            KeptProcess, self._command, folder=self._folder, log=self._log, env=self._environment
        )

    def require_running(self) -> KeptProcess:
        """Raise SandboxError with the end of its log if it is not running."""
        if self._process is None or not self._process.running:
            raise SandboxError(f"{self.name} has ended by itself; its log says:\n{self.tail()}")
        return self._process

    async def kill9(self) -> None:
        """SIGKILL, counted only when that is what ended it."""
        process = self.require_running()
        code = await asyncio.to_thread(process.end, signal.SIGKILL, timeout_s=STOP_TIMEOUT_S)
        self.kills += code == 128 + signal.SIGKILL

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL for one that does not listen. Quiet if it is not running."""
        await self._end(signal.SIGTERM, signal.SIGKILL)

    async def end(self) -> None:
        """SIGKILL, for the clearing up. Quiet if it is not running."""
        await self._end(signal.SIGKILL)

    async def _end(self, *signals: int) -> None:
        if self._process is not None and self._process.running:
            await asyncio.to_thread(self._process.end, *signals, timeout_s=STOP_TIMEOUT_S)

    def news(self) -> list[dict[str, Any]]:
        """The lines of JSON written since the last call."""
        if not self._log.exists():
            return []
        with self._log.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # a line that is being written is left for the next call
        self._read += len(whole)
        return [line for line in map(_parsed, whole.splitlines()) if line is not None]

    def tail(self) -> str:
        """The end of its log."""
        return "(no log)" if self._process is None else self._process.log_tail()


def _inherited() -> dict[str, str]:
    """Nothing of the caller's RELAY_* settings may reach a daemon of the demo."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "PG"))}


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of the log; None for one that is not ours, or was cut by a kill."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
