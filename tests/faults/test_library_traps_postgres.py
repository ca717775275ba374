"""Traps of asyncpg, and of a session with PostgreSQL (RELIABILITY 3, M, N, P and the pitfalls): see test_library_traps.py.

A test named `today_...` pins what the library does; its text says what it means for us when it fails after an upgrade. The others
hold whatever the library does. Between relay and PostgreSQL stands the laboratory's proxy, which can fall silent.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest

from relay.errors import PostgresUnavailable
from relay.outbox.wakeup import Wakeup
from relay.postgres import connect as connecting
from relay.postgres.connect import Connection, close, connect
from relay.postgres.errors import postgres_errors
from relay.sandbox import Postgres
from relay.settings import PostgresSettings
from tests.faults.lab.postgres_proxy import PostgresProxy
from tests.harness.loop_clock import loop_clock
from tests.harness.outbox import connected


@pytest.fixture(scope="module")
def database(postgres: Postgres) -> Iterator[str]:
    """One for all tests of this file: they ask for sessions and locks, not for tables."""
    name = f"relay_traps_{secrets.token_hex(4)}"
    yield postgres.create_database(name, None)
    postgres.drop_database(name)


@asynccontextmanager
async def proxied(dsn: str) -> AsyncIterator[tuple[PostgresProxy, str]]:
    """A proxy, and the DSN that leads through it."""
    parts = urlsplit(dsn)
    assert parts.port is not None
    proxy = PostgresProxy(parts.port)
    port = await proxy.start()
    try:
        yield proxy, parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{port}")).geturl()
    finally:
        await proxy.close()


@asynccontextmanager
async def session(dsn: str, **settings: Any) -> AsyncIterator[Connection]:
    opened = await connect(PostgresSettings(dsn=dsn, **settings), application="traps")
    try:
        yield opened
    finally:
        opened.terminate()


async def until(question: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not question():  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.001)


def client_sockets(port: int) -> int:
    """Ends of ours that lead to a port."""
    ends = psutil.Process().net_connections("tcp4")
    return sum(bool(end.raddr) and end.raddr.port == port for end in ends)


# --- M: a listener that hears nothing


class TestM:
    async def test_today_asyncpg_does_not_notice_that_a_listener_hears_nothing(self, database: str) -> None:
        """If this fails, asyncpg looks after its listeners: then sleeping relays need not ask at each poll."""
        ended: list[object] = []
        async with proxied(database) as (proxy, dsn):
            listening = await asyncpg.connect(dsn)
            listening.add_termination_listener(ended.append)
            await listening.add_listener("c", lambda *_: None)
            async with proxy.black_hole():
                with loop_clock() as clock:
                    await clock.forward(3600, step_s=100)
                assert not listening.is_closed()
                assert not ended
            listening.terminate()

    async def test_a_sleeper_whose_connection_is_silent_finds_out_at_its_next_poll(self, database: str) -> None:
        async with proxied(database) as (proxy, dsn), session(dsn, command_timeout_s=0.2) as opened:
            wakeup = Wakeup(opened, shard=0)
            await wakeup.listen()
            assert await wakeup.try_fall_asleep()
            async with proxy.black_hole() as bites:
                await wakeup.wait(0.01)  # nothing was heard
                async with asyncio.timeout(2):
                    with pytest.raises(PostgresUnavailable, match="did not answer in time"):
                        await wakeup.get_up()
                assert bites.count > 0

    async def test_a_sleeper_whose_connection_ends_is_woken_at_once(self, database: str) -> None:
        async with connected(database) as other, session(database) as opened:
            wakeup = Wakeup(opened, shard=0)
            await wakeup.listen()
            assert await wakeup.try_fall_asleep()
            sleeping = asyncio.create_task(wakeup.wait(3600))
            await other.execute("SELECT pg_terminate_backend($1)", opened.get_server_pid())
            async with asyncio.timeout(5):
                with pytest.raises(PostgresUnavailable, match="was closed"):
                    await sleeping
            assert wakeup.urgent.is_set()

    async def test_a_notification_between_the_question_and_the_sleep_is_not_lost(self, database: str) -> None:
        async with connected(database) as other, session(database) as opened:
            wakeup = Wakeup(opened, shard=0)
            await wakeup.listen()
            assert await wakeup.try_fall_asleep()
            await other.execute("SELECT pg_notify('relay_outbox', '0')")
            await opened.fetchval("SELECT 1")  # the look for what is new, during which it arrives
            async with asyncio.timeout(5):
                await wakeup.wait(3600)

    async def test_a_listener_is_never_in_a_transaction(self, database: str) -> None:
        """In one it would keep the queue of notifications from being emptied, and at last the producers' commits would fail."""
        async with connected(database) as other, session(database) as opened:
            wakeup = Wakeup(opened, shard=0)
            await wakeup.listen()
            assert await wakeup.try_fall_asleep()
            sql = "SELECT state, xact_start, backend_xmin FROM pg_stat_activity WHERE pid = $1"
            assert tuple(await other.fetchrow(sql, opened.get_server_pid()) or ()) == ("idle", None, None)


# --- N: a goodbye that waits for a cancellation


class TestN:
    async def test_today_asyncpg_keeps_the_time_out_of_close_behind_a_pending_cancel(self, database: str) -> None:
        """If this fails, `relay.postgres.connect.close` needs a time-out of its own."""
        async with proxied(database) as (proxy, dsn):
            opened = await asyncpg.connect(dsn)
            await hang(opened)
            async with proxy.black_hole(), asyncio.timeout(2):
                with pytest.raises(TimeoutError):
                    await opened.close(timeout=0.2)
            assert opened.is_closed()

    @pytest.mark.parametrize("cancelled", [True, False], ids=["a query cancelled", "idle"])
    async def test_closing_is_bounded_on_a_connection_that_answers_nothing(
        self, database: str, cancelled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connecting, "CLOSE_TIMEOUT_S", 0.2)
        async with proxied(database) as (proxy, dsn), session(dsn) as opened:
            async with proxy.black_hole():
                if cancelled:
                    await hang(opened)
                async with asyncio.timeout(2):
                    await close(opened)
                assert opened.is_closed()
                await until(lambda: client_sockets(proxy.port) == 0)

    async def test_terminating_is_at_once(self, database: str) -> None:
        async with proxied(database) as (proxy, dsn), session(dsn) as opened:
            async with proxy.black_hole():
                await hang(opened)
                opened.terminate()
                assert opened.is_closed()
                await until(lambda: client_sockets(proxy.port) == 0)

    async def test_connecting_and_asking_are_bounded_at_a_server_that_answers_nothing(self, database: str) -> None:
        async with proxied(database) as (proxy, dsn), session(dsn, command_timeout_s=0.2) as opened:
            async with proxy.black_hole(), asyncio.timeout(3):
                with pytest.raises(PostgresUnavailable, match="did not answer in time"):
                    async with session(dsn, connect_timeout_s=0.2):
                        pass
                with pytest.raises(PostgresUnavailable, match="did not answer in time"), postgres_errors():
                    await opened.fetchval("SELECT 1")


async def hang(opened: Connection) -> None:
    """A statement that was cancelled by us, and of which the server has not said yet that it has ended."""
    asking = asyncio.create_task(opened.execute("SELECT pg_sleep(30)"))
    await asyncio.sleep(0.02)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


# --- P: the kernel's part, on both ends


class TestP:
    async def test_today_asyncpg_leaves_the_keepalive_to_us(self, database: str) -> None:
        """If this fails, `_keep_alive` may go."""
        opened = await asyncpg.connect(database)
        assert option(opened, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        assert option(opened, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        await opened.close()

    async def test_our_end_notices_a_dead_server_in_seconds(self, database: str) -> None:
        async with session(database) as opened:
            assert option(opened, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, interval, count = (
                option(opened, socket.IPPROTO_TCP, name)
                for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + interval * count <= 15

    async def test_a_peer_that_is_alive_and_does_not_read_keeps_its_connection(self) -> None:
        """As a backend that waits for a row lock while a handler's COPY goes on. TCP_USER_TIMEOUT would count that as death."""
        with zero_window() as (ours, their_end), zero_window() as (other, _):
            connecting._keep_alive(on(ours))
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
            other.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000)
            loop = asyncio.get_running_loop()
            waiting = asyncio.create_task(loop.sock_sendall(ours, MEGABYTES))
            async with asyncio.timeout(10):
                with pytest.raises(TimeoutError, match="timed out"):  # the kernel's, ETIMEDOUT
                    await loop.sock_sendall(other, MEGABYTES)
            assert not waiting.done()
            received = 0
            async with asyncio.timeout(10):
                while received < len(MEGABYTES):
                    received += len(await loop.sock_recv(their_end, 1_000_000))
                await waiting

    async def test_a_socket_that_is_gone_already_is_told_as_an_unavailable_server(
        self, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A raw OSError would end the process."""
        real = connecting._keep_alive

        def on_a_closed_socket(opened: Connection) -> None:
            opened._transport.get_extra_info("socket")._sock.close()  # type: ignore[attr-defined]
            real(opened)

        monkeypatch.setattr(connecting, "_keep_alive", on_a_closed_socket)
        with pytest.raises(PostgresUnavailable, match="Bad file descriptor"):
            await connect(PostgresSettings(dsn=database), application="traps")

    async def test_a_socket_that_uvloop_has_let_go_of_is_told_as_an_unavailable_server(
        self, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where asyncio's sockets raise, there is none."""
        real = connecting._keep_alive
        gone: Any = SimpleNamespace(_transport=SimpleNamespace(get_extra_info=lambda _: None))
        monkeypatch.setattr(connecting, "_keep_alive", lambda _: real(gone))
        with pytest.raises(PostgresUnavailable, match="ended right after the login"):
            await connect(PostgresSettings(dsn=database), application="traps")

    async def test_what_a_platform_does_not_have_is_left_out(
        self, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """macOS has no TCP_KEEPIDLE."""
        monkeypatch.delattr(socket, "TCP_KEEPIDLE")
        async with session(database) as opened:
            assert option(opened, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert option(opened, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 2

    async def test_the_servers_end_notices_a_dead_client_in_seconds(self, database: str) -> None:
        """So that the lock of an owner whose machine is gone is free for the standby."""
        async with session(database) as opened:
            shown = {
                name: await opened.fetchval(f"SHOW {name}")
                for name in (
                    "tcp_keepalives_idle",
                    "tcp_keepalives_interval",
                    "tcp_keepalives_count",
                    "tcp_user_timeout",
                )
            }
        assert list(shown.values()) == ["5", "2", "3", "10000"]

    async def test_a_unix_socket_needs_none_of_it(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        connecting._keep_alive(on(ours))
        ours.close()
        theirs.close()


MEGABYTES = bytes(20_000_000)
"""More than the sockets of both ends hold."""


@contextmanager
def zero_window() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection; the second has room for nearly nothing."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with socket.create_connection(listening.getsockname()) as ours, listening.accept()[0] as theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            yield ours, theirs


def on(sock: socket.socket) -> Connection:
    """What `_keep_alive` sees of a connection."""

    class Transport:
        def get_extra_info(self, _name: str) -> socket.socket:
            return sock

    class Opened:
        _transport = Transport()

    return cast(Connection, Opened())


def option(opened: Connection, level: int, name: int) -> int:
    found: int = opened._transport.get_extra_info("socket").getsockopt(level, name)  # type: ignore[attr-defined]
    return found
