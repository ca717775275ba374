"""Rows 6, 7 and 15 of the fault matrix: packets vanish. Nobody is told, and no kernel acknowledges anything.

The relay has a network of its own, in which the servers' addresses are black holes for a while: a proxy cannot do that, since
its kernel answers for it. What proxies can do is part of the laboratory.
"""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from relay.postgres.migrate import migrate
from relay.sandbox import SandboxPostgres, SandboxRabbitMQ
from relay.sandbox.ports import free_ports
from tests.faults.own_servers import postgres_version
from tests.harness.audit import audit
from tests.harness.outbox import connected, insert, until
from tests.harness.program import changed, environment, relay

__all__ = ["postgres_version"]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]

POSTGRES, RABBITMQ, RELAY = "10.213.77.1", "10.213.77.2", "10.213.77.3"
HEARTBEAT_S = 5
COMMAND_TIMEOUT_S = 5.0

BROKER_BOUND_S = 3 * (HEARTBEAT_S + 1) + HEARTBEAT_S / 2
"""aiormq gives a silent connection up after three heartbeats and a second each, and looks every half of one."""
SERVER_BOUND_S = 5 + 3 * 2 + 5
"""relay's sessions ask for tcp_keepalives of 5 s, 3 times 2 s, and a tcp_user_timeout of 10 s; and a second here and there."""


@dataclass(frozen=True, slots=True)
class Island:
    """A network namespace with one cable to ours."""

    name: str

    @property
    def inside(self) -> tuple[str, ...]:
        """Runs a command in it."""
        return ("ip", "netns", "exec", self.name)

    @contextmanager
    def cut_off_from(self, address: str) -> Iterator[None]:
        """Within it, what is sent there from the island vanishes, and so does every acknowledgement."""
        run("ip", "-n", self.name, "route", "add", "blackhole", f"{address}/32")
        run("ip", "-n", self.name, "neigh", "flush", "dev", "cable")
        try:
            yield
        finally:
            run("ip", "-n", self.name, "route", "del", "blackhole", f"{address}/32")


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def island() -> Iterator[Island]:
    name = f"relay-{secrets.token_hex(3)}"
    try:
        run("ip", "netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"needs ip and the right to make a network (root, CAP_NET_ADMIN): {exc}")
    end = f"v{secrets.token_hex(3)}"
    try:
        run("ip", "link", "add", end, "type", "veth", "peer", "name", "cable", "netns", name)
        for address in (POSTGRES, RABBITMQ):
            run("ip", "addr", "add", f"{address}/29", "dev", end)
        run("ip", "link", "set", end, "up")
        run("ip", "-n", name, "addr", "add", f"{RELAY}/29", "dev", "cable")
        run("ip", "-n", name, "link", "set", "cable", "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
        yield Island(name)
    finally:
        run("ip", "netns", "del", name)  # and the cable with it


@dataclass(frozen=True, slots=True)
class Servers:
    """Both servers, as seen from here and from the island."""

    dsn: str
    url: str
    dsn_there: str
    url_there: str


@pytest.fixture(scope="module")
def servers(island: Island, postgres_version: str | None) -> Iterator[Servers]:
    (port,) = free_ports(1)
    settings = {"listen_addresses": f"127.0.0.1,{POSTGRES}"}
    with (
        SandboxPostgres(postgres_version, fsync=False, settings=settings) as postgres,
        SandboxRabbitMQ(config=[f"listeners.tcp.2 = {RABBITMQ}:{port}"]) as rabbitmq,
    ):
        with (postgres.log.parent / "data" / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {RELAY}/32 scram-sha-256\n")
        postgres.execute("SELECT pg_reload_conf()")
        dsn, url = postgres.create_database("shop"), rabbitmq.url()
        asyncio.run(migrated(dsn))
        yield Servers(
            dsn=dsn,
            url=url,
            dsn_there=changed(dsn, host=f"{POSTGRES}:{urlsplit(dsn).port}"),
            url_there=changed(url, host=f"{RABBITMQ}:{port}"),
        )


async def migrated(dsn: str) -> None:
    async with connected(dsn) as db:
        await migrate(db)


def settings_of(dsn: str, url: str) -> dict[str, str]:
    return environment(
        dsn,
        url,
        rabbitmq_heartbeat_s=str(HEARTBEAT_S),
        postgres_command_timeout_s=str(COMMAND_TIMEOUT_S),
        rabbitmq_connect_timeout_s="5",
        outbox_standby_interval_s="0.2",
    )


async def test_an_owner_that_cannot_reach_postgresql_any_more_is_replaced_and_finds_out(
    island: Island, servers: Servers, tmp_path: Path
) -> None:
    """Row 7. Its statements are given up, its backend and with it the lock are gone in the server, and it leads no more."""
    there, here = settings_of(servers.dsn_there, servers.url_there), settings_of(servers.dsn, servers.url)
    async with audit(servers.url) as witness, connected(servers.dsn) as db:
        async with relay(tmp_path, there, "run", inside=island.inside) as owner:
            await owner.says('"owner"')
            await insert(db, "order/1", count=3)
            await witness.wait_for_distinct(3)
            before = await addresses(db)
            assert f"{RELAY}/32" in before
            async with relay(tmp_path, here, "run") as standby:
                await standby.says('"standby"')
                with island.cut_off_from(POSTGRES):
                    cut = time.monotonic()
                    await insert(db, "order/1", count=3)
                    await standby.says('"owner"')
                    taken_over_s = time.monotonic() - cut
                    await witness.wait_for_distinct(6)
                    await owner.says('"session_failed"')
                    noticed_s = time.monotonic() - cut
                    await until(lambda: are_gone(db), timeout_s=SERVER_BOUND_S)
                    gone_s = time.monotonic() - cut
                healed = time.monotonic()
                await owner.says('"standby"')
                back_s = time.monotonic() - healed
                await insert(db, "order/1", count=3)
                await witness.wait_for_distinct(9)
                assert (await standby.stop())[0] == (await owner.stop())[0] == 0
    assert witness.sequences() == {"order/1": list(range(1, 10))}
    assert taken_over_s < SERVER_BOUND_S
    assert noticed_s < 3 * COMMAND_TIMEOUT_S + 5
    print(
        f"row 7: the standby took over after {taken_over_s:.1f} s, the owner knew after {noticed_s:.1f} s, all its backends"
        f" were gone after {gone_s:.1f} s; it stood by {back_s:.1f} s after it was healed"
    )


async def addresses(db: object) -> list[str]:
    return [
        r["a"]
        for r in await db.fetch(  # type: ignore[attr-defined]
            "SELECT client_addr::text AS a FROM pg_stat_activity WHERE application_name LIKE 'relay %'"
        )
    ]


async def are_gone(db: object) -> bool:
    """Whether no backend of the island is left in the server."""
    return f"{RELAY}/32" not in await addresses(db)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_a_broker_that_cannot_be_reached_any_more_is_noticed_in_time(
    island: Island, servers: Servers, tmp_path: Path, busy: bool
) -> None:
    """Row 6. Idle, it is the heartbeat that tells; with something in flight the kernel is a little quicker."""
    there = settings_of(servers.dsn_there, servers.url_there)
    kind = f"{'busy' if busy else 'idle'}/1"
    async with audit(servers.url, f"{kind[:4]}.#", queue=f"audit-{kind[:4]}") as witness, connected(servers.dsn) as db:
        async with relay(tmp_path, there, "run", inside=island.inside) as program:
            await insert(db, kind, count=3)
            await witness.wait_for_distinct(3)
            with island.cut_off_from(RABBITMQ):
                cut = time.monotonic()
                if busy:
                    await insert(db, kind, count=3)
                await program.says('"session_failed"')
                noticed_s = time.monotonic() - cut
                await insert(db, kind, count=3)
                await program.says('"session_failed"', times=2)
                assert len(witness.messages) == 3, "inconclusive: something got through"
            healed = time.monotonic()
            expected = 9 if busy else 6
            await witness.wait_for_distinct(expected)
            recovered_s = time.monotonic() - healed
            assert (await program.stop())[0] == 0
    assert witness.sequences() == {kind: list(range(1, expected + 1))}
    assert noticed_s < BROKER_BOUND_S + 2
    print(f"row 6, {kind[:4]}: noticed after {noticed_s:.1f} s; published {recovered_s:.1f} s after it was healed")
