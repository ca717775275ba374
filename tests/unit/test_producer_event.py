from __future__ import annotations

import enum
import json
import math
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import InputError
from relay.producer import JsonText, NewEvent
from relay.producer.payload import MAX_DEPTH

GOOD: dict[str, Any] = {"aggregate_type": "order", "aggregate_id": "42", "event_type": "OrderPaid", "payload": {"a": 1}}


def event(**changed: Any) -> NewEvent:
    return NewEvent(**{**GOOD, **changed})


def without_payload(**changed: Any) -> NewEvent:
    fields = {**GOOD, **changed}
    del fields["payload"]
    return NewEvent(**fields)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def cyclic() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


REFUSED: list[tuple[str, Any, str]] = [
    ("event_type", "", "not a name"),
    ("event_type", "Order Paid", "not a name"),
    ("event_type", "OrderPaid\n", "not a name"),
    ("event_type", "x" * 101, "not a name"),
    ("event_type", "relay.tombstone", "relay's own"),
    ("event_type", None, "NoneType, not str"),
    ("aggregate_type", ".order", "not a name"),
    ("aggregate_type", "\0", "NUL"),
    ("aggregate_type", None, "give both, or neither"),
    ("aggregate_id", 42, r"convert it with str\(...\)"),
    ("aggregate_id", "", "leave it out"),
    ("aggregate_id", "é" * 257, "514 bytes"),
    ("aggregate_id", "a\0b", "NUL"),
    ("aggregate_id", "a\ud800", "lone surrogate"),
    ("routing_key", "k" * 256, "1 to 255"),
    ("routing_key", "\udfff", "lone surrogate"),
    ("content_type", "text/plain\n", "printable ASCII"),
    ("content_type", "x" * 101, "printable ASCII"),
    ("seq", 0, "1 to 2\\^63"),
    ("seq", 2**63, "1 to 2\\^63"),
    ("seq", True, "bool, not int"),
    ("payload", {"a": [{"b": "x\0"}]}, "NUL"),
    ("payload", {"a": [{"b\0": 1}]}, "NUL"),
    ("payload", {"a": [{"b": "\ud800"}]}, "lone surrogate"),
    ("payload", {"\udc00": 1}, "lone surrogate"),
    ("payload", math.nan, "NaN or Infinity"),
    ("payload", [-math.inf], "NaN or Infinity"),
    ("payload", {1: "a"}, "only str keys"),
    ("payload", Decimal("1.5"), "Decimal"),
    ("payload", {"at": datetime.now(UTC)}, "datetime"),
    ("payload", b"bytes", "bytes"),
    ("payload", nested(MAX_DEPTH + 1), "nested deeper"),
    ("payload", nested(200_000), "nested deeper"),
    ("payload", cyclic(), "contains itself"),
    ("payload", 10**5000, "4200 digits"),
    ("payload", "x" * (16 * 1024 * 1024 - 1), "16 MiB"),
    ("payload", JsonText("{"), "not valid JSON"),
    ("payload", JsonText("NaN"), "NaN"),
    ("payload", JsonText("1e400"), "double"),
    ("payload", JsonText("1e-400"), "double"),
    ("payload", JsonText("0e-20000"), "double"),
    ("payload", JsonText("0." + "1" * 20_000), "1000 characters"),
    ("payload", JsonText("1" * 5000), "4200 digits"),
    ("payload", JsonText('{"a": 1, "a": 2}'), "same key twice"),
    ("payload", JsonText('"\\u0000"'), "NUL"),
    ("payload", JsonText('"\\ud800"'), "lone surrogate"),
    ("payload", JsonText("[" * 100_000), "nested deeper"),
    ("body", b"x", "both were given"),
    ("headers", ["a"], "not a mapping"),
    ("headers", {"": 1}, "1 to 128"),
    ("headers", {"a b": 1}, "1 to 128"),
    ("headers", {"é": 1}, "1 to 128"),
    ("headers", {"x" * 129: 1}, "1 to 128"),
    ("headers", {1: 1}, "1 to 128"),
    ("headers", {"x-sequence": 1}, "relay's own"),
    ("headers", {"x-relay-anything": 1}, "relay's own"),
    ("headers", {"a": 1.5}, "float"),
    ("headers", {"a": None}, "NoneType"),
    ("headers", {"a": 2**63}, "64 bits"),
    ("headers", {"a": "\0"}, "NUL"),
    ("headers", {"a": "\ud800"}, "lone surrogate"),
    ("headers", {"a": "x" * 16384}, "limit is 16384"),
]


@pytest.mark.parametrize(("field", "value", "says"), REFUSED, ids=[f"{field}-{says}" for field, _, says in REFUSED])
def test_a_bad_field_is_refused_by_name_with_the_event_and_what_to_do(field: str, value: object, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        event(**{field: value})
    named = "payload" if field == "body" else field
    assert str(caught.value).startswith(f"{named}: ")
    assert "(event " in str(caught.value)
    str(caught.value).encode()  # can be printed anywhere


def test_neither_payload_nor_body_is_refused() -> None:
    with pytest.raises(InputError, match=r"payload: .* neither was given"):
        without_payload()


@pytest.mark.parametrize("body", ["text", bytearray(b"x"), memoryview(b"x")])
def test_a_body_must_be_bytes_that_nobody_can_change(body: object) -> None:
    with pytest.raises(InputError, match=r"body: .*not bytes"):
        without_payload(body=body)


def test_a_body_over_16_mib_is_refused_and_one_of_16_mib_is_not() -> None:
    assert without_payload(body=bytes(16 * 1024 * 1024)).payload_json is None
    with pytest.raises(InputError, match=r"body: .*16 MiB"):
        without_payload(body=bytes(16 * 1024 * 1024 + 1))


def test_a_seq_needs_an_aggregate() -> None:
    with pytest.raises(InputError, match=r"seq: .*without an aggregate_id"):
        event(aggregate_id=None, seq=1)


@pytest.mark.parametrize("payload", [None, False, 0, "", [], {}])
def test_a_payload_that_is_false_or_null_is_a_payload(payload: object) -> None:
    assert json.loads(event(payload=payload).payload_json or "") == payload


def test_an_event_keeps_the_payload_that_it_was_made_with() -> None:
    payload, headers = {"a": 1}, {"traceparent": "00-1"}
    made = event(payload=payload, headers=headers)
    payload["a"] = 2
    headers["traceparent"] = "00-2"
    assert made.payload_json == '{"a":1}'
    assert made.headers_json == '{"traceparent": "00-1"}'


def test_nothing_of_the_content_is_shown() -> None:
    made = event(payload={"card": "4111"}, headers={"token": "4111"})
    assert "4111" not in repr(made)
    assert "4111" not in repr(without_payload(body=b"4111"))
    with pytest.raises(InputError) as caught:
        event(payload={"4111": "4111\0"})
    assert "4111" not in str(caught.value)


def test_json_text_is_kept_to_the_digit() -> None:
    text = '{"amount": 12.3400000000000000000001}'
    assert event(payload=JsonText(text)).payload_json == text


def test_enums_of_text_and_number_are_their_values() -> None:
    colour = enum.StrEnum("colour", {"RED": "red"})
    assert event(payload={"c": colour["RED"]}).payload_json == '{"c":"red"}'


def test_the_same_event_is_equal_and_has_a_hash() -> None:
    assert event() == event()
    assert hash(event()) == hash(event())


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # with NUL and surrogates
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(ANY_JSON)
def test_a_payload_is_refused_or_comes_back_from_its_text(payload: object) -> None:
    try:
        made = event(payload=payload)
    except InputError as error:
        refusal = str(error)
    else:
        assert json.loads(made.payload_json or "") == payload
        return
    assert refusal.startswith("payload: ")


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "sqlalchemy", "django"])
def test_a_driver_that_is_not_installed_is_missed_by_its_own_module_only(driver: str) -> None:
    others = [d for d in ("asyncpg", "psycopg", "sqlalchemy", "django") if d != driver]
    program = (
        f"import sys; sys.modules[{driver!r}] = None\nimport relay.producer\n"
        + "".join(f"import relay.producer.{other}\n" for other in others)
        + f"try:\n    import relay.producer.{driver}\nexcept ImportError: print('missed')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "missed\n"
