"""What goes over the wire, beside pamqp: the same message in each property, every type, every size; and what is refused."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pamqp import body as pamqp_body
from pamqp import commands, frame, header

from relay.message import (
    AGGREGATE_ID,
    AGGREGATE_TYPE,
    CONTENT_DIGEST,
    MAX_BODY_BYTES,
    MAX_SEQUENCE,
    SEQUENCE,
    Message,
    to_message,
)
from relay.rabbitmq.contract import Refused
from relay.rabbitmq.refusals import HEADER_BYTES, unsendable
from relay.rabbitmq.stock_publisher import _amqp
from relay.rabbitmq.wire import encoding
from relay.rabbitmq.wire.encoding import Encoder, Unencodable
from tests.unit.test_parking import TEMPLATE

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
FRAME = 131072 - 8


def message(**changes: Any) -> Message:
    given_: dict[str, Any] = {
        "message_id": "id-1",
        "event_type": "Paid",
        "source": "shop",
        "content_type": "application/json",
        "occurred_at": NOON,
        "routing_key": "order.Paid",
        "headers": {
            "x-aggregate-type": "order",
            "x-aggregate-id": "é",
            "x-sequence": 7,
            "x-content-digest": "sha256:0",
        },
        "body": b"{}",
    }
    return Message(**(given_ | changes))


def ours(*values: Any) -> dict[str, Any]:
    """Headers as relay.message.to_message gives them, in its order."""
    return dict(zip((CONTENT_DIGEST, AGGREGATE_TYPE, AGGREGATE_ID, SEQUENCE), values, strict=True))


def encoder(*, max_payload: int = FRAME) -> Encoder:
    return Encoder(channel=3, exchange="relay.events", max_payload=max_payload)


class Sent:
    """Frames of one message, read by pamqp."""

    def __init__(self, octets: bytes) -> None:
        frames: list[Any] = []
        while octets:
            size, channel, found = frame.unmarshal(octets)
            assert channel == 3
            frames.append(found)
            octets = octets[size:]
        self.method, self.header, *self.bodies = frames
        assert isinstance(self.method, commands.Basic.Publish)
        assert isinstance(self.header, header.ContentHeader)
        assert all(isinstance(part, pamqp_body.ContentBody) for part in self.bodies)
        self.body = b"".join(part.value for part in self.bodies)
        self.properties = self.header.properties


def compare(sent: Sent, wanted: Message) -> None:
    method, properties = sent.method, sent.properties
    assert (method.exchange, method.routing_key) == ("relay.events", wanted.routing_key)
    assert (method.mandatory, method.immediate) == (True, False)
    assert sent.header.body_size == len(wanted.body)
    assert sent.body == wanted.body
    assert properties.delivery_mode == 2
    assert kept(properties.headers) == kept(wanted.headers)
    assert properties.timestamp == timestamp(wanted.occurred_at)
    assert properties.message_id == (wanted.message_id or None)
    assert properties.content_type == (wanted.content_type or None)
    assert properties.message_type == (wanted.event_type or None)
    assert properties.app_id == (wanted.source or None)


def timestamp(at: datetime) -> datetime:
    """To the second. After 2106 pamqp takes seconds for milliseconds."""
    seconds = (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    return datetime.fromtimestamp(seconds / 1000 if seconds > 2**32 - 1 else seconds, tz=UTC)


def kept(headers: Mapping[str, Any] | None) -> dict[str, tuple[object, type]]:
    return {
        name: (value, bool if isinstance(value, bool) else int if isinstance(value, int) else str)
        for name, value in (headers or {}).items()
    }


TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", "x" * 255, "x" * 256, "é" * 127, "é" * 128, "\ud800", "nul\0", "漢🙂"]),
)
NAMES = st.one_of(st.text(max_size=20), st.sampled_from(["x-sequence", "n" * 128, "n" * 129, "é" * 65, "\udfff"]))
NUMBERS = st.one_of(
    st.integers(-300, 300), st.integers(-(2**63), 2**63 - 1), st.sampled_from([2**63, -(2**63) - 1, 10**5000])
)
VALUES = st.one_of(TEXTS, st.text(min_size=250, max_size=260), NUMBERS, st.booleans())
ODD_VALUES = st.one_of(st.none(), st.floats(), st.binary(max_size=3), st.lists(st.integers(), max_size=2))
ANY_VALUES = st.one_of(VALUES, VALUES, VALUES, ODD_VALUES)
OURS = st.builds(  # and sometimes with what they never have
    ours,
    *(st.one_of(TEXTS, TEXTS, TEXTS, ANY_VALUES) for _ in range(3)),
    st.one_of(NUMBERS, NUMBERS, NUMBERS, ANY_VALUES),
)
HEADERS = st.one_of(st.dictionaries(NAMES, ANY_VALUES, max_size=6), OURS)
ZONES: Any = st.sampled_from([UTC, timezone(timedelta(hours=14)), timezone(timedelta(hours=-11, minutes=-30)), None])
TIMES = st.one_of(
    st.datetimes(datetime(1960, 1, 1), datetime(2300, 1, 1), timezones=ZONES),
    st.datetimes(timezones=ZONES),
    st.sampled_from([datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)]),
)
MESSAGES = st.builds(
    Message,
    message_id=TEXTS,
    event_type=TEXTS,
    source=TEXTS,
    content_type=TEXTS,
    occurred_at=st.one_of(st.just(NOON), TIMES),
    routing_key=TEXTS,
    headers=HEADERS,
    body=st.binary(max_size=300),
)


@given(MESSAGES, st.integers(8, 400))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(message(), FRAME)
@example(message(message_id="", event_type="", source="", content_type="", routing_key="", headers={}, body=b""), 8)
def test_a_message_is_read_by_pamqp_as_it_was_or_refused_in_the_words_of_the_stock_publisher(
    any_message: Message, max_payload: int
) -> None:
    sent = sent_or_refused(encoder(max_payload=max_payload), any_message)
    if isinstance(sent, Refused):
        assert sent == unsendable(any_message)
    else:
        assert unsendable(any_message) is None, "the stock publisher refuses it"
        compare(sent, any_message)
        compare(stock(any_message), any_message)
        assert all(0 < len(part.value) <= max_payload for part in sent.bodies)


def sent_or_refused(one: Encoder, any_message: Message) -> Sent | Refused:
    try:
        return Sent(one.encode(any_message))
    except Unencodable as exc:
        return exc.refused


def stock(sendable: Message) -> Sent:
    """What aio-pika sends of it, but for the microseconds: with those pamqp rounds the last second of 9999 up."""
    made = _amqp(sendable._replace(occurred_at=sendable.occurred_at.replace(microsecond=0)))
    method = commands.Basic.Publish(exchange="relay.events", routing_key=sendable.routing_key, mandatory=True)
    parts: list[Any] = [method, header.ContentHeader(0, len(made.body), made.properties)]
    if made.body:
        parts.append(pamqp_body.ContentBody(made.body))
    return Sent(b"".join(frame.marshal(part, 3) for part in parts))


@pytest.mark.parametrize("size", [0, 1, FRAME - 1, FRAME, FRAME + 1, 2 * FRAME, 2 * FRAME + 1, 1024 * 1024])
def test_a_body_is_cut_into_frames_as_large_as_allowed(size: int) -> None:
    content = bytes(n % 251 for n in range(251)) * (size // 251 + 1)
    sent = Sent(encoder().encode(message(body=content[:size])))
    assert sent.body == content[:size]
    assert [len(part.value) for part in sent.bodies] == [FRAME] * (size // FRAME) + (
        [size % FRAME] if size % FRAME else []
    )


@pytest.mark.parametrize("size", [MAX_BODY_BYTES, MAX_BODY_BYTES + 1])
def test_a_body_is_refused_above_the_limit_and_not_at_it(size: int) -> None:
    refuses_as_stock_does(message(body=bytes(size)), refuses=size > MAX_BODY_BYTES)


EAST, WEST = timezone(timedelta(hours=5)), timezone(timedelta(hours=-5))
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("a routing key of 256 bytes", {"routing_key": "é" * 128}),
    ("a message id of 256 bytes", {"message_id": "m" * 256}),
    ("an event type of 256 bytes", {"event_type": "t" * 256}),
    ("a source of 256 bytes", {"source": "s" * 256}),
    ("a content type of 256 bytes", {"content_type": "c" * 256}),
    ("a lone surrogate as a routing key", {"routing_key": "\ud800"}),
    ("a lone surrogate as a message id", {"message_id": "\ud800"}),
    ("a lone surrogate in a header", {"headers": {"x": "\ud800"}}),
    ("a lone surrogate in a header's name", {"headers": {"\ud800": 1}}),
    ("a header's name of 129 bytes", {"headers": {"n" * 129: "x"}}),
    ("a number's name of 129 bytes", {"headers": {"n" * 129: 1}}),
    ("a boolean's name of 130 bytes", {"headers": {"é" * 65: True}}),
    ("2 to the 63", {"headers": {"x": 2**63}}),
    ("less than minus 2 to the 63", {"headers": {"x": -(2**63) - 1}}),
    ("more digits than Python writes", {"headers": {"x": 10**5000}}),
    ("a float", {"headers": {"x": 0.5}}),
    ("nothing", {"headers": {"x": None}}),
    ("bytes", {"headers": {"x": b"x"}}),
    ("a table", {"headers": {"x": {}}}),
    ("a time without a zone", {"occurred_at": datetime(2026, 1, 1)}),
    ("the year 1", {"occurred_at": datetime(1, 1, 1, tzinfo=EAST)}),
    ("a moment before 1970", {"occurred_at": datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)}),
    ("1970 in the east", {"occurred_at": datetime(1970, 1, 1, 4, 59, tzinfo=EAST)}),
    ("the end of 9999 in the west", {"occurred_at": datetime(9999, 12, 31, 19, tzinfo=WEST)}),
]
ALLOWED: list[tuple[str, dict[str, Any]]] = [
    (
        "texts of 255 bytes",
        dict.fromkeys(("routing_key", "message_id", "event_type", "source", "content_type"), "x" * 255),
    ),
    ("no texts", dict.fromkeys(("routing_key", "message_id", "event_type", "source", "content_type"), "")),
    ("names of 128 bytes", {"headers": {"n" * 128: "x", "m" * 128: 1, "é" * 64: False, "": ""}}),
    ("numbers of 64 bits", {"headers": {"greatest": 2**63 - 1, "least": -(2**63)}}),
    ("as many headers as ours, of the same kinds", {"headers": {"a": "x", "b": "y", "c": "z", "d": 1}}),
    ("texts around 256 bytes", {"headers": {str(n): "x" * n for n in (0, 254, 255, 256, 257, 70_000)}}),
    ("1970", {"occurred_at": datetime(1970, 1, 1, tzinfo=UTC)}),
    ("1970 in the west", {"occurred_at": datetime(1969, 12, 31, 19, tzinfo=WEST)}),
    ("the last second of 9999", {"occurred_at": datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)}),
]


@pytest.mark.parametrize("changes", [changes for _, changes in REFUSED], ids=[name for name, _ in REFUSED])
def test_what_does_not_fit_into_amqp_is_refused(changes: dict[str, Any]) -> None:
    refuses_as_stock_does(message(**changes), refuses=True)


@pytest.mark.parametrize("changes", [changes for _, changes in ALLOWED], ids=[name for name, _ in ALLOWED])
def test_what_just_fits_into_amqp_is_sent_as_it_is(changes: dict[str, Any]) -> None:
    refuses_as_stock_does(message(**changes), refuses=False)


MANY: dict[str, dict[str, Any]] = {
    "a long text": {},
    "many numbers": {f"n{n}": n for n in range(2000)},
    "many booleans": {f"{n:x}": True for n in range(3000)},  # where the estimate is furthest from what is sent
    "many empty texts": {f"{n:x}": "" for n in range(5000)},
}


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("many", MANY.values(), ids=MANY)
def test_headers_are_refused_above_the_limit_and_not_at_it(many: dict[str, Any], over: int) -> None:
    """The estimate of `unsendable` decides, also where the encoder first thinks that it need not ask."""
    counted = sum(len(name) + 16 + (0 if value == "" else 20) for name, value in many.items())
    rest = HEADER_BYTES + over - counted - len("rest") - 16
    assert rest > 0
    refuses_as_stock_does(message(headers=many | {"rest": "x" * rest}), refuses=bool(over))


def refuses_as_stock_does(any_message: Message, *, refuses: bool) -> None:
    refused = unsendable(any_message)
    assert (refused is not None) == refuses
    if refused is None:
        compare(Sent(encoder().encode(any_message)), any_message)
        return
    with pytest.raises(Unencodable) as caught:
        encoder().encode(any_message)
    assert caught.value.refused == refused


class Size(enum.IntEnum):
    LARGE = 3


class Name(str):
    __slots__ = ()


@pytest.mark.parametrize("others", [{}, {"tenant": "acme"}], ids=["an event's headers", "with one of the producer's"])
def test_the_headers_of_an_event_are_those_of_its_row(others: dict[str, Any]) -> None:
    row = TEMPLATE._replace(aggregate_type="order", aggregate_id="é" * 256, seq=MAX_SEQUENCE, headers=others)
    wanted = to_message(row, source="shop", routing_key="order.Paid")
    compare(Sent(encoder().encode(wanted)), wanted)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [Size.LARGE, Name("x"), True, 7, "x"], ids=repr)
def test_each_of_our_headers_is_sent_as_what_it_is(place: int, value: Any) -> None:
    values: list[Any] = ["sha256:0", "order", "1", 1]
    values[place] = value
    compare(Sent(encoder().encode(message(headers=ours(*values)))), message(headers=ours(*values)))


def test_a_header_of_a_kind_of_text_or_number_is_what_it_is_a_kind_of() -> None:
    sent = Sent(encoder().encode(message(headers={"size": Size.LARGE, "name": Name("x"), "yes": True})))
    assert sent.properties.headers == {"size": 3, "name": "x", "yes": True}
    assert sent.properties.headers["yes"] is True


def test_what_is_remembered_is_bounded_and_does_not_change_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_REMEMBERED", 5)
    one = encoder()
    for n in range(60):
        name = f"n{n % 7}"
        wanted = message(
            routing_key=name,
            event_type=name,
            source=name,
            content_type=name,
            headers={name: n, name * 2: name},
            occurred_at=NOON + timedelta(seconds=n % 7),
        )
        compare(Sent(one.encode(wanted)), wanted)
        plain = wanted._replace(headers=ours("sha256:0", name, "x" * (n % 7), n))
        compare(Sent(one.encode(plain)), plain)
    memories = [memory for memory in vars(one).values() if isinstance(memory, dict)]
    assert len(memories) == 7
    assert all(1 <= len(memory) <= 5 for memory in memories)


def test_what_was_refused_once_is_refused_again_and_what_is_like_it_is_not() -> None:
    one = encoder()
    for _ in range(2):
        with pytest.raises(Unencodable):
            one.encode(message(routing_key="k" * 256))
        with pytest.raises(Unencodable):
            one.encode(message(headers={"x": 2**63}))
        compare(Sent(one.encode(message(headers={"x": 1}))), message(headers={"x": 1}))


def test_an_exchange_whose_name_is_too_long_is_a_mistake() -> None:
    with pytest.raises(LookupError):
        Encoder(channel=1, exchange="e" * 256, max_payload=FRAME)
