"""The publisher seam's contract: whatever implements it must pass all of this. A batch in, an outcome for every message out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest

from relay.errors import BrokerRefused, BrokerUnavailable
from relay.message import Message
from relay.rabbitmq import fast_publisher
from relay.rabbitmq.contract import Confirmed, Nacked, Publisher, Returned, Unknown
from relay.rabbitmq.fast_publisher import FastPublisher
from relay.rabbitmq.stock_publisher import StockPublisher
from relay.sandbox import RabbitMQ
from relay.settings import RabbitmqSettings
from tests.harness.audit import audit

Opener = Callable[..., Awaitable[Publisher]]
IMPLEMENTATIONS: dict[str, Opener] = {"stock": StockPublisher.open, "fast": FastPublisher.open}


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def opener(request: pytest.FixtureRequest) -> Opener:
    return IMPLEMENTATIONS[request.param]


@asynccontextmanager
async def opened(
    opener: Opener, url: str, *, confirm_timeout_s: float = 10, **settings: Any
) -> AsyncIterator[Publisher]:
    publisher = await opener(
        RabbitmqSettings(url=url, **settings), confirm_timeout_s=confirm_timeout_s, name="contract"
    )
    try:
        yield publisher
    finally:
        async with asyncio.timeout(10):
            await publisher.close()


def message(number: int, *, routing_key: str = "order.Paid", **changes: Any) -> Message:
    made = Message(
        message_id=f"id-{number}",
        event_type="Paid",
        source="shop",
        content_type="application/json",
        occurred_at=datetime(2026, 1, 2, tzinfo=UTC),
        routing_key=routing_key,
        headers={"x-sequence": number, "x-aggregate-id": "é", "flag": True},
        body=b"{}",
    )
    return made._replace(**changes)


def stamp(found: list[Any]) -> list[str]:
    return [type(outcome).__name__ for outcome in found]


async def test_every_message_is_confirmed_and_arrives_in_order(opener: Opener, broker: str) -> None:
    async with audit(broker) as witness, opened(opener, broker) as publisher:
        outcomes = await publisher.publish([message(n) for n in range(1500)])
        assert outcomes == [Confirmed()] * 1500
        arrived = await witness.wait_for(1500)
    assert [m.headers["x-sequence"] for m in arrived] == list(range(1500))


async def test_a_url_that_asks_for_happy_eyeballs_is_good_on_either_event_loop(opener: Opener, broker: str) -> None:
    """uvloop's connections know nothing of these two."""
    async with audit(broker) as witness:
        async with opened(opener, f"{broker}?happy_eyeballs_delay=0.25&interleave=1") as publisher:
            assert await publisher.publish([message(1)]) == [Confirmed()]
        await witness.wait_for(1)


async def test_calls_at_the_same_time_are_written_in_the_order_in_which_they_were_begun(
    opener: Opener, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each whole before the next, also where one is larger than what may be in flight."""
    monkeypatch.setattr(fast_publisher, "IN_FLIGHT", 500)
    sizes = (1, 300, 900, 2, 300)
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    async with audit(broker) as witness, opened(opener, broker, confirm_timeout_s=30) as publisher:
        calls = [
            asyncio.create_task(publisher.publish([message(n) for n in range(start, end)]))
            for start, end in pairwise(starts)
        ]
        assert [await call for call in calls] == [[Confirmed()] * size for size in sizes]
        arrived = await witness.wait_for(starts[-1])
    assert [m.headers["x-sequence"] for m in arrived] == list(range(starts[-1]))


async def test_an_empty_batch_has_no_outcomes(opener: Opener, broker: str) -> None:
    async with opened(opener, broker) as publisher:
        assert await publisher.publish([]) == []


async def test_exactly_the_unroutable_messages_are_returned(opener: Opener, broker: str) -> None:
    async with audit(broker, "order.#") as witness, opened(opener, broker) as publisher:
        lost = {3, 250, 251, 699}
        outcomes = await publisher.publish(
            [message(n, routing_key="nobody.Paid" if n in lost else "order.Paid") for n in range(700)]
        )
        assert {n for n, outcome in enumerate(outcomes) if isinstance(outcome, Returned)} == lost
        assert sum(isinstance(outcome, Confirmed) for outcome in outcomes) == 700 - len(lost)
        assert len(await witness.wait_for(700 - len(lost))) == 696


async def test_what_is_confirmed_is_exactly_what_a_full_queue_took(opener: Opener, broker: str) -> None:
    async with audit(broker, "none") as witness:
        full = await witness.channel.declare_queue(
            "full", durable=True, arguments={"x-max-length": 50, "x-overflow": "reject-publish"}
        )
        await full.bind(witness.exchange, "order.#")
        async with opened(opener, broker) as publisher:
            outcomes = await publisher.publish([message(n) for n in range(400)])
        confirmed = {n for n, outcome in enumerate(outcomes) if isinstance(outcome, Confirmed)}
        assert set(stamp(outcomes)) == {"Confirmed", "Nacked"}
        assert any(isinstance(outcome, Nacked) for outcome in outcomes)
        await full.consume(witness._take, no_ack=True)
        taken = await witness.wait_for(len(confirmed))
    assert {m.headers["x-sequence"] for m in taken} == confirmed


async def test_calls_at_the_same_time_each_account_for_exactly_what_the_queues_took(
    opener: Opener, broker: str
) -> None:
    """A full queue that refuses, one that takes all, and nobody: 8 calls whose messages go everywhere in turns."""
    async with audit(broker, "order.#") as witness:
        full = await witness.channel.declare_queue(
            "full", durable=True, arguments={"x-max-length": 50, "x-overflow": "reject-publish"}
        )
        await full.bind(witness.exchange, "full.#")
        keys = ("order.Paid", "full.Paid", "nobody.Paid", "order.Sent", "full.Sent")
        async with opened(opener, broker) as publisher:
            calls = [
                [message(n, routing_key=keys[n % len(keys)]) for n in range(start, start + 200)]
                for start in range(0, 1600, 200)
            ]
            answers = await asyncio.gather(*(publisher.publish(call) for call in calls))
            assert publisher.lost is None
        outcomes = [outcome for answer in answers for outcome in answer]
        found = {
            kind: {n for n, o in enumerate(outcomes) if isinstance(o, kind)} for kind in (Confirmed, Nacked, Returned)
        }
        assert found[Returned] == set(range(2, 1600, 5))
        assert found[Nacked] < set(range(1600)) - {n for n in range(1600) if n % 5 in (0, 2, 3)}
        assert found[Nacked]
        assert len(outcomes) == sum(map(len, found.values())) == 1600
        await full.consume(witness._take, no_ack=True)
        taken = await witness.wait_for(len(found[Confirmed]))
    assert {m.headers["x-sequence"] for m in taken} == found[Confirmed]


@pytest.mark.parametrize(
    "size", [0, 1, 131_063, 131_064, 131_065, 131_072, 262_128, 262_129, 1_048_576, 5 * 1024 * 1024]
)
async def test_bodies_around_the_frame_size_arrive_whole(opener: Opener, broker: str, size: int) -> None:
    body = bytes(n % 251 for n in range(size))
    async with audit(broker) as witness, opened(opener, broker) as publisher:
        assert await publisher.publish([message(1, body=body)]) == [Confirmed()]
        (arrived,) = await witness.wait_for(1)
    assert arrived.body == body


HOSTILE = [
    ("a routing key of 256 bytes", {"routing_key": "k" * 256}),
    ("a message id of 256 bytes", {"message_id": "m" * 256}),
    ("a lone surrogate in a property", {"event_type": "\ud800"}),
    ("a lone surrogate in a header", {"headers": {"x": "\ud800"}}),
    ("a lone surrogate in a header's name", {"headers": {"\ud800": "x"}}),
    ("headers larger than a frame", {"headers": {"x": "y" * 200_000}}),
    ("a whole number over 64 bits", {"headers": {"x": 2**70}}),
    ("a time before 1970", {"occurred_at": datetime(1, 1, 1, tzinfo=UTC)}),
    ("a body over the limit", {"body": b"x" * (16 * 1024 * 1024 + 1)}),
]


@pytest.mark.parametrize("changes", [changes for _, changes in HOSTILE], ids=[name for name, _ in HOSTILE])
async def test_what_cannot_be_sent_is_refused_by_itself_and_its_neighbours_are_confirmed(
    opener: Opener, broker: str, changes: dict[str, Any]
) -> None:
    async with audit(broker) as witness, opened(opener, broker) as publisher:
        outcomes = await publisher.publish([message(1), message(2, **changes), message(3)])
        assert stamp(outcomes) == ["Confirmed", "Refused", "Confirmed"]
        assert publisher.lost is None
        assert await publisher.publish([message(4)]) == [Confirmed()]
        await witness.wait_for(3)
    assert [m.message_id for m in witness.messages] == ["id-1", "id-3", "id-4"]


async def test_a_closed_connection_leaves_the_rest_unknown_and_the_session_lost(
    opener: Opener, broker: str, rabbitmq: RabbitMQ
) -> None:
    async with audit(broker), opened(opener, broker) as publisher:
        assert await publisher.publish([message(0)]) == [Confirmed()]
        publishing = asyncio.create_task(publish_until_lost(publisher))
        await asyncio.to_thread(rabbitmq.close_all_connections)
        sent, outcomes = await asyncio.wait_for(publishing, 30)
        assert sent == len(outcomes)
        assert {type(outcome) for outcome in outcomes} <= {Confirmed, Unknown}
        assert isinstance(outcomes[-1], Unknown)
        assert publisher.lost is not None
        async with asyncio.timeout(5):
            await publisher.wait_lost()
            assert stamp(await publisher.publish([message(1)])) == ["Unknown"]


async def publish_until_lost(publisher: Publisher, answered: asyncio.Event | None = None) -> tuple[int, list[Any]]:
    """Three calls at a time. `answered` is set when the first three have ended."""
    sent, outcomes = 0, []
    while publisher.lost is None:
        calls = [[message(sent + n) for n in range(start, start + 100)] for start in (0, 100, 200)]
        sent += 300
        for answers in await asyncio.gather(*(publisher.publish(call) for call in calls)):
            outcomes += answers
        if answered is not None:
            answered.set()
    return sent, outcomes


async def test_nothing_confirmed_is_missing_after_the_broker_was_killed(
    opener: Opener, rabbitmq: RabbitMQ, broker: str
) -> None:
    async with audit(broker) as witness:
        await witness.channel.declare_queue("kept", durable=True)
        await (await witness.channel.get_queue("kept")).bind(witness.exchange, "order.#")
    async with opened(opener, broker) as publisher:
        answered = asyncio.Event()
        publishing = asyncio.create_task(publish_until_lost(publisher, answered))
        await asyncio.wait_for(answered.wait(), 30)
        await asyncio.to_thread(rabbitmq.kill9)
        _, outcomes = await asyncio.wait_for(publishing, 30)
    await asyncio.to_thread(rabbitmq.start_again)
    confirmed = {n for n, outcome in enumerate(outcomes) if isinstance(outcome, Confirmed)}
    async with audit(broker, "none") as witness:
        await (await witness.channel.get_queue("kept")).consume(witness._take, no_ack=True)
        await witness.wait_for_distinct(len(confirmed))
        assert confirmed <= {m.headers["x-sequence"] for m in witness.messages}
    assert confirmed


async def test_a_broker_that_does_not_answer_is_given_up_after_the_confirm_timeout(
    opener: Opener, broker: str, rabbitmq: RabbitMQ
) -> None:
    async with audit(broker), opened(opener, broker, confirm_timeout_s=1) as publisher:
        assert await publisher.publish([message(0)]) == [Confirmed()]
        rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            async with asyncio.timeout(8):
                outcomes = [Confirmed()]
                while outcomes == [Confirmed()]:
                    outcomes = await publisher.publish([message(1)])  # type: ignore[assignment]
            assert stamp(outcomes) == ["Unknown"]
            assert publisher.lost is not None
        finally:
            rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")


async def test_cancelling_destroys_the_session_and_nothing_hangs(opener: Opener, broker: str) -> None:
    async with audit(broker), opened(opener, broker) as publisher:
        publishing = asyncio.create_task(publisher.publish([message(n) for n in range(400)]))
        await asyncio.sleep(0)
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(publishing, 5)
        assert publisher.lost is not None


async def test_cancelling_one_of_several_calls_ends_them_all(opener: Opener, broker: str) -> None:
    async with audit(broker) as witness, opened(opener, broker) as publisher:
        calls = [
            asyncio.create_task(publisher.publish([message(n) for n in range(start, start + 400)]))
            for start in range(0, 1200, 400)
        ]
        await asyncio.sleep(0)
        calls[2].cancel()
        async with asyncio.timeout(5):
            first, second, third = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(third, asyncio.CancelledError)
        assert isinstance(first, list)
        assert isinstance(second, list)
        assert publisher.lost is not None
        confirmed = {n for n, outcome in enumerate(first + second) if isinstance(outcome, Confirmed)}
        assert set(stamp(first + second)) <= {"Confirmed", "Unknown"}
        await witness.wait_for_distinct(len(confirmed))
        assert confirmed <= {m.headers["x-sequence"] for m in witness.messages}


async def test_a_message_id_twice_in_one_batch_is_a_mistake_of_the_caller(opener: Opener, broker: str) -> None:
    async with opened(opener, broker) as publisher:
        with pytest.raises(ValueError, match="same message_id"):
            await publisher.publish([message(1), message(1)])


async def test_wrong_credentials_and_missing_things_say_so(opener: Opener, broker: str) -> None:
    scheme, _, rest = broker.partition("://")
    with pytest.raises(BrokerRefused, match="refused"):
        async with opened(opener, f"{scheme}://nobody:wrong@{rest.partition('@')[2]}"):
            pass
    with pytest.raises(BrokerRefused, match="does not exist"):
        async with opened(opener, broker, exchange="missing", declare_topology=False):
            pass
    with pytest.raises(BrokerUnavailable):
        async with opened(opener, "amqp://guest:guest@127.0.0.1:1/"):
            pass
