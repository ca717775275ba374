"""Whatever the validator accepts, PostgreSQL accepts and gives back; whatever it refuses, it refuses by name."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from relay.errors import InputError
from relay.producer import JsonText, NewEvent
from relay.producer.event import MAX_HEADERS_BYTES
from relay.producer.payload import MAX_DEPTH
from relay.producer.psycopg import emit, emit_many

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # with NUL and surrogates
NAME = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,99}", fullmatch=True) | ANY_TEXT
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
NUMBER = st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,5})?", fullmatch=True)
HEADERS = st.dictionaries(
    st.text(st.characters(codec="ascii"), max_size=6)
    | ANY_TEXT
    | st.sampled_from(["x-tag", "x-relay-a", "traceparent"]),
    ANY_TEXT | st.integers(-(2**65), 2**65) | st.booleans(),
    max_size=3,
)
FIELDS = {
    "aggregate_type": NAME,
    "aggregate_id": ANY_TEXT | st.text(min_size=100, max_size=300),
    "event_type": NAME,
    "payload": ANY_JSON | NUMBER.map(JsonText) | ANY_JSON.map(json.dumps).map(JsonText),
    "content_type": ANY_TEXT | st.text(st.characters(codec="ascii"), max_size=101),
    "headers": HEADERS,
    "routing_key": ANY_TEXT | st.text(min_size=60, max_size=260),
}
GOOD: dict[str, Any] = {"aggregate_type": "order", "aggregate_id": "42", "event_type": "OrderPaid", "payload": 1}
ONE_FIELD = st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), FIELDS[name]))


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed=st.lists(ONE_FIELD, min_size=1, max_size=3).map(dict))
@example(changed={"event_type": "relay.x"})
@example(changed={"event_type": "OrderPaid\n"})
@example(changed={"payload": JsonText("1e308")})
@example(changed={"payload": JsonText('"\\ud83d\\ude00"')})
@example(changed={"payload": 5e-324})
@example(changed={"payload": JsonText("0e-20000")})
@example(changed={"payload": JsonText("0E99999")})
@example(changed={"payload": JsonText("0e-1000")})
def test_every_text_in_every_field_is_stored_or_refused_by_name(
    link: psycopg.Connection[Any], changed: dict[str, Any]
) -> None:
    try:
        event = NewEvent(**{**GOOD, **changed})
    except InputError as error:
        event, refusal = None, str(error)
    if event is None:
        assert refusal.split(":")[0] in changed
        return
    with link.transaction(force_rollback=True):
        assert emit(link, event) == 1
        assert emit_many(link, [event, event]) == [2, 3]
        found = link.execute(
            "SELECT aggregate_type, aggregate_id, event_type, routing_key, content_type, headers FROM relay.outbox"
        ).fetchall()
        expected = (event.aggregate_type, event.aggregate_id, event.event_type, event.routing_key, event.content_type)
        assert found == [(*expected, event.headers)] * 3


@pytest.fixture
def link(database: str) -> Any:
    with psycopg.connect(database) as connection:
        yield connection


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"payload": deep(MAX_DEPTH // 2)}, id="deepest"),
        pytest.param({"payload": 10**4200}, id="longest whole number"),
        pytest.param({"payload": JsonText("0." + "1" * 998)}, id="longest fraction"),
        pytest.param({"payload": JsonText(f"0.{'0' * 300}{'1' * 695}e-7")}, id="smallest"),
        pytest.param({"payload": "x" * (16 * 1024 * 1024 - 2)}, id="largest"),
        pytest.param({"aggregate_id": "é" * 256}, id="longest id"),
        pytest.param({"routing_key": "é" * 127 + "k"}, id="longest key"),
        pytest.param(
            {"event_type": "_" * 100, "aggregate_type": "0" * 100, "content_type": "~" * 100}, id="longest names"
        ),
        pytest.param({"headers": {"!" * 128: -(2**63), "~": 2**63 - 1}}, id="headers at their limits"),
    ],
)
def test_the_largest_that_is_accepted_is_stored(link: psycopg.Connection[Any], fields: dict[str, Any]) -> None:
    assert emit(link, NewEvent(**{**GOOD, **fields})) == 1


@pytest.mark.parametrize("text", ["x", 'é"', "\n\x1f\x7f\\", "\U0001f600"])
def test_headers_are_as_large_as_postgresql_finds_them(link: psycopg.Connection[Any], text: str) -> None:
    value = text * (MAX_HEADERS_BYTES // len(json.dumps(text, ensure_ascii=False).encode()))
    while True:
        try:
            NewEvent(**GOOD, headers={"b": True, "a": value, "n": -5})
        except InputError:
            break
        value += "x"
    largest = NewEvent(**GOOD, headers={"b": True, "a": value[:-1], "n": -5})
    assert len((largest.headers_json or "").encode()) == MAX_HEADERS_BYTES
    assert emit(link, largest) == 1
