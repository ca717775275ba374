"""The splitter: whatever pieces a stream comes in, it is told apart as pamqp tells it apart; a broken one is a FrameError."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import body, commands, frame, header, heartbeat
from pamqp.base import Frame

from relay.rabbitmq.wire import frames
from relay.rabbitmq.wire.frames import Content, FrameError, Sink, Splitter
from relay.rabbitmq.wire.methods import deliver, returned

OURS, OTHER = 1, 2  # channel numbers
PROPERTIES = commands.Basic.Properties(message_id="m", content_type="text/plain", headers={"x-sequence": 2**40})


def method(asked: Frame, channel: int = OURS) -> bytes:
    return frame.marshal(asked, channel)


def content(octets: bytes, *, piece: int = 1000, channel: int = OURS) -> list[bytes]:
    """The frames of a message behind its method."""
    pieces = [octets[i : i + piece] for i in range(0, len(octets), piece)]
    found = [frame.marshal(header.ContentHeader(0, len(octets), PROPERTIES), channel)]
    return found + [frame.marshal(body.ContentBody(each), channel) for each in pieces]


def delivery(
    tag: int, octets: bytes, *, piece: int = 1000, consumer: str = "ctag1.x", redelivered: bool = False
) -> bytes:
    asked = commands.Basic.Deliver(consumer, tag, redelivered, "relay.events", f"order.{tag}")
    return method(asked) + b"".join(content(octets, piece=piece))


def gotten(octets: bytes) -> bytes:
    return method(commands.Basic.GetOk(9, False, "e", "r", 0)) + b"".join(content(octets, piece=40))


BEAT = heartbeat.Heartbeat.marshal()
DECLARED = method(commands.Queue.DeclareOk("q", 1, 2), OTHER)
BACK = method(commands.Basic.Return(312, "NO_ROUTE", "relay.events", "a.b"))


def broken_up() -> bytes:
    """A message in three pieces, with the frames of others between them."""
    head, *pieces = content(b"c" * 90, piece=30)
    between = [DECLARED, BEAT, BEAT + DECLARED, DECLARED]
    told = commands.Basic.Deliver("ctag1.x", 5, False, "relay.events", "order.5")
    return method(told) + b"".join(ours + others for ours, others in zip([head, *pieces], between, strict=True))


STREAM = b"".join(
    [
        method(commands.Basic.QosOk()),
        method(commands.Basic.ConsumeOk("ctag1.x")),
        delivery(1, b""),
        delivery(2, b"a" * 10),
        BEAT,
        delivery(3, bytes(range(256)), piece=40, redelivered=True),
        broken_up(),
        method(commands.Basic.Ack(7, True)),
        method(commands.Basic.Nack(8, False)),
        BACK + b"".join(content(b"hello")),
        gotten(b""),
        gotten(b"g" * 3),
        gotten(b"g" * 90),
        method(commands.Basic.Ack(2**62, False)),
        method(commands.Connection.Blocked("low on memory"), 0),
        method(commands.Connection.Unblocked(), 0),
        BACK + b"".join(content(b"")),
        method(commands.Basic.Cancel("ctag1.x")),
        delivery(6, b"\xce" * 70, piece=33, consumer=""),
        delivery(7, b"d" * 30, consumer="t" * 255),
        method(commands.Channel.Close(406, "PRECONDITION_FAILED", 0, 0)),
    ]
)
"""Everything that may come on a connection, in an order in which it may come."""


@dataclass
class Told:
    """What came out of a stream: at the sink, and for somebody else."""

    deliveries: list[Content] = field(default_factory=list)
    confirms: list[tuple[int, bool, bool]] = field(default_factory=list)
    returns: list[Content] = field(default_factory=list)
    rest: bytes = b""

    def sink(self, *, max_body: int = 2**24) -> Sink:
        def confirm(tag: int, multiple: bool, acked: bool) -> None:
            self.confirms.append((tag, multiple, acked))

        return Sink(self.deliveries.append, confirm, self.returns.append, max_body=max_body)


def split(stream: bytes, cuts: Iterable[int] = (), *, max_body: int = 2**24) -> Told:
    told = Told()
    splitter = Splitter()
    splitter.register(OURS, told.sink(max_body=max_body))
    start = 0
    for cut in [*cuts, len(stream)]:
        told.rest += splitter.feed(stream[start:cut])
        start = cut
    return told


def frames_of(stream: bytes) -> Iterable[bytes]:
    start = 0
    while start < len(stream):
        end = start + 8 + struct.unpack_from(">I", stream, start + 3)[0]
        yield stream[start:end]
        start = end


def by_pamqp(stream: bytes) -> Told:
    """The same, told apart frame by frame with pamqp."""
    told = Told()
    taking: list[Content] | None = None
    begun = properties = octets = b""
    left = 0
    for each in frames_of(stream):
        _, channel, found = frame.unmarshal(each)
        if channel == OURS and isinstance(found, commands.Basic.Deliver | commands.Basic.Return):
            taking = told.deliveries if isinstance(found, commands.Basic.Deliver) else told.returns
            begun, octets = each[7:-1], b""
            continue
        if channel == OURS and isinstance(found, commands.Basic.Ack | commands.Basic.Nack):
            told.confirms.append((found.delivery_tag, bool(found.multiple), isinstance(found, commands.Basic.Ack)))
        elif channel == OURS and taking is not None and isinstance(found, header.ContentHeader):
            properties, left = each[19:-1], found.body_size
        elif channel == OURS and taking is not None and isinstance(found, body.ContentBody):
            octets, left = octets + found.value, left - len(found.value)
        else:
            told.rest += each
            continue
        if taking is not None and not left:
            taking.append((begun, properties, octets))
            taking = None
    return told


EXPECTED = by_pamqp(STREAM)


def test_the_stream_has_something_of_everything() -> None:
    assert [len(octets or b"") for _, _, octets in EXPECTED.deliveries] == [0, 10, 256, 90, 70, 30]
    assert EXPECTED.confirms == [(7, True, True), (8, False, False), (2**62, False, True)]
    assert [octets for _, _, octets in EXPECTED.returns] == [b"hello", b""]
    assert len(list(frames_of(EXPECTED.rest))) == 22


def test_a_stream_is_told_apart_as_pamqp_does_wherever_it_is_cut() -> None:
    for cut in range(len(STREAM) + 1):
        assert split(STREAM, [cut]) == EXPECTED, cut


@pytest.mark.parametrize("piece", [1, 2, 7, 8, 19, 64])
def test_a_stream_in_pieces_of_one_size_is_told_apart_alike(piece: int) -> None:
    assert split(STREAM, range(piece, len(STREAM), piece)) == EXPECTED


@given(st.lists(st.integers(0, len(STREAM)), max_size=40))
@settings(max_examples=150, deadline=None)
def test_a_stream_in_any_pieces_is_told_apart_alike(cuts: list[int]) -> None:
    assert split(STREAM, sorted(cuts)) == EXPECTED


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 3000)), max_size=12),
    st.lists(st.integers(0, 40_000), max_size=10),
)
@settings(max_examples=100, deadline=None)
def test_bodies_of_any_size_in_frames_of_any_size_arrive_whole(sizes: list[tuple[int, int]], cuts: list[int]) -> None:
    dice = random.Random(len(sizes))
    bodies = [dice.randbytes(size) for size, _ in sizes]
    stream = b"".join(
        delivery(tag, octets, piece=piece)
        for tag, (octets, (_, piece)) in enumerate(zip(bodies, sizes, strict=True), 1)
    )
    told = split(stream, sorted(cut for cut in cuts if cut < len(stream)))
    assert [octets for _, _, octets in told.deliveries] == bodies
    assert [deliver(begun)[0] for begun, _, _ in told.deliveries] == list(range(1, len(bodies) + 1))
    assert told.rest == b""


def message_of(octets: bytes, channel: int) -> list[bytes]:
    return [
        method(commands.Basic.Deliver("c", 1, False, "e", "k"), channel),
        *content(octets, piece=20, channel=channel),
    ]


@pytest.mark.parametrize("both", [True, False], ids=["both ours", "one ours"])
@pytest.mark.parametrize("octets", [b"", b"second" * 9], ids=["empty", "three frames"])
def test_messages_of_two_channels_are_told_apart_however_their_frames_are_mixed(octets: bytes, both: bool) -> None:
    first, second = message_of(b"first" * 9, OURS), message_of(octets, OTHER)
    for places in combinations(range(len(first) + len(second)), len(second)):
        ours, others = iter(first), iter(second)
        stream = b"".join(next(others if i in places else ours) for i in range(len(first) + len(second)))
        taken, beside, splitter = Told(), Told(), Splitter()
        splitter.register(OURS, taken.sink())
        if both:
            splitter.register(OTHER, beside.sink())
        rest = splitter.feed(stream)
        assert [found for _, _, found in taken.deliveries] == [b"first" * 9]
        assert [found for _, _, found in beside.deliveries] == [octets] * both
        assert rest == b"".join(second) * (not both)


def test_without_a_sink_everything_is_somebody_else_s() -> None:
    splitter = Splitter()
    assert splitter.feed(STREAM) == STREAM


def test_what_a_sink_has_no_callback_for_is_passed_on_whole() -> None:
    splitter = Splitter()
    splitter.register(OURS, Sink(max_body=2**20))
    cuts = [0, *range(11, len(STREAM), 11), len(STREAM)]
    assert b"".join(splitter.feed(STREAM[a:b]) for a, b in pairwise(cuts)) == STREAM


@pytest.mark.parametrize(
    "end", [commands.Channel.Close(404, "NOT_FOUND", 0, 0), commands.Channel.CloseOk()], ids=["close", "close-ok"]
)
def test_a_channel_that_is_closed_has_no_sink_any_more_so_that_its_number_can_be_given_out_again(end: Frame) -> None:
    told = split(delivery(1, b"x") + method(end) + delivery(1, b"of the next channel"))
    assert [octets for _, _, octets in told.deliveries] == [b"x"]
    assert told.rest == method(end) + delivery(1, b"of the next channel")


def test_a_channel_may_be_closed_in_the_middle_of_a_message() -> None:
    begun = delivery(1, b"x" * 100, piece=10)[:-18]
    told = split(begun + method(commands.Channel.CloseOk()) + BEAT)
    assert told.deliveries == []
    assert told.rest == method(commands.Channel.CloseOk()) + BEAT


def test_a_body_larger_than_the_sink_takes_is_thrown_away_and_said_to_be() -> None:
    stream = delivery(1, b"x" * 101, piece=60) + delivery(2, b"y" * 101) + delivery(3, b"z" * 100)
    for cut in range(len(stream)):
        assert [octets for _, _, octets in split(stream, [cut], max_body=100).deliveries] == [None, None, b"z" * 100]


def test_nothing_is_kept_of_a_body_that_is_too_large() -> None:
    """Its size is announced in the header: 2^60 bytes would otherwise gather until the memory is full."""
    told = Told()
    sink = told.sink(max_body=100)
    splitter = Splitter()
    splitter.register(OURS, sink)
    head = struct.pack(">HHQH", 60, 0, 2**60, 0)
    splitter.feed(delivery(1, b"")[: -len(content(b"")[0])] + struct.pack(">BHI", 2, 1, len(head)) + head + b"\xce")
    for _ in range(10):
        splitter.feed(content(b"x" * 1000)[1])
    assert (sink._parts, told.deliveries) == (None, [])


def test_an_alarm_is_noticed_and_passed_on() -> None:
    heard: list[bool] = []
    splitter = Splitter(heard.append)
    assert not splitter.blocked
    for asked, now in ((commands.Connection.Blocked("disk"), True), (commands.Connection.Unblocked(), False)):
        assert splitter.feed(method(asked, 0)) == method(asked, 0)
        assert splitter.blocked is now
    assert heard == [True, False]


def test_a_header_frame_larger_than_was_negotiated_is_taken() -> None:
    """A quorum queue sends one when it delivers again what was as large as allowed: refused, it would come again for ever."""
    properties = b"\x20\x00" + struct.pack(">I", 131_090) + bytes(131_090)
    payload = struct.pack(">HHQ", 60, 0, 0) + properties
    told = split(
        delivery(1, b"")[: -len(content(b"")[0])] + struct.pack(">BHI", 2, 1, len(payload)) + payload + b"\xce"
    )
    assert [block for _, block, _ in told.deliveries] == [properties]


def test_what_a_sink_raises_leaves_the_splitter() -> None:
    def fails(_: Content) -> None:
        raise ZeroDivisionError

    splitter = Splitter()
    splitter.register(OURS, Sink(fails, max_body=100))
    with pytest.raises(ZeroDivisionError):
        splitter.feed(delivery(1, b"x"))


@pytest.mark.parametrize("frame_max", [4 * 1024 * 1024, 0, 2**32 - 1])
def test_frames_are_as_large_as_the_broker_said_they_may_be(frame_max: int) -> None:
    body = b"1" * (3 * 1024 * 1024)
    size = len(body)
    tune = method(commands.Connection.Tune(2047, frame_max, 60), 0)
    stream = tune + delivery(1, b"") + BEGUN + b"".join(content(body, piece=size))
    for cuts in ([], [len(tune)], range(0, len(stream), 65536)):
        contents: list[Content] = []
        splitter = Splitter()
        splitter.register(OURS, Sink(contents.append, max_body=size))
        rest = b"".join(splitter.feed(stream[i:j]) for i, j in pairwise([0, *cuts, len(stream)]))
        assert rest == tune
        assert [taken[2] for taken in contents] == [b"", body]


def test_a_frame_larger_than_the_broker_said_is_refused() -> None:
    splitter = Splitter()
    splitter.feed(method(commands.Connection.Tune(2047, 4 * 1024 * 1024, 60), 0) + b"\1\0\0\0\0\0\2\0\x0a\xce")
    with pytest.raises(FrameError):
        splitter.feed(struct.pack(">BHI", 1, 0, 4 * 1024 * 1024 + frames.MAX_FRAME_BYTES + 1))


HEAD, BODY = content(b"12345")
BEGUN = delivery(1, b"")[: -len(content(b"")[0])]
GOT = method(commands.Basic.GetOk(9, False, "e", "r", 0))
BROKEN = {
    "a frame longer than anybody sends": struct.pack(">BHI", 1, 0, frames.MAX_FRAME_BYTES + 1),
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n",
    "no end": BEAT[:-1] + b"\0",
    "no end of a header": BEGUN + HEAD[:-1] + b"\0" + BODY,
    "no end of an empty message's header": BEGUN + content(b"")[0][:-1] + b"\0",
    "no end of a body": BEGUN + HEAD + BODY[:-1] + b"\0",
    "a header without a method": HEAD,
    "a body without a method": BODY,
    "a body without a header": BEGUN + BODY,
    "two headers": BEGUN + HEAD + HEAD,
    "a body that is too long": BEGUN + HEAD + content(b"123456")[1],
    "a body in a frame longer than anybody sends": BEGUN
    + b"".join(content(b"1" * (frames.MAX_FRAME_BYTES + 1), piece=frames.MAX_FRAME_BYTES + 1)),
    "a message in a message": BEGUN + HEAD + BEGUN,
    "a method in a message": BEGUN + method(commands.Basic.QosOk()),
    "a get-ok in a message": BEGUN + GOT,
    "a header of one byte": BEGUN + b"\x02\0\1\0\0\0\1x\xce",
    "an unknown frame on a channel": b"\x05\0\1\0\0\0\0\xce",
    "a confirm without a tag": b"\x01\0\1\0\0\0\4\0\x3c\0\x50\xce",
    "passing on: a body without a header": GOT + BODY,
    "passing on: two headers": GOT + HEAD + HEAD,
    "passing on: a body that is too long": GOT + HEAD + content(b"123456")[1],
    "passing on: a message in a message": GOT + BEGUN,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_stream_that_cannot_be_followed_is_refused(name: str) -> None:
    stream = delivery(4, b"good") + BROKEN[name] + BEAT
    for cuts in ([], [len(stream) - 9], range(1, min(len(stream), 300))):
        with pytest.raises(FrameError):
            split(stream, cuts)


def test_whatever_is_changed_in_a_stream_nothing_but_a_frame_error_comes_of_it() -> None:
    dice = random.Random(5)
    refused = 0
    for _ in range(4000):
        changed = bytearray(STREAM)
        for _ in range(dice.randrange(1, 4)):
            changed[dice.randrange(len(changed))] = dice.randrange(256)
        try:
            told = split(bytes(changed), sorted(dice.randrange(len(changed)) for _ in range(3)))
            for begun, _, _ in told.deliveries:
                deliver(begun)
            for begun, _, _ in told.returns:
                returned(begun)
        except FrameError:
            refused += 1
    assert 400 < refused < 4000


def test_the_arguments_of_the_methods_are_read_as_pamqp_reads_them() -> None:
    asked = commands.Basic.Deliver("t" * 255, 2**63 - 1, True, "", "ä" * 100)
    assert deliver(method(asked)[7:-1]) == (2**63 - 1, True, "", "ä" * 100)
    assert returned(BACK[7:-1]) == (312, "NO_ROUTE", "relay.events", "a.b")


def test_a_routing_key_that_is_not_utf8_is_shown_escaped() -> None:
    asked = method(commands.Basic.Deliver("c", 1, False, "e", "order.??"))[7:-1].replace(b"??", b"\xff\x1b")
    assert deliver(asked)[3] == "order.\\xff\x1b"


@pytest.mark.parametrize(("read", "whole"), [(deliver, BEGUN[7:-1]), (returned, BACK[7:-1])], ids=["deliver", "return"])
def test_a_method_of_another_length_than_its_arguments_is_a_frame_error(
    read: Callable[[bytes], object], whole: bytes
) -> None:
    read(whole)
    for wrong in [whole[:length] for length in range(4, len(whole))] + [whole + b"\0"]:
        with pytest.raises(FrameError):
            read(wrong)
