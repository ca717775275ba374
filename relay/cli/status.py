"""`relay status`: one screen."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from relay.cli.display import (
    ago,
    clock,
    duration,
    heading,
    line,
    number,
    pairs,
    plural,
    print_json,
    shorten,
    size,
    table,
)
from relay.cli.looking import here, json_option, look_at
from relay.cli.options import config_option, set_option
from relay.operate import status as operate
from relay.operate.status import ConsumerStatus, OutboxStatus, ShardStatus, Status


@click.command()
@config_option
@set_option
@json_option
def status(config: Path | None, assignments: tuple[str, ...], *, as_json: bool) -> None:
    """How both sides are, and whether anything needs a person.

    \b
    relay status
    relay status -c billing.toml                       the consumer's database
    relay status --json | jq '.problems[].text'

    Looks at the database of postgres.dsn and tells what it holds: a producer's outbox, consumers' inboxes, or both. Needs the
    rights of relay_monitor, and no broker.

    Scripts: --json, whose `problems` is empty when nothing needs a person; each has a `text` and a `command`. The exit code is 0
    either way.
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    found = look_at(config, assignments, operate.status, command="status")
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(found: Status) -> None:
    line(f"database {found.database}, {clock(found.at)}")
    if found.outbox is not None:
        _outbox(found.outbox, found.at)
    if found.inbox:
        _inbox(found.inbox, found.at)
    line()
    if found.outbox is None and not found.inbox:
        line(
            "Nothing has been published or consumed here yet. (For another database: --config, or RELAY_POSTGRES_DSN.)"
        )
    if not found.problems:
        line("Nothing needs a person.")
        return
    for problem in found.problems:
        line(f"! {problem.text}: {here(problem.command)}")
    line(f"This needs a person. Next: {here(found.problems[0].command)}")


def _outbox(outbox: OutboxStatus, now: datetime) -> None:
    for shard in outbox.shards:
        line()
        heading(
            f"OUTBOX {shard.source or '(never published)'}"
            + (f" shard {shard.shard}" if len(outbox.shards) > 1 else "")
        )
        pairs(_shard(shard, outbox, now))
    if outbox.pauses:
        line()
        heading("PAUSED")
        table(
            ("scope", "what", "since", "by", "why"),
            [
                (p.scope, shorten(p.what), ago(p.paused_at, now), shorten(p.who, 40), shorten(p.why))
                for p in outbox.pauses
            ],
        )
    if outbox.replays:
        line()
        heading("REPLAYS NOT FINISHED")
        table(
            ("id", "to", "sent", "of", "last step", "state", "by"),
            [
                (r.id, shorten(r.to_queue or "everyone"), r.sent, r.total, ago(r.updated_at, now),
                 "running" if r.running else "interrupted", shorten(r.who, 40))
                for r in outbox.replays
            ],
        )  # fmt: skip


def _shard(s: ShardStatus, outbox: OutboxStatus, now: datetime) -> list[tuple[str, str]]:
    told = [
        ("backlog", _waiting(s.backlog.rows, more=s.backlog.more, age_s=s.backlog.age_s, noun="to be published")),
        ("published", f"{number(s.published)}, lately {number(s.rate)}/s, cursor written {ago(s.checkpoint_at, now)}"),
        ("owner", _owner(s)),
        ("parked", _parked(s, now)),
    ]
    if s.retained_since is not None:
        told.append(("retained", f"since {clock(s.retained_since)}, {size(outbox.retained_bytes)} with indexes"))
    if s.last_error is not None:
        told.append(("last error", f"{ago(s.last_error_at, now)}: {shorten(s.last_error, 200)}"))
    return told


def _owner(s: ShardStatus) -> str:
    standbys = f", {s.standbys} standing by" if s.standbys else ""
    if s.owner_alive:
        return f"{shorten(s.owner or 'unknown')}, alive{standbys}"
    if s.owner is None:
        return f"nobody yet{standbys}"
    return f"NOBODY (the last one was {shorten(s.owner)}){standbys}"


def _parked(s: ShardStatus, now: datetime) -> str:
    p = s.parked
    if not p.rows:
        return "nothing"
    kinds = [
        f"{number(n)} {word}" for n, word in ((p.stuck, "stuck"), (p.retrying, "retrying"), (p.paused, "paused")) if n
    ]
    return f"{plural(p.rows, 'row')} of {plural(p.aggregates, 'aggregate')} ({', '.join(kinds)}), the oldest {_since(p.oldest, now)}"


def _inbox(consumers: tuple[ConsumerStatus, ...], now: datetime) -> None:
    for c in consumers:
        line()
        heading(f"INBOX {shorten(c.consumer)}")
        pairs(_consumer(c, now))


def _consumer(c: ConsumerStatus, now: datetime) -> list[tuple[str, str]]:
    running = f"{plural(c.running, 'consumer')} connected" if c.running else "NOBODY is connected"
    told = [("applied", f"{number(c.applied)}, lately {number(c.rate)}/s, {running}"), ("held", _held(c, now))]
    if c.gaps.open or c.gaps.stuck:
        told.append(
            (
                "gaps",
                f"{number(c.gaps.open)} open, {number(c.gaps.stuck)} stuck, the oldest {_since(c.gaps.oldest, now)}",
            )
        )
    if c.quarantine:
        told.append(("quarantine", ", ".join(f"{number(n)} {reason}" for reason, n in c.quarantine.items())))
    if c.stored is not None:
        failed = f", {number(c.taker_failed)} given back" if c.taker_failed else ""
        failed += f", {plural(c.stranded, 'aggregate')} stranded" if c.stranded else ""
        told.append(
            ("stored", _waiting(c.stored.rows, more=c.stored.more, age_s=c.stored.age_s, noun="to be taken") + failed)
        )
    if c.last_error is not None:
        told.append(("last error", f"{ago(c.last_error_at, now)}: {shorten(c.last_error, 200)}"))
    return told


def _held(c: ConsumerStatus, now: datetime) -> str:
    h = c.held
    if not h.rows:
        return "nothing"
    kinds = [f"{number(n)} {word}" for n, word in ((h.failed, "failed"), (h.early, "early"), (h.behind, "behind")) if n]
    stuck = f", {number(h.stuck)} stuck" if h.stuck else ""
    return f"{plural(h.rows, 'message')} of {plural(h.aggregates, 'aggregate')} ({', '.join(kinds)}){stuck}, the oldest {_since(h.oldest, now)}"


def _since(oldest: datetime | None, now: datetime) -> str:
    return "–" if oldest is None else f"{duration((now - oldest).total_seconds())} ago"


def _waiting(rows: int, *, more: bool, age_s: float | None, noun: str) -> str:
    if not rows:
        return f"no rows {noun}"
    return f"{number(rows, more=more)} row{'' if rows == 1 else 's'} {noun}, the oldest for {duration(age_s)}"
