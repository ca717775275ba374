"""The reader of property blocks: reads what clients send as pamqp reads it, and whatever anybody sends without failing."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from pamqp import commands

from relay.message import OWN_HEADERS
from relay.rabbitmq.wire import properties
from relay.rabbitmq.wire.properties import Malformed, Properties, read

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
NEW = commands.Basic.Properties
HEADERS, TIMESTAMP, MESSAGE_ID = 0x2000, 0x0040, 0x0080


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def long(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def block(flags: int, values: bytes) -> bytes:
    return struct.pack(">H", flags) + values


def headers(*entries: bytes) -> bytes:
    return block(HEADERS, long(b"".join(entries)))


def entry(name: bytes, letter: str, value: bytes) -> bytes:
    return short(name) + letter.encode() + value


def of_a_relay(**changes: Any) -> bytes:
    values: dict[str, Any] = {
        "content_type": "application/json",
        "headers": {
            "x-aggregate-type": "order",
            "x-aggregate-id": "4711",
            "x-sequence": 2**40,
            "x-content-digest": "sha256:" + "ab" * 32,
            "traceparent": "00-" + "a" * 50,
        },
        "delivery_mode": 2,
        "message_id": "5a3c6f0e-64a8-5d5e-9b0c-3b1a7d1e2f40",
        "timestamp": NOON,
        "message_type": "OrderPaid",
        "app_id": "shop",
    }
    return NEW(**(values | changes)).marshal()


def by_pamqp(encoded: bytes) -> Properties:
    """What pamqp makes of it, in our form."""
    found = NEW()
    found.unmarshal(struct.unpack(">H", encoded[:2])[0], encoded[2:])
    mine = {"message_id", "message_type", "app_id", "content_type", "timestamp", "headers"}
    others = {name: value for name, value in found if name not in mine and value not in (None, "")}
    return Properties(
        found.message_id,
        found.message_type,
        found.app_id,
        found.content_type,
        found.timestamp,
        _with_bytes(found.headers or {}),
        others,
    )


def _with_bytes(value: Any) -> Any:
    """pamqp gives byte arrays that can be changed."""
    if isinstance(value, dict):
        return {name: _with_bytes(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_bytes(each) for each in value]
    return bytes(value) if isinstance(value, bytearray) else value


def a_text(dice: random.Random, most: int = 40) -> str:
    return "".join(dice.choice("ab-x.0\0\nä€\U0001f600") for _ in range(dice.randrange(most)))


def a_time(dice: random.Random) -> datetime:
    return datetime.fromtimestamp(dice.choice([0, 1, 1_700_000_000, 2**32 - 1]), UTC)


def a_value(dice: random.Random, depth: int = 0) -> Any:
    match dice.randrange(11 if depth < 4 else 9):
        case 0:
            return dice.choice([True, False])
        case 1:
            return dice.choice([1, -1]) * dice.getrandbits(dice.choice([1, 7, 8, 15, 16, 31, 32, 33, 62]))
        case 2 | 3:
            return a_text(dice)
        case 4:
            return bytearray(dice.randbytes(dice.randrange(5)))
        case 5:
            return a_time(dice)
        case 6:
            return dice.choice([0.5, -1e30, 0.0])
        case 7:
            return Decimal(dice.randrange(2**20)) / 1000
        case 8:
            return None
        case 9:
            return [a_value(dice, depth + 1) for _ in range(dice.randrange(4))]
        case _:
            return {a_text(dice): a_value(dice, depth + 1) for _ in range(dice.randrange(4))}


def some_headers(dice: random.Random) -> dict[str, Any]:
    names = [a_text(dice), a_text(dice), "traceparent", *OWN_HEADERS]
    return {name: a_value(dice) for name in dice.sample(names, dice.randrange(len(names)))}


def some_properties(dice: random.Random) -> dict[str, Any]:
    values = {name: a_text(dice) for name in TEXTS} | {
        "headers": some_headers(dice),
        "delivery_mode": dice.choice([1, 2]),
        "priority": dice.randrange(256),
        "timestamp": a_time(dice),
    }
    return {name: value for name, value in values.items() if value != "" and dice.random() < 0.6}


TEXTS = (
    "content_type",
    "content_encoding",
    "correlation_id",
    "reply_to",
    "expiration",
    "message_id",
    "message_type",
    "user_id",
    "app_id",
)


def test_whatever_a_client_encodes_is_read_as_pamqp_reads_it() -> None:
    dice = random.Random(3)
    for _ in range(2000):
        encoded = NEW(**some_properties(dice)).marshal()
        assert read(encoded) == by_pamqp(encoded), encoded


def test_the_short_way_for_a_relay_s_message_reads_the_same_as_the_long_one() -> None:
    dice = random.Random(4)
    for _ in range(500):
        texts = {name: "m" + a_text(dice) for name in ("content_type", "message_id", "message_type", "app_id")}
        encoded = of_a_relay(headers=some_headers(dice), timestamp=a_time(dice), **texts)
        assert properties.step_by_step(encoded) == properties._any(encoded) == read(encoded)


def test_a_relay_s_message_goes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(properties, "_any")
    assert read(of_a_relay()).headers["x-sequence"] == 2**40


def test_no_property_at_all_is_nothing() -> None:
    assert read(b"\0\0") == Properties(None, None, None, None, None, {}, {})


NUMBERS = [
    ("b", ">b", -128),
    ("B", ">B", 255),
    ("s", ">h", -32_768),
    ("u", ">H", 65_535),
    ("I", ">i", -(2**31)),
    ("i", ">I", 2**32 - 1),
    ("l", ">q", -(2**63)),
    ("L", ">q", 2**63 - 1),
    ("f", ">f", 0.5),
    ("d", ">d", 1e300),
]


@pytest.mark.parametrize(("letter", "form", "number"), NUMBERS, ids=[letter for letter, _, _ in NUMBERS])
def test_a_number_of_any_width_is_read(letter: str, form: str, number: float) -> None:
    found = read(headers(entry(b"x-sequence", letter, struct.pack(form, number)), entry(b"z", "t", b"\1"))).headers
    assert found == {"x-sequence": number, "z": True}
    assert type(found["x-sequence"]) is type(number)


ODD: dict[str, tuple[bytes, Mapping[str, Any]]] = {
    "a name that is not UTF-8": (entry(b"\xff\xfe", "t", b"\1"), {"\\xff\\xfe": True}),
    "a name that is empty": (entry(b"", "t", b"\0"), {"": False}),
    "a text that is not UTF-8": (entry(b"k", "S", long(b"\xff")), {"k": b"\xff"}),
    "a time in the year 317 million": (entry(b"k", "T", struct.pack(">Q", 10**16)), {"k": 10**16}),
    "the largest time": (entry(b"k", "T", b"\xff" * 8), {"k": 2**64 - 1}),
    "the first second": (entry(b"k", "T", bytes(8)), {"k": datetime(1970, 1, 1, tzinfo=UTC)}),
    "a decimal of 255 places": (entry(b"k", "D", b"\xff" + struct.pack(">I", 12345)), {"k": Decimal("12345E-255")}),
    "nothing": (entry(b"k", "V", b"") + entry(b"l", "\0", b""), {"k": None, "l": None}),
    "a stranger's header twice": (entry(b"k", "b", b"\1") + entry(b"k", "b", b"\2"), {"k": 2}),
    "a table that is broken inside": (entry(b"k", "F", long(b"\x09x")), {"k": b"\x09x"}),
    "an array of an unknown type": (entry(b"k", "A", long(b"Z")), {"k": b"Z"}),
    "a value that leads out of its array": (
        entry(b"k", "A", long(b"S" + b"\0\0\0\x09")) + b"\1lt\1",
        {"k": b"S\0\0\0\x09", "l": True},
    ),
    "an array that leads out of its array": (
        entry(b"k", "A", long(b"A" + b"\0\0\0\2")) + b"\1lt\1",
        {"k": b"A\0\0\0\2", "l": True},
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_and_can_be_told_apart_is_a_value(name: str) -> None:
    entries, expected = ODD[name]
    found = read(headers(entries, entry(b"x-sequence", "l", struct.pack(">q", 7)))).headers
    assert found == {**expected, "x-sequence": 7}


@pytest.mark.parametrize("letter", ["A", "F"])
def test_tables_and_arrays_in_each_other_without_end_are_read_so_deep_and_no_deeper(letter: str) -> None:
    value = b""
    for _ in range(2000):
        value = letter.encode() + long(value) if letter == "A" else short(b"k") + letter.encode() + long(value)
    found: Any = read(headers(entry(b"k", letter, long(value)))).headers["k"]
    depth = 0
    while not isinstance(found, bytes):
        assert len(found) == 1
        found = found[0] if letter == "A" else found["k"]
        depth += 1
    assert depth == 32


def test_dead_letters_tell_their_history() -> None:
    """An array of tables: what an operator looks for in a message in quarantine."""
    history: list[Any] = [
        {"queue": "shop", "reason": "delivery_limit", "count": 2, "time": NOON, "routing-keys": ["order.#"]}
    ]
    assert read(NEW(headers={"x-death": history}).marshal()).headers == {"x-death": history}


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (7_258_118_400, datetime(2200, 1, 1, tzinfo=UTC)),  # pamqp takes what is after 2106 for milliseconds
        (253_402_300_799, datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (1_700_000_000_000, datetime.fromtimestamp(1_700_000_000, UTC)),
        (253_402_300_799_999, datetime(9999, 12, 31, 23, 59, 59, 999000, tzinfo=UTC)),
    ],
)
def test_a_timestamp_is_in_seconds_and_in_milliseconds_where_seconds_make_no_sense(
    number: int, expected: datetime
) -> None:
    assert read(block(TIMESTAMP, struct.pack(">Q", number))).occurred_at == expected


@pytest.mark.parametrize("number", [253_402_300_800_000, 10**16, 2**64 - 1])
@pytest.mark.parametrize("relay_s", [True, False], ids=["of a relay", "of a stranger"])
def test_a_timestamp_that_is_no_time_is_kept_as_the_number_it_is(number: int, relay_s: bool) -> None:
    stamp = struct.pack(">Q", number)
    found = read(
        of_a_relay().replace(struct.pack(">Q", int(NOON.timestamp())), stamp) if relay_s else block(TIMESTAMP, stamp)
    )
    assert found.occurred_at is None
    assert found.others["timestamp"] == number


@pytest.mark.parametrize("name", sorted(OWN_HEADERS))
def test_a_header_of_ours_that_is_there_twice_is_malformed(name: str) -> None:
    """Which of the two is meant cannot be told, and other clients may take the other one."""
    twice = entry(name.encode(), "S", long(b"1")) + entry(b"k", "t", b"\1") + entry(name.encode(), "b", b"\1")
    with pytest.raises(Malformed, match=f"the header {name} is there twice"):
        read(headers(twice))


MALFORMED = {
    "no flags": b"\0",
    "nothing": b"",
    "more flags announced": b"\0\1\0\0",
    "an unknown flag": b"\0\2",
    "a value without a flag": b"\0\0x",
    "a flag without a value": block(MESSAGE_ID, b""),
    "a property longer than the block": block(MESSAGE_ID, b"\x05abc"),
    "a property that is not UTF-8": block(MESSAGE_ID, short(b"\xff\xfe")),
    "half a time": block(TIMESTAMP, bytes(4)),
    "a table longer than the block": block(HEADERS, struct.pack(">I", 500) + b"\x01kt\x01"),
    "a table shorter than its value": block(HEADERS | MESSAGE_ID, struct.pack(">I", 5) + b"\x01kl" + bytes(10)),
    "a header of an unknown type": headers(entry(b"k", "Z", b"\1")),
    "a text longer than its table": headers(b"\x01kS" + struct.pack(">I", 9) + b"x"),
    "a nested table longer than its table": block(
        HEADERS | MESSAGE_ID, long(b"\x01kF" + struct.pack(">I", 1)) + short(b"x")
    ),
    "a name longer than its table": headers(b"\x09k"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_cannot_be_told_apart_is_malformed(name: str) -> None:
    with pytest.raises(Malformed):
        read(MALFORMED[name])


def test_whatever_is_changed_in_a_block_nothing_but_malformed_comes_of_it() -> None:
    dice = random.Random(7)
    history: list[Any] = [{"queue": "shop", "count": 2, "time": NOON, "routing-keys": ["order.#", 0.5, Decimal(1)]}]
    blocks = [
        of_a_relay(),
        of_a_relay(headers={"x-sequence": 1, "x-death": history, "a": None, "b": True, "c": bytearray(b"\0")}),
        NEW(message_id="m", priority=3, correlation_id="c", headers={"k": {"l": [1, 2, {"m": "n"}]}}).marshal(),
    ]
    refused = 0
    for _ in range(15_000):
        changed = bytearray(dice.choice(blocks))
        for _ in range(dice.randrange(1, 4)):
            changed[dice.randrange(len(changed))] = dice.randrange(256)
        if dice.random() < 0.1:
            del changed[dice.randrange(len(changed)) :]
        try:
            read(bytes(changed))
        except Malformed as exc:
            assert str(exc).isprintable()  # noqa: PT017
            refused += 1
    assert 1500 < refused < 14_000
