"""A proxy before PostgreSQL that reads messages: it can cut a client off at a statement, before it is run or before it is answered."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from tests.faults.lab.link import Link
from tests.faults.lab.proxy import Bites, TcpProxy
from tests.faults.lab.statements import (
    STARTUP,
    Message,
    Splitter,
    Statements,
    asks_for_encryption,
)

Side = Literal["request", "answer"]


@dataclass(slots=True, kw_only=True)
class Trap(Bites):
    """What is to happen at a statement."""

    pattern: re.Pattern[str]
    after: re.Pattern[str] | None
    side: Side
    left: int | None  # times that it still bites; None: always
    silences: bool  # instead of cutting

    def matches(self, text: str, transaction: list[str]) -> bool:
        """True for a statement that is run after these in its transaction."""
        return (
            self.left != 0
            and self.pattern.search(text) is not None
            and (self.after is None or any(self.after.search(earlier) for earlier in transaction))
        )


class PostgresProxy(TcpProxy):
    """Clients connect to PostgreSQL through it. Encrypted sessions pass unread, cancel requests pass.

    `seen` counts statements that were run (statement), and connections.
    """

    def __init__(self, upstream_port: int) -> None:
        super().__init__(upstream_port)
        self._traps: list[Trap] = []

    def link(self) -> Link:
        """See TcpProxy."""
        return PostgresLink(self)

    @asynccontextmanager
    async def cutting_at(
        self, pattern: str, side: Side = "request", times: int | None = 1, *, after: str | None = None
    ) -> AsyncIterator[Bites]:
        """A client that runs a matching statement is cut off. Counts cuts.

        "request": the server never gets the statement. "answer": it has run it, and the client does not learn how it went (an
        error is passed on, and does not count). `after`: only in a transaction that has run a statement which matches this.
        """
        async with self._trap(pattern, after, side, times, silences=False) as trap:
            yield trap

    @asynccontextmanager
    async def black_holing_at(
        self, pattern: str, side: Side = "request", times: int | None = 1, *, after: str | None = None
    ) -> AsyncIterator[Bites]:
        """The same, but the session goes silent instead of being cut; until the mode ends the server thinks that it lives."""
        async with self._trap(pattern, after, side, times, silences=True) as trap:
            try:
                yield trap
            finally:
                if self.hole is None:
                    for link in list(self.links):
                        link.settle()

    @asynccontextmanager
    async def _trap(
        self, pattern: str, after: str | None, side: Side, times: int | None, *, silences: bool
    ) -> AsyncIterator[Trap]:
        flags = re.IGNORECASE
        trap = Trap(
            pattern=re.compile(pattern, flags),
            after=None if after is None else re.compile(after, flags),
            side=side,
            left=times,
            silences=silences,
        )
        self._traps.append(trap)
        try:
            yield trap
        finally:
            self._traps.remove(trap)

    def trap_at(self, text: str, transaction: list[str]) -> Trap | None:
        """The trap that this statement springs; taken once of the times that it bites."""
        self.seen["statement"] += 1
        for trap in self._traps:
            if trap.matches(text, transaction):
                if trap.left is not None:
                    trap.left -= 1
                return trap
        return None


class PostgresLink(Link):
    """One connection to PostgreSQL."""

    def __init__(self, proxy: PostgresProxy) -> None:
        super().__init__(proxy)
        self._postgres = proxy
        self._client_messages = Splitter(starts=True)
        self._server_messages = Splitter(starts=False)
        self._statements = Statements()
        self._opaque = False
        self._sprung: Trap | None = None  # at the answer that is awaited
        self._withheld: list[bytes] = []  # of it

    def from_client(self, data: bytes) -> bytes:
        """See Link."""
        kept: list[bytes] = []
        while not self._opaque:
            whole, messages = self._client_messages.feed(data)
            data = b""
            kept.append(whole[: self._look(messages, len(whole))])
            if not messages or messages[-1].kind != STARTUP:
                return b"".join(kept)
        return b"".join(kept) + self._client_messages.rest() + data

    def from_server(self, data: bytes) -> bytes:
        """See Link."""
        kept: list[bytes] = []
        while not self._opaque:
            whole, messages = self._server_messages.feed(data)
            data = b""
            if messages and messages[0].kind == STARTUP:
                self._opaque = whole != b"N"
                kept.append(whole)
                continue
            kept.append(whole if self._sprung is None else self._withhold(self._sprung, whole, messages))
            return b"".join(kept)
        return b"".join(kept) + self._server_messages.rest() + data

    def _look(self, messages: list[Message], end: int) -> int:
        """How much of these goes on to the server."""
        for message in messages:
            if message.kind == STARTUP:
                self._start(message)
            elif (text := self._statements.run_by(message)) is not None:
                trap = self._postgres.trap_at(text, self._statements.in_transaction)
                self._statements.note(text)
                if trap is not None and trap.side == "request":
                    self._bite(trap)
                    return message.start
                self._sprung = self._sprung or trap
        return end

    def _start(self, message: Message) -> None:
        if asks_for_encryption(message.data):
            self._server_messages.expects_answer = True
        else:  # after a CancelRequest nothing follows
            self._client_messages.starting = False

    def _withhold(self, trap: Trap, whole: bytes, messages: list[Message]) -> bytes:
        """The answer is complete when the server is ready for the next statement: until then it may not have committed."""
        self._withheld.append(whole)
        for message in messages:
            if message.kind == b"E":
                self._sprung = None
                if trap.left is not None:
                    trap.left += 1
                passed, self._withheld = b"".join(self._withheld), []
                return passed
            if message.kind == b"Z":
                self._sprung = None
                self._withheld.clear()
                self._bite(trap)
                break
        return b""

    def _bite(self, trap: Trap) -> None:
        trap.count += 1
        if trap.silences:
            self.fall_silent()
        else:
            self.doomed = "reset"
