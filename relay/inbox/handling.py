"""Hands the events of one transaction to their handlers: each at once, or many together when all are in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from relay.inbox.calls import Caller
from relay.inbox.charges import Charges
from relay.inbox.failures import SUSPECTED, HandlerFailed
from relay.inbox.handlers import Grouped, Handler, Inbox
from relay.inbox.plan import Ready, calls
from relay.inbox.sequencer import Arrival, Key, Placed
from relay.inbox.stats import Tally


class Handling:
    """The application's part of one transaction.

    With batch handlers among those of the inbox, and unless it is `careful`, events are only put down as `postponed`, as if
    their handlers had succeeded, and `call_postponed` calls them all: if one fails, the transaction is lost anyway. `careful`
    calls each handler at once, with one event, in a savepoint.
    """

    def __init__(self, inbox: Inbox, caller: Caller, charges: Charges, tally: Tally, *, careful: bool) -> None:
        self._inbox = inbox
        self._caller = caller
        self._charges = charges
        self._tally = tally
        self._careful = careful
        self._postpones = inbox.takes_batches and not careful
        self._any_charges = bool(charges)
        self._postponed: list[Ready] = []
        self.errors: dict[tuple[str, int], str] = {}  # by the name of the arrival that failed
        self.cleared: list[Arrival] = []  # suspects whose handler has succeeded
        self.follows = False  # what comes now is out of the table: it was not known when the batch was divided

    def postpone(self, key: Key | None, arrival: Arrival) -> bool:
        """Put an event down to be handled by `call_postponed`. False: `succeeds` is to be asked at once.

        Raises HandlerFailed for what must not be tried together with others.
        """
        if not self._postpones:
            return False
        handler = self._inbox.handler(arrival.event)
        if handler is None:
            self._tally.add("skipped")
            return True
        if self._any_charges:
            self._refuse_known(arrival)
            self._refuse_unforeseen(arrival)
        self._postponed.append((handler, key, arrival))
        return True

    def postpone_all(self, placed: Sequence[Placed]) -> bool:
        """`postpone` for many, if nothing is known against anybody. False: nothing of it is put down."""
        if not self._postpones or self._any_charges:
            return False
        handler, add, before = self._inbox.handler, self._postponed.append, len(self._postponed)
        for key, arrival in placed:
            if (found := handler(arrival.event)) is not None:
                add((found, key, arrival))
        if skipped := len(placed) - (len(self._postponed) - before):
            self._tally.add("skipped", skipped)
        return True

    async def call_postponed(self) -> None:
        """Call the handlers of all that was put down. Raises HandlerFailed for the first call that fails."""
        ready, self._postponed = self._postponed, []
        await self._caller.call_all(calls(ready))
        self._tally.add("applied", len(ready))
        if self._charges.suspects:
            self.cleared += [arrival for _, _, arrival in ready if arrival.message in self._charges.suspects]

    @property
    def calls_each(self) -> bool:
        """Whether many events may be given to `call_each`: no batch handlers, nothing known against anybody, no savepoints."""
        return not (self._inbox.takes_batches or self._any_charges or self._careful)

    async def call_each(self, placed: Sequence[Placed], before: Callable[[], None]) -> None:
        """Handle one event after the other, in this order, after a call of `before` for each, also those without a handler.

        Raises HandlerFailed for the first that fails. As `succeeds` for each of them, at half the cost.
        """
        await self._caller.call_all(self._one_by_one(placed, before))

    def _one_by_one(
        self, placed: Sequence[Placed], before: Callable[[], None]
    ) -> Iterator[tuple[Handler | Grouped, Sequence[Arrival]]]:
        handler, skipped = self._inbox.handler, 0
        for _, arrival in placed:
            before()
            if (found := handler(arrival.event)) is None:
                skipped += 1
            else:
                yield found, (arrival,)
        self._tally.add("applied", len(placed) - skipped)
        if skipped:
            self._tally.add("skipped", skipped)

    async def succeeds(self, arrival: Arrival) -> bool:
        """Handle one event. False: its handler failed, and its effects are rolled back."""
        handler = self._inbox.handler(arrival.event)
        if handler is None:
            self._tally.add("skipped")
            return True
        try:
            if self._any_charges:
                self._refuse_known(arrival)
            if self._careful:
                await self._caller.call_in_savepoint(handler, arrival)
            else:
                await self._caller.call(handler, (arrival,))
        except HandlerFailed as exc:
            if not self._careful or exc.ends_transaction:
                raise
            self.errors[arrival.name] = exc.error
            return False
        self._tally.add("applied")
        if self._any_charges and arrival.message in self._charges.suspects:
            self.cleared.append(arrival)
        return True

    def _refuse_known(self, arrival: Arrival) -> None:
        if (verdict := self._charges.verdict(arrival)) is not None:
            raise HandlerFailed((arrival,), verdict)

    def _refuse_unforeseen(self, arrival: Arrival) -> None:
        """A suspect that follows out of the table was in no part of the divided batch: its aggregate goes apart, too."""
        if self.follows and arrival.message in self._charges.suspects:
            raise HandlerFailed((arrival,), SUSPECTED)
