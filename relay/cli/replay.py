"""`relay replay`: send again what is retained, to one queue or to everyone."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from relay.cli.acting import INTERRUPTED, Way, acting, ask
from relay.cli.display import clock, table
from relay.cli.filters import selecting
from relay.cli.options import config_option, set_option, settings_from
from relay.cli.replay_screen import (
    asked,
    count_as_json,
    counted_lines,
    counting,
    missing_lines,
    outcome_as_json,
    outcome_lines,
    progress,
)
from relay.cli.signals import stop_on_signals
from relay.errors import ConfigError, NothingSelected
from relay.log import printable
from relay.operate.replay import Sending, State, require_target
from relay.operate.replays import Listed, Replay, abandon, begin, find_unfinished, listed, resume, source_of
from relay.operate.retained import COUNT_PLANS, Count, Retained
from relay.operate.selection import Selection
from relay.postgres.connect import close, connect, connection
from relay.postgres.migrate import require_current
from relay.settings import Settings

NOT_ALL_SENT = 8
"""Exit code of a replay that is done, of which some rows could not be sent as they are; the same as of `relay run --drain`."""

_LISTED = 20


@click.command()
@config_option
@set_option
@selecting("outbox", without=("cause", "state", "error", "older_than"))
@click.option("--all", "everything", is_flag=True, help="Everything that is retained, without a filter.")
@click.option("--to-queue", metavar="QUEUE", help="Only into this queue. Default: to everyone, through the exchange.")
@click.option("--rate", type=click.IntRange(1, 1_000_000), default=2000, show_default=True, help="Most rows a second.")
@click.option("--ignore-backlog", is_flag=True, help="Do not wait while the relay is behind with new events.")
@click.option("--resume", is_flag=False, flag_value="newest", metavar="[N]", help="Go on with replay N (default: the newest that is unfinished).")  # fmt: skip
@click.option("--abandon", "abandoned", type=click.IntRange(1), metavar="N", help="Give replay N up.")
@click.option("--list", "listing", is_flag=True, help="Show the newest replays.")
@acting
def replay(
    config: Path | None,
    assignments: tuple[str, ...],
    *,
    selection: Selection,
    to_queue: str | None,
    rate: int,
    ignore_backlog: bool,
    resume: str | None,
    abandoned: int | None,
    listing: bool,
    way: Way,
) -> None:
    """Send again what was published and is still retained.

    With the same message ids; outbox.retention_s says how long rows are retained.
    An inbox drops what it has applied already. To let one consumer do everything again: relay inbox reset, then a replay
    into its queue. What is paused, parked or not published yet is left out: it is still to come.

    New events go first: while the relay is more than a second behind, the replay waits. Ctrl-C finishes the page in hand;
    --resume goes on behind it, also after a crash: nothing is left out, at most one page is sent twice.

    \b
    relay replay order/42 --to-queue billing                 one aggregate, to one consumer
    relay replay order/42 --seq 3-9                          some of its events, to everyone
    relay replay --type order --since 2h --dry-run           how much is that?
    relay replay --all --to-queue billing --rate 5000 --yes  everything that is retained
    relay replay --resume                                    go on with the one that was interrupted
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    settings = settings_from(config, assignments)
    modes = [name for name, on in (("--resume", resume), ("--abandon", abandoned), ("--list", listing)) if on]
    if modes and (len(modes) > 1 or selection != Selection() or to_queue is not None):
        raise ConfigError(f"{modes[0]} stands alone: it takes no filter, no --to-queue")
    if way.dry_run and (resume or listing):
        raise ConfigError(f"{modes[0]} has no --dry-run: relay replay --list shows how far each replay is")
    if listing:
        asyncio.run(_list(settings, as_json=way.as_json))
    elif abandoned is not None:
        asyncio.run(_abandon(settings, abandoned, way))
    else:
        with _told_if_interrupted():
            if resume is None:
                selection.require_bounds()
                chosen = asyncio.run(_begin(settings, selection, to_queue, way))
            else:
                chosen = asyncio.run(_resume(settings, _number(resume), way))
        if chosen is not None:
            _send(settings, chosen, rate=rate, live_first=not ignore_backlog, as_json=way.as_json)


async def _begin(settings: Settings, selection: Selection, to_queue: str | None, way: Way) -> Replay | None:
    """Count, look for the target, ask, note. None: it was only a dry run."""
    operator = way.operator
    opened = await connect(settings.postgres, application="relay replay, counting", plans=COUNT_PLANS)
    try:
        await require_current(opened)
        source = await source_of(opened, settings)
        with counting():
            count = await Retained(opened).count(selection)
        _require_rows(count, selection)
        if way.dry_run:
            _show_count(count, selection, source, to_queue, as_json=way.as_json)
            return None
        await require_target(settings, to_queue)
        ask(way, lambda: _say(counted_lines(count, selection, source, to_queue)), "They are sent again.")
        if way.yes:
            _say(missing_lines(count.missing, selection))
        return await begin(opened, selection=selection, count=count, to_queue=to_queue, operator=operator)
    finally:
        await close(opened)


async def _resume(settings: Settings, number: int | None, way: Way) -> Replay:
    async with connection(settings.postgres, application="relay replay, resuming") as opened:
        await require_current(opened)
        found = await find_unfinished(opened, number)
        await require_target(settings, found.to_queue)
        await resume(opened, found, operator=way.operator)
        return found


async def _abandon(settings: Settings, number: int, way: Way) -> None:
    async with connection(settings.postgres, application="relay replay, giving up") as opened:
        await require_current(opened)
        found = await find_unfinished(opened, number)
        sent = f"replay {number} has sent {found.sent:,} of {found.total:,} rows"
        if way.dry_run:
            click.echo(
                json.dumps({"replay": number, "state": found.state, "sent": found.sent, "total": found.total})
                if way.as_json
                else f"{sent}, and would be given up"
            )
            return
        ask(way, lambda: _say([sent]), "The rest will not be sent.")
        await abandon(opened, found, operator=way.operator)
    if way.as_json:
        click.echo(json.dumps({"replay": number, "state": "abandoned", "sent": found.sent, "total": found.total}))
    else:
        click.echo(f"{sent}, and is given up")


async def _list(settings: Settings, *, as_json: bool) -> None:
    async with connection(settings.postgres, application="relay replay, listing") as opened:
        await require_current(opened)
        found = await listed(opened, rows=_LISTED)
    if as_json:
        click.echo(json.dumps([_listed_as_json(one) for one in found]))
        return
    if not found:
        click.echo("there has been no replay")
        return
    columns = ("replay", "state", "sent", "rows", "to", "selection", "started", "by", "why")
    table(columns, [_listed_row(one) for one in found], indent=0)


def _send(settings: Settings, chosen: Replay, *, rate: int, live_first: bool, as_json: bool) -> None:
    state, interrupted, hint, seconds = asyncio.run(
        _sent(settings, chosen, rate, live_first=live_first, silent=as_json)
    )
    if as_json:
        click.echo(json.dumps(outcome_as_json(chosen, state, seconds)))
    else:
        for line in outcome_lines(chosen, state, seconds):
            click.echo(printable(line))
    if interrupted:
        click.echo(f"relay: stopped. {hint}", err=True)
        sys.exit(INTERRUPTED)
    if state.not_sent_rows:
        sys.exit(NOT_ALL_SENT)


async def _sent(
    settings: Settings, chosen: Replay, rate: int, *, live_first: bool, silent: bool
) -> tuple[State, bool, str, float]:
    """(how it ended, whether it was interrupted, the way on, seconds)."""
    clock = asyncio.get_running_loop().time
    started = clock()
    with stop_on_signals() as stop, progress(chosen, silent=silent) as tell:
        sending = Sending(settings, chosen, rate=rate, live_first=live_first, stop=stop, tell=tell)
        state = await sending.run()
    return state, not state.done, sending.way_on(), clock() - started


def _require_rows(count: Count, selection: Selection) -> None:
    if count.rows:
        return
    gone = "".join(f" {line}." for line in missing_lines(count.missing, selection))
    raise NothingSelected(
        f"nothing that was published and is retained is selected ({asked(selection)}): nothing was sent.{gone}"
    )


def _show_count(count: Count, selection: Selection, source: str, to_queue: str | None, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(count_as_json(count, selection, source, to_queue)))
        return
    for line in [*counted_lines(count, selection, source, to_queue), "nothing was sent: it was a dry run"]:
        click.echo(printable(line))


@contextmanager
def _told_if_interrupted() -> Iterator[None]:
    """Ctrl-C before the first page."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(
            "relay: interrupted: nothing was sent. If it was noted already, relay replay --list shows it", err=True
        )
        sys.exit(INTERRUPTED)


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(printable(line), err=True)


def _number(text: str) -> int | None:
    if text == "newest":
        return None
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise ConfigError(f"--resume {text}: expected the number of a replay, as relay replay --list shows it")
    return int(text)


def _listed_as_json(one: Listed) -> dict[str, Any]:
    r = one.replay
    return {
        "replay": r.id,
        "state": r.state,
        "is_running": one.is_running,
        "sent": r.sent,
        "total": r.total,
        "to_queue": r.to_queue,
        "selection": r.selection.as_json(),
        "started_at": r.started_at.isoformat(),
        "updated_at": r.updated_at.isoformat(),
        "who": one.who,
        "why": one.why,
    }


def _listed_row(one: Listed) -> tuple[str | int, ...]:
    r = one.replay
    state = "being sent" if one.is_running else r.state
    to = "everyone" if r.to_queue is None else r.to_queue
    return str(r.id), state, r.sent, r.total, to, asked(r.selection), clock(r.started_at), one.who, one.why
