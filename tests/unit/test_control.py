"""Control messages survive the wire, and nothing else is taken for one: whatever arrives is a value or NotAnEvent."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.control import (
    GONE,
    MARKS,
    MAX_CONTROL_BYTES,
    MAX_MARKS,
    MAX_RANGES,
    REPAIR,
    Gone,
    Mark,
    Marks,
    Range,
    RepairRequest,
    gone_message,
    is_control,
    marks_message,
    repair_message,
    to_control,
    to_repair_request,
)
from relay.message import CONTENT_DIGEST, MAX_SEQUENCE, Delivery, Message, NotAnEvent, content_digest, to_event
from tests.harness.deliveries import delivered

NOW = datetime(2026, 1, 1, tzinfo=UTC)

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
ids = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=100)
numbers = st.integers(1, MAX_SEQUENCE - 1)
ranges = st.builds(lambda kind, name, ends: Range(kind, name, *sorted(ends)), names, ids, st.tuples(numbers, numbers))
marks = st.builds(Mark, names, ids, numbers)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)


def signed(kind: str, body: bytes, source: Any = "shop") -> Delivery:
    """A control message with any body, whose digest is right."""
    digest = content_digest(kind, "application/json", body).hex()
    empty = Message(
        message_id="m",
        event_type=kind,
        source=source,
        content_type="application/json",
        occurred_at=NOW,
        routing_key="k",
        headers={CONTENT_DIGEST: f"sha256:{digest}"},
        body=body,
    )
    return delivered(empty)


def read(delivery: Delivery) -> object:
    return to_repair_request(delivery) if delivery.event_type == REPAIR else to_control(delivery)


@given(st.lists(ranges, min_size=1, max_size=5), names, names)
def test_a_request_arrives_as_it_was_sent(asked: list[Range], consumer: str, queue: str) -> None:
    request = RepairRequest(consumer=consumer, reply_to=f"q{queue}", ranges=tuple(asked))
    assert to_repair_request(delivered(repair_message(request, source="shop", at=NOW))) == request


@given(st.lists(ranges, min_size=1, max_size=5), st.sampled_from(["not_retained", "unknown", "beyond"]))
def test_an_answer_arrives_as_it_was_sent(asked: list[Range], reason: Any) -> None:
    gone = Gone(source="shop", reason=reason, ranges=tuple(asked))
    assert to_control(delivered(gone_message(gone, reply_to="q", at=NOW))) == gone


@given(st.lists(marks, min_size=1, max_size=5), st.booleans())
def test_marks_arrive_as_they_were_sent(told: list[Mark], retained: bool) -> None:
    sent = Marks(source="shop", marks=tuple(told), retained=retained)
    assert to_control(delivered(marks_message(sent, routing_key="order.Paid", at=NOW))) == sent


@given(st.sampled_from([REPAIR, GONE, MARKS]), junk)
def test_a_body_that_is_json_and_something_else_is_refused_and_nothing_but_refused(kind: str, content: Any) -> None:
    with pytest.raises(NotAnEvent):
        read(signed(kind, json.dumps(content).encode()))


@given(st.sampled_from([REPAIR, GONE, MARKS]), st.binary(max_size=200))
def test_a_body_of_any_bytes_is_refused(kind: str, body: bytes) -> None:
    with pytest.raises(NotAnEvent):
        read(signed(kind, body))


@given(
    st.sampled_from([REPAIR, GONE, MARKS]),
    st.lists(st.lists(junk, max_size=6) | junk, min_size=1, max_size=3),
)
def test_members_of_any_kind_are_refused_or_are_what_they_say(kind: str, members: list[Any]) -> None:
    content = {"consumer": "c", "reply_to": "q", "reason": "unknown", "ranges": members, "marks": members}
    delivery = signed(kind, json.dumps(content).encode())
    try:
        value = read(delivery)
    except NotAnEvent:
        return
    found = value.marks if isinstance(value, Marks) else value.ranges  # type: ignore[attr-defined]
    assert [list(vars_of(one)) for one in found] == members


def vars_of(value: Any) -> list[Any]:
    return [getattr(value, name) for name in value.__dataclass_fields__]


REQUEST: dict[str, Any] = {"consumer": "c", "reply_to": "q", "ranges": [["order", "1", 1, 2]]}
HOSTILE: dict[str, Callable[[], Delivery]] = {
    "nested_deeper_than_the_stack": lambda: signed(REPAIR, b"[" * 100_000),
    "a_number_of_a_million_digits": lambda: signed(MARKS, b'{"marks": [["o", "1", ' + b"9" * 1_000_000 + b"]]}"),
    "a_whole_number_as_a_float": lambda: signed(MARKS, b'{"marks": [["o", "1", 1.0]]}'),
    "true_as_a_number": lambda: signed(MARKS, b'{"marks": [["o", "1", true]]}'),
    "retained_as_a_number": lambda: signed(MARKS, b'{"marks": [["o", "1", 1]], "retained": 0}'),
    "zero": lambda: signed(MARKS, b'{"marks": [["o", "1", 0]]}'),
    "the_last_bigint": lambda: signed(MARKS, b'{"marks": [["o", "1", %d]]}' % MAX_SEQUENCE),
    "a_lone_surrogate": lambda: signed(MARKS, rb'{"marks": [["o", "\ud800", 1]]}'),
    "nul": lambda: signed(MARKS, rb'{"marks": [["o", "\u0000", 1]]}'),
    "an_id_that_is_too_long": lambda: signed(MARKS, b'{"marks": [["o", "' + b"x" * 513 + b'", 1]]}'),
    "too_many_marks": lambda: signed(MARKS, json.dumps({"marks": [["o", "1", 1]] * (MAX_MARKS + 1)}).encode()),
    "no_marks": lambda: signed(MARKS, b'{"marks": []}'),
    "backwards": lambda: changed(ranges=[["order", "1", 2, 1]]),
    "too_many_ranges": lambda: changed(ranges=[["order", "1", 1, 1]] * (MAX_RANGES + 1)),
    "the_brokers_own_queue": lambda: changed(reply_to="amq.rabbitmq.reply-to.x"),
    "a_queue_name_that_is_too_long": lambda: changed(reply_to="q" * 256),
    "no_consumer": lambda: changed(consumer=None),
    "an_unknown_reason": lambda: signed(GONE, b'{"reason": "because", "ranges": [["o", "1", 1, 1]]}'),
    "too_large": lambda: signed(MARKS, b" " * (MAX_CONTROL_BYTES + 1)),
    "another_content_than_the_digest_says": lambda: changed()._replace(body=b"{}"),
    "no_digest": lambda: changed()._replace(headers={}),
    "a_digest_of_another_kind": lambda: changed()._replace(headers={CONTENT_DIGEST: 1}),
    "a_content_type_that_is_no_text": lambda: changed()._replace(content_type="\ud800"),
    "no_sender": lambda: changed()._replace(source=None),
    "an_event": lambda: changed()._replace(event_type="OrderPaid"),
}


def changed(**values: Any) -> Delivery:
    return signed(REPAIR, json.dumps(REQUEST | values).encode())


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused(name: str) -> None:
    delivery = HOSTILE[name]()
    with pytest.raises(NotAnEvent):
        to_control(delivery) if is_control(delivery) else to_repair_request(delivery)


def test_members_that_a_later_version_adds_are_ignored() -> None:
    assert to_repair_request(changed(priority=7)).ranges == (Range("order", "1", 1, 2),)


def test_an_older_inbox_takes_a_control_message_for_an_event_without_order_that_nobody_handles() -> None:
    message = marks_message(Marks(source="shop", marks=(Mark("order", "1", 3),)), routing_key="order.Paid", at=NOW)
    event = to_event(delivered(message))
    assert (event.seq, event.aggregate, event.event_type) == (None, None, MARKS)
