"""A streaming standby of a sandbox's PostgreSQL, that can be cut off from its primary and promoted."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from relay.sandbox import SandboxPostgres
from relay.sandbox.account import private_folder, remove_folder, unprivileged_user
from relay.sandbox.ports import LOOPBACK, free_ports
from relay.sandbox.process import KeptProcess

BACKUP_TIMEOUT_S = 60.0


class Standby:
    """Made with pg_basebackup from a primary that runs, and started; asynchronous, so it may lack the last commits."""

    def __init__(self, primary: SandboxPostgres) -> None:
        self._dsn = urlsplit(primary.dsn())
        self._user = unprivileged_user()
        self._folder = private_folder("relay-standby-", user=self._user)
        self._programs = primary.binaries.reachable_for(self._user, copy_into=self._folder)
        (self._port,) = free_ports(1)
        self._server: KeptProcess | None = None

    def dsn(self, database: str) -> str:
        """The address of one database in the standby."""
        login = self._dsn.netloc.rpartition("@")[0]
        return urlunsplit(self._dsn._replace(netloc=f"{login}@{LOOPBACK}:{self._port}", path=f"/{database}"))

    def __enter__(self) -> Self:
        try:
            self._copy()
            self._server = self._keep("postgres", "-D", str(self._data), "-p", str(self._port))
            self._server.wait_until(self._answers, timeout_s=BACKUP_TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.end(signal.SIGQUIT, signal.SIGKILL, timeout_s=20)
        remove_folder(self._folder)

    async def cut_off(self) -> None:
        """Nothing of the primary arrives any more."""
        await self._do("ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()")

    async def has_replayed(self, position: str) -> bool:
        """Whether everything up to a position of the primary's log is there."""
        return bool(await self._do(f"SELECT pg_last_wal_replay_lsn() >= '{position}'::pg_lsn"))

    async def receives(self) -> bool:
        """Whether it is connected to its primary."""
        return bool(await self._do("SELECT EXISTS (SELECT FROM pg_stat_wal_receiver)"))

    async def promote(self) -> None:
        """It is the primary from now on."""
        assert await self._do("SELECT pg_promote()")

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _copy(self) -> None:
        source = ("-h", LOOPBACK, "-p", str(self._dsn.port), "-U", self._dsn.username or "")
        backup = self._keep("pg_basebackup", *source, "-D", str(self._data), "-R", "-X", "stream", "--checkpoint=fast")
        code = backup.wait(BACKUP_TIMEOUT_S)
        assert code == 0, backup.log_tail()

    def _keep(self, program: str, *arguments: str) -> KeptProcess:
        return KeptProcess(
            [str(self._programs / program), *arguments],
            folder=self._folder,
            log=self._folder / f"{program}.log",
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "LC_ALL": "C",
                "HOME": "/",
                "PGPASSWORD": self._dsn.password or "",
            },
            user=self._user,
        )

    def _answers(self) -> bool:
        log = self._folder / "postgres.log"
        return log.exists() and "ready to accept" in log.read_text(errors="replace")

    async def _do(self, *statements: str) -> object:
        connection = await asyncpg.connect(self.dsn("postgres"))
        try:
            return [await connection.fetchval(statement) for statement in statements][-1]
        finally:
            await connection.close()
