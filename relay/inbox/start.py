"""What an inbox needs before its first message: handlers that fit its mode, functions that exist, a seed if it starts from now."""

from __future__ import annotations

from relay.errors import ConfigError
from relay.inbox import stored
from relay.inbox.functions import sql_functions
from relay.inbox.handlers import Inbox
from relay.postgres.connect import Connection
from relay.postgres.queries import query
from relay.settings import InboxSettings


class Start:
    """The wiring of one consumer: its name and its handlers, those of `inbox` and those of the settings.

    Raises ConfigError for what contradicts itself, before any socket is opened.
    """

    def __init__(self, inbox: Inbox, settings: InboxSettings) -> None:
        self.consumer = settings.consumer or inbox.name
        self._settings = settings
        self._functions = sql_functions(settings.functions, consumer=self.consumer)
        self.inbox = inbox.with_functions(self._functions) if self._functions else inbox
        if settings.mode == "store" and self._functions:
            raise ConfigError(
                'inbox.mode = "store" writes events into relay.inbox and calls nobody: leave out inbox.functions'
            )
        if settings.mode == "store" and inbox.event_types:
            raise ConfigError(
                f'inbox.mode = "store" writes events into relay.inbox and calls nobody: Inbox({inbox.name!r}) must have no handlers'
            )

    async def check(self, connection: Connection) -> None:
        """Ask the database. Raises ConfigError or PrivilegeError, which say what to create, to grant or to run."""
        for function in self._functions.values():
            await function.find(connection)
        if self._settings.mode == "store":
            await stored.probe(connection, self.consumer)
        if self._settings.start_from == "now" and not await connection.fetchval(query("has_seed"), self.consumer):
            raise ConfigError(
                f'inbox.start_from = "now", but nobody has said where {self.consumer} starts: run `relay inbox seed`, which copies '
                "the producer's newest numbers into its cursors. It is never guessed from the first message seen."
            )
