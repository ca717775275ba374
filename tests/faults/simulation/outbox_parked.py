"""The parked rows of the model: relay.outbox_parked, relay.outbox_pause, and the statements on them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tests.faults.simulation.server import Session

if TYPE_CHECKING:
    from tests.faults.simulation.outbox_database import LogRow, OutboxDatabase

_ALONE = ("refused", "unconfirmed")
_NOBODYS_FAULT = ("paused", "behind", "tombstone")


@dataclass(frozen=True, slots=True)
class Parked:
    """A row of relay.outbox_parked. Times are the virtual clock's."""

    id: int
    place: tuple[str, str]
    seq: int
    reason: str
    state: str  # waiting, retrying, stuck, paused
    attempts: int
    next_attempt_at: float | None


@dataclass(frozen=True, slots=True)
class Pause:
    """A row of relay.outbox_pause: of an aggregate, or of an event type."""

    place: tuple[str, str] | None = None
    event_type: str | None = None

    def record(self) -> dict[str, Any]:
        """As `list_pauses` returns it."""
        if self.place is None:
            return {"scope": "event_type", "event_type": self.event_type}
        return {"scope": "aggregate", "aggregate_type": self.place[0], "aggregate_id": self.place[1]}


class ParkedRows:
    """Answers what relay.outbox.store asks about parked rows."""

    def __init__(self, database: OutboxDatabase) -> None:
        self._db = database
        database.answer(
            list_pauses=self._list_pauses,
            blocked_aggregates=self._blocked_aggregates,
            park=self._park,
            due_parked=self._due_parked,
            due_alone=self._due_alone,
            next_parked_attempt=self._next_parked_attempt,
            unpark=self._unpark,
            delay_parked=self._delay_parked,
            promote_parked=self._promote_parked,
            promote_headless=self._promote_headless,
            hold_paused=self._hold_paused,
            hold_due=self._hold_due,
            release_paused=self._release_paused,
        )

    def rows(self, session: Session) -> dict[int, Parked]:
        """What a session sees of them."""
        return self._db.read(session, "parked")

    def _now(self) -> float:
        return self._db.loop.time()

    def _row(self, row_id: int) -> LogRow:
        return next(row for row in self._db.log if row.id == row_id)

    def _is_paused(self, row: LogRow) -> bool:
        pauses = self._db.tables["pauses"]
        return Pause(place=row.place) in pauses or Pause(event_type=row.record["event_type"]) in pauses

    def _put(self, session: Session, parked: Parked) -> None:
        self._db.write(session, "parked", parked.id, parked)

    def _by_place(self, session: Session) -> dict[tuple[str, str], list[Parked]]:
        lines: dict[tuple[str, str], list[Parked]] = defaultdict(list)
        for parked in sorted(self.rows(session).values(), key=lambda p: p.seq):
            lines[parked.place].append(parked)
        return lines

    # --- looking

    def _list_pauses(self, session: Session) -> list[dict[str, Any]]:
        return [pause.record() for pause in self._db.read(session, "pauses")]

    def _blocked_aggregates(self, session: Session, _shard: int) -> list[dict[str, Any]]:
        found = []
        for place, line in self._by_place(session).items():
            is_paused = any(p.state == "paused" for p in line)
            refused = any(p.state != "paused" and p.reason not in _NOBODYS_FAULT for p in line)
            found.append(
                {
                    "aggregate_type": place[0],
                    "aggregate_id": place[1],
                    "parked": len(line),
                    "refused": len(line) if refused and not is_paused else 0,
                }
            )
        return found

    def _due_parked(
        self, session: Session, _shard: int, aggregates: int, rows_each: int, _bytes: int, suspects: list[int]
    ) -> list[dict[str, Any]]:
        now, rows, found = self._now(), self.rows(session), {}
        heads = [
            p
            for p in rows.values()
            if p.state == "retrying" and p.reason not in _ALONE and _at(p) <= now and p.id not in suspects
        ]
        for head in sorted(heads, key=_at)[:aggregates]:
            found[head.id] = self._due(head, head.attempts, head.next_attempt_at)
            behind = sorted(
                (p for p in rows.values() if p.place == head.place and p.seq > head.seq), key=lambda p: p.seq
            )
            for p in behind[: rows_each - 1]:
                if p.state != "waiting" or p.id in suspects:
                    break
                found.setdefault(p.id, self._due(p, 0, None))
        return [found[row_id] for row_id in sorted(found)]

    def _due_alone(self, session: Session, _shard: int, suspects: list[int]) -> list[dict[str, Any]]:
        now = self._now()
        heads = {line[0].id for line in self._by_place(session).values()}
        due = [
            p
            for p in self.rows(session).values()
            if p.state == "retrying" and (p.reason in _ALONE or p.id in suspects) and _at(p) <= now
            if p.id in heads and not self._is_paused(self._row(p.id))
        ]
        return [self._due(p, p.attempts, p.next_attempt_at) for p in sorted(due, key=_at)[:1]]

    def _next_parked_attempt(self, session: Session, _shard: int, suspects: list[int]) -> list[dict[str, Any]]:
        retrying = [p for p in self.rows(session).values() if p.state == "retrying"]
        together = [_at(p) for p in retrying if p.reason not in _ALONE and p.id not in suspects]
        alone = [_at(p) for p in retrying if p.reason in _ALONE or p.id in suspects]
        now = self._now()
        return [
            {
                "together_s": min(together) - now if together else None,
                "alone_s": min(alone) - now if alone else None,
            }
        ]

    def _due(self, parked: Parked, attempts: int, at: float | None) -> dict[str, Any]:
        return self._row(parked.id).record | {"is_tombstone": False, "attempts": attempts, "next_attempt_at": at}

    # --- writing

    def _park(self, session: Session, _shard: int, *columns: list[Any]) -> None:
        for row_id, kind, name, seq, reason, _detail, state, attempts, delay_s in zip(*columns, strict=True):
            if row_id not in self.rows(session):
                at = None if delay_s is None else self._now() + delay_s
                self._put(session, Parked(row_id, (kind, name), seq, reason, state, attempts, at))

    def _unpark(self, session: Session, ids: list[int], _tombstones: list[int]) -> list[dict[str, Any]]:
        gone = [p for row_id in ids if (p := self.rows(session).get(row_id)) is not None]
        for parked in gone:
            self._db.write(session, "parked", parked.id, None)
        return [{"id": p.id, "refused": p.reason not in _NOBODYS_FAULT} for p in gone]

    def _delay_parked(self, session: Session, *columns: list[Any]) -> None:
        for row_id, reason, _detail, state, attempts, delay_s, _is_tombstone, due_at in zip(*columns, strict=True):
            parked = self.rows(session).get(row_id)
            if parked is None:
                continue
            changed = replace(parked, reason=reason, attempts=attempts)
            if parked.state != "paused" and parked.next_attempt_at == due_at:
                at = None if delay_s is None else self._now() + delay_s
                changed = replace(changed, state=state, next_attempt_at=at)
            self._put(session, changed)

    def _promote_parked(
        self, session: Session, _shard: int, kinds: list[str], names: list[str]
    ) -> list[dict[str, Any]]:
        lines, found = self._by_place(session), []
        for place in zip(kinds, names, strict=True):
            if place not in lines:
                continue
            head = lines[place][0]
            # As the statement says it: from the head before it is promoted.
            found.append(
                {
                    "aggregate_type": place[0],
                    "aggregate_id": place[1],
                    "refused": head.state != "paused" and head.reason not in _NOBODYS_FAULT,
                }
            )
            if head.state == "waiting":
                self._put(session, self._paused_or_due(head))
        return found

    def _paused_or_due(self, head: Parked) -> Parked:
        if self._is_paused(self._row(head.id)):
            return replace(head, state="paused", next_attempt_at=None, reason="paused")
        return replace(head, state="retrying", next_attempt_at=self._now())

    def _promote_headless(self, session: Session, _shard: int) -> str:
        heads = [line[0] for line in self._by_place(session).values() if line[0].state == "waiting"]
        for head in heads:
            self._put(session, replace(head, state="retrying", next_attempt_at=self._now()))
        return f"UPDATE {len(heads)}"

    def _hold_paused(self, session: Session, _shard: int) -> str:
        return self._hold(session, [p for p in self.rows(session).values() if self._is_paused(self._row(p.id))])

    def _hold_due(self, session: Session, ids: list[int]) -> str:
        return self._hold(session, [p for row_id in ids if (p := self.rows(session).get(row_id)) is not None])

    def _hold(self, session: Session, rows: list[Parked]) -> str:
        held = [p for p in rows if p.state == "retrying"]
        for p in held:
            reason = "paused" if p.reason == "behind" else p.reason
            self._put(session, replace(p, state="paused", next_attempt_at=None, reason=reason))
        return f"UPDATE {len(held)}"

    def _release_paused(self, session: Session, _shard: int) -> str:
        free = [p for p in self.rows(session).values() if p.state == "paused" and not self._is_paused(self._row(p.id))]
        for p in free:
            self._put(session, replace(p, state="retrying", next_attempt_at=self._now()))
        return f"UPDATE {len(free)}"


def _at(parked: Parked) -> float:
    return parked.next_attempt_at if parked.next_attempt_at is not None else float("inf")
