"""`relay inbox held`, `gaps` and `quarantine`: what an inbox keeps aside."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import click

from relay.cli.display import aggregate, ago, content, duration, line, plural, print_json, shorten, table, until
from relay.cli.filters import selecting
from relay.cli.looking import again, json_option, limit_option, look_at, nothing, payload_option
from relay.cli.options import config_option, set_option
from relay.operate import inbox_look as operate
from relay.operate.inbox_look import Held, Missing, Quarantined, QuarantinedContent
from relay.operate.look import Look
from relay.operate.rows import Content
from relay.operate.selection import Selection

after_option = click.option(
    "--after", type=click.IntRange(0), metavar="ID", help="Go on behind this row: the page's last one."
)


@click.command("held")
@config_option
@set_option
@json_option
@limit_option
@after_option
@payload_option
@selecting("inbox", causes=("early", "behind", "failed"))
def held(
    config: Path | None,
    assignments: tuple[str, ...],
    *,
    as_json: bool,
    limit: int,
    after: int | None,
    payload: bool,
    selection: Selection,
) -> None:
    """Messages that an inbox holds.

    The first held first: early, failed, or behind one that failed.

    \b
    relay inbox held order/42
    relay inbox held --cause failed --error KeyError
    relay inbox held --state stuck --payload
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    found, bodies, more, now, empty = look_at(
        config, assignments, lambda look: _held(look, selection, after or 0, limit, payload=payload), command="held"
    )
    if as_json:
        told: dict[str, object] = {"held": found, "next_after": found[-1].id if more else None}
        print_json(told | ({"payloads": bodies} if payload else {}))
        return
    if not found:
        line(empty if after is None else "Nothing further is held.")
        return
    table(
        ("id", "consumer", "source", "aggregate", "seq", "event", "held", "why", "state", "attempts", "next", "error"),
        [
            (str(h.id), shorten(h.consumer, 40), shorten(h.source, 40), aggregate(h.aggregate_type, h.aggregate_id),
             None if h.seq is None else str(h.seq), shorten(h.event_type, 40), ago(h.held_at, now), h.reason, h.state,
             h.attempts or None, until(h.next_attempt_at, now), shorten(h.error or ""))
            for h in found
        ],
        indent=0,
    )  # fmt: skip
    for h in found if payload else ():
        line(f"{h.id}: {content(bodies.get(h.id))}")
    _end(plural(len(found), "message"), found[-1].id if more else None)


async def _held(
    look: Look, selection: Selection, after: int, limit: int, *, payload: bool
) -> tuple[tuple[Held, ...], dict[int, Content], bool, datetime, str]:
    found = await operate.held(look, selection, after_id=after, limit=limit + 1)
    shown = found[:limit]
    bodies = await operate.held_contents(look, [h.id for h in shown]) if payload else {}
    total = 0 if found or selection == Selection() else await operate.held_total(look)
    others = _are(plural(total, "message"), total, "held") if total else None
    empty = nothing(look, "inbox", said="Nothing is held", others=others)
    return shown, bodies, len(found) > limit, look.now, empty


def _are(told: str, count: int, state: str) -> str:
    return f"{told} {'is' if count == 1 else 'are'} {state}"


@click.command("gaps")
@config_option
@set_option
@json_option
@limit_option
@selecting("inbox", without=("event_type", "cause", "error", "ids"), states=("open", "stuck"))
def gaps(config: Path | None, assignments: tuple[str, ...], *, as_json: bool, limit: int, selection: Selection) -> None:
    """Aggregates of which something is missing.

    The longest known first.

    \b
    relay inbox gaps
    relay inbox gaps --state stuck

    open: the producer's relay is asked for the missing numbers, again and again. stuck: it has them no longer, and the aggregate
    waits for you: relay inbox skip TYPE/ID --through N gives them up.
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    (total, found), now, empty = look_at(
        config, assignments, lambda look: _gaps(look, selection, limit), command="gaps"
    )
    if as_json:
        print_json({"total": total, "gaps": found})
        return
    if not found:
        line(empty)
        return
    table(
        ("consumer", "source", "aggregate", "applied", "missing", "numbers", "held", "since", "found by", "state", "asked", "next", "answer"),
        [_gap(g, now) for g in found],
        indent=0,
    )  # fmt: skip
    line()
    shown = f"; the longest known are shown: {len(found):,} (--limit)" if total > len(found) else ""
    line(f"{plural(total, 'gap')}{shown}.")


async def _gaps(look: Look, selection: Selection, limit: int) -> tuple[tuple[int, tuple[Missing, ...]], datetime, str]:
    found = await operate.gaps(look, selection, limit=limit)
    total = 0 if found[0] or selection == Selection() else (await operate.gaps(look, Selection(), limit=1))[0]
    others = _are(plural(total, "gap"), total, "known") if total else None
    return found, look.now, nothing(look, "inbox", said="Nothing is missing", others=others)


def _gap(g: Missing, now: datetime) -> tuple[str | int | None, ...]:
    first = str(g.missing_from) if g.missing_from == g.missing_to else f"{g.missing_from}-{g.missing_to}"
    return (
        shorten(g.consumer, 40),
        shorten(g.source, 40),
        aggregate(g.aggregate_type, g.aggregate_id),
        str(g.last_seq),
        g.missing,
        first + (" …" if g.missing > g.missing_to - g.missing_from + 1 else ""),
        g.held,
        duration((now - g.noticed_at).total_seconds()),
        g.found_by,
        g.state,
        g.asks,
        until(g.next_ask_at, now),
        shorten(g.detail or ""),
    )


@click.command("quarantine")
@config_option
@set_option
@json_option
@limit_option
@after_option
@payload_option
@click.option("--dismissed", is_flag=True, help="Show also what was dismissed, skipped or purged.")
@selecting("inbox", without=("event_type", "state"), causes=("foreign", "malformed", "conflict", "skipped", "purged"))
def quarantine(
    config: Path | None,
    assignments: tuple[str, ...],
    *,
    as_json: bool,
    limit: int,
    after: int | None,
    payload: bool,
    dismissed: bool,
    selection: Selection,
) -> None:
    """Messages that were put aside: never applied or dropped.

    The newest first.

    \b
    relay inbox quarantine
    relay inbox quarantine --cause conflict --payload
    relay inbox quarantine order/42 --dismissed

    foreign: without relay's headers; malformed: with headers that cannot be; conflict: the number of an event that was applied, with
    another content.
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    chosen = selection if dismissed or selection.cause in ("skipped", "purged") else replace(selection, state="open")
    found, bodies, more, now, empty = look_at(
        config, assignments, lambda look: _quarantine(look, chosen, after, limit, payload=payload), command="quarantine"
    )
    if as_json:
        told: dict[str, object] = {"quarantine": found, "next_after": found[-1].id if more else None}
        print_json(told | ({"payloads": bodies} if payload else {}))
        return
    if not found:
        line(empty if after is None else "Nothing further is in quarantine.")
        return
    table(
        ("id", "consumer", "reason", "received", "aggregate", "seq", "message id", "exchange", "routing key", "dismissed", "what was said"),
        [_quarantined(q, now) for q in found],
        indent=0,
    )  # fmt: skip
    for q in found if payload else ():
        line(f"{q.id}: {shorten(bodies[q.id].properties, 4000)}")
        line(f"{q.id}: {content(bodies[q.id].body)}")
    _end(plural(len(found), "message"), found[-1].id if more else None)


async def _quarantine(
    look: Look, selection: Selection, after: int | None, limit: int, *, payload: bool
) -> tuple[tuple[Quarantined, ...], dict[int, QuarantinedContent], bool, datetime, str]:
    found = await operate.quarantine(look, selection, after_id=after, limit=limit + 1)
    shown = found[:limit]
    bodies = await operate.quarantine_contents(look, [q.id for q in shown]) if payload else {}
    total = 0 if found or replace(selection, state=None) == Selection() else await operate.quarantine_total(look)
    others = _are(plural(total, "message"), total, "in quarantine") if total else None
    empty = nothing(look, "inbox", said="Nothing is in quarantine", others=others)
    return shown, bodies, len(found) > limit, look.now, empty


def _quarantined(q: Quarantined, now: datetime) -> tuple[str | int | None, ...]:
    return (
        str(q.id),
        shorten(q.consumer, 40),
        q.reason,
        ago(q.received_at, now),
        aggregate(q.aggregate_type, q.aggregate_id),
        None if q.seq is None else str(q.seq),
        shorten(q.message_id or "", 40),
        shorten(q.exchange, 40),
        shorten(q.routing_key, 60),
        ago(q.dismissed_at, now),
        shorten(q.detail, 120),
    )


def _end(shown: str, after: int | None) -> None:
    line()
    line(f"{shown}." if after is None else f"{shown}, and there are more: {again(after)}")
