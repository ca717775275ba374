"""The pages of a shard that are in flight: sent as they are read, settled in the order of reading.

Two positions: what is read, `read_to`, runs ahead; `position` is behind what is settled, and alone is ever written down.

What may be sent changes only while nothing is in flight, but for one thing: settling a page can block aggregates. So a row that was
held back is still held back when its page is settled, and is parked; and a row that went out before its aggregate was known to be
blocked is parked behind it (see `relay.outbox.parking`), to go out again in its turn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from relay.failpoints import Point, reached
from relay.message import Aggregate, Message, Row
from relay.outbox.blocked import Blocked
from relay.outbox.cursor import Page, Position
from relay.outbox.parking import Settlement, settle, unsendable, waves
from relay.outbox.progress import Progress
from relay.rabbitmq.contract import Confirmed, Outcome, Publisher, Refused, Unknown
from relay.settings import OutboxSettings

_PAGES = 4
"""Pages in flight. One is being confirmed, one waits at the broker, one is encoded and written while another is read: the broker never
runs dry. More would only be repeated after a crash."""

_FULL_PAGES = 2
"""So many times `page_bytes` in flight are enough as well: pages of large rows are bounded by the bytes, and keep the broker busy for
longer than it takes to read the next."""

_HOPELESS = 3
_FEW_ROWS = 10


@dataclass(slots=True)
class _Sent:
    """A page in flight."""

    page: Page
    size: int  # bytes of its bodies
    answers: asyncio.Task[list[Outcome | None]]  # None: a row that was not sent because it or its aggregate is held up
    believed: Sequence[Outcome | None] | None = None  # the outcomes, once it is decided what to make of them

    def known(self) -> Sequence[Outcome | None]:
        """The outcomes of its rows, when all answers are there."""
        return self.answers.result() if self.believed is None else self.believed


class Pipeline:
    """At most 4 pages in flight, and fewer than 2 * page_bytes of bodies when another is begun: with the page and its last row,
    which may be larger than all of it (16 MiB), less than 3 * page_bytes + 16 MiB, 40 MiB by default, beside what is encoded of it.
    One page with `order = "strict"`, and while a row is looked for that ends sessions.
    """

    def __init__(
        self,
        *,
        position: Position,
        publisher: Publisher,
        blocked: Blocked,
        message: Callable[[Row], Message],
        settings: OutboxSettings,
        progress: Progress,
    ) -> None:
        self.position = position
        """Everything before it is confirmed or parked."""
        self.read_to = position
        """Everything before it is in flight at least: where to read on."""
        self._publisher = publisher
        self._blocked = blocked
        self._message = message
        self._settings = settings
        self._progress = progress
        self._sent: deque[_Sent] = deque()
        self._held: set[Aggregate] = set()  # of which something is held back in flight, or was since nothing was
        self._bytes = 0

    @property
    def is_empty(self) -> bool:
        """True when nothing is in flight."""
        return not self._sent

    @property
    def is_full(self) -> bool:
        """True when no other page may be begun."""
        if self._settings.order == "strict" or self._progress.careful:
            return bool(self._sent)
        return len(self._sent) >= _PAGES or self._bytes >= _FULL_PAGES * self._settings.page_bytes

    @property
    def is_answered(self) -> bool:
        """True when the oldest page in flight can be settled."""
        return bool(self._sent) and self._sent[0].answers.done()

    @property
    def is_settleable(self) -> bool:
        """True when the outcome of the oldest row in flight is known: what is answered is settled up to the first that is not."""
        return self.is_answered and not isinstance(self._sent[0].known()[0], Unknown)

    @property
    def rows(self) -> int:
        """Rows in flight."""
        return sum(len(sent.page.rows) for sent in self._sent)

    def begin(self, page: Page) -> None:
        """Send the page that was read behind `read_to`. What of it may be sent is decided here."""
        if not self._sent:
            self._held.clear()
        unsent = unsendable(page.rows, self._blocked.aggregates, self._blocked.pauses, self._held)
        self._held.update(aggregate for i in unsent if (aggregate := page.rows[i].aggregate) is not None)
        size = sum(len(row.body) for row in page.rows)
        self._sent.append(_Sent(page, size, asyncio.create_task(self._publish(page.rows, unsent))))
        self._bytes += size
        self.read_to = self.read_to.after(page)

    def skip(self, page: Page) -> None:
        """Nothing was found behind `read_to`: its window ends there, or nothing is new."""
        if not self._sent:
            self.position = self.read_to = self.read_to.after(page)
        elif self.read_to.window is not None:  # it ends with the last page in flight
            self._sent[-1].page = replace(self._sent[-1].page, complete=True)
            self.read_to = self.read_to.after(page)

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the oldest page in flight is answered, at most `timeout_s` seconds."""
        await asyncio.wait([self._sent[0].answers], timeout=timeout_s)

    def settle(self) -> Settlement:
        """Divide the oldest page, which is answered, and move `position` behind what of it is settled."""
        sent = self._sent.popleft()
        self._bytes -= sent.size
        settlement = settle(sent.page.rows, sent.known(), self._blocked.aggregates, self._blocked.pauses)
        if settlement.settled == len(sent.page.rows):
            self.position = self.position.after(sent.page)
            return settlement
        self._sent.appendleft(_rest(sent, settlement.settled))
        if settlement.settled:
            self.position = self.position.within(sent.page, sent.page.rows[settlement.settled - 1].id)
        return settlement

    async def conclude(self) -> None:
        """The publisher is lost: wait for what it says of everything in flight, which takes no time, and give up what is hopeless."""
        if not self._sent:
            return
        await asyncio.wait([sent.answers for sent in self._sent])
        flight = [(row, o) for sent in self._sent for row, o in zip(sent.page.rows, sent.known(), strict=True)]
        late = [row.id for row, outcome in flight if isinstance(outcome, Unknown) and outcome.timed_out]
        if late:
            witnessed = any(isinstance(outcome, Confirmed) for _, outcome in flight)
            self._progress.unconfirmed = _scores(late, self._progress.unconfirmed, witnessed=witnessed)
        for sent in self._sent:
            sent.believed = _given_up(sent.page.rows, sent.known(), self._progress.unconfirmed if late else {})

    async def close(self) -> None:
        """End what is in flight: it is published again by the next session."""
        for sent in self._sent:
            sent.answers.cancel()
        await asyncio.gather(*(sent.answers for sent in self._sent), return_exceptions=True)

    # --- one page

    async def _publish(self, rows: Sequence[Row], unsent: Collection[int]) -> list[Outcome | None]:
        """The outcome of every row. The publisher is called before anything is waited for: pages are written in their order."""
        if not unsent and self._settings.order == "pipelined":
            return [*await self._send(rows)]
        outcomes: list[Outcome | None] = [None] * len(rows)
        failed: set[Aggregate | None] = set()  # in this page
        for wave in waves(rows) if self._settings.order == "strict" else [range(len(rows))]:
            chosen = [i for i in wave if i not in unsent and rows[i].aggregate not in failed]
            for i, outcome in zip(chosen, await self._send([rows[i] for i in chosen]), strict=True):
                outcomes[i] = outcome
                if rows[i].aggregate is not None and not isinstance(outcome, Confirmed):
                    failed.add(rows[i].aggregate)
            if any(isinstance(outcome, Unknown) for outcome in outcomes):
                return [Unknown("not sent") if o is None and i not in unsent else o for i, o in enumerate(outcomes)]
        return outcomes

    async def _send(self, rows: Sequence[Row]) -> list[Outcome]:
        if not rows:
            return []
        reached(Point.PUBLISHING)
        return await self._publisher.publish([self._message(row) for row in rows])


def _rest(sent: _Sent, settled: int) -> _Sent:
    """What of a page is not settled."""
    return replace(sent, page=replace(sent.page, rows=sent.page.rows[settled:]), believed=sent.known()[settled:])


# --- giving up


def _scores(late: Sequence[int], before: Mapping[int, int], *, witnessed: bool) -> dict[int, int]:
    """How near each of these rows is to be given up: it was not confirmed in time, now and perhaps in sessions before.

    That others were confirmed beside it is the evidence that its queue hangs, not the broker. A few rows alone in the rest of a
    window cannot have that, and would hold up everything behind the window; when all is late without it, the broker is not well.
    """
    weight = 2 if witnessed else 1
    return {i: before.get(i, 0) + weight for i in late if witnessed or i in before or len(late) <= _FEW_ROWS}


def _given_up(
    rows: Sequence[Row], outcomes: Sequence[Outcome | None], scores: Mapping[int, int]
) -> Sequence[Outcome | None]:
    """The outcomes, but a row that is late again and again is refused: so it is parked, and what is behind it goes on."""
    hopeless = Refused("unconfirmed", "its queue did not confirm in time, several times")
    return [hopeless if scores.get(row.id, 0) >= _HOPELESS else o for row, o in zip(rows, outcomes, strict=True)]
