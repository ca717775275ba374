"""A block that is read by its layout says what it says step by step, whatever is in it; and what is not laid out so is not read so."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from unittest.mock import patch

import pytest
from hypothesis import event as note
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.rabbitmq.wire import layouts, properties
from relay.rabbitmq.wire.layouts import Layouts
from relay.rabbitmq.wire.properties import Malformed, Properties, read
from tests.unit.test_wire_properties import entry, headers, long, of_a_relay, short

USUAL = b"\xb0\xe8"
SIZES = (9, 5, 3, 12)  # of the texts, unless they are drawn


def text(size: int) -> st.SearchStrategy[bytes]:
    """So many bytes that are a text."""
    return st.binary(min_size=size, max_size=size).map(lambda drawn: bytes(octet & 127 for octet in drawn))


@st.composite
def shapes(draw: st.DrawFn) -> list[tuple[bytes, str, int]]:
    """(name, letter, bytes of its value) of each header."""
    names = st.sampled_from([b"x-sequence", b"x-aggregate-id", b"traceparent", b"tenant", b"t\xff", b"t\\xff", b""])
    header = st.tuples(names, st.sampled_from("SSSSSSllllt"), st.integers(0, 6))
    return draw(st.lists(header, max_size=4, unique_by=lambda one: one[0]) | st.lists(header, max_size=4))


@st.composite
def filled(draw: st.DrawFn, shape: list[tuple[bytes, str, int]]) -> bytes:
    """A block of this shape, with values of its own."""
    fields = b""
    for name, letter, size in shape:
        if letter == "S":
            value = long(draw(text(size)))
        else:
            value = draw(st.binary(min_size=8, max_size=8)) if letter == "l" else b"\1"
        fields += entry(name, letter, value)
    content_type, message_id, event_type, source = (short(draw(text(size))) for size in SIZES)
    seconds = draw(st.integers(0, 2**33) | st.sampled_from([253_402_300_799, 253_402_300_800, 10**16, 2**64 - 1]))
    return USUAL + content_type + long(fields) + b"\2" + message_id + struct.pack(">Q", seconds) + event_type + source


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """(blocks that came before, blocks that come now): of the same shapes, some of the latter with other bytes here and there."""
    kinds = draw(st.lists(shapes(), min_size=1, max_size=3))
    before = [draw(filled(shape)) for shape in kinds]
    now = []
    for shape in (*kinds, *kinds):
        block = bytearray(draw(filled(shape)))
        for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
            block[draw(st.integers(2, len(block) - 1))] = draw(st.integers(0, 255))
        now.append(bytes(block))
    return before, now


def told(block: bytes) -> Properties | str:
    try:
        return read(block)
    except Malformed as exc:
        return str(exc)


@settings(max_examples=80, deadline=None)
@given(streams())
def test_a_known_layout_is_read_as_any_block_is(stream: tuple[list[bytes], list[bytes]]) -> None:
    before, now = stream
    known = Layouts()
    for block in before:
        if isinstance(told(block), Properties):
            known.learn(block)
    with patch.object(properties, "_USUAL", b"no block begins so"):
        expected = [told(block) for block in now]
    note(f"{sum(known.read(block) is not None for block in now)} of {len(now)} by their layout")
    with patch.object(properties, "_layouts", known):
        assert [told(block) for block in now] == expected


def test_no_octet_of_a_block_may_be_another_without_a_reader_seeing_it() -> None:
    known = Layouts()
    known.learn(of_a_relay())
    for place, octet in enumerate(of_a_relay()):
        for other in (octet ^ 1, octet ^ 0x80, (octet + 1) & 255, 0):
            changed = bytearray(of_a_relay())
            changed[place] = other
            with patch.object(properties, "_layouts", Layouts()):
                expected = told(bytes(changed))
            with patch.object(properties, "_layouts", known):
                assert told(bytes(changed)) == expected


@pytest.mark.parametrize("said", ["order", "application/json", "shop", "OrderPaid", "5a3c6f0e"])
def test_what_is_no_text_is_what_it_is_to_any_reader(said: str) -> None:
    known = Layouts()
    known.learn(of_a_relay())
    broken = of_a_relay().replace(said.encode(), b"\xff" * len(said))
    with patch.object(properties, "_USUAL", b"no block begins so"):
        expected = told(broken)
    with patch.object(properties, "_layouts", known):
        assert told(broken) == expected


def read_by_layout(known: Layouts, block: bytes) -> bool:
    return known.read(block) is not None


def test_what_differs_in_its_values_only_is_read_by_the_layout() -> None:
    known = Layouts()
    known.learn(of_a_relay())
    assert read_by_layout(known, of_a_relay(message_type="OrderHeld", timestamp=datetime(2027, 1, 1, tzinfo=UTC)))
    assert not read_by_layout(known, of_a_relay(message_type="OrderLost!"))
    assert not read_by_layout(known, of_a_relay(delivery_mode=1))


@pytest.mark.parametrize("block", [b"", b"\xb0", b"\xb0\xe8", b"\xb0\xe8\xff", headers()])
def test_what_is_too_short_to_have_a_layout_is_not_read(block: bytes) -> None:
    known = Layouts()
    known.learn(of_a_relay())
    assert known.read(block) is None


def test_a_producer_s_layout_is_learned_at_once_and_of_a_stream_without_any_only_every_16th() -> None:
    known = Layouts()
    with patch.object(layouts, "_layout", wraps=layouts._layout) as worked_out:
        for size in range(64):
            block = of_a_relay(app_id="s" * (size + 1))
            assert known.read(block) is None
            known.missed(block)
    assert worked_out.call_count == 4
    assert read_by_layout(known, of_a_relay(app_id="o"))


def test_layouts_are_forgotten_before_there_are_too_many() -> None:
    known = Layouts()
    for size in range(1000):
        known.learn(of_a_relay(app_id="s" * (size % 250 + 1), message_type="t" * (size // 4 + 1)))
    assert sum(map(len, known._known.values())) <= 256


def test_of_layouts_that_look_alike_a_few_are_known() -> None:
    known = Layouts()
    blocks = [of_a_relay(app_id="s" * size, message_type="t" * (20 - size)) for size in range(1, 20)]
    for block in blocks:
        known.learn(block)
    assert [read_by_layout(known, block) for block in blocks] == [True] * 4 + [False] * 15
