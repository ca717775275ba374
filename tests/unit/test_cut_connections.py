"""A connection that was cut in the middle of an exchange raises asyncpg's InternalClientError until asyncpg has noticed: found by the
fault laboratory, where a consumer's process died of it."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr

from relay.errors import PostgresUnavailable
from relay.inbox.database import Database
from relay.inbox.figures import Figures
from relay.postgres.connect import close
from relay.settings import PostgresSettings


class Cut:
    """What is left of a connection, and the transaction that was open on it."""

    def __init__(self) -> None:
        self.terminated = 0

    async def start(self) -> None:
        """It was there when the transaction began."""

    async def execute(self, *_: object, **__: object) -> None:
        raise asyncpg.InternalClientError("cannot switch to state 11; another operation (2) is in progress")

    rollback = commit = close = execute

    def transaction(self, **_: object) -> Cut:
        return self

    def terminate(self) -> None:
        self.terminated += 1

    def is_closed(self) -> bool:
        return False

    def get_server_pid(self) -> int:
        return 1


def as_connection(cut: Cut) -> Any:
    return cut


def database_on(cut: Cut) -> Database:
    database = Database(PostgresSettings(dsn=SecretStr("postgresql://nowhere")), application="test")
    database._connection = as_connection(cut)
    return database


async def test_figures_that_cannot_be_written_on_it_are_nobodys_failure() -> None:
    figures = Figures("effects", lambda: 100.0)
    await figures.tell(as_connection(Cut()))
    assert figures.due_in_s > 0  # later


async def test_a_transaction_that_cannot_be_rolled_back_on_it_is_over_with_the_connection() -> None:
    cut = Cut()
    database = database_on(cut)
    with pytest.raises(PostgresUnavailable, match="the server"):
        async with database.transaction():
            raise asyncpg.AdminShutdownError("the server goes away")
    assert cut.terminated == 1


async def test_a_commit_on_it_ends_the_session_as_any_lost_connection_does() -> None:
    with pytest.raises(PostgresUnavailable, match="not usable"):
        async with database_on(Cut()).transaction():
            pass


async def test_closing_it_cuts_it_and_raises_nothing() -> None:
    cut = Cut()
    await close(as_connection(cut))
    assert cut.terminated == 1
