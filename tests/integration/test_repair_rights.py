"""Repair and marks with the least rights, in PostgreSQL and at the broker; and without them events flow as before."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from urllib.parse import quote, urlsplit, urlunsplit

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from relay.sandbox import Postgres, RabbitMQ
from relay.settings import Settings
from tests.harness.logins import Logins
from tests.harness.outbox import until
from tests.harness.pair import Pair, pair

__all__ = ["pair"]

RELAY = {
    "configure": r"^relay\.(events|events\.marks|repair|repair\.shop)$",
    "write": r"^(relay\.(events|events\.marks|repair\.shop)|amq\.default)$",
    "read": r"^relay\.(repair|repair\.shop)$",
}
INBOX = {
    "configure": r"^(relay\.(events|events\.marks|dead|repair)|billing|billing\.dead)$",
    "write": r"^(relay\.(dead|repair)|billing|billing\.dead)$",
    "read": r"^(relay\.(events|events\.marks|dead)|billing)$",
}
"""What README says that the two users need, with rabbitmq.declare_topology."""

RELAY_BEFORE = {"configure": r"^relay\.events$", "write": r"^relay\.events$", "read": "^$"}
INBOX_BEFORE = {
    "configure": r"^(relay\.(events|dead)|billing|billing\.dead)$",
    "write": r"^(relay\.dead|billing|billing\.dead)$",
    "read": r"^(relay\.(events|dead)|billing)$",
}

Grant = Callable[[Settings, dict[str, str]], Settings]


@pytest.fixture
def grant(rabbitmq: RabbitMQ, broker: str) -> Iterator[Grant]:
    """The same settings with a broker user of these rights and no others."""
    api = rabbitmq.management()
    users: list[str] = []

    def create(settings: Settings, rights: dict[str, str]) -> Settings:
        user = f"relay_user_{secrets.token_hex(4)}"
        users.append(user)
        api.request("PUT", f"/api/users/{user}", {"password": "secret", "tags": ""})
        parts = urlsplit(broker)
        vhost = quote(parts.path.removeprefix("/"), safe="")
        api.request("PUT", f"/api/permissions/{vhost}/{user}", rights)
        url = urlunsplit(parts._replace(netloc=f"{user}:secret@{parts.netloc.rpartition('@')[2]}"))
        return settings.model_copy(update={"rabbitmq": settings.rabbitmq.model_copy(update={"url": SecretStr(url)})})

    yield create
    for user in users:
        api.request("DELETE", f"/api/users/{user}")


def with_login(settings: Settings, logins: Logins, role: str) -> Settings:
    dsn = logins.create(settings.postgres.dsn.get_secret_value(), role)
    return settings.model_copy(update={"postgres": settings.postgres.model_copy(update={"dsn": SecretStr(dsn)})})


async def lose_some(pair: Pair) -> None:
    """The queue exists, with the last and a middle message of two aggregates lost."""
    await pair.emit("order/1", 3)
    await pair.emit("order/2", 3)
    await pair.publish()
    await pair.lose(("1", 2), ("2", 3))


async def test_the_rights_that_readme_names_suffice(pair: Pair, grant: Grant, postgres: Postgres, broker: str) -> None:
    with Logins(postgres) as logins:
        await pair.declare()
        await lose_some(pair)
        await pair.consumer_db.execute("GRANT INSERT ON effect TO PUBLIC")
        pair.producer = with_login(grant(pair.producer, RELAY), logins, "relay_daemon")
        pair.consumer = with_login(grant(pair.consumer, INBOX), logins, "relay_consumer")
        with capture_logs() as told:
            async with pair.both():
                await pair.applied("1", [1, 2, 3])
                await pair.applied("2", [1, 2, 3])
        assert [t for t in told if t["log_level"] == "warning" and t["event"] != "gap"] == []
        await pair.consumer_db.execute("REVOKE INSERT ON effect FROM PUBLIC")


async def test_without_the_rights_for_marks_and_repair_events_flow_and_it_is_told_once(
    pair: Pair, grant: Grant
) -> None:
    pair.producer, pair.consumer = grant(pair.producer, RELAY_BEFORE), grant(pair.consumer, INBOX_BEFORE)
    with capture_logs() as told:
        async with pair.inbox(), pair.relay():

            async def told_all() -> bool:
                """And the inbox's queue is bound: an event that comes before is unroutable."""
                return {"marks_unavailable", "repair_unavailable", "inbox_started"} <= {t["event"] for t in told}

            await until(told_all)
            await pair.emit("order/1", 3)
            await pair.applied("1", [1, 2, 3])
    events = [t["event"] for t in told if t["log_level"] == "warning"]
    assert sorted(events) == ["marks_unavailable", "marks_unavailable", "repair_unavailable"]  # inbox, relay, relay


async def test_rights_that_were_taken_away_for_a_moment_are_not_done_without_for_long(
    pair: Pair, grant: Grant, rabbitmq: RabbitMQ
) -> None:
    await pair.declare()
    await lose_some(pair)
    pair.producer = grant(pair.producer, RELAY_BEFORE)
    with capture_logs() as told:
        async with pair.relay():

            async def refused() -> bool:
                return {"marks_unavailable", "repair_unavailable"} <= {t["event"] for t in told}

            await until(refused)
            parts = urlsplit(pair.producer.rabbitmq.url.get_secret_value())
            vhost = quote(parts.path.removeprefix("/"), safe="")
            rabbitmq.management().request("PUT", f"/api/permissions/{vhost}/{parts.username}", RELAY)
            async with pair.inbox():
                await pair.applied("1", [1, 2, 3])
                await pair.applied("2", [1, 2, 3])


async def test_without_declaring_what_is_missing_is_done_without_and_what_is_there_is_used(pair: Pair) -> None:
    """The queue and its bindings were made by somebody else; the queue for requests was not."""
    await pair.declare()
    pair.with_inbox(rabbitmq__declare_topology=False)
    await lose_some(pair)
    declaring = pair.producer
    pair.producer = declaring.model_copy(
        update={"rabbitmq": declaring.rabbitmq.model_copy(update={"declare_topology": False})}
    )
    with capture_logs() as told:
        async with pair.both():
            await pair.gap("aggregate_id = '2' AND found_by = 'mark' AND detail LIKE 'cannot be asked for%'")
    assert [t["queue"] for t in told if t["event"] == "repair_unavailable"] == ["relay.repair.shop"]
    pair.producer = declaring
    async with pair.both():
        await pair.applied("2", [1, 2, 3])
