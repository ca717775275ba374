"""The nemesis: kills daemons, restarts the broker, delivers copies, swaps messages. It counts what it has done, not what it meant to.

How messages are swapped: a further consumer joins each queue, is given some messages, sits on them while others go past,
and dies without an acknowledgement; the broker hands its messages out again, late. Nothing of that is simulated.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from relay.demo.audit import Audit
from relay.demo.broker import reconnecting
from relay.demo.processes import Daemon
from relay.demo.shop import Shop
from relay.demo.sql import sql
from relay.postgres.connect import Connection, connection
from relay.rabbitmq.session import Session
from relay.sandbox import SandboxRabbitMQ
from relay.settings import PostgresSettings, RabbitmqSettings

TAKEN = 25
"""Messages that the dying consumer asks for."""
HOLDING_S = (0.4, 0.9)
"""How long it sits on them: longer than an order takes to its next event."""
RESTART_S = 0.5
"""Until a killed daemon is started again, as a supervisor would."""
TAKEOVER_TIMEOUT_S = 15.0

_BROKERS_OWN = (
    "x-delivery-count",
    "x-acquired-count",
    "x-death",
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
)

Tell = Callable[[str], None]


@dataclass(slots=True)
class Faults:
    """What has happened."""

    broker_restarts: int = 0
    copies: int = 0  # of real messages, published again and confirmed
    dead_consumers: int = 0  # that died with messages in hand
    taken: int = 0  # messages that they had in hand
    takeovers_s: list[float] = field(default_factory=list)  # from a kill of the owner to the standby's ownership


@dataclass(slots=True)
class Nemesis:
    """All faults of one run, at fixed parts of the shop's day."""

    shop: Shop
    relays: Sequence[Daemon]
    billing: Daemon
    broker: SandboxRabbitMQ
    audit: Audit
    postgres: PostgresSettings  # of the shop, to see which relay owns the log
    rabbitmq: RabbitmqSettings
    queues: Sequence[str]
    tell: Tell
    dice: random.Random
    faults: Faults = field(default_factory=Faults)

    async def run(self) -> None:
        """Until the day's business is done and every fault has had its turn."""
        gentle = [
            asyncio.create_task(reconnecting(self.rabbitmq, "demo copies", self._copy)),
            *(asyncio.create_task(reconnecting(self.rabbitmq, "demo swaps", self._swaps(q))) for q in self.queues),
        ]
        try:
            for share, act in self._plan():
                await self._at(share)
                await act()
            await self._at(1)
        finally:
            for task in gentle:
                task.cancel()
            await asyncio.gather(*gentle, return_exceptions=True)

    def _plan(self) -> list[tuple[float, Callable[[], Awaitable[None]]]]:
        return [
            (0.06, self._kill_owner),
            (0.16, self._kill_billing),
            (0.26, self._kill_owner),
            (0.36, self._restart_broker),
            (0.60, self._kill_owner),
            (0.72, self._kill_billing),
            (0.82, self._kill_owner),
        ]

    async def _at(self, share: float) -> None:
        while self.shop.progress < share:  # noqa: ASYNC110 - it grows with every order: looking is simpler than announcing
            await asyncio.sleep(0.05)

    async def _kill_owner(self) -> None:
        """SIGKILL for the relay that owns the log: the standby must take over."""
        async with connection(self.postgres, application="demo nemesis") as looking:
            owner = await looking.fetchval(sql("owner_of_log"))
            victim = next((r for r in self.relays if owner and owner.endswith(f":{r.pid}")), self.relays[0])
            self.tell(f"kill -9 {victim.name} (pid {victim.pid}), the owner of the log")
            await asyncio.sleep(self.dice.uniform(0, 0.1))  # anywhere between two checkpoints
            killed_at = asyncio.get_running_loop().time()
            await victim.kill9()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._start_later(victim))
                takeover_s = await self._takeover(looking, owner, killed_at)
        if takeover_s is None:
            self.tell(f"nobody has taken over for {TAKEOVER_TIMEOUT_S:g} s")
        else:
            self.faults.takeovers_s.append(takeover_s)
            self.tell(f"the standby owns the log after {takeover_s:.1f} s; {victim.name} is started again")

    async def _takeover(self, looking: Connection, owner: str | None, killed_at: float) -> float | None:
        """Seconds until another process owns the log; None if that takes too long."""
        clock = asyncio.get_running_loop().time
        while clock() - killed_at < TAKEOVER_TIMEOUT_S:
            if await looking.fetchval(sql("owner_of_log")) != owner:
                return clock() - killed_at
            await asyncio.sleep(0.02)
        return None

    async def _kill_billing(self) -> None:
        self.tell(f"kill -9 {self.billing.name} (pid {self.billing.pid}), with messages in hand")
        await self.billing.kill9()
        await self._start_later(self.billing)

    async def _start_later(self, daemon: Daemon) -> None:
        await asyncio.sleep(RESTART_S)
        await daemon.start()

    async def _restart_broker(self) -> None:
        self.tell(f"kill -9 RabbitMQ (pid {self.broker.pid}); the shop goes on without it")
        clock = asyncio.get_running_loop().time
        begun = clock()
        await asyncio.to_thread(self.broker.kill9)
        await asyncio.to_thread(self.broker.start_again)
        self.faults.broker_restarts += 1
        self.tell(f"RabbitMQ is back after {clock() - begun:.0f} s, with what it had on disk")

    async def _copy(self, session: Session) -> None:
        """Publish real messages again, as a client does whose confirm got lost: some at once, some seconds late."""
        channel = await session.channel(publisher_confirms=True)
        while True:
            await asyncio.sleep(self.dice.uniform(0.02, 0.12))
            if not self.audit.recent:
                continue
            message = self.dice.choice(self.audit.recent)
            exchange = await channel.get_exchange(message.exchange or "", ensure=False)
            await exchange.publish(_again(message), message.routing_key or "")
            self.faults.copies += 1

    def _swaps(self, name: str) -> Callable[[Session], Awaitable[None]]:
        async def take_some_and_die(session: Session) -> None:
            taken: list[AbstractIncomingMessage] = []

            async def take(message: AbstractIncomingMessage) -> None:
                taken.append(message)

            await asyncio.sleep(self.dice.uniform(0.1, 0.5))
            channel = await session.channel(publisher_confirms=False)
            await channel.set_qos(prefetch_count=TAKEN)
            queue = await channel.get_queue(name, ensure=False)
            await queue.consume(take)
            await asyncio.sleep(self.dice.uniform(*HOLDING_S))
            session.abort()
            self.faults.dead_consumers += bool(taken)
            self.faults.taken += len(taken)

        return take_some_and_die


def _again(message: AbstractIncomingMessage) -> aio_pika.Message:
    return aio_pika.Message(
        message.body,
        message_id=message.message_id,
        type=message.type,
        app_id=message.app_id,
        timestamp=message.timestamp,
        content_type=message.content_type,
        headers={name: value for name, value in message.headers.items() if name not in _BROKERS_OWN},
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )
