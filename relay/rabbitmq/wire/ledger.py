"""The delivery tags of one confirm channel: what became of each message that was written. Pure: no I/O, no clock.

Every tag ends acked, nacked or unknown; that a message was returned is a mark on top. RabbitMQ answers single tags in any order,
or all up to one; the cost of an answer does not grow with what is in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

UNKNOWN, ACKED, NACKED = 0, 1, 2
"""States of a message: not answered (yet), basic.ack, basic.nack."""

_SET = {state: bytes((state, ACKED, NACKED, *range(3, 256))) for state in (ACKED, NACKED)}
"""Translations that give a state to what is unknown, and leave what has one."""


class Violation(Exception):
    """The broker spoke of a message that was never written, or is settled: none of its answers can be trusted any more."""


class Batch:
    """Messages that were written together, and what became of each. Read it; only its ledger changes it."""

    __slots__ = ("_answered", "_positions", "done", "first", "ids", "left", "nacked", "returned", "size", "states")

    def __init__(self, first: int, ids: Sequence[str], size: int, done: Callable[[Batch], object]) -> None:
        self.first = first  # delivery tag of the first message
        self.ids = ids  # message ids, in the order of the tags
        self.size = size  # bytes that were written
        self.done = done
        self.left = len(ids)  # not answered
        self.nacked = False  # any of them
        self.states = bytearray(len(ids))
        self.returned: dict[int, str] = {}  # position -> the broker's reason
        self._answered = 0  # everything before this position is answered
        self._positions: dict[str, int] | None = None  # by id; only made when something is returned

    @property
    def all_acked(self) -> bool:
        """True when every message was acked, and none was returned."""
        return not (self.left or self.nacked or self.returned)

    def position(self, message_id: str) -> int | None:
        """Where the message with this id is, None if it is not among them."""
        if self._positions is None:
            self._positions = {name: position for position, name in enumerate(self.ids)}
        return self._positions.get(message_id)

    def answer_one(self, position: int, state: int) -> None:
        """The first answer counts."""
        if self.states[position] == UNKNOWN:
            self.states[position] = state
            self._count(1, state)

    def answer_up_to(self, end: int, state: int) -> None:
        """All before the position `end` that have no answer yet."""
        start = self._answered
        if end <= start:
            return
        found = self.states.count(UNKNOWN, start, end)
        if found == end - start:
            self.states[start:end] = bytes((state,)) * found
        else:
            self.states[start:end] = self.states[start:end].translate(_SET[state])
        self._answered = end
        self._count(found, state)

    def _count(self, answered: int, state: int) -> None:
        self.left -= answered
        if answered and state == NACKED:
            self.nacked = True


class Ledger:
    """What is in flight on a channel. A batch's `done` is called once: when it is answered, or when the session has failed."""

    def __init__(self) -> None:
        self._last = 0
        self._open: deque[Batch] = deque()

    @property
    def unanswered(self) -> int:
        """Messages in flight."""
        return sum(batch.left for batch in self._open)

    def write(self, ids: Sequence[str], size: int, done: Callable[[Batch], object]) -> Batch:
        """Give the next tags to messages, which must be written to the channel now, in this order, before any others."""
        batch = Batch(self._last + 1, ids, size, done)
        self._last += len(ids)
        self._open.append(batch)
        return batch

    def confirm(self, tag: int, multiple: bool, acked: bool) -> None:
        """Take a basic.ack or basic.nack. A second answer to a message changes nothing. Raises Violation."""
        if tag > self._last or not (tag or multiple):
            raise Violation(f"a confirm of the message {tag}, and {self._last} were published")
        state = ACKED if acked else NACKED
        if not multiple:
            self._confirm_one(tag, state)
        else:
            self._confirm_up_to(tag or self._last, state)  # AMQP: 0 stands for all that were sent

    def returned(self, message_id: str | None, reason: str) -> None:
        """Take a basic.return: mark its message. Raises Violation if no such message is in flight.

        The ids in flight must be distinct. RabbitMQ returns a message before it acks it, so it cannot have left the ledger.
        """
        if message_id is not None:
            for batch in self._open:
                position = batch.position(message_id)
                if position is not None and position not in batch.returned:
                    batch.returned[position] = reason
                    return
        raise Violation("a message came back that is not in flight")

    def fail(self) -> None:
        """The session is over: what has no answer stays unknown."""
        ended, self._open = self._open, deque()
        for batch in ended:
            batch.done(batch)

    def _confirm_one(self, tag: int, state: int) -> None:
        for batch in self._open:
            position = tag - batch.first
            if position < len(batch.states):
                if position >= 0:  # else its batch is settled
                    batch.answer_one(position, state)
                    if not batch.left:
                        self._settle(batch)
                return

    def _confirm_up_to(self, tag: int, state: int) -> None:
        answered = []
        for batch in self._open:
            if batch.first > tag:
                break
            batch.answer_up_to(min(tag + 1 - batch.first, len(batch.states)), state)
            if not batch.left:
                answered.append(batch)
        for batch in answered:
            self._settle(batch)

    def _settle(self, batch: Batch) -> None:
        self._open.remove(batch)  # nearly always the oldest
        batch.done(batch)
