"""relay's daemons as processes that can be killed, frozen and stalled, and that are started again as a supervisor would."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from relay.sandbox.process import KeptProcess

RESTART_S = 0.5
"""Until a daemon that has ended is started again; so does any supervisor, most of them later."""

STOP_TIMEOUT_S = 30.0
_LOOK_S = 0.05


class Daemon:
    """One of relay's commands, kept running; every process of it has the same name and the same log."""

    def __init__(self, name: str, *arguments: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.environment = _inherited() | dict(environment) | {"LAB_FOLDER": str(folder), "LAB_NAME": name}
        """Of the next start."""
        self.unasked: list[tuple[float, int]] = []  # (time, exit code) of processes that nobody had asked to end
        self.log = folder / f"{name.replace(' ', '-')}.log"
        self._command = [sys.executable, "-m", "tests.faults.lab.worker", *arguments]
        self._folder = folder
        self._process: KeptProcess | None = None
        self._asked: int | None = None  # the process that somebody ends
        self._holds = 0

    @property
    def pid(self) -> int | None:
        """Of the running process; None while there is none."""
        return self._process.pid if self._process is not None and self._process.running else None

    async def start(self) -> None:
        """Start it; does not wait until it is at work. Cancelled, it is started all the same, so that who ends it finds it."""
        starting = asyncio.create_task(
            asyncio.to_thread(
                KeptProcess, self._command, folder=self._folder / "none", log=self.log, env=self.environment
            )
        )
        try:
            self._process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._process = await starting
            raise

    async def keep(self) -> None:
        """Start it again whenever it has ended, unless it is held. Ends by cancellation."""
        while True:
            if self._is_missed:
                await self._note_end()
                await asyncio.sleep(RESTART_S)
                if self._is_missed:  # whoever held it meanwhile may have started it
                    await self.start()
            await asyncio.sleep(_LOOK_S)

    async def kill9(self) -> int:
        """SIGKILL; the exit code, -9 when that is what ended it. Quiet if it is not running."""
        return await self._end(signal.SIGKILL)

    async def terminate(self) -> int:
        """SIGTERM, and wait; the exit code. SIGKILL for one that does not end in 30 s: -9 then."""
        return await self._end(signal.SIGTERM, signal.SIGKILL)

    async def restart(self) -> None:
        """SIGTERM and a start with the environment as it is now."""
        with self.held():
            await self.terminate()
            await self.start()

    def freeze(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def stall(self, seconds: float) -> None:
        """Its event loop stands still for so long, as if a handler computed; sockets stay open, the kernel answers."""
        (self._folder / f"{self.name}.stall").write_text(str(seconds))
        self._signal(signal.SIGUSR1)

    def ask_for_tasks(self) -> None:
        """It will write the number of its tasks, see `tasks`."""
        self._signal(signal.SIGUSR2)

    @property
    def tasks(self) -> tuple[int, int] | None:
        """(pid, tasks) as it told last."""
        told = self._folder / f"{self.name}.tasks"
        if not told.exists():
            return None
        pid, tasks = told.read_text().split()
        return int(pid), int(tasks)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it nobody starts it again; whoever holds it may."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1

    def log_mark(self) -> int:
        """Where its log ends now."""
        return self.log.stat().st_size if self.log.exists() else 0

    def log_since(self, mark: int) -> str:
        """What it has logged since then."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(mark)
            return file.read().decode(errors="replace")

    @property
    def _is_missed(self) -> bool:
        return self.pid is None and not self._holds

    async def _note_end(self) -> None:
        process = self._process
        if process is not None and (code := await asyncio.to_thread(process.wait, 0)) is not None:
            if process.pid != self._asked:
                self.unasked.append((time.time(), _signed(code)))
            self._process = None

    async def _end(self, *signals: int) -> int:
        process = self._process
        if process is None:
            return 0
        self._asked = process.pid
        code = _signed(await asyncio.to_thread(lambda: process.end(*signals, timeout_s=STOP_TIMEOUT_S)))
        if self._process is process:
            self._process = None
        return code

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.signal(number)


def _signed(code: int) -> int:
    """An exit code as Python tells it: negative for a signal."""
    return 128 - code if code > 128 else code


def _inherited() -> dict[str, str]:
    """Nothing of the caller's settings may reach a daemon."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "PG", "LAB_"))}
