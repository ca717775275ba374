"""PostgreSQL for demo, tests and benchmarks: a throwaway server of our own, or one that the environment names."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from relay.errors import SandboxError
from relay.sandbox.account import give, private_folder, remove_folder, unprivileged_user
from relay.sandbox.ports import LOOPBACK, free_ports
from relay.sandbox.postgres_binaries import PostgresBinaries, find_postgres_binaries
from relay.sandbox.process import KeptProcess

EXTERNAL_DSN = "RELAY_TEST_POSTGRES_DSN"

SUPERUSER = "postgres"
INITDB_TIMEOUT_S = 60.0
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
CONNECT_TIMEOUT_S = 5.0

# https://www.postgresql.org/docs/current/server-shutdown.html
STOP_SIGNALS: Mapping[str, int] = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}

SETTINGS: Mapping[str, str] = {
    "listen_addresses": LOOPBACK,
    "shared_buffers": "128MB",
    "max_connections": "200",
    "max_prepared_transactions": "10",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d ",
    "dynamic_shared_memory_type": "posix",
}


class Postgres(ABC):
    """A PostgreSQL server in which we may create databases. Methods block: in async code use `asyncio.to_thread`."""

    external: bool

    @abstractmethod
    def dsn(self, database: str = "postgres") -> str:
        """The address of one database, with its password."""

    @abstractmethod
    def start(self) -> Self:
        """Start the server and wait until it accepts connections. An external server is not touched."""

    @abstractmethod
    def stop(self) -> None:
        """Stop the server and delete its data. Safe to call twice. An external server is not touched."""

    @abstractmethod
    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server in PostgreSQL's `mode` and start it again on the same port with the same data."""

    @abstractmethod
    def kill9(self) -> None:
        """Kill the postmaster with SIGKILL, then whatever it leaves behind. The data stay for `start_again`."""

    @abstractmethod
    def start_again(self) -> None:
        """Start a killed server on the same port with the same data, and wait until it accepts connections."""

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create a database, as a copy of `template` if given (nobody may be connected to that one); return its DSN."""
        copy_of = "" if template is None else f" TEMPLATE {_quoted(template)}"
        self.execute(f"CREATE DATABASE {_quoted(name)}{copy_of}")
        return self.dsn(name)

    def drop_database(self, name: str) -> None:
        """Drop a database and throw out whoever is connected to it. Quiet if there is none."""
        self.execute(f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)")

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Run SQL as superuser outside a transaction block."""
        _in_a_thread_of_its_own(self.dsn(database), statement)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class ExternalPostgres(Postgres):
    """A server that somebody else runs: we create and drop databases in it and never stop it."""

    external = True

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    def dsn(self, database: str = "postgres") -> str:
        return urlunsplit(urlsplit(self._dsn)._replace(path=f"/{database}"))

    def start(self) -> Self:
        return self

    def stop(self) -> None:
        return

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        raise self._not_ours(f"restart ({mode})")

    def kill9(self) -> None:
        raise self._not_ours("kill")

    def start_again(self) -> None:
        raise self._not_ours("start")

    def _not_ours(self, verb: str) -> SandboxError:
        return SandboxError(f"cannot {verb} the PostgreSQL of {EXTERNAL_DSN}: it is not ours; unset the variable")


class SandboxPostgres(Postgres):
    """A private server in a temporary folder: loopback only, random password, gone when we stop it or die.

    `select`: a major version ("15"), "system" or "embedded"; default: RELAY_SANDBOX_POSTGRES, else the first found.
    `fsync=False` loses data at a power failure (not at `kill9`) and is what tests want. `settings` are added to
    postgresql.conf. Nothing is started before `start()`.
    """

    external = False

    def __init__(
        self, select: str | None = None, *, fsync: bool = True, settings: Mapping[str, str] | None = None
    ) -> None:
        self.binaries: PostgresBinaries = find_postgres_binaries(select)
        self._fsync = fsync
        self._settings = dict(settings or {})
        self._password = secrets.token_urlsafe(24)
        self._user = unprivileged_user()
        self._port = 0
        self._folder: Path | None = None
        self._process: KeptProcess | None = None

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1, the same over all restarts; 0 before `start()`."""
        return self._port

    @property
    def version(self) -> str:
        """The server's version as its program tells it, such as "15.18"."""
        return self.binaries.version

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self._home() / "server.log"

    def dsn(self, database: str = "postgres") -> str:
        return f"postgresql://{SUPERUSER}:{self._password}@{LOOPBACK}:{self._port}/{database}"

    def start(self) -> Self:
        if self._folder is not None:
            raise SandboxError("this PostgreSQL was started already; start_again() is for one that was killed")
        self._folder = private_folder("relay-postgres-", user=self._user)
        (self._port,) = free_ports(1)
        try:
            self._initdb()
            self.start_again()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        if self._process is not None:
            # "immediate" is right here: the data are deleted in the next line.
            self._process.end(signal.SIGQUIT, signal.SIGKILL, timeout_s=STOP_TIMEOUT_S)
            self._process = None
        if self._folder is not None:
            remove_folder(self._folder)
            self._folder = None

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        self._running().end(STOP_SIGNALS[mode], timeout_s=STOP_TIMEOUT_S)
        self.start_again()

    def kill9(self) -> None:
        self._running().end(signal.SIGKILL, timeout_s=STOP_TIMEOUT_S)

    def start_again(self) -> None:
        if self._process is not None and self._process.running:
            raise SandboxError("PostgreSQL is running")
        self._process = self._keep(str(self._program("postgres")), "-D", str(self._home() / "data"), log=self.log)
        self._process.wait_until(self._accepts_connections, timeout_s=START_TIMEOUT_S)

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        return self._running().pid

    def _initdb(self) -> None:
        password_file = self._home() / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(self._password)
        give(password_file, self._user)
        log = self._home() / "initdb.log"
        initdb = self._keep(
            str(self._program("initdb")),
            f"--pgdata={self._home() / 'data'}",
            f"--username={SUPERUSER}",
            f"--pwfile={password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",  # the one locale that every build of PostgreSQL has
            "--no-sync",
            log=log,
        )
        if initdb.wait(INITDB_TIMEOUT_S) != 0:
            raise SandboxError(f"initdb failed:\n{initdb.log_tail()}")
        password_file.unlink()
        with (self._home() / "data" / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{key} = '{value}'\n" for key, value in self._all_settings().items())

    def _all_settings(self) -> dict[str, str]:
        ours = {
            **SETTINGS,
            "port": str(self._port),
            "unix_socket_directories": str(self._home()),
            "fsync": "on" if self._fsync else "off",
        }
        return {**ours, **self._settings}

    def _keep(self, *command: str, log: Path) -> KeptProcess:
        return KeptProcess(command, folder=self._home(), log=log, env=_clean_environment(), user=self._user)

    def _program(self, name: str) -> Path:
        return self.binaries.reachable_for(self._user, copy_into=self._home()) / name

    def _home(self) -> Path:
        if self._folder is None:
            raise SandboxError("this PostgreSQL is not started")
        return self._folder

    def _running(self) -> KeptProcess:
        if self._process is None or not self._process.running:
            raise SandboxError("this PostgreSQL is not running")
        return self._process

    def _accepts_connections(self) -> bool:
        try:
            self.execute("SELECT 1")
        except (ConnectionError, TimeoutError, asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError):
            return False
        return True


def find_postgres(
    select: str | None = None, *, fsync: bool = True, settings: Mapping[str, str] | None = None
) -> Postgres:
    """The server of RELAY_TEST_POSTGRES_DSN if that is set, else a private one. Not started yet."""
    dsn = os.environ.get(EXTERNAL_DSN)
    return ExternalPostgres(dsn) if dsn else SandboxPostgres(select, fsync=fsync, settings=settings)


def _clean_environment() -> dict[str, str]:
    """Nothing of the caller's PG* variables may reach the server."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "HOME": "/"}


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def _in_a_thread_of_its_own(dsn: str, statement: str) -> None:
    """Run one statement from code with or without a running event loop (a test has one, a plain script has none).

    Ctrl-C does not wait for it: whoever has the server ends it, and so a statement that hangs.
    """
    thread = ThreadPoolExecutor(1, "relay-sandbox-sql")
    try:
        thread.submit(lambda: asyncio.run(_execute(dsn, statement))).result()
    finally:
        thread.shutdown(wait=False)


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn, timeout=CONNECT_TIMEOUT_S)
    try:
        await connection.execute(statement)
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT_S)
