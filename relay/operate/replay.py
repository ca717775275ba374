"""A replay: what is retained of a selection is sent again, page by page, confirmed, and can be resumed at any moment.

Crash-only like the daemon: whatever goes wrong ends the session, and the next one goes on from what relay.outbox_replay says.
So an interruption of any kind leaves no hole and repeats at most one page, under the same message ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import structlog

from relay.errors import BrokerRefused, BrokerUnavailable, ConfigError, PostgresUnavailable, RelayError
from relay.message import Message, Row, to_message
from relay.operate.replays import Replay, find, got_to, source_of, try_lock
from relay.operate.retained import Place, Retained, RetainedPage
from relay.outbox.routing import routing_key
from relay.postgres.connect import Connection, connection
from relay.rabbitmq.contract import Confirmed, Outcome, Publisher, Refused, Returned
from relay.rabbitmq.stock_publisher import StockPublisher
from relay.rabbitmq.topology import exchange, queues, require_queue
from relay.settings import Settings
from relay.supervisor import WRONG_AT_START, Backoff, wait_for

log = structlog.get_logger()

_PATIENCE_S = 60.0
"""How long a broken connection is tried again without a page getting through, before the replay ends and is to be resumed."""

_LOOK_S = 0.25
"""Seconds between two looks at the relay's backlog, each about a millisecond."""

_BACKLOG_LIMIT_S = 1.0
"""While the oldest event that waits for its first publication is older, nothing is sent again: live traffic goes first."""

_REFUSED_TOLD = 20

_TAKEN_AWAY = "replay {} was abandoned, or taken further by another process: this one stops"


@dataclass(frozen=True, slots=True)
class NotSent:
    """A row that could not be sent again as it is."""

    row_id: int
    reason: str
    detail: str


@dataclass(slots=True)
class State:
    """How a running replay is doing; `tell` is called after every change."""

    total: int
    sent: int  # dealt with so far, earlier runs included
    sent_now: int = 0  # by this run
    unroutable: int = 0  # of this run: no queue is bound for the routing key
    not_sent: list[NotSent] = field(default_factory=list)  # of this run, the first ones
    not_sent_rows: int = 0
    held_back_s: float | None = None  # the relay is so far behind that nothing is sent for now
    trouble: str | None = None  # what a session ended with; it is being tried again
    done: bool = False

    @property
    def short(self) -> int:
        """Rows that were counted at the start and were not there any more when their turn came."""
        return max(0, self.total - self.sent) if self.done else 0


class Sending:
    """One run of a replay, until it is done or `stop` is set (the page in hand is finished and noted)."""

    def __init__(
        self,
        settings: Settings,
        to_send: Replay,
        *,
        rate: float,
        live_first: bool = True,
        stop: asyncio.Event,
        tell: Callable[[State], object] = lambda _: None,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self.state = State(total=to_send.total, sent=to_send.sent)
        self._settings = settings
        self._replay = to_send
        self._rate = rate
        self._page_rows = max(1, min(settings.outbox.page_rows, int(rate / 2)))
        self._backlog_limit_s = _backlog_limit_s(settings) if live_first else None
        self._stop = stop
        self._tell = tell
        self._patience_s = patience_s
        self._clock = asyncio.get_running_loop().time
        self._place = Place(to_send.after_id)
        self._had_lock = False
        self._careful = False  # the page in hand may hold a message that ends the session: one at a time
        self._refused: dict[int, Refused] = {}  # of the page in hand: not to be tried again
        self._failing_since: float | None = None
        self._look_at = 0.0
        self._next_page_at = 0.0

    async def run(self) -> State:
        """Send. Raises RelayError, with the way on, for what does not heal within a minute or would not by waiting."""
        backoff = Backoff(self._settings.daemon)
        while not self._stop.is_set() and not self.state.done:
            try:
                await self._session()
            except RelayError as exc:
                if not exc.retryable or isinstance(exc, WRONG_AT_START):
                    raise
                if self._failing_since is None:
                    self._failing_since = self._clock()
                    backoff = Backoff(self._settings.daemon)
                if self._clock() - self._failing_since > self._patience_s:
                    raise type(exc)(f"{exc}. {self.way_on()}") from exc
                self._told(trouble=str(exc))
                await wait_for(self._stop, backoff.next_s())
        return self.state

    def way_on(self) -> str:
        """What to do after an interruption."""
        return (
            f"Replay {self._replay.id} has sent {self.state.sent:,} of {self.state.total:,} rows; "
            f"continue with: relay replay --resume {self._replay.id}"
        )

    async def _session(self) -> None:
        async with connection(self._settings.postgres, application=f"relay replay {self._replay.id}") as opened:
            await self._lock(opened)
            await self._look_where_it_is(opened)
            source = await source_of(opened, self._settings)
            retained = Retained(opened)
            async with _publisher(self._settings, self._replay) as publisher:
                while not self._stop.is_set() and not self.state.done:
                    await self._let_live_traffic_pass(retained)
                    await wait_for(self._stop, max(0.0, self._next_page_at - self._clock()))
                    if not self._stop.is_set():
                        await self._send_page(opened, publisher, retained, source)

    async def _lock(self, opened: Connection) -> None:
        if await try_lock(opened, self._replay.id):
            self._had_lock = True
            return
        if self._had_lock:  # the server has not noticed yet that our former session is gone
            raise PostgresUnavailable(f"replay {self._replay.id}: waiting for the lock of the session that broke")
        raise ConfigError(
            f"replay {self._replay.id} is being sent by another process: let it end, or stop it before you resume"
        )

    async def _look_where_it_is(self, opened: Connection) -> None:
        """Under the lock, for it may be further than we know: another process may have had it, or our last note had no answer."""
        now = await find(opened, self._replay.id)
        if now.state == "abandoned":
            raise ConfigError(_TAKEN_AWAY.format(self._replay.id))
        self.state.sent, self.state.done = now.sent, now.state == "done"
        if now.after_id > self._place.after_id:
            self._place = Place(now.after_id)

    async def _let_live_traffic_pass(self, retained: Retained) -> None:
        """Wait while the relay is behind with what it has to publish itself. A bounded look, and not before every page."""
        if self._backlog_limit_s is None or self._clock() < self._look_at:
            return
        while not self._stop.is_set():
            behind_s = await retained.backlog_s()
            self._look_at = self._clock() + _LOOK_S
            if behind_s <= self._backlog_limit_s:
                if self.state.held_back_s is not None:
                    self._told(held_back_s=None)
                return
            self._told(held_back_s=behind_s)
            await wait_for(self._stop, _LOOK_S)

    async def _send_page(self, opened: Connection, publisher: Publisher, retained: Retained, source: str) -> None:
        page = await retained.page(
            self._replay.selection,
            self._place,
            last_id=self._replay.last_id,
            page_rows=self._page_rows,
            page_bytes=self._settings.outbox.page_bytes,
        )
        unroutable = await self._publish(publisher, [(r, self._message(r, source)) for r in page.rows])
        if page.rows or page.is_last:
            await self._note(opened, page)
        self._place = page.place
        self._settle(page, unroutable)

    async def _publish(self, publisher: Publisher, page: Sequence[tuple[Row, Message]]) -> int:
        """Until each is confirmed, or will never be; returns how many are unroutable. Raises BrokerError when the session ended."""
        portions = [page] if not self._careful else [[one] for one in page if one[0].id not in self._refused]
        unroutable = 0
        for portion in portions:
            outcomes = await publisher.publish([message for _, message in portion])
            for (row, _), outcome in zip(portion, outcomes, strict=True):
                unroutable += self._judge(row, outcome, publisher)
        return unroutable

    def _judge(self, row: Row, outcome: Outcome, publisher: Publisher) -> bool:
        """True: unroutable. Raises BrokerError for a message without an answer: then the page is sent again."""
        match outcome:
            case Confirmed():
                return False
            case Returned():
                if self._replay.to_queue is not None:
                    raise BrokerRefused(f"the queue {self._replay.to_queue!r} is gone: nothing takes the messages")
                return True
            case Refused():
                self._refused[row.id] = outcome
                if publisher.lost is None:
                    return False
                self._failing_since = None  # found the one at fault: that is progress
                raise BrokerUnavailable(f"the broker ended the session over row {row.id}: {outcome.detail}")
            case _:
                self._careful = self._careful or publisher.message_is_suspect
                raise BrokerUnavailable(
                    getattr(outcome, "detail", None)
                    or "the broker refused a message (basic.nack): is a queue at its limit?"
                )

    async def _note(self, opened: Connection, page: RetainedPage) -> None:
        state = "done" if page.is_last else "unfinished"
        sent = await got_to(opened, self._replay.id, after_id=page.place.after_id, rows=len(page.rows), state=state)
        if sent is None:
            raise ConfigError(_TAKEN_AWAY.format(self._replay.id))
        self.state.sent = sent
        self.state.done = page.is_last

    def _settle(self, page: RetainedPage, unroutable: int) -> None:
        """The page is confirmed and noted: count it, and set the time of the next by the rate."""
        refused = [(i, r) for i, r in self._refused.items() if i in {row.id for row in page.rows}]
        for row_id, why in refused[: _REFUSED_TOLD - len(self.state.not_sent)]:
            self.state.not_sent.append(NotSent(row_id, why.reason, why.detail))
        self._refused.clear()
        self._careful = False
        self._failing_since = None
        self._next_page_at = max(self._clock(), self._next_page_at) + len(page.rows) / self._rate
        self._told(
            sent_now=self.state.sent_now + len(page.rows),
            unroutable=self.state.unroutable + unroutable,
            not_sent_rows=self.state.not_sent_rows + len(refused),
            trouble=None,
        )

    def _message(self, row: Row, source: str) -> Message:
        """As it was published, addressed as then, or to the one queue (through the default exchange)."""
        key = self._replay.to_queue or routing_key(row, self._settings.outbox.routing_key)
        return to_message(row, source=source, routing_key=key)

    def _told(self, **changes: object) -> None:
        for name, value in changes.items():
            setattr(self.state, name, value)
        self._tell(replace(self.state))


@asynccontextmanager
async def _publisher(settings: Settings, to_send: Replay) -> AsyncIterator[Publisher]:
    publisher = await StockPublisher.open(
        settings.rabbitmq,
        confirm_timeout_s=settings.outbox.confirm_timeout_s,
        name=f"relay replay {to_send.id}",
        target=exchange if to_send.to_queue is None else queues,
    )
    try:
        yield publisher
    finally:
        await publisher.close()


async def require_target(settings: Settings, to_queue: str | None) -> None:
    """Raise BrokerError unless the broker is there and has the queue, or the exchange: before anything is noted or sent."""
    if to_queue is not None:
        await require_queue(settings.rabbitmq, to_queue)
        return
    publisher = await StockPublisher.open(settings.rabbitmq, confirm_timeout_s=1, name="relay replay, a look")
    await publisher.close()


def _backlog_limit_s(settings: Settings) -> float:
    """A relay that only polls is up to one interval behind without being slow."""
    return _BACKLOG_LIMIT_S + (settings.outbox.poll_interval_s if settings.outbox.wakeup == "poll" else 0.0)
