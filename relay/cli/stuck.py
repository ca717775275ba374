"""`relay stuck`: what is blocked, and why."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from relay.cli.display import aggregate, ago, duration, heading, line, plural, print_json, shorten, table, until
from relay.cli.filters import selecting
from relay.cli.looking import json_option, limit_option, look_at
from relay.cli.options import config_option, set_option
from relay.operate import stuck as operate
from relay.operate.selection import Selection
from relay.operate.stuck import Blocked, Cause, Stuck


@click.command()
@config_option
@set_option
@click.option(
    "--by",
    type=click.Choice(["cause"]),
    help="One line for each cause: the reason, and the class of the error or what the broker said.",
)
@json_option
@limit_option
@selecting("both", states=("waiting", "retrying", "stuck", "paused"))
def stuck(
    config: Path | None,
    assignments: tuple[str, ...],
    *,
    by: str | None,
    as_json: bool,
    limit: int,
    selection: Selection,
) -> None:
    """Every blocked aggregate on both sides: why, since when, attempts, next attempt, rows waiting behind it.

    \b
    relay stuck                              one line for each, the oldest first
    relay stuck --by cause                   one line for each cause
    relay stuck --cause unroutable --older-than 1h
    relay stuck 'order/4*' --state stuck     only what waits for an operator

    State retrying heals by itself when the cause is gone; stuck waits for you: relay show TYPE/ID tells the story, then retry,
    skip or purge (outbox), inbox retry, inbox skip or inbox purge (inbox).
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    found = look_at(
        config,
        assignments,
        lambda look: operate.stuck(look, selection, by_cause=by is not None, limit=limit),
        command="stuck",
    )
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(found: Stuck) -> None:
    if found.blocked:
        table(
            ("side", "aggregate", "seq", "event", "cause", "state", "since", "attempts", "next", "behind", "id", "what was said"),
            [_row(b, found.at) for b in found.blocked],
            indent=0,
        )  # fmt: skip
    if found.causes:
        table(
            ("side", "cause", "aggregates", "rows", "stuck", "oldest", "what was said"),
            [_cause(c) for c in found.causes],
            indent=0,
        )
    if found.pauses:
        if found.blocked or found.causes:
            line()
        heading("PAUSED")
        table(
            ("scope", "what", "since", "by", "why"),
            [
                (p.scope, shorten(p.what), ago(p.paused_at, found.at), shorten(p.who, 40), shorten(p.why))
                for p in found.pauses
            ],
        )
    _end(found)


def _end(found: Stuck) -> None:
    shown = len(found.blocked) + len(found.causes)
    if not found.total:
        line(f"Nothing is blocked in database {found.database}.")
        return
    line()
    if found.causes:
        line(_shown(shown, found.total, "cause"))
        line("Next: relay stuck --cause CAUSE, or relay retry --cause CAUSE (inbox: relay inbox retry --cause CAUSE).")
        return
    line(_shown(shown, found.total, "blocked"))
    if any(b.side == "inbox" and b.cause in ("failed", "taken") for b in found.blocked) and not found.errors_readable:
        line("What handlers said is shown to members of relay_operator only.")
    first = next((b for b in found.blocked if b.aggregate_id is not None), None)
    if first is not None:
        line(f"Next: relay show {aggregate(first.aggregate_type, first.aggregate_id)}")


def _shown(shown: int, total: int, noun: str) -> str:
    told = plural(total, noun) if noun != "blocked" else f"{total:,} blocked"
    return f"{told}." if shown == total else f"{told}; the oldest {shown:,} are shown (--limit)."


def _row(b: Blocked, now: datetime) -> tuple[str | int | None, ...]:
    return (
        b.side if b.consumer is None else f"inbox {shorten(b.consumer, 40)}",
        aggregate(b.aggregate_type, b.aggregate_id),
        None if b.seq is None else str(b.seq),
        shorten(b.event_type or "", 40),
        b.cause,
        b.state,
        duration(b.age_s),
        b.attempts or None,
        until(b.next_attempt_at, now),
        b.behind or None,
        "" if b.id is None else str(b.id),
        shorten(b.detail or ""),
    )


def _cause(c: Cause) -> tuple[str | int | None, ...]:
    return (
        c.side if c.consumer is None else f"inbox {shorten(c.consumer, 40)}",
        c.cause,
        c.aggregates,
        c.rows,
        c.stuck,
        duration(c.age_s),
        shorten(c.detail or "", 120) + (f" (and {c.details - 1:,} others)" if c.details > 1 else ""),
    )
