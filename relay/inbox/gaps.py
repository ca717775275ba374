"""What is missing: the table of gaps, and what each of them needs. The decisions are pure, the statements set-wise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

import asyncpg

from relay.control import Gone, Marks, Range
from relay.inbox.sequencer import Key, Policy
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query

LONGEST_DELAY_S = 300.0
"""Longest time between two requests for the same numbers."""

NUMBERS_EACH = 2000
"""Numbers of one gap that are asked for at a time; when they have come, the next are."""

ASKS_IN_VAIN = 3
"""After so many requests for the same number it is asked whether what is sent ends among the dead letters."""

HOLES_EACH = 50
_EARLY_LOOKED_AT = 2000
_WALKED = 1000
_ASKED_LOOKED_AT = 5000
_LEASE_S = 30.0
"""How long a claimed gap is ours: a consumer that dies while asking keeps the others from asking for no longer."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Need(Enum):
    """What a gap needs."""

    CLOSE = "close"  # nothing is missing any more
    ASK = "ask"  # something came, the rest may be asked for at once
    WAIT = "wait"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A gap, and how its aggregate is doing."""

    key: Key
    to_seq: int  # everything up to here exists
    is_stuck: bool  # its producer does not have it any more
    asks: int
    asked_from: int | None
    asked_to: int | None
    last_seq: int  # the cursor
    held_to: int  # up to here there is no hole: applied or held
    top_is_held: bool  # to_seq itself is held
    latest: bool = False  # policy latest: only the newest state is wanted
    dead_letters: int | None = None  # of the queue when it was first asked for; None: not known

    @property
    def first_missing(self) -> int:
        """The first number that is neither applied nor held; behind `to_seq` when none is."""
        if self.latest:
            return self.to_seq if self.last_seq < self.to_seq and not self.top_is_held else self.to_seq + 1
        return max(self.last_seq, min(self.held_to, self.to_seq)) + 1

    @property
    def need(self) -> Need:
        """What it needs, whether or not its time has come."""
        first = self.first_missing
        if first > self.to_seq:
            return Need.CLOSE
        if self.is_stuck:
            return Need.ASK if self.asked_from is not None and first > self.asked_from else Need.WAIT
        return Need.ASK if self.asks and self.asked_to is not None and first > self.asked_to else Need.WAIT

    @property
    def is_coming(self) -> bool:
        """True when part of what was asked for last has come since."""
        return self.asks > 0 and self.asked_from is not None and self.first_missing > self.asked_from

    def dies(self, dead_letters: int | None) -> bool:
        """True when it was sent again in vain, and there are more dead letters since: what comes may end its consumer."""
        return (
            self.asks >= ASKS_IN_VAIN
            and self.first_missing == self.asked_from
            and self.dead_letters is not None
            and dead_letters is not None
            and dead_letters > self.dead_letters
        )

    def delay_s(self, first_s: float) -> float:
        """Seconds until it is asked for again, when it is asked for now: doubles."""
        return float(min(LONGEST_DELAY_S, first_s * 2.0 ** min(self.asks, 60)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How a gap that was claimed fared, and when to look again."""

    gap: Gap
    asks: int
    asked_to: int | None  # None: not asked for now
    delay_s: float
    detail: str | None = None
    dead_letters: int | None = None  # to compare with


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A gap that people should hear of: where it is, and how it is."""

    key: Key
    to_seq: int
    found_by: str = ""
    asks: int = 0
    lasted_s: float = 0.0


class EarlyWalk:
    """Finds gaps among the messages that arrived early, a bounded number a call, round and round.

    `policies` are those of aggregate types, `policy` that of all others: where it is not `sequence` nothing is missed, and what
    waits nevertheless is made due.
    """

    def __init__(
        self,
        consumer: str,
        *,
        alert_s: float,
        policy: Policy = "sequence",
        policies: Mapping[str, Policy] | None = None,
    ) -> None:
        self._consumer = consumer
        self._alert_s = alert_s
        self._policies = (list(policies or {}), list((policies or {}).values()), policy)
        self._after = (_EPOCH, 0)
        self.is_over = True  # the last call came to the end of the round

    async def step(self, connection: Connection) -> int:
        """Look at the next ones; return how many gaps were noted, or grew."""
        with postgres_errors():
            row = await connection.fetchrow(
                query("note_early"), self._consumer, self._alert_s, *self._after, _EARLY_LOOKED_AT, *self._policies
            )
        if row is None:
            return 0
        self.is_over = row["looked"] < _EARLY_LOOKED_AT
        self._after = (_EPOCH, 0) if self.is_over else (row["held_at"], row["id"])
        noted: int = row["noted"]
        return noted


class GapWalk:
    """Goes through all gaps, a bounded number a call, round and round: those that others have asked for close as well."""

    def __init__(self, consumer: str) -> None:
        self._consumer = consumer
        self._after = ("", "", "")
        self.is_over = True

    async def step(self, connection: Connection) -> list[Key]:
        """The next gaps."""
        with postgres_errors():
            rows = await connection.fetch(query("walk_gaps"), self._consumer, *self._after, _WALKED)
        self.is_over = len(rows) < _WALKED
        last = rows[-1] if rows and not self.is_over else None
        self._after = (last["aggregate_id"], last["aggregate_type"], last["source"]) if last else ("", "", "")
        return [(r["source"], r["aggregate_type"], r["aggregate_id"]) for r in rows]


async def note_marks(
    connection: Connection, consumer: str, marks: Mapping[Key, int], *, alert_s: float, retained: bool = True
) -> int:
    """Note what marks say exists and has not come. In a batch's transaction, after its cursors are written.

    Not `retained`: only of aggregates that something was applied of.
    """
    if not marks:
        return 0
    keys = sorted(marks)
    noted: int = await connection.fetchval(
        query("note_marks"), consumer, *_arrays(keys), [marks[key] for key in keys], alert_s, retained
    )
    return noted


async def states(
    connection: Connection, consumer: str, keys: Iterable[Key], *, is_latest: Callable[[str], bool]
) -> list[Gap]:
    """Those of these gaps that there are. `is_latest`: whether an aggregate type is of that policy."""
    wanted = sorted(set(keys))
    if not wanted:
        return []
    rows = await connection.fetch(query("gap_states"), consumer, *_arrays(wanted))
    return [
        Gap(
            key=(r["source"], r["aggregate_type"], r["aggregate_id"]),
            to_seq=r["to_seq"],
            is_stuck=r["state"] == "stuck",
            asks=r["asks"],
            asked_from=r["asked_from"],
            asked_to=r["asked_to"],
            last_seq=r["last_seq"],
            held_to=r["held_to"],
            top_is_held=r["top_is_held"],
            latest=is_latest(r["aggregate_type"]),
            dead_letters=r["dead_letters"],
        )
        for r in rows
    ]


async def close(connection: Connection, consumer: str, gaps: Sequence[Gap]) -> list[Told]:
    """Forget gaps of which nothing is missing; return those that people had been told of."""
    if not gaps:
        return []
    with postgres_errors():
        rows = await connection.fetch(query("close_gaps"), consumer, *_keys(gaps), [g.to_seq for g in gaps])
    return [Told(key=_key(r), to_seq=r["to_seq"], asks=r["asks"], lasted_s=r["lasted_s"]) for r in rows]


async def make_due(connection: Connection, consumer: str, gaps: Sequence[Gap]) -> None:
    """Let gaps of which something came be asked for at once."""
    if gaps:
        with postgres_errors():
            await connection.execute(query("make_gaps_due"), consumer, *_keys(gaps))


async def claim(connection: Connection, consumer: str, rows: int) -> list[Key]:
    """The gaps that are due: ours alone for a while."""
    with postgres_errors():
        return [_key(r) for r in await connection.fetch(query("claim_gaps"), consumer, rows, _LEASE_S)]


async def missing(connection: Connection, consumer: str, gaps: Sequence[Gap], numbers: int) -> dict[Key, list[Range]]:
    """What is to be asked for: of each gap the first holes, so many numbers at most. Of the policy latest, the newest only."""
    sequence = [gap for gap in gaps if not gap.latest]
    found: dict[Key, list[Range]] = {
        gap.key: [Range(*gap.key[1:], gap.to_seq, gap.to_seq)] for gap in gaps if gap.latest
    }
    if sequence:
        with postgres_errors():
            rows = await connection.fetch(
                query("gap_numbers"),
                consumer,
                *_keys(sequence),
                [g.to_seq for g in sequence],
                [g.first_missing - 1 for g in sequence],
                HOLES_EACH,
            )
        for r in rows:
            key = sequence[r["n"] - 1].key
            found.setdefault(key, []).append(Range(key[1], key[2], r["from_seq"], r["to_seq"]))
    return {key: _cut(ranges, numbers) for key, ranges in found.items()}


async def write_asked(connection: Connection, consumer: str, asked: Sequence[Asked]) -> list[Told]:
    """Write down what was asked for, and when to look again; return the gaps that nobody had been told of."""
    if not asked:
        return []
    with postgres_errors():
        rows = await connection.fetch(
            query("write_asked"),
            consumer,
            *_keys([a.gap for a in asked]),
            [a.asks for a in asked],
            [a.gap.first_missing for a in asked],
            [a.asked_to for a in asked],
            [a.delay_s for a in asked],
            [a.detail for a in asked],
            [a.dead_letters for a in asked],
        )
    return [Told(key=_key(r), to_seq=r["to_seq"], found_by=r["found_by"]) for r in rows]


async def asked_numbers(connection: Connection, consumer: str) -> float:
    """How many numbers the competing consumers together have asked for and still wait for, about."""
    with postgres_errors():
        numbers: float = await connection.fetchval(query("asked_numbers"), consumer, _ASKED_LOOKED_AT)
    return numbers


async def stick(connection: Connection, consumer: str, details: Mapping[Key, tuple[int, str]]) -> list[tuple[Key, str]]:
    """These cannot be had, from a number on, and why. Returns those that were not stuck before."""
    if not details:
        return []
    keys = sorted(details)
    rows = await connection.fetch(
        query("stick_gaps"), consumer, *_arrays(keys), [details[k][0] for k in keys], [details[k][1] for k in keys]
    )
    return [(_key(r), r["detail"]) for r in rows]


async def drop_announced(connection: Connection, consumer: str, firsts: Mapping[Key, int]) -> list[Told]:
    """Forget those of these gaps, given their first missing numbers, behind which nothing is held. In a batch's transaction."""
    if not firsts:
        return []
    keys = sorted(firsts)
    rows = await connection.fetch(query("drop_announced"), consumer, *_arrays(keys), [firsts[key] for key in keys])
    return [Told(key=_key(r), to_seq=r["to_seq"]) for r in rows]


async def next_s(connection: Connection, consumer: str) -> float | None:
    """Seconds until a gap is due; None if none is open."""
    with postgres_errors():
        seconds: float | None = await connection.fetchval(query("next_gap"), consumer)
    return seconds


def newest(marks: Iterable[Marks], *, is_ordered: Callable[[str], bool]) -> dict[Key, int]:
    """The highest mark of each aggregate whose type is ordered. Pure."""
    found: dict[Key, int] = {}
    for one in marks:
        for mark in one.marks:
            if is_ordered(mark.aggregate_type):
                key = (one.source, mark.aggregate_type, mark.aggregate_id)
                found[key] = max(found.get(key, 0), mark.last_seq)
    return found


def stuck_details(answers: Iterable[Gone], gaps: Sequence[Gap]) -> dict[Key, tuple[int, str]]:
    """Of which gaps the first missing number is gone, and what to say about it. Pure.

    A number that is gone further on does not hold anything up yet: it is asked for again when it does.
    """
    by_key = {gap.key: gap for gap in gaps}
    details: dict[Key, tuple[int, str]] = {}
    for answer in answers:
        for r in answer.ranges:
            gap = by_key.get((answer.source, *r.aggregate))
            if gap is not None and r.from_seq <= gap.first_missing <= min(r.to_seq, gap.to_seq):
                details[gap.key] = (gap.first_missing, _detail(gap, r, answer))
    return details


def beyond(answers: Iterable[Gone], details: Mapping[Key, tuple[int, str]]) -> dict[Key, int]:
    """Which of the gaps that would be stuck are so because their numbers were never given out: their first missing ones. Pure."""
    return {
        (a.source, *r.aggregate): details[a.source, *r.aggregate][0]
        for a in answers
        if a.reason == "beyond"
        for r in a.ranges
        if (a.source, *r.aggregate) in details and r.from_seq <= details[a.source, *r.aggregate][0] <= r.to_seq
    }


def dead_detail(gap: Gap, queue: str) -> str:
    """What to say about a gap that `dies`."""
    _, kind, name = gap.key
    first = gap.first_missing
    return (
        f"number {first} was sent again {gap.asks} times and has not arrived, and {queue}.dead has grown: a message may end the process "
        f"of its consumer. Mend that, then relay inbox retry {kind}/{name}; to go on without: relay inbox skip {kind}/{name} "
        f"--through {first}"
    )


def _detail(gap: Gap, gone: Range, answer: Gone) -> str:
    source, kind, name = gap.key
    first, last = gap.first_missing, min(gone.to_seq, gap.to_seq)
    numbers = f"number {first} is" if first == last else f"numbers {first} to {last} are"
    if answer.reason == "beyond":
        why = (
            f"source {source} has never given out {kind}/{name} beyond {gone.from_seq - 1}, and more has come from it: its database "
            f"has lost {numbers.removesuffix(' is').removesuffix(' are')}, and will give out such numbers again"
        )
    elif answer.reason == "unknown":
        why = f"source {source} knows no {kind}/{name}: {numbers} missing here, so its database has lost them, or it is another one"
    else:
        why = f"{numbers} not retained by source {source} any more"
    return f"{why}; to go on without: relay inbox skip {kind}/{name} --through {last}, or seed the aggregate"


def _cut(ranges: Iterable[Range], numbers: int) -> list[Range]:
    cut: list[Range] = []
    for r in ranges:
        if numbers <= 0:
            break
        cut.append(Range(*r.aggregate, r.from_seq, min(r.to_seq, r.from_seq + numbers - 1)))
        numbers -= len(cut[-1])
    return cut


def _key(row: asyncpg.Record) -> Key:
    return (row["source"], row["aggregate_type"], row["aggregate_id"])


def _keys(gaps: Sequence[Gap]) -> tuple[list[str], list[str], list[str]]:
    return _arrays([gap.key for gap in gaps])


def _arrays(keys: Sequence[Key]) -> tuple[list[str], list[str], list[str]]:
    return [k[0] for k in keys], [k[1] for k in keys], [k[2] for k in keys]
