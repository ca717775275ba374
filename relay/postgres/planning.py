"""How PostgreSQL plans the statements of a session: for the values of each use, or once for all."""

from __future__ import annotations

from relay.postgres.connect import Connection
from relay.postgres.queries import query

FOR_VALUES = "force_custom_plan"
ONCE = "force_generic_plan"


class Planning:
    """Of one session, shared by all who use it. Switches when the other way is asked for, which takes a round trip.

    To be asked outside of transactions: one that is rolled back takes the setting back with it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._now: str | None = None

    async def once(self) -> None:
        """From here on a statement is planned at its first use: right for one that has a single index to go by, whatever the day.

        To plan a page of the log anew takes PostgreSQL longer than to read a small one.
        """
        await self._switch(ONCE)

    async def for_values(self) -> None:
        """From here on a statement is planned at each use: right where tables are joined that are empty today and large tomorrow."""
        await self._switch(FOR_VALUES)

    async def _switch(self, mode: str) -> None:
        if self._now != mode:
            self._now = None  # cut off in the middle of it, nobody knows
            await self._connection.execute(query("set_session"), "plan_cache_mode", mode)
            self._now = mode
