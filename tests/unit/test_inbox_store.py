"""The cursors of a transaction: its statements are told of the same aggregates once, and lock them in one order."""

from __future__ import annotations

from typing import Any, cast

import pytest

from relay.inbox import store
from relay.inbox.failures import CommitFailed
from relay.inbox.sequencer import Cursor, Key
from relay.inbox.store import Store, columns
from relay.postgres import arrays
from relay.postgres.connect import Connection

ONE, TWO, THREE = [("shop", "order", name) for name in ("1", "2", "3")]


class Known:
    """A connection to a database that knows these cursors; what its statements were told of aggregates."""

    def __init__(self, *keys: Key) -> None:
        self._keys = keys
        self.tids = ""  # which rows were written
        self.written = 2
        self.transaction_id = "1"
        self.told: list[tuple[Any, ...]] = []

    async def fetch(self, statement: str, consumer: str, *arguments: Any, timeout: float) -> list[tuple[Any, ...]]:
        self.told.append(arguments)
        if "FOR UPDATE" in statement:
            return [
                (place, 1, b"d", False, f"(0,{name})", "1")
                for place, name in enumerate(_names(arguments), 1)
                if name in self._known_names
            ]
        return [
            ("shop", "order", name, f"(0,{name})", "1") for name in _names(arguments) if name not in self._known_names
        ]

    async def fetchrow(self, statement: str, consumer: str, *arguments: Any) -> dict[str, Any]:
        self.told.append(arguments[:4])
        self.tids = arguments[4]
        return {"transaction_id": self.transaction_id, "held": [], "written": self.written}

    @property
    def _known_names(self) -> set[str]:
        return {key[2] for key in self._keys}


def _names(arguments: tuple[Any, ...]) -> list[str]:
    return str(arguments[2]).strip('{"}').split('","')


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[list[Key]]:
    """For which keys columns were made, of some."""
    found: list[list[Key]] = []

    def making(keys: list[Key]) -> store.Columns:
        if keys:
            found.append(list(keys))
        return columns(keys)

    monkeypatch.setattr(store, "columns", making)
    return found


async def test_aggregates_that_are_known_are_put_into_columns_once(made: list[list[Key]]) -> None:
    database = Known(ONE, TWO)
    opened = Store(cast("Connection", database), "billing")
    cursors = await opened.lock_cursors([TWO, ONE])
    await opened.write_cursors(cursors, look=True)
    assert made == [[ONE, TWO]]
    assert database.told == [columns([ONE, TWO])] * 2  # lock, write


async def test_every_statement_is_told_of_the_aggregates_that_it_is_about(made: list[list[Key]]) -> None:
    database = Known(ONE, THREE)
    opened = Store(cast("Connection", database), "billing")
    cursors = await opened.lock_cursors([THREE, TWO, ONE])
    await opened.write_cursors({THREE: cursors[THREE], TWO: Cursor(1)}, look=True)
    assert database.told == [columns([ONE, TWO, THREE]), columns([TWO]), columns([THREE, TWO])]  # lock, create, write


async def test_cursors_are_written_where_they_were_locked_or_created() -> None:
    database = Known(ONE, THREE)
    opened = Store(cast("Connection", database), "billing")
    cursors = await opened.lock_cursors([THREE, TWO, ONE])
    await opened.write_cursors({THREE: cursors[THREE], TWO: Cursor(1)}, look=True)
    assert database.tids == arrays.texts(["(0,3)", "(0,2)"])


async def test_rows_that_were_moved_although_they_are_locked_are_noticed() -> None:
    database = Known(ONE, TWO)
    opened = Store(cast("Connection", database), "billing")
    cursors = await opened.lock_cursors([ONE, TWO])
    database.written = 1
    with pytest.raises(CommitFailed, match="were changed inside"):
        await opened.write_cursors(cursors, look=True)


async def test_rows_that_are_not_there_in_another_transaction_are_for_who_compares_the_transactions() -> None:
    database = Known(ONE, TWO)
    opened = Store(cast("Connection", database), "billing")
    cursors = await opened.lock_cursors([ONE, TWO])
    database.written, database.transaction_id = 0, "2"
    assert await opened.write_cursors(cursors, look=True) == []
    assert (opened.locked_in, opened.written_in) == ("1", "2")


async def test_one_that_seems_to_be_new_is_created_at_once() -> None:
    database = Known()
    assert await Store(cast("Connection", database), "billing").lock_cursors([ONE], is_new=True) == {ONE: Cursor()}
    assert len(database.told) == 1


async def test_one_that_seems_to_be_new_and_exists_is_locked() -> None:
    database = Known(ONE)
    assert await Store(cast("Connection", database), "billing").lock_cursors([ONE], is_new=True) == {
        ONE: Cursor(1, b"d", blocked=False, has_held=True)
    }
    assert len(database.told) == 2  # create, lock


async def test_of_several_that_seem_to_be_new_those_that_exist_are_locked_before_one_is_created() -> None:
    database = Known(TWO)
    opened = Store(cast("Connection", database), "billing")
    assert await opened.lock_cursors([ONE, TWO], is_new=True) == await opened.lock_cursors([ONE, TWO])
    assert database.told == [columns([ONE, TWO]), columns([ONE])] * 2  # lock, create


async def test_cursors_come_in_the_order_in_which_they_are_locked_also_those_that_are_created() -> None:
    opened = Store(cast("Connection", Known(ONE, THREE)), "billing")
    assert list(await opened.lock_cursors([THREE, TWO, ONE])) == [ONE, TWO, THREE]
