"""Arrays given as text are the same arrays to PostgreSQL as those that asyncpg encodes, whatever is in them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.postgres import arrays
from relay.postgres.connect import connect
from relay.settings import PostgresSettings

AWKWARD = st.sampled_from(
    ["", "NULL", "null", " ", '"', "\\", '\\"', "{", "}", ",", '","', "\\x00", "\n", "\x1f", "a\tb", "Ж😀"]
)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def lists(elements: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.lists(elements, max_size=12), min_size=20, max_size=20)


@pytest.mark.parametrize(
    ("kind", "literal", "elements"),
    [
        ("text", arrays.texts, AWKWARD | TEXT | st.builds(str.__add__, TEXT, AWKWARD)),
        ("bigint", arrays.numbers, st.integers(-(2**63), 2**63 - 1)),
        ("bytea", arrays.octets, st.none() | st.binary(max_size=40)),
    ],
)
def test_postgresql_reads_the_same_array(
    kind: str, literal: Callable[[Sequence[Any]], str], elements: st.SearchStrategy[Any], database: str
) -> None:
    @settings(max_examples=25, deadline=None)
    @given(lists(elements))
    def reads(several: list[list[Any]]) -> None:
        asyncio.run(read(several))

    async def read(several: list[list[Any]]) -> None:
        connection = await connect(PostgresSettings.model_validate({"dsn": database}), application="arrays", plans={})
        try:
            for values in several:
                assert await connection.fetchval(f"SELECT $1::text::{kind}[]", literal(values)) == values
        finally:
            await connection.close()

    reads()


def test_a_text_with_nul_is_refused_and_not_taken_for_two() -> None:
    with pytest.raises(ValueError, match="NUL"):
        arrays.texts(["a\0b"])
