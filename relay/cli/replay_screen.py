"""What a replay shows: the count before, a progress bar (or plain lines) meanwhile, the outcome after."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

from relay.log import printable
from relay.operate.replay import State
from relay.operate.replays import Replay
from relay.operate.retained import Count, Missing
from relay.operate.selection import Selection
from relay.operate.wording import as_options

_LINE_EVERY_S = 5.0
_RATE_OVER_S = 10.0

Tell = Callable[[State], None]


@contextmanager
def progress(chosen: Replay, *, silent: bool) -> Iterator[Tell]:
    """A bar on standard error if that is a terminal, else a line every few seconds; what it yields is told each state."""
    if silent:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _bar(chosen) as tell:
            yield tell
    else:
        yield _lines(chosen)


@contextmanager
def _bar(chosen: Replay) -> Iterator[Tell]:
    columns = (BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("replay", total=chosen.total, completed=chosen.sent, note="")
        speed = _Speed()

        def tell(state: State) -> None:
            bar.update(task, completed=min(state.sent, state.total), note=_note(state, speed.after(state)))

        yield tell


def _lines(chosen: Replay) -> Tell:
    """A line at once when something changes for the worse or the better, else one every few seconds."""
    speed = _Speed()
    told_at = time.monotonic()
    before: tuple[bool, str | None] = (False, None)

    def tell(state: State) -> None:
        nonlocal told_at, before
        rate = speed.after(state)
        now = (state.held_back_s is not None, state.trouble)
        if now == before and time.monotonic() - told_at < _LINE_EVERY_S:
            return
        told_at, before = time.monotonic(), now
        click.echo(
            printable(f"replay {chosen.id}: {state.sent:,} of {state.total:,} rows, {_note(state, rate)}"), err=True
        )

    return tell


class _Speed:
    """Rows a second over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def after(self, state: State) -> float:
        now = time.monotonic()
        self._seen.append((now, state.sent_now))
        while len(self._seen) > 2 and now - self._seen[0][0] > _RATE_OVER_S:
            self._seen.popleft()
        (since, before), (until, sent) = self._seen[0], self._seen[-1]
        return (sent - before) / max(0.001, until - since)


def _note(state: State, rate: float) -> str:
    if state.trouble is not None:
        return printable(f"trying again: {state.trouble}")
    if state.held_back_s is not None:
        return f"waiting for new events to go first: the relay is {state.held_back_s:,.0f} s behind (is `relay run` running?)"
    left = f", {_duration((state.total - state.sent) / rate)} left" if rate > 0 and state.sent < state.total else ""
    return f"{rate:,.0f} rows/s{left}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.{0 if seconds >= 10 else 1}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def whereto(chosen: Replay) -> str:
    """Who gets it."""
    return "to everyone" if chosen.to_queue is None else f"to the queue {chosen.to_queue}"


def asked(selection: Selection) -> str:
    """The filters, as they were given."""
    return as_options(selection.as_json())


@contextmanager
def counting() -> Iterator[None]:
    """Says that it takes its time: a log of ten million rows is counted for some seconds."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status("counting what is retained"):
        yield


def counted_lines(count: Count, selection: Selection, source: str, to_queue: str | None) -> list[str]:
    """What would be sent, to whom, and what is missing of what was asked for."""
    rows = f"{count.rows:,} row{'' if count.rows == 1 else 's'} of source {source}"
    to = (
        "to everyone: each queue that is bound to its routing key gets it again"
        if to_queue is None
        else f"to the queue {to_queue} and nobody else"
    )
    return [
        f"{rows}, {to}",
        *(f"  {t.rows:>12,}  {t.event_type}" for t in count.types),
        f"inserted between {count.first_at:%Y-%m-%d %H:%M:%S} and {count.last_at:%Y-%m-%d %H:%M:%S} UTC (row {count.first_id} to row {count.last_id})",
        *missing_lines(count.missing, selection),
    ]


def missing_lines(missing: Missing, selection: Selection) -> list[str]:
    """What was asked for and is no longer there, and nothing for what is."""
    lines = []
    if missing.numbers:
        numbers = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in missing.numbers)
        verb = "is" if len(missing.numbers) == 1 and missing.numbers[0][0] == missing.numbers[0][1] else "are"
        lines.append(f"{selection.aggregate}: {numbers} {verb} no longer retained")
    if missing.ids:
        lines.append(f"no longer retained, or never there: row {', '.join(map(str, missing.ids))}")
    if missing.before is not None:
        lines.append(
            f"the retained log begins at {missing.before:%Y-%m-%d %H:%M:%S} UTC: what is older is no longer retained"
        )
    return lines


def count_as_json(count: Count, selection: Selection, source: str, to_queue: str | None) -> dict[str, Any]:
    """The same for programs."""
    return {
        "dry_run": True,
        "source": source,
        "to_queue": to_queue,
        "selection": selection.as_json(),
        "rows": count.rows,
        "types": {t.event_type: t.rows for t in count.types},
        "first_id": count.first_id,
        "last_id": count.last_id,
        "first_at": count.first_at.isoformat(),
        "last_at": count.last_at.isoformat(),
        "no_longer_retained": {
            "numbers": [list(r) for r in count.missing.numbers],
            "ids": list(count.missing.ids),
            "before": None if count.missing.before is None else count.missing.before.isoformat(),
        },
    }


def outcome_lines(chosen: Replay, state: State, seconds: float) -> list[str]:
    """How it ended; of one that was interrupted only what is worth a look (the way on is told elsewhere)."""
    lines = []
    if state.done:
        now = "" if state.sent_now == state.sent else f"{state.sent_now:,} of them now, "
        lines.append(
            f"replay {chosen.id}: done, {state.sent:,} of {state.total:,} rows sent {whereto(chosen)} ({now}in {_duration(seconds)})"
        )
    if state.unroutable:
        lines.append(
            f"{state.unroutable:,} of them were unroutable: no queue is bound for their routing keys, so nobody got them"
        )
    if state.not_sent_rows:
        lines.append(f"{state.not_sent_rows:,} could not be sent as they are:")
        lines += [f"  row {n.row_id}: {n.reason}: {n.detail}" for n in state.not_sent]
    if state.short:
        lines.append(
            f"{state.short:,} of the rows that were counted at the start were left out: no longer retained, or parked meanwhile"
        )
    return lines


def outcome_as_json(chosen: Replay, state: State, seconds: float) -> dict[str, Any]:
    """The same for programs."""
    return {
        "replay": chosen.id,
        "state": "done" if state.done else "unfinished",
        "to_queue": chosen.to_queue,
        "total": state.total,
        "sent": state.sent,
        "sent_now": state.sent_now,
        "seconds": round(seconds, 3),
        "unroutable": state.unroutable,
        "could_not_be_sent": [{"id": n.row_id, "reason": n.reason, "detail": n.detail} for n in state.not_sent],
        "could_not_be_sent_rows": state.not_sent_rows,
        "left_out": state.short,
    }
