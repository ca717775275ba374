"""Login roles and databases of their own, for tests of who may do what; all dropped at the end."""

from __future__ import annotations

import secrets
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from relay.sandbox import Postgres


class Logins:
    """Makes them in one server, and drops them when it is left."""

    def __init__(self, server: Postgres) -> None:
        self._server = server
        self._roles: list[str] = []
        self._databases: list[str] = []

    def create(self, dsn: str, *member_of: str) -> str:
        """The same DSN for a new login role with the rights of `member_of` and no others."""
        name = f"relay_login_{secrets.token_hex(4)}"
        self._server.execute(
            f"CREATE ROLE {name} LOGIN PASSWORD 'secret'" + (f" IN ROLE {', '.join(member_of)}" if member_of else "")
        )
        self._roles.append(name)
        parts = urlsplit(dsn)
        return urlunsplit(parts._replace(netloc=f"{name}:secret@{parts.netloc.rpartition('@')[2]}"))

    def create_owner(self) -> str:
        """The DSN of a new empty database, for a new login role that owns it and has no other right."""
        name = f"relay_owned_{secrets.token_hex(4)}"
        dsn = self.create(self._server.dsn(name))
        self._server.execute(f"CREATE DATABASE {name} OWNER {role_of(dsn)}")
        self._databases.append(name)
        return dsn

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for database in self._databases:
            self._server.drop_database(database)
        for role in self._roles:
            self._server.execute(f"DROP ROLE {role}")


def role_of(dsn: str) -> str:
    """The role that a DSN logs in as."""
    return urlsplit(dsn).username or ""
