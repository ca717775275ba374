"""Events in batches from a source of lines, each batch one transaction: what `relay emit` does.

A batch is committed whole or not at all, and a Tally says at any moment, also after an error or an interrupt, what is
committed and where to go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import asyncpg

from relay.errors import InputError, PostgresError
from relay.postgres.connect import Connection
from relay.postgres.errors import FAILURES, postgres_errors
from relay.producer.asyncpg import emit, emit_many
from relay.producer.jsonl import BadLine, Line

BATCH_BYTES = 32 * 1024 * 1024
"""A batch ends at this size too: it is held in memory, here and as one statement in the server."""

_ABOUT_AN_EVENT = ("22", "23", "40001", "54")
"""SQLSTATE classes that a single event can be the cause of: data, constraints, a wrong seq, a limit."""


@dataclass(slots=True)
class Tally:
    """How far a run has come."""

    next_line: int = 1  # where to go on: the first line that is not known to be done
    events: int = 0  # committed, or with a dry run found good
    in_doubt: tuple[int, int] | None = None  # lines whose COMMIT was sent and not answered

    def done(self, batch: list[Line]) -> None:
        """A batch is committed (or found good)."""
        self.events += len(batch)
        self.next_line = batch[-1].number + 1
        self.in_doubt = None


def batches(lines: Iterable[Line], rows: int) -> Iterator[list[Line]]:
    """Lines in lists of `rows`, or shorter ones of about BATCH_BYTES, and what is left at the end."""
    batch: list[Line] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += line.size
        if len(batch) >= rows or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


async def insert_batch(connection: Connection, batch: list[Line], tally: Tally) -> None:
    """Commit a batch and note it in the tally; on any error or cancellation nothing of it is written.

    Unless the answer to COMMIT is lost: then `tally.in_doubt` says so. Raises BadLine for an event that PostgreSQL refuses,
    else a PostgresError.
    """
    try:
        with postgres_errors():
            transaction = connection.transaction()
            await transaction.start()
            try:
                await emit_many(connection, [line.event for line in batch])
            except BaseException:
                await _roll_back(transaction)
                raise
            await _commit(transaction, batch, tally)
    except PostgresError as error:
        if not (error.sqlstate or "").startswith(_ABOUT_AN_EVENT):
            raise
        raise await _culprit(connection, batch) or error from error.__cause__


async def _roll_back(transaction: asyncpg.transaction.Transaction) -> None:
    try:
        await transaction.rollback()
    except FAILURES:
        return  # the connection is broken, and its end is a rollback as well; the first error tells more


async def _commit(transaction: asyncpg.transaction.Transaction, batch: list[Line], tally: Tally) -> None:
    """COMMIT; a cancellation waits for the answer, so that an interrupted run can say what it has done."""
    tally.in_doubt = (batch[0].number, batch[-1].number)
    commit = asyncio.ensure_future(transaction.commit())
    try:
        await asyncio.shield(commit)
    except asyncio.CancelledError:
        await commit
        tally.done(batch)
        raise
    except asyncpg.PostgresError as exc:
        if not (exc.sqlstate or "08").startswith(("08", "57P")):
            tally.in_doubt = None  # PostgreSQL answered: it is rolled back
        raise
    tally.done(batch)


async def _culprit(connection: Connection, batch: list[Line]) -> InputError | None:
    """The error of the first line that PostgreSQL refuses, found by inserting one by one and rolling all of it back."""
    with postgres_errors():
        transaction = connection.transaction()
        await transaction.start()
        try:
            for line in batch:
                try:
                    await emit(connection, line.event)
                except asyncpg.PostgresError as exc:
                    if not (exc.sqlstate or "").startswith(_ABOUT_AN_EVENT):
                        raise
                    return BadLine(line.number, _refusal(exc))
        finally:
            await _roll_back(transaction)
    return None


def _refusal(exc: asyncpg.PostgresError) -> str:
    """PostgreSQL's message and hint; never its detail, which shows the row."""
    message = str(exc.args[0]).splitlines()[0]
    hint = getattr(exc, "hint", None)
    return f"PostgreSQL refused the event: {message}" + (f" ({hint})" if hint else "")
