"""The wire contract: what goes out comes back, whatever is wrong is refused, and the ids never change."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.message import (
    AGGREGATE_ID,
    AGGREGATE_TYPE,
    CONTENT_DIGEST,
    MAX_SEQUENCE,
    OWN_HEADERS,
    SEQUENCE,
    Delivery,
    Event,
    Header,
    NotAnEvent,
    Row,
    content_digest,
    message_id,
    to_event,
    to_message,
)

NOON = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)

# What PostgreSQL can store is what a row can hold: any text but NUL and surrogates.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,99}", fullmatch=True)
header_names = st.from_regex(r"[!-~]{1,20}", fullmatch=True).filter(
    lambda n: n not in OWN_HEADERS and not n.startswith("x-")
)
header_values = st.one_of(texts, st.integers(-(2**63), MAX_SEQUENCE), st.booleans())
aggregate_ids = texts.filter(lambda t: 1 <= len(t.encode()) <= 512)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    ordered = draw(st.booleans())
    return Row(
        id=draw(st.integers(1, MAX_SEQUENCE)),
        aggregate_type=draw(names if ordered else st.none() | names),
        aggregate_id=draw(aggregate_ids) if ordered else None,
        seq=draw(st.integers(1, MAX_SEQUENCE)) if ordered else None,
        event_type=draw(names),
        content_type=draw(st.from_regex(r"[ -~]{1,100}", fullmatch=True)),
        headers=draw(st.dictionaries(header_names, header_values, max_size=4)),
        routing_key=None,
        created_at=draw(st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC))),
        body=draw(st.binary(max_size=200)),
    )


def row(**changes: Any) -> Row:
    plain = Row(
        id=7,
        aggregate_type="order",
        aggregate_id="42",
        seq=3,
        event_type="OrderPaid",
        content_type="application/json",
        headers={},
        routing_key=None,
        created_at=NOON,
        body=b'{"amount": 100}',
    )
    return plain._replace(**changes)


def delivered(row: Row, *, source: str = "shop", **changes: Any) -> Delivery:
    """What a broker makes of the message of a row."""
    message = to_message(row, source=source, routing_key="a.b")
    plain = Delivery(
        tag=1,
        redelivered=False,
        exchange="relay.events",
        routing_key=message.routing_key,
        message_id=message.message_id,
        event_type=message.event_type,
        source=message.source,
        content_type=message.content_type,
        occurred_at=message.occurred_at.replace(microsecond=0),  # AMQP's timestamp is in seconds
        headers=message.headers,
        body=message.body,
    )
    return plain._replace(**changes)


def with_headers(**headers: Any) -> Delivery:
    """The plain delivery with some of our headers replaced; None: missing."""
    plain = delivered(row())
    changed = dict(plain.headers) | {name.replace("_", "-"): value for name, value in headers.items()}
    return plain._replace(headers={name: value for name, value in changed.items() if value is not None})


@given(rows(), names)
def test_what_goes_out_comes_back(sent: Row, source: str) -> None:
    event = to_event(delivered(sent, source=source))
    assert event == Event(
        source=source,
        aggregate_type=sent.aggregate_type,
        aggregate_id=sent.aggregate_id,
        seq=sent.seq,
        event_type=sent.event_type,
        message_id=to_message(sent, source=source, routing_key="").message_id,
        content_type=sent.content_type,
        headers=sent.headers,
        occurred_at=sent.created_at.replace(microsecond=0),
        body=sent.body,
        digest=content_digest(sent.event_type, sent.content_type, sent.body),
    )
    assert event.aggregate == sent.aggregate


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
mess = st.none() | st.text(st.characters())  # lone surrogates and NUL too


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys((*sorted(OWN_HEADERS), "other"), anything)),
    mess,
    mess,
    mess,
    mess,
    st.booleans(),
)
def test_whatever_else_arrives_is_an_event_or_is_refused_with_a_reason(
    headers: dict[str, Any], id_: str | None, kind: str | None, source: str | None, content: str | None, digest: bool
) -> None:
    """A right digest lets the rest be looked at as well."""
    if digest:
        try:
            headers |= {CONTENT_DIGEST: "sha256:" + content_digest(kind or "", content or "", b"x").hex()}
        except UnicodeEncodeError:
            return
    delivery = Delivery(
        tag=1,
        redelivered=False,
        exchange="",
        routing_key="",
        message_id=id_,
        event_type=kind,
        source=source,
        content_type=content,
        occurred_at=None,
        headers=headers,
        body=b"x",
    )
    refused: NotAnEvent | None = None
    try:
        event = to_event(delivery)
    except NotAnEvent as refusal:
        refused = refusal
    if refused is not None:
        assert refused.reason in ("foreign", "malformed")
        assert refused.detail.isprintable()
        assert len(refused.detail) < 200
        return
    for text in (event.source, event.event_type, event.message_id, event.content_type, event.aggregate_id or ""):
        assert "\0" not in text
        assert len(text.encode()) <= 512
    assert (event.seq is None) == (event.aggregate_id is None)


@pytest.mark.parametrize("content_type", ["a\ud800", "a\0b", "x" * 256])
def test_a_content_type_that_cannot_be_kept_is_malformed(content_type: str) -> None:
    with pytest.raises(NotAnEvent, match="malformed: content_type"):
        to_event(delivered(row(), content_type=content_type))


@pytest.mark.parametrize(
    "changes",
    [{"body": b"{}"}, {"event_type": "OrderUnpaid"}, {"content_type": "text/plain"}, {"content_type": None}],
    ids=str,
)
def test_content_that_is_not_what_the_digest_says_is_malformed(changes: dict[str, Any]) -> None:
    with pytest.raises(NotAnEvent, match="malformed: x-content-digest does not match the content"):
        to_event(delivered(row(), **changes))


@pytest.mark.parametrize(
    "digest",
    ["", "sha256:", "sha256:00", "sha256:xyz", "md5:00", "sha256", "sha256:" + "ä" * 64, 1, True, b"sha256:", {}, []],
    ids=repr,
)
def test_a_digest_that_is_none_is_malformed(digest: object) -> None:
    with pytest.raises(NotAnEvent, match="malformed: x-content-digest"):
        to_event(with_headers(x_content_digest=digest))


@pytest.mark.parametrize(
    "seq",
    [0, -1, 2**63, -(2**63), "1", "", b"1", 1.0, True, False, [1], {"a": 1}, NOON],
    ids=repr,
)
def test_a_sequence_number_that_is_none_is_malformed(seq: object) -> None:
    with pytest.raises(NotAnEvent, match="malformed: x-sequence is"):
        to_event(with_headers(x_sequence=seq))


@pytest.mark.parametrize("seq", [1, 2, 2**31, MAX_SEQUENCE])
def test_every_whole_number_from_1_to_63_bits_is_a_sequence_number(seq: int) -> None:
    assert to_event(with_headers(x_sequence=seq)).seq == seq


@pytest.mark.parametrize("name", [AGGREGATE_TYPE, AGGREGATE_ID])
@pytest.mark.parametrize(
    "value", ["", "a\0b", "\ud800", "ä" * 257, 1, True, b"order", ["order"], {"a": "order"}], ids=ascii
)
def test_an_aggregate_that_is_none_is_malformed(name: str, value: object) -> None:
    with pytest.raises(NotAnEvent, match=f"malformed: {name}"):
        to_event(with_headers(**{name.replace("-", "_"): value}))


@pytest.mark.parametrize("missing", [AGGREGATE_TYPE, AGGREGATE_ID, SEQUENCE, CONTENT_DIGEST])
def test_a_header_of_ours_that_is_missing_is_malformed(missing: str) -> None:
    with pytest.raises(NotAnEvent, match="malformed"):
        to_event(with_headers(**{missing.replace("-", "_"): None}))


@pytest.mark.parametrize("field", ["message_id", "event_type", "source"])
@pytest.mark.parametrize("value", [None, "", "\0", "a\ud800", "x" * 256])
def test_a_property_that_is_none_is_malformed(field: str, value: str | None) -> None:
    changes: dict[str, Any] = {field: value}
    with pytest.raises(NotAnEvent, match="malformed"):
        to_event(delivered(row())._replace(**changes))


def test_a_message_whose_properties_cannot_be_read_is_malformed_and_says_why() -> None:
    unread: dict[str, Any] = dict.fromkeys(("message_id", "event_type", "source", "content_type", "occurred_at"))
    with pytest.raises(NotAnEvent, match="malformed: a property is not UTF-8"):
        to_event(delivered(row(), headers={}, fault="a property is not UTF-8", **unread))


@pytest.mark.parametrize("headers", [{}, {"x-aggregate-type": "order", "x-aggregate-id": "1"}, {"other": 1}], ids=str)
def test_a_message_without_digest_and_sequence_is_foreign(headers: dict[str, Any]) -> None:
    with pytest.raises(NotAnEvent, match="foreign: no x-content-digest header"):
        to_event(delivered(row(), headers=headers))


def test_an_event_made_of_a_delivery_is_a_frozen_value_like_one_that_was_constructed() -> None:
    """It is made without its constructor, for speed."""
    made = to_event(delivered(row(headers={"n": 1})))
    constructed = Event(**{each.name: getattr(made, each.name) for each in fields(Event)})
    assert (made, repr(made)) == (constructed, repr(constructed))
    assert replace(made, seq=4) == replace(constructed, seq=4) != made
    with pytest.raises(FrozenInstanceError):
        made.seq = 4  # type: ignore[misc]


def test_a_digest_may_be_written_in_capitals() -> None:
    digest = str(delivered(row()).headers[CONTENT_DIGEST]).removeprefix("sha256:")
    assert to_event(with_headers(x_content_digest="sha256:" + digest.upper())).digest.hex() == digest


def test_what_was_refused_once_is_refused_again() -> None:
    """What repeats in every message is checked once, and only what is right is remembered."""
    for _ in range(2):
        with pytest.raises(NotAnEvent, match="malformed: type contains NUL"):
            to_event(delivered(row(), event_type="a\0b"))


def test_what_the_broker_adds_and_what_no_producer_can_send_is_not_among_the_events_headers() -> None:
    added = {"x-delivery-count": 2, "x-death": [{"count": 1}], "x-first-death-queue": "q", "x-last-death-reason": "r"}
    foreign = {"bytes": b"x", "float": 1.5, "list": [1], "table": {}, "time": NOON, "none": None}
    own: dict[str, Header] = {"traceparent": "00-x", "n": 1, "yes": True, "x-mine": "m"}
    plain = delivered(row(headers=own))
    event = to_event(plain._replace(headers={**plain.headers, **added, **foreign}))
    assert event.headers == own


def test_a_refusal_never_shows_a_long_value_or_one_that_moves_the_cursor() -> None:
    with pytest.raises(NotAnEvent) as caught:
        to_event(with_headers(x_sequence="\x1b[2J\r\n" + "x" * 1000))
    assert len(str(caught.value)) < 150
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "source", "expected"),
    [
        ({}, "shop", "c2976bd8-10be-510a-90da-c570d3ed681f"),
        ({"seq": 4}, "shop", "fd8963a6-9dc9-534b-ae6a-2df36b9f578a"),
        ({"aggregate_id": "ä/ö\n"}, "shop", "6ea8bce6-1132-5304-a3fe-8f7d67a89192"),
        ({"seq": MAX_SEQUENCE}, "warehouse.eu", "ddbd53d7-0eb9-529a-9278-211ad35b4a96"),
        ({"aggregate_type": None, "aggregate_id": None, "seq": None}, "shop", "b4ef1f66-3a8f-550a-88be-a66ee0defcbd"),
        ({"aggregate_id": None, "seq": None}, "shop", "b4ef1f66-3a8f-550a-88be-a66ee0defcbd"),
    ],
)
def test_message_ids_are_what_they_have_always_been(changes: dict[str, Any], source: str, expected: str) -> None:
    """Literal values: consumers have stored them. A change of these is a change of the contract."""
    assert to_message(row(**changes), source=source, routing_key="").message_id == expected


def test_the_digest_is_what_it_has_always_been() -> None:
    digest = content_digest("OrderPaid", "application/json", b'{"amount": 100}')
    assert digest.hex() == "3df9bc6e34e3f3b82596e00f023441134710c68c11cceaf80e6d1a7b6101278f"
    assert to_message(row(), source="shop", routing_key="").headers[CONTENT_DIGEST] == f"sha256:{digest.hex()}"


def test_the_id_of_an_ordered_event_depends_on_its_place_only() -> None:
    first, again = row(), row(id=8, event_type="Other", body=b"other", created_at=NOON + timedelta(days=1))
    assert message_id(first, "shop", b"1") == message_id(again, "shop", b"2")


places = st.tuples(names, names, st.text("a/1.:", min_size=1, max_size=6), st.integers(1, 20))


@given(places, places)
def test_two_places_never_have_one_id(one: tuple[str, str, str, int], other: tuple[str, str, str, int]) -> None:
    def of(place: tuple[str, str, str, int]) -> str:
        source, kind, name, seq = place
        return message_id(row(aggregate_type=kind, aggregate_id=name, seq=seq), source, b"")

    assert (of(one) == of(other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("s", "order", "1/2", 3), ("s", "order", "1", 2)),
        (("s", "order", "a/1", 1), ("s", "order", "a", 1)),
        (("s", "a", "b/c", 1), ("s", "a", "b", 1)),
        (("s", "7", "x", 1), ("s", "7/x", "1", 1)),
    ],
)
def test_a_slash_in_an_aggregate_id_makes_no_collision(
    one: tuple[str, str, str, int], other: tuple[str, str, str, int]
) -> None:
    """Of an id's parts only the aggregate id can hold a slash, and a number ends it: there is one way to read it."""
    ids = {message_id(row(aggregate_type=t, aggregate_id=i, seq=n), s, b"") for s, t, i, n in (one, other)}
    assert len(ids) == 2


def test_unordered_events_never_share_an_id_with_each_other_or_with_ordered_ones() -> None:
    unordered = {"aggregate_id": None, "seq": None}
    found = {
        to_message(row(**changes), source="s", routing_key="").message_id
        for changes in (
            {},
            unordered,
            {**unordered, "id": 8},
            {**unordered, "body": b"other"},
            {**unordered, "content_type": "other"},
            {**unordered, "event_type": "Other"},
        )
    }
    assert len(found) == 6
