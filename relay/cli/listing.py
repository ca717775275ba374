"""`relay list`: rows of the outbox by filters; `relay audit`: what operators did."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from pathlib import Path

import click

from relay.cli.display import aggregate, ago, content, line, plural, print_json, shorten, size, table, until
from relay.cli.filters import selecting
from relay.cli.looking import again, json_option, limit_option, look_at, nothing, payload_option
from relay.cli.options import config_option, set_option
from relay.cli.show import acts_table
from relay.errors import ConfigError
from relay.operate import listing as operate
from relay.operate.audit_look import Act, acts, any_act
from relay.operate.listing import Listing, Page
from relay.operate.look import Look
from relay.operate.rows import Content, SeenRow, contents
from relay.operate.selection import Selection

STATES = ("waiting", "published", "parked", "retrying", "stuck", "paused", "behind", "skipped")


@click.command("list")
@config_option
@set_option
@json_option
@limit_option
@click.option("--after", type=click.IntRange(0), metavar="ID", help="Go on behind this row: the page's last one.")
@click.option("--oldest-first", is_flag=True, help="Begin with the oldest row instead of the newest.")
@payload_option
@selecting("outbox", states=STATES)
def listing(
    config: Path | None,
    assignments: tuple[str, ...],
    *,
    as_json: bool,
    limit: int,
    after: int | None,
    oldest_first: bool,
    payload: bool,
    selection: Selection,
) -> None:
    """Rows of the outbox, each with what became of it.

    The newest first.

    \b
    relay list --state stuck
    relay list 'order/4*' --event-type OrderPaid --since 2h
    relay list --cause unroutable --error 'no queue' --json
    relay list --id 4711 --payload

    States: waiting (to be published), published, skipped (a tombstone took its place), parked (any of: retrying, stuck, paused,
    behind another row of its aggregate). Of parked rows --since, --until and --older-than mean the time of parking, else that of
    insertion.
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    page = Page(after=after, newest_first=not oldest_first, limit=limit)
    found, bodies, empty = look_at(
        config, assignments, lambda look: _ask(look, selection, page, payload=payload), command="list"
    )
    if as_json:
        told: dict[str, object] = {f: getattr(found, f) for f in found.__dataclass_fields__}
        print_json(told | ({"payloads": bodies} if payload else {}))
        return
    _show(found, page, empty)
    for row in found.rows if payload else ():
        line(f"{row.id}: {content(bodies.get(row.id))}")


async def _ask(
    look: Look, selection: Selection, page: Page, *, payload: bool
) -> tuple[Listing, dict[int, Content], str]:
    found = await operate.listing(look, selection, page)
    bodies: dict[int, Content] = {}
    if payload:
        for shard in {row.shard for row in found.rows}:
            bodies |= await contents(look, shard, [row.id for row in found.rows if row.shard == shard])
    said = "The outbox retains no row" if selection == Selection() else "No row matches the filters"
    return found, bodies, nothing(look, "outbox", said=said, others=None)


def _show(found: Listing, page: Page, empty: str) -> None:
    if not found.rows:
        line(empty if page.after is None else "No further row is selected.")
        return
    table(
        ("id", "aggregate", "seq", "event", "inserted", "size", "state", "why", "attempts", "next", "what was said"),
        [_row(row, found.at) for row in found.rows],
        indent=0,
    )
    line()
    if found.next_after is None:
        line(f"{plural(len(found.rows), 'row')}.")
    else:
        line(f"{plural(len(found.rows), 'row')}, and there are more: {again(found.next_after)}")


def _row(row: SeenRow, now: datetime) -> tuple[str | int | None, ...]:
    why = row.tombstone if row.state == "skipped" else ("" if row.reason in ("behind", "paused") else row.reason)
    return (
        str(row.id),
        aggregate(row.aggregate_type, row.aggregate_id),
        None if row.seq is None else str(row.seq),
        shorten(row.event_type or "(no longer retained)", 40),
        ago(row.created_at, now),
        size(row.size),
        row.state,
        why,
        row.attempts or None,
        until(row.next_attempt_at, now),
        shorten(row.detail or ""),
    )


ACTS = ("retry", "skip", "purge", "pause", "resume", "replay", "abandon", "reset", "seed", "dismiss")


def _act(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str | None, str | None]:
    """Callback of --act: (side, act), either None for any; also as the table has it, `inbox skip`."""
    if value is None:
        return None, None
    name = value.removeprefix("inbox ").removeprefix("outbox ")
    if name not in ACTS:
        raise click.BadParameter(
            f"{value!r} is no act: {', '.join(ACTS)}, for the inbox's acts also 'inbox skip' and the like"
        )
    return (None if name == value else value.partition(" ")[0]), name


@click.command("audit")
@config_option
@set_option
@json_option
@limit_option
@click.option("--after", type=click.IntRange(0), metavar="ID", help="Go on behind this act: the page's last one.")
@click.option("--side", type=click.Choice(["outbox", "inbox"]), help="Acts on this side only.")
@click.option(
    "--act",
    callback=_act,
    metavar="ACT",
    help=f"Acts of this name only: {', '.join(ACTS)}; 'inbox skip' for the inbox's.",
)
@click.option("--who", metavar="TEXT", help="By whom: a part of the name.")
@selecting("outbox", without=("aggregate_type", "event_type", "cause", "state", "error", "older_than", "seq", "ids"))
def audit(
    config: Path | None,
    assignments: tuple[str, ...],
    *,
    as_json: bool,
    limit: int,
    after: int | None,
    side: str | None,
    act: tuple[str | None, str | None],
    who: str | None,
    selection: Selection,
) -> None:
    """What operators did: who, when, what, why, how many rows.

    The newest first.

    \b
    relay audit --since 1d
    relay audit order/42                 what was done to it, and to everything
    relay audit --act skip --who anna
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    if selection.aggregate is not None and selection.exact() is None:
        raise ConfigError(f"{selection.aggregate!r}: acts are found for one aggregate, without *")
    of_side, name = act
    if side is not None and of_side not in (None, side):
        raise ConfigError(f"--act '{of_side} {name}' is not an act on the {side}: leave --side out")
    asked = partial(
        acts,
        aggregate=selection.exact(),
        side=side or of_side,
        act=name,
        who=who,
        since=selection.since,
        until=selection.until,
    )
    is_filtered = selection != Selection() or any((side, name, who))

    async def ask(look: Look) -> tuple[tuple[Act, ...], str]:
        found = await asked(look, after_id=after, limit=limit)
        if not found and is_filtered and await any_act(look):
            return found, f"Nothing matches; without the filters acts are recorded in database {look.database}."
        return found, f"No act is recorded in database {look.database}."

    found, empty = look_at(config, assignments, ask, command="audit")
    if as_json:
        print_json({"acts": found})
    elif not found:
        line(empty if after is None else "No further act is recorded.")
    else:
        columns, rows = acts_table(found)
        table(columns, rows, indent=0)
        if len(found) == limit:
            line()
            line(f"There may be more: {again(found[-1].id)}")
