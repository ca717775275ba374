"""The consumer's database, as DESIGN.md section 4 describes it: cursors with row locks, what is held, what was seen, and effects."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from typing import Any

from relay.message import TOMBSTONE, Event
from tests.faults.simulation.clock import VirtualLoop
from tests.faults.simulation.server import Server, Session

Key = tuple[str, str, str]
"""(source, aggregate type, aggregate id)."""

EFFECT = "the application's effect"
_EVENT = (
    "source",
    "aggregate_type",
    "aggregate_id",
    "seq",
    "message_id",
    "event_type",
    "content_type",
    "headers",
    "body",
    "digest",
    "occurred_at",
)


@dataclass(frozen=True, slots=True)
class CursorRow:
    """A row of relay.inbox_aggregate."""

    last_seq: int = 0
    last_digest: bytes | None = None
    blocked: bool = False


@dataclass(frozen=True, slots=True)
class HeldRow:
    """A row of relay.inbox_held."""

    id: int
    event: dict[str, Any]
    reason: str
    state: str  # waiting, retrying, stuck
    attempts: int
    next_attempt_at: float | None

    @property
    def key(self) -> Key:
        """Its aggregate."""
        return (self.event["source"], self.event["aggregate_type"], self.event["aggregate_id"])

    @property
    def seq(self) -> int | None:
        """Its number."""
        seq: int | None = self.event["seq"]
        return seq

    @property
    def record(self) -> dict[str, Any]:
        """As a statement returns it."""
        return self.event | {"id": self.id, "attempts": self.attempts}


@dataclass(frozen=True, slots=True)
class Effect:
    """What the application did, and for which event. There is no unique constraint."""

    key: tuple[str | None, str | None]
    seq: int | None
    message_id: str
    digest: bytes


class InboxDatabase(Server):
    """Answers what relay/inbox asks."""

    locks_cursors = True  # FOR UPDATE; off in a mutant of the statements

    def __init__(self, loop: VirtualLoop, dice: random.Random) -> None:
        super().__init__(loop, dice)
        self.last_id = 0
        self._tids: dict[Key, str] = {}
        self.statements[EFFECT] = self._effect
        self.answer(
            probe_inbox=_nothing,
            set_session=_nothing,
            write_figures=_nothing,
            purge_seen=_nothing,
            end_backend=self._end_backend,
            transaction_id=self._transaction_id,
            lock_cursors=self._lock_cursors,
            create_cursors=self._create_cursors,
            lines_with_held=self._lines_with_held,
            insert_seen=self._insert_seen,
            held_successors=self._held_successors,
            make_successors_due=self._make_successors_due,
            release_waiting=self._release_waiting,
            due_held=self._due_held,
            lock_due_held=self._lock_due_held,
            next_due=self._next_due,
            write_cursors=self._write_cursors,
            delete_held_through=self._delete_held_through,
            held_by_id=self._held_by_id,
            delete_held=self._delete_held,
            insert_held=self._insert_held,
            held_digest=self._held_digest,
            replace_held=self._replace_held,
            update_held=self._update_held,
            insert_quarantine=self._insert_quarantine,
        )

    def held(self, session: Session) -> dict[int, HeldRow]:
        """What a session sees of the held messages."""
        return self.read(session, "held")

    def _id(self) -> int:
        self.last_id += 1
        return self.last_id

    def _now(self) -> float:
        return self.loop.time()

    def _effect(self, session: Session, event: Event) -> None:
        effect = Effect((event.aggregate_type, event.aggregate_id), event.seq, event.message_id, event.digest)
        self.write(session, "effects", self._id(), effect)

    def _end_backend(self, _session: Session, pid: int, *_: object) -> None:
        for other in [*self.sessions]:
            if other.pid == pid:
                self.ended(other)

    @staticmethod
    def _transaction_id(session: Session) -> str:
        return "none" if session.tx is None else str(session.tx.xid)

    # --- cursors

    async def _lock_cursors(self, session: Session, _consumer: str, *columns: Any) -> list[tuple[Any, ...]]:
        """What exists when the statement begins, each as it is once its lock is ours."""
        found = []
        for place, key in enumerate(_keys(*columns), start=1):
            if key not in self.read(session, "cursors"):
                continue
            if self.locks_cursors:
                await self.lock(session, key)
            row = self.read(session, "cursors")[key]
            cursor = (row.last_seq, row.last_digest, row.blocked)
            found.append((place, *cursor, self._tid(key), self._transaction_id(session)))
        return found

    def _tid(self, key: Key) -> str:
        """Where its row is. It stays there: who has not locked it overwrites what another one wrote. Servers of today would write nothing."""
        return self._tids.setdefault(key, f"(0,{len(self._tids) + 1})")

    async def _create_cursors(self, session: Session, _consumer: str, *columns: Any) -> list[tuple[str, ...]]:
        created: list[tuple[str, ...]] = []
        for key in _keys(*columns):
            if self.locks_cursors:
                await self.lock(session, key)
            if key not in self.read(session, "cursors"):
                self.write(session, "cursors", key, CursorRow())
                created.append((*key, self._tid(key), self._transaction_id(session)))
        return created

    def _lines_with_held(self, session: Session, _consumer: str, *columns: Any) -> list[tuple[int]]:
        held = {row.key for row in self.held(session).values() if row.seq is not None}
        return [(place,) for place, key in enumerate(_keys(*columns), start=1) if key in held]

    def _write_cursors(self, session: Session, consumer: str, *columns: Any) -> list[dict[str, Any]]:
        tids, last_seqs, digests, blocked, look = columns[4:]
        held = [place for (place,) in self._lines_with_held(session, consumer, *columns[:4])] if look else []
        if held:
            return [{"transaction_id": self._transaction_id(session), "held": held, "written": 0}]
        keys = {tid: key for key, tid in self._tids.items()}
        known = [None if digest is None else bytes.fromhex(digest.removeprefix("\\x")) for digest in _array(digests)]
        rows = zip(_array(tids), _array(last_seqs), known, strict=True)
        for place, (tid, last_seq, digest) in enumerate(rows, start=1):
            self.write(session, "cursors", keys[tid], CursorRow(last_seq, digest, place in blocked))
        return [{"transaction_id": self._transaction_id(session), "held": [], "written": len(known)}]

    async def _insert_seen(
        self, session: Session, _consumer: str, sources: list[str], ids: list[str]
    ) -> list[dict[str, Any]]:
        fresh = []
        for source, message_id in zip(sources, ids, strict=True):
            await self.lock(session, ("seen", source, message_id))
            if (source, message_id) not in self.read(session, "seen"):
                self.write(session, "seen", (source, message_id), True)
                fresh.append({"source": source, "message_id": message_id})
        return fresh

    # --- held messages: which

    def _line(self, session: Session, key: Key) -> dict[int, HeldRow]:
        return {row.seq: row for row in self.held(session).values() if row.seq is not None and row.key == key}

    def _held_successors(
        self,
        session: Session,
        _consumer: str,
        source: str,
        kind: str,
        names: list[str],
        last: list[int],
        most: int,
        _bytes: int,
    ) -> list[dict[str, Any]]:
        found = []
        for name, last_seq in sorted(zip(names, last, strict=True)):
            line = self._line(session, (source, kind, name))
            seq = last_seq + 1
            while seq in line and seq <= last_seq + most:
                found.append(line[seq].record)
                seq += 1
        return found

    def _due_held(self, session: Session, _consumer: str, rows: int, _bytes: int) -> list[dict[str, Any]]:
        due = [row for row in self.held(session).values() if self._is_due(row)]
        due.sort(key=lambda row: (row.next_attempt_at, row.id))
        return [row.record for row in due[:rows]]

    def _is_due(self, row: HeldRow) -> bool:
        return row.state == "retrying" and row.next_attempt_at is not None and row.next_attempt_at <= self._now()

    async def _lock_due_held(self, session: Session, _consumer: str, ids: list[int]) -> list[dict[str, Any]]:
        found = []
        for held_id in sorted(ids):
            if not self.is_free(session, ("held", held_id)):
                continue
            row = self.held(session).get(held_id)
            if row is not None and self._is_due(row):
                await self.lock(session, ("held", held_id))
                found.append(row.record)
        return found

    def _next_due(self, session: Session, _consumer: str) -> float | None:
        times = [
            row.next_attempt_at
            for row in self.held(session).values()
            if row.state == "retrying" and row.next_attempt_at is not None
        ]
        return min(times) - self._now() if times else None

    def _held_by_id(self, session: Session, _consumer: str, ids: list[int]) -> list[dict[str, Any]]:
        held = self.held(session)
        return [row.record for row in sorted((held[i] for i in ids if i in held), key=lambda row: row.seq or 0)]

    def _held_digest(
        self, session: Session, _consumer: str, source: str, kind: str, name: str, seq: int
    ) -> list[dict[str, Any]]:
        row = self._line(session, (source, kind, name)).get(seq)
        return [] if row is None else [row.record]

    # --- held messages: what becomes of them

    async def _change(self, session: Session, row: HeldRow, **changes: Any) -> bool:
        """UPDATE of a row, after waiting for who has it. False: it is gone meanwhile."""
        await self.lock(session, ("held", row.id))
        now = self.held(session).get(row.id)
        if now is not None:
            self.write(session, "held", row.id, replace(now, **changes))
        return now is not None

    async def _make_successors_due(
        self, session: Session, _consumer: str, source: str, kind: str, names: list[str], last: list[int]
    ) -> list[dict[str, Any]]:
        found = []
        for name, last_seq in zip(names, last, strict=True):
            row = self._line(session, (source, kind, name)).get(last_seq + 1)
            due = {"reason": "behind", "state": "retrying", "next_attempt_at": self._now()}
            if row is not None and await self._change(session, row, **due):
                found.append({"aggregate_id": name})
        return found

    async def _release_waiting(self, session: Session, *_: object) -> list[dict[str, Any]]:
        released = 0
        for row in [*self.held(session).values()]:
            cursor = self.read(session, "cursors").get(row.key)
            if row.seq is None or row.state != "waiting" or cursor is None or row.seq != cursor.last_seq + 1:
                continue
            await self.lock(session, ("held", row.id))
            now = self.held(session).get(row.id)
            if now is not None and now.state == "waiting":
                due = replace(now, reason="behind", state="retrying", next_attempt_at=self._now())
                self.write(session, "held", row.id, due)
                released += 1
        return [{"released": released, "aggregate_id": None, "aggregate_type": None, "source": None}]

    async def _delete_held_through(
        self,
        session: Session,
        _consumer: str,
        source: str,
        kind: str,
        names: list[str],
        last: list[int],
        *applied: Any,
    ) -> list[dict[str, Any]]:
        known = {(name, seq): digest for name, seq, digest in zip(*applied[:3], strict=True)}
        found = []
        for name, last_seq in zip(names, last, strict=True):
            for seq, row in self._line(session, (source, kind, name)).items():
                if seq > last_seq:
                    continue
                await self.lock(session, ("held", row.id))
                self.write(session, "held", row.id, None)
                is_tombstone = row.event["event_type"] == TOMBSTONE
                if (name, seq) in known and (is_tombstone or known[name, seq] != row.event["digest"]):
                    found.append(row.record | {"given_up": is_tombstone})
                    if not is_tombstone:
                        self.write(session, "quarantine", self._id(), ("conflict", row.event["message_id"]))
        return found

    async def _delete_held(self, session: Session, ids: list[int]) -> None:
        for held_id in ids:
            await self.lock(session, ("held", held_id))
            self.write(session, "held", held_id, None)

    def _insert_held(self, session: Session, _consumer: str, *columns: Any) -> list[dict[str, Any]]:
        """ON CONFLICT DO NOTHING: by number within an aggregate, or by message id without one."""
        taken = {_identity(row.event) for row in self.held(session).values()}
        rows = [dict(zip(_HELD, values, strict=True)) for values in zip(*columns, strict=True)]
        found = []
        for row in rows:
            event = {name: row[name] for name in _EVENT}
            if _identity(event) in taken:
                continue
            taken.add(_identity(event))
            at = None if row["delay"] is None else self._now() + row["delay"]
            held = HeldRow(self._id(), event, self._reason(session, row, rows), row["state"], row["attempts"], at)
            self.write(session, "held", held.id, held)
            found.append({name: event[name] for name in _NAME})
        return found

    def _reason(self, session: Session, row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
        """Behind a hole a message is early, whatever is wrong before the hole."""
        reason: str = row["reason"]
        key = (row["source"], row["aggregate_type"], row["aggregate_id"])
        before = {r["seq"] for r in rows if (r["source"], r["aggregate_type"], r["aggregate_id"]) == key}
        if (
            reason == "behind"
            and row["state"] == "waiting"
            and row["seq"] - 1 not in before | {*self._line(session, key)}
        ):
            return "early"
        return reason

    async def _replace_held(
        self,
        session: Session,
        held_id: int,
        message_id: str,
        event_type: str,
        content_type: str,
        headers: str,
        body: bytes,
        digest: bytes,
    ) -> None:
        row = self.held(session)[held_id]
        given = {"message_id": message_id, "event_type": event_type, "content_type": content_type}
        await self._change(session, row, event=row.event | given | {"headers": headers, "body": body, "digest": digest})

    async def _update_held(self, session: Session, *columns: Any) -> None:
        for held_id, reason, state, attempts, _error, delay in zip(*columns, strict=True):
            row = self.held(session).get(held_id)
            at = None if delay is None else self._now() + delay
            if row is not None:
                await self._change(session, row, reason=reason, state=state, attempts=attempts, next_attempt_at=at)

    def _insert_quarantine(self, session: Session, _consumer: str, *columns: Any) -> None:
        for reason, message_id in zip(columns[0], columns[2], strict=True):
            self.write(session, "quarantine", self._id(), (reason, message_id))


def _keys(sources: list[str], kinds: list[str], literal: str, pairs: list[int]) -> list[Key]:
    """As the statements take keys."""
    names = _array(literal)
    return [(sources[p - 1], kinds[p - 1], name) for name, p in zip(names, pairs or [1] * len(names), strict=True)]


def _array(literal: str) -> list[Any]:
    """What is in an array that was given as text. Its escapes are those of JSON."""
    elements: list[Any] = json.loads(f"[{literal[1:-1].replace('NULL', 'null')}]")
    return elements


_NAME = ("source", "aggregate_type", "aggregate_id", "seq", "message_id")
_HELD = (
    "source",
    "aggregate_type",
    "aggregate_id",
    "seq",
    "message_id",
    "event_type",
    "content_type",
    "headers",
    "body",
    "digest",
    "occurred_at",
    "reason",
    "state",
    "attempts",
    "error",
    "delay",
)


def _identity(event: dict[str, Any]) -> tuple[Any, ...]:
    if event["seq"] is None:
        return (event["source"], event["message_id"])
    return (event["source"], event["aggregate_type"], event["aggregate_id"], event["seq"])


def _nothing(*_: object) -> None:
    """Nothing that a simulation would notice."""
