"""`relay stuck`: what is blocked, and why."""

from __future__ import annotations

import shlex
from datetime import datetime
from pathlib import Path

import click

from relay.cli.display import aggregate, ago, duration, heading, line, plural, print_json, shorten, table, until
from relay.cli.filters import selecting
from relay.cli.looking import RIGHT_ONE, here, json_option, limit_option, look_at
from relay.cli.options import config_option, set_option
from relay.operate import stuck as operate
from relay.operate.look import Look
from relay.operate.selection import Selection
from relay.operate.status import Pause, resume
from relay.operate.stuck import Blocked, Cause, Stuck


@click.command()
@config_option
@set_option
@click.option(
    "--by",
    type=click.Choice(["cause"]),
    metavar="cause",
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
    """Every blocked aggregate on both sides, and why.

    Since when, after how many attempts, when the next one is, how many rows wait behind it.

    \b
    relay stuck                              one line for each, the oldest first
    relay stuck --by cause                   one line for each cause
    relay stuck --cause unroutable --older-than 1h
    relay stuck 'order/4*' --state stuck     only what waits for an operator

    State retrying heals by itself when the cause is gone; stuck waits for you: relay show TYPE/ID tells the story, then retry,
    skip or purge (outbox), inbox retry, inbox skip or inbox purge (inbox).
    """  # noqa: D301 - click's own mark: do not wrap this paragraph

    async def ask(look: Look) -> tuple[Stuck, str, bool]:
        told = await operate.stuck(look, selection, by_cause=by is not None, limit=limit)
        return told, "" if told.total else await _nothing(look, selection), await look.has_several_inboxes()

    found, empty, several = look_at(config, assignments, ask, command="stuck")
    if as_json:
        print_json(found)
    else:
        _show(found, empty, several=several)


async def _nothing(look: Look, selection: Selection) -> str:
    if others := 0 if selection == Selection() else await operate.blocked_in_all(look):
        are = "is" if others == 1 else "are"
        return f"Nothing matches; without the filters {others:,} {are} blocked in database {look.database}."
    if look.outbox or look.inbox:
        return f"Nothing is blocked in database {look.database}."
    return f"Nothing is blocked in database {look.database}: nothing was published or consumed there. Is it the right one? {RIGHT_ONE}"


def _show(found: Stuck, empty: str, *, several: bool) -> None:
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
    _end(found, empty, several=several)


def _end(found: Stuck, empty: str, *, several: bool) -> None:
    shown = len(found.blocked) + len(found.causes)
    if not found.total:
        if found.pauses:
            line()
        line(empty)
        return
    line()
    if found.causes:
        line(_shown(shown, found.total, "cause"))
        line(f"Next: {here('relay stuck --cause CAUSE')}")
        for goes_on in dict.fromkeys(_goes_on(c, found.pauses, several=several) for c in found.causes):
            if goes_on:
                line(f"  {goes_on}")
        return
    line(_shown(shown, found.total, "blocked"))
    if any(b.side == "inbox" and b.cause in ("failed", "taken") for b in found.blocked) and not found.errors_readable:
        line("What handlers said is shown to members of relay_operator only.")
    first = next((b for b in found.blocked if b.aggregate_id is not None), None)
    if first is not None:
        name = shlex.quote(f"{first.aggregate_type}/{first.aggregate_id}")
        line(f"Next: {here(f'relay show {name}')}")


def _goes_on(c: Cause, pauses: tuple[Pause, ...], *, several: bool) -> str | None:
    """What goes on from a cause; None for what heals without anybody. `several`: inboxes in this database."""
    of = f" --consumer {shlex.quote(c.consumer)}" if several and c.consumer is not None else ""
    match c.side, c.cause:
        case "outbox", "paused":
            return f"paused: {here(resume(pauses[0]) if len(pauses) == 1 else 'relay resume --all')}"
        case ("outbox", "behind" | "tombstone") | ("inbox", "early" | "behind"):
            return None
        case "outbox", cause:
            return f"{cause}: mend it, then {here(f'relay retry --cause {cause}')}"
        case "inbox", "gap":
            return f"gap: {here('relay inbox gaps')}"
        case "inbox", "foreign" | "malformed" | "conflict":
            look, then = (f"relay inbox {command} --cause {c.cause}{of}" for command in ("quarantine", "dismiss"))
            return f"{c.cause}: {here(look)}, then {here(then)}"
        case "inbox", "stranded":
            return f"stranded: {here('relay inbox run')} mends it"
        case _, cause:
            return f"{cause}: mend it, then {here(f'relay inbox retry --cause {cause}{of}')}"


def _shown(shown: int, total: int, noun: str) -> str:
    told = plural(total, noun) if noun != "blocked" else f"{total:,} blocked"
    return (
        f"{told}."
        if shown == total
        else f"{told}; the oldest {shown:,} {'is' if shown == 1 else 'are'} shown (--limit)."
    )


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
