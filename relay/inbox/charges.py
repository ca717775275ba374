"""What is known against messages: whose handler collides, breaks connections, or is known to fail. Pure, in memory."""

from __future__ import annotations

from collections.abc import Sequence

from relay.inbox.failures import DIED
from relay.inbox.sequencer import Arrival

_FORGIVEN = 3
"""A handler's collisions in one batch that are redone. A fourth is no chance any more: the application raises it by itself."""

_DEATHS = 3
"""Connections that may break under one message's handler, before the handler is what breaks them."""

_SUSPECTS = 1000
"""Suspects remembered: a bound, for those that another consumer has dealt with in the end."""

_COMPANY = 10_000
"""The same for those that are only suspected together with others: ten calls of a thousand."""


class Suspects:
    """The messages under whose handlers the connection broke, remembered from session to session.

    A broken connection leaves no trace of the attempt in the database, so a message that breaks every connection would
    be delivered for ever, together with innocent ones that wear out their delivery limit. The last message whose handler
    was called is the suspect; an innocent one is cleared by its next success.

    Of the messages of one call of a batch handler none is accused: it is only remembered with how many aggregates they were
    together, so that they are tried in smaller parts next time (see relay.inbox.narrowing), and at last alone.
    """

    def __init__(self) -> None:
        self._deaths: dict[tuple[str, str], int] = {}
        self._company: dict[tuple[str, str], int] = {}

    def __bool__(self) -> bool:
        return bool(self._deaths or self._company)

    def __contains__(self, message: tuple[str, str]) -> bool:
        """Whether (source, message id) is one of them."""
        return message in self._deaths or message in self._company

    def company(self, message: tuple[str, str]) -> int:
        """With how many aggregates it is suspected together, itself counted: 1 is alone, 0 is not at all."""
        return 1 if message in self._deaths else self._company.get(message, 0)

    def accuse_one_of(self, messages: Sequence[tuple[str, str]], aggregates: int) -> None:
        """The connection broke under one call for messages of so many aggregates, or before the next call."""
        for message in messages:
            self._company[message] = min(aggregates, self._company.pop(message, aggregates))
        # Never so few that a part of those who were together is forgotten: the guilty one may be in it.
        while len(self._company) > max(_COMPANY, len(messages)):
            del self._company[next(iter(self._company))]

    def accuse(self, message: tuple[str, str]) -> None:
        """The connection broke while its handler was running, or before another one was called."""
        self._deaths[message] = self._deaths.pop(message, 0) + 1
        self._company.pop(message, None)
        if len(self._deaths) > _SUSPECTS:
            del self._deaths[next(iter(self._deaths))]

    def is_convicted(self, message: tuple[str, str]) -> bool:
        """True: it is to be held as failed, without being called."""
        return self._deaths.get(message, 0) >= _DEATHS

    def held(self, message: tuple[str, str]) -> None:
        """It was convicted, and is held: its next attempt may break one more connection."""
        self._deaths[message] = _DEATHS - 1

    def clear(self, message: tuple[str, str]) -> None:
        """Its handler succeeded, and that is committed."""
        self._deaths.pop(message, None)
        self._company.pop(message, None)


class Charges:
    """What is known against the arrivals of one batch, through all its transactions."""

    def __init__(self, suspects: Suspects) -> None:
        self.suspects = suspects
        self._doomed: dict[tuple[str, int], str] = {}
        self._collisions: dict[tuple[tuple[str, int], ...], int] = {}

    def __bool__(self) -> bool:
        """False: nothing is known against anybody."""
        return bool(self._doomed or self.suspects)

    def doom(self, name: tuple[str, int], error: str) -> None:
        """The arrival made the connection unfit, or a COMMIT fail: it is held without another try."""
        self._doomed[name] = error

    def verdict(self, arrival: Arrival) -> str | None:
        """Why an arrival is to be held without being called; None: call it."""
        if (error := self._doomed.get(arrival.name)) is None and self.suspects.is_convicted(arrival.message):
            return DIED
        return error

    def forgives(self, arrivals: Sequence[Arrival]) -> bool:
        """Count a collision in a call of a handler with these. True: redo, nobody has failed."""
        names = tuple(arrival.name for arrival in arrivals)
        self._collisions[names] = self._collisions.get(names, 0) + 1
        return self._collisions[names] <= _FORGIVEN
