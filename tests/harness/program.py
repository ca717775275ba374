"""`python -m relay ...` as a process whose every line of log can be waited for, and the environment it is started in."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

DEADLINE_S = 40

Ended = tuple[int, str]


class Program:
    """`python -m relay ...`, and what it has said so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.log = ""
        self._reading = asyncio.create_task(self._read())
        self._more = asyncio.Condition()

    async def _read(self) -> None:
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            async with self._more:
                self.log += line.decode()
                self._more.notify_all()
        async with self._more:
            self._more.notify_all()

    async def says(self, *texts: str, times: int = 1) -> None:
        """Wait until each of the texts has been said so often."""

        def said() -> bool:
            return all(self.log.count(text) >= times for text in texts)

        async with self._more:
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await self._more.wait_for(lambda: said() or self._process.returncode is not None)
            except TimeoutError:
                pass
        assert said(), f"not said: {texts}\n{self.log[-3000:]}"

    @property
    def pid(self) -> int:
        """The process id, while it runs and after."""
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    async def ends(self) -> Ended:
        """(exit code, all that it said)."""
        async with asyncio.timeout(DEADLINE_S):
            await self._reading
            await self._process.wait()
        assert self._process.returncode is not None
        return self._process.returncode, self.log

    async def stop(self) -> Ended:
        """SIGTERM, and its end."""
        self._process.send_signal(signal.SIGTERM)
        return await self.ends()

    def kill(self) -> None:
        """kill -9, if it still runs."""
        if self._process.returncode is None:
            self._process.kill()


def environment(dsn: str, url: str, **more: str) -> dict[str, str]:
    """This process's own without any setting of relay's, and these settings (`outbox_page_rows="5"`)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "PG"))}
    ours = {
        "RELAY_SOURCE": "shop",
        "RELAY_POSTGRES_DSN": dsn,
        "RELAY_RABBITMQ_URL": url,
        "RELAY_DAEMON_BACKOFF_FIRST_S": "0.05",
        "RELAY_DAEMON_BACKOFF_MAX_S": "0.3",
        "RELAY_POSTGRES_CONNECT_TIMEOUT_S": "5",
        "RELAY_INBOX_RETRY_FIRST_S": "0.05",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return clean | ours | {f"RELAY_{name.upper()}": value for name, value in more.items()}


@asynccontextmanager
async def relay(
    folder: Path, environ: dict[str, str], *arguments: str, inside: Sequence[str] = ()
) -> AsyncIterator[Program]:
    """The program, running, and killed at the end if it still runs; `inside`: a command that runs a command."""
    program = Program(
        await asyncio.create_subprocess_exec(
            *(*inside, sys.executable, "-m", "relay", *arguments),
            env=environ,
            cwd=folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    )
    try:
        yield program
    finally:
        program.kill()
        await program.ends()


async def ended(folder: Path, environ: dict[str, str], *arguments: str) -> Ended:
    """Run it to its end."""
    async with relay(folder, environ, *arguments) as program:
        return await program.ends()


def changed(url: str, **parts: str) -> str:
    """A URL with another user, password, host (with port) or path."""
    old = urlsplit(url)
    user = parts.get("user", old.username or "")
    password = parts.get("password", old.password or "")
    host = parts.get("host", old.netloc.rpartition("@")[2])
    return urlunsplit(old._replace(netloc=f"{user}:{password}@{host}", path=parts.get("path", old.path)))
