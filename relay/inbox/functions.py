"""SQL functions as handlers: `inbox.functions` names them, and each is called with one `relay.event` in the inbox's transaction.

They are handlers like any other: what they do commits with the cursor, an exception that they raise is held with its message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from relay.errors import ConfigError, PrivilegeError
from relay.inbox import storable
from relay.message import Event
from relay.postgres.connect import Connection
from relay.postgres.queries import query

_PART = r'([A-Za-z_][A-Za-z0-9_$]*|"(?:[^"\0]|"")+")'
_NAME = re.compile(rf"{_PART}\.{_PART}")
_PLAIN = re.compile(r"[a-z_][a-z0-9_$]*")
_LONGEST = 63
"""PostgreSQL's NAMEDATALEN less one: a longer name would be cut, and could then be another function's."""


class SqlFunction:
    """One function, called as `SELECT schema.name(event)`. `find` it before it is called."""

    def __init__(self, text: str, *, event_type: str, consumer: str) -> None:
        self._event_type = event_type
        self._consumer = consumer
        self._schema, self._name = _parsed(text, event_type)
        self._call: str | None = None

    def __repr__(self) -> str:
        """Its name, as it has to be written in SQL."""
        return f"{_shown(self._schema)}.{_shown(self._name)}"

    async def find(self, connection: Connection) -> None:
        """Look the function up. Raises ConfigError when it does not exist, PrivilegeError when we may not call it."""
        found = await connection.fetchrow(query("find_function"), self._schema, self._name)
        if found is None or not found["exists"]:
            raise ConfigError(self._missing([] if found is None else found["namesakes"]))
        if not found["may_use_schema"] or not found["may_execute"]:
            login = _shown(found["login"])
            raise PrivilegeError(
                f"inbox.functions: {login} may not call {self._signature}, the handler of {self._event_type}: "
                f"GRANT USAGE ON SCHEMA {_shown(self._schema)} TO {login}; GRANT EXECUTE ON FUNCTION {self._signature} TO {login}"
            )
        self._call = await connection.fetchval(query("function_call"), self._schema, self._name)

    async def __call__(self, event: Event, tx: Connection) -> None:
        """Call it. Raises what it raises."""
        if self._call is None:
            raise RuntimeError(f"{self._signature} is called before it was found")
        await tx.execute(
            self._call,
            self._consumer,
            event.source,
            event.aggregate_type,
            event.aggregate_id,
            event.seq,
            event.event_type,
            event.message_id,
            storable.text(event.content_type),
            storable.headers(event.headers),
            event.occurred_at,
            event.body,
        )

    @property
    def _signature(self) -> str:
        return f"{self!r}(relay.event)"

    def _missing(self, namesakes: list[str]) -> str:
        others = f" (there is {', '.join(namesakes[:3])})" if namesakes else ""
        return (
            f"inbox.functions: {self._event_type} is to be handled by {self._signature}, which does not exist{others}. Create it: "
            f"CREATE FUNCTION {self!r}(event relay.event) RETURNS void LANGUAGE plpgsql AS $$ BEGIN ... END $$"
        )


def sql_functions(functions: Mapping[str, str], *, consumer: str) -> dict[str, SqlFunction]:
    """The handlers that the setting inbox.functions names, by event type. Raises ConfigError for what is no name of a function."""
    found = {}
    for event_type, text in functions.items():
        if not event_type or event_type.startswith("relay."):
            raise ConfigError(
                f"inbox.functions: {event_type!r} is no event type of yours: name one, or * for all that have no handler"
            )
        found[event_type] = SqlFunction(text, event_type=event_type, consumer=consumer)
    return found


def _parsed(text: str, event_type: str) -> tuple[str, str]:
    match = _NAME.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"inbox.functions: {event_type} = {text!r} does not name a function: expected schema.function, for example billing.order_paid"
        )
    schema, name = (_identifier(part) for part in match.groups())
    for part in (schema, name):
        if len(part.encode()) > _LONGEST:
            raise ConfigError(
                f"inbox.functions: {event_type} = {text!r}: a name in PostgreSQL is at most {_LONGEST} bytes"
            )
    return schema, name


def _identifier(part: str) -> str:
    """As SQL reads it: folded to lower case unless it is quoted."""
    return part[1:-1].replace('""', '"') if part.startswith('"') else part.lower()


def _shown(name: str) -> str:
    """As it has to be written in SQL."""
    return name if _PLAIN.fullmatch(name) else '"' + name.replace('"', '""') + '"'
