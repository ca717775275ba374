"""The shop: concurrent producers that change business tables and emit events in one transaction, and sometimes roll back.

Each event also goes out the way it does without an outbox: published to RabbitMQ by the shop itself, from within the
transaction (the *dual write*). That path is there for the comparison only; relay has no part in it.
"""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aio_pika
from aio_pika.abc import AbstractExchange

from relay.demo.billing import STATES
from relay.demo.broker import DIRECT, reconnecting
from relay.demo.sql import sql
from relay.errors import BrokerError
from relay.postgres.connect import Connection, connection
from relay.producer import NewEvent
from relay.producer.asyncpg import emit_many
from relay.rabbitmq.session import Session, broker_errors
from relay.settings import PostgresSettings, RabbitmqSettings

PRODUCERS = 8
ROLLED_BACK = 0.15
"""Share of transactions that fail after the event was emitted: the bank says no, the customer closes the window."""

THINKING_S = (0.05, 0.4)
"""Between two steps of an order. Short, so that its next event is under way while the one before is still delayed."""

_PUBLISH_TIMEOUT_S = 1.0

Transaction = tuple[str, ...]
"""The event types of one transaction."""


class RolledBack(Exception):
    """The business changed its mind at the last moment."""


@dataclass(slots=True)
class Order:
    """One order on its way through the shop."""

    number: int
    amount_cents: int
    plan: list[Transaction]  # what is still to happen
    step: int = 0  # events committed so far
    paid_cents: int = 0


@dataclass(slots=True)
class Tally:
    """What the producers did."""

    orders: int = 0  # that have come to their end
    committed: int = 0  # transactions
    rolled_back: int = 0
    events: int = 0  # of the committed transactions
    undone_events: int = 0  # of the rolled-back ones
    unpublished: int = 0  # dual write only: events that RabbitMQ did not take; logged, as such code does, and forgotten


@dataclass(slots=True)
class DualWrite:
    """Publishes as code without an outbox does: no confirms, and an error is logged, for the business must go on."""

    settings: RabbitmqSettings
    tally: Tally
    _exchange: AbstractExchange | None = None

    async def run(self) -> None:
        """Keep a connection. Ends by cancellation."""
        await reconnecting(self.settings, "demo shop", self._hold)

    async def publish(self, event_type: str, order: dict[str, Any]) -> None:
        """Publish one event, or not."""
        try:
            with broker_errors("publishing"):
                async with asyncio.timeout(_PUBLISH_TIMEOUT_S):
                    if self._exchange is None:
                        raise ConnectionResetError("there is no connection")
                    message = aio_pika.Message(json.dumps(order).encode(), type=event_type, message_id=order["token"])
                    message.delivery_mode = aio_pika.DeliveryMode.PERSISTENT
                    await self._exchange.publish(message, f"order.{event_type}", mandatory=False)
        except BrokerError:
            self.tally.unpublished += 1

    async def _hold(self, session: Session) -> None:
        channel = await session.channel(publisher_confirms=False)
        self._exchange = await channel.get_exchange(DIRECT, ensure=False)
        try:
            await asyncio.Event().wait()
        finally:
            self._exchange = None


@dataclass(slots=True)
class Shop:
    """A day of business: `orders` orders, begun evenly over `seconds`, finished when the last has come to its end."""

    postgres: PostgresSettings
    dual_write: DualWrite
    tally: Tally
    orders: int
    seconds: float
    seed: int
    _numbers: int = 0
    _due: asyncio.PriorityQueue[tuple[float, int, Order | None]] = field(default_factory=asyncio.PriorityQueue)

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return self.tally.orders / self.orders

    async def run(self) -> None:
        """Do the day's business."""
        dice = random.Random(self.seed)  # noqa: S311 - no secret
        now = asyncio.get_running_loop().time()
        for i in range(self.orders):
            self._put(now + self.seconds * i / self.orders, self._new_order(dice))
        async with asyncio.TaskGroup() as group:
            for number in range(PRODUCERS):
                group.create_task(self._producer(random.Random(f"{self.seed}/{number}")))  # noqa: S311 - no secret

    async def _producer(self, dice: random.Random) -> None:
        clock = asyncio.get_running_loop().time
        async with connection(self.postgres, application="demo shop") as tx:
            while True:
                due, _, order = await self._due.get()
                if order is None:
                    return
                await asyncio.sleep(due - clock())
                await self._step(tx, order, dice)
                if order.plan:
                    self._put(clock() + dice.uniform(*THINKING_S), order)
                else:
                    self._finish()

    async def _step(self, tx: Connection, order: Order, dice: random.Random) -> None:
        """One transaction; when it is rolled back, the order tries again later (one that never was, under a new number)."""
        event_types = order.plan[0]
        try:
            async with tx.transaction():
                payloads = [await self._change(tx, order, i, event_type) for i, event_type in enumerate(event_types, 1)]
                await emit_many(tx, _events(event_types, payloads))
                for event_type, payload in zip(event_types, payloads, strict=True):
                    await self.dual_write.publish(event_type, payload)
                _ask_the_bank(dice)
        except RolledBack:
            self.tally.rolled_back += 1
            self.tally.undone_events += len(event_types)
            if order.step == 0:
                order.number = self._number()
            return
        self.tally.committed += 1
        self.tally.events += len(event_types)
        order.plan.pop(0)
        order.step += len(event_types)
        order.paid_cents += sum(payload["cents"] for payload in payloads)

    async def _change(self, tx: Connection, order: Order, ahead: int, event_type: str) -> dict[str, Any]:
        """Change the shop's tables; the payload that tells of it."""
        step, token = order.step + ahead, uuid.uuid4().hex
        cents = {"OrderPaid": order.amount_cents, "OrderCancelled": -order.paid_cents}.get(event_type, 0)
        if event_type == "OrderCreated":
            await tx.execute(sql("place_order"), order.number, order.amount_cents, token)
        else:
            paid_cents = order.amount_cents if event_type == "OrderShipped" else order.paid_cents + cents
            await tx.execute(sql("change_order"), order.number, STATES[event_type], paid_cents, step, event_type, token)
        return {"order": order.number, "step": step, "cents": cents, "token": token}

    def _new_order(self, dice: random.Random) -> Order:
        plan: list[Transaction] = [("OrderCreated",)]
        chance = dice.random()
        if chance < 0.12:
            plan += [("OrderCancelled",)]
        elif chance < 0.24:
            plan += [("OrderPaid",), ("OrderCancelled",)]  # paid back
        elif chance < 0.34:
            plan += [("OrderPaid", "OrderShipped")]  # a download: two events in one transaction
        else:
            plan += [("OrderPaid",), ("OrderShipped",)]
        return Order(number=self._number(), amount_cents=dice.randrange(500, 20_000), plan=plan)

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _put(self, due: float, order: Order) -> None:
        self._due.put_nowait((due, order.number, order))

    def _finish(self) -> None:
        self.tally.orders += 1
        if self.tally.orders == self.orders:
            for i in range(PRODUCERS):
                self._due.put_nowait((0.0, -i, None))


def _ask_the_bank(dice: random.Random) -> None:
    if dice.random() < ROLLED_BACK:
        raise RolledBack


def _events(event_types: Sequence[str], payloads: Sequence[dict[str, Any]]) -> list[NewEvent]:
    return [
        NewEvent(aggregate_type="order", aggregate_id=str(payload["order"]), event_type=event_type, payload=payload)
        for event_type, payload in zip(event_types, payloads, strict=True)
    ]
