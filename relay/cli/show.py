"""`relay show order/42`: one aggregate's whole story."""

from __future__ import annotations

import shlex
from datetime import datetime
from pathlib import Path

import click

from relay.cli.display import ago, clock, content, heading, line, plural, print_json, shorten, size, table, until
from relay.cli.looking import here, json_option, look_at, payload_option
from relay.cli.options import config_option, set_option
from relay.errors import ConfigError, NothingSelected
from relay.log import printable
from relay.operate import story as operate
from relay.operate.audit_look import Act
from relay.operate.inbox_look import held_contents
from relay.operate.look import Look
from relay.operate.rows import Content, SeenRow, contents
from relay.operate.selection import aggregate_text, require_text
from relay.operate.status import resume
from relay.operate.story import Gap, InboxStory, OutboxStory, Story
from relay.operate.wording import as_options


@click.command()
@config_option
@set_option
@click.argument("aggregate", metavar="TYPE/ID")
@click.option(
    "--limit",
    type=click.IntRange(1, 10_000),
    default=20,
    show_default=True,
    help="Most rows of each table: the newest of the log, the first of what is blocked.",
)
@payload_option
@json_option
def show(
    config: Path | None, assignments: tuple[str, ...], *, aggregate: str, limit: int, payload: bool, as_json: bool
) -> None:
    """One aggregate's whole story.

    Its events and what became of each, cursors, held messages, gaps, operators' acts.

    \b
    relay show order/42
    relay show order/42 --limit 200
    relay show order/42 -c billing.toml      the consumer's side, where it has a database of its own
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    name = _name(aggregate)
    story, bodies, held_bodies, several = look_at(
        config, assignments, lambda look: _ask(look, name, limit, payload=payload), command="show"
    )
    if as_json:
        print_json(_json(story, bodies, held_bodies, payload=payload))
        return
    _show(story, several=several)
    _payloads("PAYLOADS IN THE OUTBOX", {f"#{r.seq} id {r.id}": bodies.get(r.id) for r in (story.outbox.rows if story.outbox else ())}, payload)  # fmt: skip
    _payloads("PAYLOADS HELD", {f"{i.consumer} #{h.seq} id {h.id}": held_bodies.get(h.id) for i in story.inbox for h in i.held}, payload)  # fmt: skip


def _name(aggregate: str) -> tuple[str, str]:
    kind, slash, name = aggregate.partition("/")
    if not slash or not kind or not name:
        raise ConfigError(f"{aggregate!r} does not name an aggregate: expected TYPE/ID, for example order/42")
    require_text(aggregate, "aggregate")
    return kind, name


async def _ask(
    look: Look, name: tuple[str, str], limit: int, *, payload: bool
) -> tuple[Story, dict[int, Content], dict[int, Content], bool]:
    story = await operate.story(look, *name, limit=limit)
    if story is None:
        raise NothingSelected(await _unknown(look, name))
    several = await look.has_several_inboxes()
    if not payload:
        return story, {}, {}, several
    bodies: dict[int, Content] = {}
    rows = story.outbox.rows if story.outbox else ()
    for shard in {row.shard for row in rows}:
        bodies |= await contents(look, shard, [row.id for row in rows if row.shard == shard])
    held = [h.id for i in story.inbox for h in i.held]
    return story, bodies, await held_contents(look, held) if held else {}, several


async def _unknown(look: Look, name: tuple[str, str]) -> str:
    alike = await operate.similar(look, *name)
    said = f"nothing is known of {name[0]}/{name[1]} in database {look.database}"
    if not alike:
        return f"{said}. Is it the right database? (--config, or RELAY_POSTGRES_DSN)"
    are = "is" if len(alike) == 1 else "are"
    return f"{said}. There {are} {', '.join(f'{kind}/{other}' for kind, other in alike)}"


def _json(
    story: Story, bodies: dict[int, Content], held_bodies: dict[int, Content], *, payload: bool
) -> dict[str, object]:
    told: dict[str, object] = {f: getattr(story, f) for f in story.__dataclass_fields__}
    if payload:
        told["payloads"] = {"outbox": bodies, "held": held_bodies}
    return told


def _show(story: Story, *, several: bool) -> None:
    heading(f"{story.aggregate_type}/{story.aggregate_id}")
    if story.outbox is not None:
        _outbox(story.outbox, story.at)
    for consumer in story.inbox:
        _inbox(consumer, story.at)
    if story.quarantine:
        line()
        heading("QUARANTINE")
        table(
            ("id", "consumer", "seq", "reason", "received", "dismissed", "what was said"),
            [
                (str(q.id), shorten(q.consumer), None if q.seq is None else str(q.seq), q.reason, ago(q.received_at, story.at),
                 ago(q.dismissed_at, story.at), shorten(q.detail, 120))
                for q in story.quarantine
            ],
        )  # fmt: skip
    if story.pauses:
        line()
        heading("PAUSED")
        table(
            ("scope", "what", "since", "by", "why"),
            [(p.scope, shorten(p.what), ago(p.paused_at, story.at), shorten(p.who, 40), shorten(p.why)) for p in story.pauses],
        )  # fmt: skip
    if story.acts:
        line()
        heading("OPERATORS")
        table(*acts_table(story.acts))
    _end(story, several=several)


def acts_table(acts: tuple[Act, ...]) -> tuple[tuple[str, ...], list[tuple[str | int, ...]]]:
    """Columns and rows of operators' acts."""
    return ("id", "at", "who", "act", "rows", "selection", "why"), [
        (
            str(a.id),
            clock(a.at),
            shorten(a.who, 40),
            f"{'inbox ' if a.side == 'inbox' else ''}{a.act}",
            a.rows,
            shorten(as_options(a.selection)),
            shorten(a.why),
        )
        for a in acts
    ]


def _outbox(outbox: OutboxStory, now: datetime) -> None:
    line()
    heading(f"OUTBOX {outbox.source or '(never published)'}")
    parked = f", {plural(outbox.parked, 'row')} parked" if outbox.parked else ""
    line(f"  last number {outbox.last_seq}, {_retained(outbox)}{parked}")
    table(
        ("seq", "id", "event", "inserted", "size", "state", "why", "attempts", "next", "what was said"),
        [_row(row, now) for row in outbox.rows],
    )
    shown = {row.seq for row in outbox.rows}
    first = outbox.first_retained
    if first is not None and len(shown) < outbox.last_seq - first + 1:
        line(f"  {outbox.last_seq - first + 1 - len(shown):,} more are retained (--limit)")


def _retained(outbox: OutboxStory) -> str:
    if outbox.first_retained is None:
        return "none of its rows is retained any more"
    if outbox.first_retained == 1:
        return "all retained"
    return f"retained from {outbox.first_retained}; 1 to {outbox.first_retained - 1} are no longer in the log"


def _row(row: SeenRow, now: datetime) -> tuple[str | int | None, ...]:
    marked = f"tombstone ({row.tombstone})" if row.tombstone else ""
    said = "" if row.reason in (None, "behind", "paused", "tombstone") else row.reason
    why = ", ".join(filter(None, (said, marked)))
    return (
        None if row.seq is None else str(row.seq),
        str(row.id),
        shorten(row.event_type or "(no longer retained)", 40),
        ago(row.created_at, now),
        size(row.size),
        {"waiting": "waiting to be published", "behind": "waiting behind"}.get(row.state, row.state),
        why,
        row.attempts or None,
        until(row.next_attempt_at, now),
        shorten(row.detail or "", 120),
    )


def _inbox(c: InboxStory, now: datetime) -> None:
    line()
    heading(f"INBOX {c.consumer} (source {c.source})")
    applied = "nothing applied yet" if not c.last_seq else f"applied through {c.last_seq}"
    blocked = "; the next one is held because its handler failed" if c.blocked else ""
    line(f"  {applied}{blocked}")
    if c.gap is not None:
        line(f"  {_gap(c.gap, now)}")
    if c.held:
        line(f"  {plural(c.held_total, 'message')} held" + _of_total(len(c.held), c.held_total))
        table(
            ("seq", "id", "event", "held", "why", "state", "attempts", "next", "error"),
            [
                (str(h.seq), str(h.id), shorten(h.event_type, 40), ago(h.held_at, now), h.reason, h.state, h.attempts or None,
                 until(h.next_attempt_at, now), shorten(h.error or "", 120))
                for h in c.held
            ],
        )  # fmt: skip
    if c.stored:
        line(f"  {plural(c.stored_total, 'event')} stored, to be taken" + _of_total(len(c.stored), c.stored_total))
        table(
            ("seq", "id", "event", "stored", "attempts", "next", "error"),
            [
                (str(s.seq), str(s.id), shorten(s.event_type, 40), ago(s.stored_at, now), s.attempts or None,
                 until(s.next_take_at, now), shorten(s.error or "", 120))
                for s in c.stored
            ],
        )  # fmt: skip


def _of_total(shown: int, total: int) -> str:
    return "" if shown == total else f"; the first {shown} {'is' if shown == 1 else 'are'} shown (--limit)"


def _gap(gap: Gap, now: datetime) -> str:
    numbers = str(gap.missing_from) if gap.missing_from == gap.missing_to else f"{gap.missing_from} to {gap.missing_to}"
    total = gap.missing_to - gap.missing_from + 1
    more = f" (and {gap.missing - total:,} further on)" if gap.missing > total else ""
    since = f"noticed {ago(gap.noticed_at, now)}"
    if gap.state == "stuck":
        detail = f": {shorten(gap.detail, 200)}" if gap.detail else ""
        return f"MISSING {numbers}{more}, {since}, the producer has it no longer{detail}"
    return (
        f"missing {numbers}{more}, {since}, asked for {plural(gap.asks, 'time')}, again {until(gap.next_ask_at, now)}"
    )


def _payloads(title: str, named: dict[str, Content | None], payload: bool) -> None:
    if payload and named:
        line()
        heading(title)
        for name, found in named.items():
            line(f"  {printable(name)}: {content(found)}")


def _end(story: Story, *, several: bool) -> None:
    line()
    if not story.errors_readable and any(h.reason == "failed" for c in story.inbox for h in c.held):
        line("What the handler said is shown to members of relay_operator only.")
    line(_next(story, several=several))


def _next(story: Story, *, several: bool) -> str:
    """What goes on from here: of all that is blocked, what is nearest to the producer. `several`: inboxes in this database."""

    def of(consumer: str) -> str:
        return f"{name} --consumer {shlex.quote(consumer)}" if several else name

    name = shlex.quote(aggregate_text(story.aggregate_type, story.aggregate_id))
    rows = story.outbox.rows if story.outbox else ()
    gaps = [(c.gap, c.consumer) for c in story.inbox if c.gap is not None]
    if any(r.state in ("stuck", "retrying") and r.reason != "tombstone" for r in rows):
        return f"Next: mend the cause, then {here(f'relay retry {name}')}; or give the event up: {here(f'relay skip {name}')}"
    for c in story.inbox:
        if any(h.reason == "failed" for h in c.held):
            return _inbox_next("mend the handler", of(c.consumer))
    for c in story.inbox:
        if any(s.attempts for s in c.stored):
            return _inbox_next("mend the taker", of(c.consumer))
    for gap, consumer in gaps:
        if gap.state == "stuck":
            skip = here(f"relay inbox skip {of(consumer)} --through {gap.missing_to}")
            return f"Next: give the missing numbers up: {skip}"
    if story.pauses:
        return f"Next: {'; '.join(here(resume(p)) for p in story.pauses)}"
    if any(r.state == "paused" for r in rows):
        return "It was paused, and is no more: the relay publishes it as soon as it runs."
    for q in story.quarantine:
        if q.dismissed_at is None and q.reason not in ("skipped", "purged"):
            quarantined = of(q.consumer)
            return f"Next: {here(f'relay inbox quarantine {quarantined}')}, then {here(f'relay inbox dismiss {quarantined}')}"
    if gaps:
        return f"It waits for numbers that are missing; the producer's relay is asked for them: {here(f'relay inbox gaps {name}')}"
    return "Nothing of it needs a person." if story.inbox else "Nothing of it needs a person in this database."


def _inbox_next(mend: str, name: str) -> str:
    retry, skip = here(f"relay inbox retry {name}"), here(f"relay inbox skip {name}")
    return f"Next: {mend}, then {retry}; or give the event up: {skip}"
