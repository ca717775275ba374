"""The two seams between relay and the AMQP client: a batch in, an outcome for every message out; deliveries in bulk.

Whatever implements them (the fast lane; stock aio-pika, which it can be switched back to) is run by the same contract suite,
tests/integration/test_publisher_contract.py and test_consumer_contract.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from relay.message import Delivery, Message


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The broker took responsibility: `basic.ack`, and the message was not returned. The only evidence of a publication."""


@dataclass(frozen=True, slots=True)
class Returned:
    """No queue is bound for the routing key: the broker gave the message back."""

    reply_text: str


@dataclass(frozen=True, slots=True)
class Nacked:
    """The broker refused responsibility (`basic.nack`), for example because a queue is full."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The message was not sent, or closed the channel by itself: it cannot be published as it is."""

    reason: Literal["too_large", "unencodable", "refused", "unconfirmed"]
    detail: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """The session ended before the answer. The message may or may not have arrived: publish it again in a new session."""

    detail: str
    timed_out: bool = False  # it was sent, and not confirmed within the confirm time-out


Outcome = Confirmed | Returned | Nacked | Refused | Unknown


class Publisher(Protocol):
    """One confirm channel on a connection of its own."""

    async def publish(self, messages: Sequence[Message]) -> list[Outcome]:
        """Publish in order, pipelined, persistent and mandatory; return the outcome of each, in the same order.

        Never raises for the broker's or the network's sake: a message without an answer is `Unknown`, and then
        `lost` is set and every later call returns only `Unknown`. The ids of all that is being published must be
        distinct: within one call, and between calls at the same time.

        May be called again before the last call has ended: calls are written in the order in which they were begun, each
        whole before the next, and what is in flight over all of them is bounded, in messages and in bytes.
        Ends within the confirm time-out of its own last write, whatever the broker does; the time in which it has an alarm
        may be left out, of each alarm so much. Safe to cancel: cancelling any call destroys the session.
        """
        ...

    @property
    def lost(self) -> BaseException | None:
        """Why the session ended, None while it is usable."""
        ...

    async def wait_lost(self) -> None:
        """Return as soon as `lost` is set, also when nothing is being published."""
        ...

    @property
    def message_is_suspect(self) -> bool:
        """True when the session ended in a way that one of its messages may have caused.

        Published one at a time, the message at fault is `Refused` by the call that ends the session.
        """
        ...

    async def close(self) -> None:
        """Say goodbye within a bounded time, then cut. Never raises."""
        ...


class Consumer(Protocol):
    """One subscription on a connection of its own."""

    async def receive(self, limit: int) -> list[Delivery]:
        """The next deliveries in the broker's order: waits for the first, then takes what is there, at most `limit`.

        Fewer, also when more are there, where their bodies would take too much memory.

        Raises BrokerError when the session has ended (connection, channel, queue deleted, cancelled by the broker);
        nothing that was received and not acknowledged is lost then, the broker delivers it again. Safe to cancel:
        no delivery disappears from the sequence of calls.
        """
        ...

    def next_ready(self) -> Delivery | None:
        """The next delivery in the sequence of `receive`, if it is here already. None: it is not, or the session has ended.

        Raises BrokerError when it is what ends the session.
        """
        ...

    async def acknowledge(self, tag: int) -> None:
        """Acknowledge everything up to and including `tag`. Raises BrokerError when the session has ended (harmless: redelivery)."""
        ...

    async def close(self) -> None:
        """Say goodbye within a bounded time, then cut. Never raises."""
        ...
