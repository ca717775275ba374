"""RabbitMQ as a whole, and what an operator can do to it: alarms, deleted and emptied things, rights and passwords.

What is counted is what the broker answered, what the proxies saw of its frames, what relay's tables and logs tell.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import aiormq.exceptions
from aiormq.abc import AbstractChannel

from relay.errors import SandboxError
from tests.faults.lab.daemons import Daemon
from tests.faults.lab.fault import fault
from tests.faults.lab.kinds.processes import frozen
from tests.faults.lab.stage import ALL_PERMISSIONS, BROKER_USERS, Stage

WHOLE = ("broker", "relay-amqp", "consumer-amqp")
RELAY_USER, CONSUMER_USER = BROKER_USERS
EXCHANGE, QUEUE, AUDIT, AUDITED = "relay.events", "effects", "audit", "account.#"
LIMIT = "/api/policies/%2F/lab-full"
MEMORY_LIMIT = "0.4"  # RabbitMQ 3's default
DISK_LIMIT = "50MB"  # the sandbox's
HEALED_BY_MARKS_S = 30.0
"""What the broker lost is missed by marks (swept every 5 s), asked for, and sent again."""

REFUSED = re.compile(r"BrokerRefused|ACCESS_REFUSED")
NO_EXCHANGE = re.compile(r"NOT_FOUND - no exchange 'relay\.events'")
NO_QUEUE = re.compile(r"RabbitMQ cancelled the consumer|NOT_FOUND - no queue 'effects'")

UNROUTABLE = "SELECT count(*) AS n FROM relay.outbox_parked WHERE reason = 'unroutable' AND aggregate_type = 'lonely'"
MISSED = "SELECT count(*) AS n FROM relay.inbox_gap WHERE aggregate_type = 'account' AND noticed_at >= $1"


# --- the broker goes away


@fault("broker restarted", rows=(4,), touches=WHOLE, recovery_s=20)
async def broker_restarted(stage: Stage, _: random.Random) -> int:
    """A graceful stop, which closes all connections with a word of its own, and a start."""
    before = stage.broker.pid
    await asyncio.to_thread(stage.broker.restart)
    return int(stage.broker.pid != before)


@fault("broker killed", rows=(4,), touches=WHOLE, smoke=True, recovery_s=20)
async def broker_killed(stage: Stage, dice: random.Random) -> int:
    """kill -9 of the Erlang machine: whatever it confirmed is on its disk."""
    before = stage.broker.pid
    await asyncio.to_thread(stage.broker.kill9)
    try:
        await asyncio.sleep(dice.uniform(0, 2))
    finally:
        await asyncio.to_thread(stage.broker.start_again)
    return int(stage.broker.pid != before)


@fault("broker application stopped", rows=(4, 6), touches=WHOLE, recovery_s=20)
async def application_stopped(stage: Stage, dice: random.Random) -> int:
    """`rabbitmqctl stop_app`, as for maintenance: the machine runs, nobody listens. Bitten when a connection was refused."""
    await asyncio.to_thread(stage.broker.ctl, "stop_app")
    try:
        refused = not await _listens(stage.broker.port)
        await asyncio.sleep(dice.uniform(0.5, 3))
    finally:
        await asyncio.to_thread(stage.broker.ctl, "start_app")
        await _require(
            stage, lambda: asyncio.to_thread(stage.broker.management().answers), "the broker is not back", 30
        )
    return int(refused)


@fault("connections closed by an operator", rows=(4,), touches=("relay-amqp", "consumer-amqp"))
async def connections_closed(stage: Stage, dice: random.Random) -> int:
    """Some times in a row: what was in flight has no answer, and the next session starts from the cursor."""
    closed = 0
    for _ in range(dice.randint(1, 4)):
        for user in BROKER_USERS:
            closed += await _close_connections(stage, user)
        await asyncio.sleep(dice.uniform(0.2, 1.5))
    return closed


# --- the broker does not take anything for a while


@fault("memory alarm", rows=(5,), touches=WHOLE)
async def memory_alarm(stage: Stage, dice: random.Random) -> int:
    """Every publisher is blocked; who consumes goes on."""
    return await _alarm(stage, dice, ("set_vm_memory_high_watermark",), ("absolute", "1MB"), (MEMORY_LIMIT,))


@fault("disk alarm", rows=(5, 32), touches=WHOLE)
async def disk_alarm(stage: Stage, dice: random.Random) -> int:
    """The same for a disk that is nearly full."""
    return await _alarm(stage, dice, ("set_disk_free_limit",), ("9000GB",), (DISK_LIMIT,))


async def _alarm(
    stage: Stage, dice: random.Random, limit: tuple[str, ...], alarming: tuple[str, ...], usual: tuple[str, ...]
) -> int:
    """Bitten as often as a connection of the relays was told that it is blocked."""
    before = stage.relay_amqp.seen["blocked"]
    try:
        await asyncio.to_thread(stage.broker.ctl, *limit, *alarming)
        await _wait(stage, lambda: stage.relay_amqp.seen["blocked"] > before, timeout_s=12)
        await asyncio.sleep(dice.uniform(1, 7))  # sometimes longer than the relay waits for confirms
    finally:
        await asyncio.to_thread(stage.broker.ctl, *limit, *usual)
    return int(stage.relay_amqp.seen["blocked"] - before)


@fault("queue full", rows=(8, 9), touches=("consumer", *WHOLE), smoke=True, recovery_s=30)
async def queue_full(stage: Stage, dice: random.Random) -> int:
    """Nobody consumes, and the queue takes no more: what goes there is refused with basic.nack, and tried again.

    The limit is raised before it is taken away: when it is gone, RabbitMQ before 4.0 does not tell publishers that they may
    go on, and nacks whatever their channels publish to the queue (rabbitmq-server issue 12206).
    """
    before = stage.relay_amqp.seen["nack"]
    try:
        async with _nobody_consuming(stage):
            await _limit(stage, 20)
            await _wait(stage, lambda: stage.relay_amqp.seen["nack"] > before, timeout_s=20)
            await asyncio.sleep(dice.uniform(0.5, 2.5))
            nacks = stage.relay_amqp.seen["nack"] - before
    finally:
        await _limit(stage, 1_000_000)
        if not await _wait(stage, lambda: _takes_again(stage), timeout_s=10):  # raising it does not always help either
            await _close_connections(stage, RELAY_USER)
        await _api(stage, "DELETE", LIMIT)
    return nacks


async def _limit(stage: Stage, messages: int) -> None:
    rules = {"max-length": messages, "overflow": "reject-publish"}
    await _api(stage, "PUT", LIMIT, {"pattern": f"^{QUEUE}$", "apply-to": "queues", "definition": rules})


async def _takes_again(stage: Stage) -> bool:
    """No publisher was refused for a while."""
    before = stage.relay_amqp.seen["nack"]
    await asyncio.sleep(1)
    return stage.relay_amqp.seen["nack"] == before


# --- what it has is taken away


@fault(
    "exchange deleted",
    rows=(11,),
    touches=("relay", "consumer", "consumer-db", "consumer-pg", *WHOLE),
    recovery_s=HEALED_BY_MARKS_S,
)
async def exchange_deleted(stage: Stage, _: random.Random) -> int:
    """With all its bindings. The relay declares it again, each consumer's next session binds its queue again.

    The audit queue must be bound before the consumers': it would not witness what they get. So consumers are only sent into
    their next session when it is.
    """
    await _at_work(stage)
    marks, returned = _marks(stage.relays), stage.relay_amqp.seen["return"]
    try:
        async with _operator(stage) as channel:
            await channel.exchange_delete(EXCHANGE)
        await _wait(stage, lambda: _exchange_exists(stage), timeout_s=15)
    finally:
        async with _operator(stage) as channel:
            await channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True)
            await channel.queue_bind(AUDIT, EXCHANGE, AUDITED)
        await _close_connections(stage, CONSUMER_USER)
    await _require(stage, lambda: _is_bound(stage, AUDITED), "no consumer has bound its queue again", 15)
    return _count(NO_EXCHANGE, stage.relays, marks) + stage.relay_amqp.seen["return"] - returned


@fault("queue deleted", rows=(11, 41), touches=("consumer", *WHOLE), recovery_s=HEALED_BY_MARKS_S)
async def queue_deleted(stage: Stage, dice: random.Random) -> int:
    """With all that is in it. Consumers are told, and declare it again; until it is bound, events go to the audit only."""
    await _at_work(stage)
    marks = _marks(stage.consumers)
    await asyncio.sleep(dice.uniform(0, 0.5))
    async with _operator(stage) as channel:
        await channel.queue_delete(QUEUE)
    await _require(stage, lambda: _is_bound(stage, AUDITED), "no consumer has declared its queue again", 15)
    await _wait(stage, lambda: _count(NO_QUEUE, stage.consumers, marks) > 0, timeout_s=5)
    return _count(NO_QUEUE, stage.consumers, marks)


@fault("queue purged", rows=(41, 26), touches=("consumer", *WHOLE), recovery_s=HEALED_BY_MARKS_S)
async def queue_purged(stage: Stage, dice: random.Random) -> int:
    """Confirmed events are thrown away. Bitten as often as the broker says that it has thrown away."""
    wanted = dice.randint(1, 200)
    async with _nobody_consuming(stage), _operator(stage) as channel:

        async def filled() -> bool:
            return ((await channel.queue_declare(QUEUE, passive=True)).message_count or 0) >= wanted

        await _wait(stage, filled, timeout_s=15)
        purged = (await channel.queue_purge(QUEUE)).message_count
    return purged or 0


@fault("route of one type unbound", rows=(10,), touches=("broker", "consumer", "consumer-amqp"), confined_to="lonely")
async def lonely_unbound(stage: Stage, dice: random.Random) -> int:
    """No queue is bound for these events: the broker returns them, they are parked, and go out when it is bound again."""
    most = 0
    async with _unbound(stage, "lonely.#"):

        async def parked() -> bool:
            nonlocal most
            most = max(most, int((await stage.producer_sql(UNROUTABLE))[0]["n"]))
            return most > 0

        await stage.until(parked, timeout_s=15)
        await asyncio.sleep(dice.uniform(0.5, 3))
        await stage.until(parked, timeout_s=1)
    return most


@fault(
    "route unbound for the consumer only",
    rows=(41, 26),
    touches=("broker", "consumer", "consumer-amqp"),
    recovery_s=HEALED_BY_MARKS_S,
)
async def account_unbound(stage: Stage, dice: random.Random) -> int:
    """The audit queue still gets these events, so the broker confirms them: nobody but the marks tells the consumer.

    Bitten as often as it noticed that it misses something of an aggregate.
    """
    (now,) = await stage.consumer_sql("SELECT clock_timestamp() AS at")
    async with _unbound(stage, AUDITED):
        published = stage.relay_amqp.seen["publish"]
        await _wait(stage, lambda: stage.relay_amqp.seen["publish"] > published + 20, timeout_s=15)
        await asyncio.sleep(dice.uniform(0, 2))
    most = 0

    async def missed() -> bool:
        nonlocal most
        most = max(most, int((await stage.consumer_sql(MISSED, now["at"]))[0]["n"]))
        return most > 0

    await stage.until(missed, timeout_s=12)
    return most


# --- rights and passwords


@fault("relay's rights revoked", rows=(11, 35), touches=("broker", "relay-amqp"))
async def relay_revoked(stage: Stage, dice: random.Random) -> int:
    """All of them, so that it is not let in; or only the right to publish, so that the broker closes its channel."""
    rights = dice.choice([None, ALL_PERMISSIONS | {"write": "^$"}])
    return await _revoked(stage, dice, RELAY_USER, stage.relays, rights)


@fault("consumer's rights revoked", rows=(11, 35), touches=("broker", "consumer-amqp"))
async def consumer_revoked(stage: Stage, dice: random.Random) -> int:
    """All of them, or only the right to read."""
    rights = dice.choice([None, ALL_PERMISSIONS | {"read": "^$"}])
    return await _revoked(stage, dice, CONSUMER_USER, stage.consumers, rights)


async def _revoked(
    stage: Stage, dice: random.Random, user: str, daemons: Sequence[Daemon], rights: dict[str, object] | None
) -> int:
    """Bitten as often as a daemon logged a refusal. A channel remembers what it was allowed, so connections are closed too."""
    marks = _marks(daemons)
    permissions = f"/api/permissions/%2F/{user}"
    try:
        await (_api(stage, "DELETE", permissions) if rights is None else _api(stage, "PUT", permissions, rights))
        await _close_connections(stage, user)
        await _wait(stage, lambda: _count(REFUSED, daemons, marks) > 0, timeout_s=10)
        await asyncio.sleep(dice.uniform(0.5, 3))
    finally:
        await _api(stage, "PUT", permissions, ALL_PERMISSIONS)
    return _count(REFUSED, daemons, marks)


@fault("relay's password changed", rows=(40,), touches=("broker", "relay-amqp"))
async def relay_password_changed(stage: Stage, dice: random.Random) -> int:
    """Somebody rotated it and forgot the relay; then the old one is valid again."""
    marks = _marks(stage.relays)
    path = f"/api/users/{RELAY_USER}"
    user = json.loads(await _api(stage, "GET", path))
    try:
        await _api(stage, "PUT", path, {"password": secrets.token_hex(8), "tags": ""})
        await _close_connections(stage, RELAY_USER)
        await _wait(stage, lambda: _count(REFUSED, stage.relays, marks) > 0, timeout_s=10)
        await asyncio.sleep(dice.uniform(0.5, 3))
    finally:
        await _api(stage, "PUT", path, {name: user[name] for name in ("password_hash", "hashing_algorithm", "tags")})
    return _count(REFUSED, stage.relays, marks)


# --- what an operator does, and sees


@asynccontextmanager
async def _operator(stage: Stage) -> AsyncIterator[AbstractChannel]:
    """A channel straight to the broker: exact counts at once, where the management API's figures are seconds old."""
    async with await aio_pika.connect(stage.broker.url(), timeout=10) as connection:
        channel = await connection.channel(publisher_confirms=False)
        yield await channel.get_underlay_channel()


@asynccontextmanager
async def _nobody_consuming(stage: Stage) -> AsyncIterator[None]:
    """Both consumers stand still: what they have not taken yet stays in the queue."""
    await _at_work(stage)
    async with frozen(stage, *stage.consumers):
        yield


@asynccontextmanager
async def _unbound(stage: Stage, pattern: str) -> AsyncIterator[None]:
    """Within it the consumers' queue gets nothing of that kind; a consumer's next session would bind it again by itself."""
    async with _operator(stage) as channel:
        await channel.queue_unbind(QUEUE, EXCHANGE, pattern)
    try:
        yield
    finally:
        async with _operator(stage) as channel:
            await channel.queue_bind(QUEUE, EXCHANGE, pattern)


async def _close_connections(stage: Stage, user: str) -> int:
    """Close all connections of a broker's user; how many it had."""
    path = f"/api/connections/username/{user}"
    had = json.loads(await _api(stage, "GET", path))
    await _api(stage, "DELETE", path)
    return len(had)


async def _exchange_exists(stage: Stage) -> bool:
    return bool(await _api(stage, "GET", f"/api/exchanges/%2F/{EXCHANGE}"))


async def _is_bound(stage: Stage, pattern: str) -> bool:
    """Whether the consumers' queue gets these events."""
    found: list[dict[str, Any]] = json.loads(
        await _api(stage, "GET", f"/api/exchanges/%2F/{EXCHANGE}/bindings/source") or b"[]"
    )
    return any(one["destination"] == QUEUE and one["routing_key"] == pattern for one in found)


async def _api(stage: Stage, method: str, path: str, body: dict[str, object] | None = None) -> bytes:
    """The management API; nothing for what is not there."""
    return await asyncio.to_thread(stage.broker.management().request, method, path, body, missing_is_fine=True)


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def _marks(daemons: Sequence[Daemon]) -> list[int]:
    return [daemon.log_mark() for daemon in daemons]


def _count(words: re.Pattern[str], daemons: Sequence[Daemon], marks: Sequence[int]) -> int:
    """How often they have logged it since then."""
    return sum(len(words.findall(d.log_since(mark))) for d, mark in zip(daemons, marks, strict=True))


async def _at_work(stage: Stage) -> None:
    """Wait until the relay publishes and both consumers are on the queue: who is just connecting notices nothing."""
    before = stage.relay_amqp.seen["publish"]

    async def at_work() -> bool:
        async with _operator(stage) as channel:
            consuming = (await channel.queue_declare(QUEUE, passive=True)).consumer_count == len(stage.consumers)
        return consuming and stage.relay_amqp.seen["publish"] > before

    await _require(stage, at_work, "relay and consumers are not at work", 40)


async def _wait(stage: Stage, condition: Callable[[], Awaitable[bool] | bool], *, timeout_s: float) -> bool:
    """As `Stage.until`; a broker that does not answer counts as not yet, too."""

    async def asked() -> bool:
        try:
            found = condition()
            return found if isinstance(found, bool) else await found
        except (aiormq.exceptions.AMQPError, SandboxError):
            return False

    return await stage.until(asked, timeout_s=timeout_s)


async def _require(stage: Stage, condition: Callable[[], Awaitable[bool]], failure: str, timeout_s: float) -> None:
    if not await _wait(stage, condition, timeout_s=timeout_s):
        raise TimeoutError(failure)
