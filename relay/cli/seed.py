"""`relay inbox seed`: a consumer that joins late starts at what the producer has counted so far."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click
from pydantic import SecretStr, ValidationError

from relay.cli.acting import Way, acting, ask
from relay.cli.counters import types_option
from relay.cli.options import config_option, set_option, settings_from
from relay.cli.seed_screen import Order, as_json, binding_notes, compared_lines, done_lines
from relay.errors import BrokerRefused, ConfigError, NothingSelected
from relay.log import printable
from relay.operate import counters as producer
from relay.operate.counters import Counter, Counters
from relay.operate.seed import Compared, compare, seed, source_for
from relay.operate.selection import Selection
from relay.postgres.connect import PLANS, Connection, close, connect, connection
from relay.postgres.migrate import require_current
from relay.rabbitmq.queues import InboxQueue, ensure_queue
from relay.rabbitmq.session import close as close_session
from relay.rabbitmq.session import connect as connect_broker
from relay.rabbitmq.topology import NOT_FOUND, require_queue
from relay.settings import PostgresSettings, Settings

_DSN = "RELAY_PRODUCER_DSN"


@click.command("seed")
@click.argument("aggregate", metavar="[TYPE/ID]", required=False)
@config_option
@set_option
@click.option("--consumer", metavar="NAME", help="Which consumer. Default: inbox.consumer.")
@click.option("--counters", "file", type=click.File("rb"), metavar="FILE", help="What `relay counters` printed; - is standard input.")  # fmt: skip
@click.option("--producer-dsn-file", envvar=f"{_DSN}_FILE", type=click.Path(path_type=Path), metavar="FILE", help=f"File that holds the DSN of the producer's database. Or set {_DSN}.")  # fmt: skip
@types_option
@click.option("--at", type=click.IntRange(1), metavar="N", help="Of one aggregate: its cursor is put here; N+1 is applied next.")  # fmt: skip
@click.option("--source", metavar="NAME", help="Of one aggregate: whose it is. Default: the only source that is known.")
@click.option("--prepare", is_flag=True, help="Only declare the queue and its bindings.")
@click.option("--force", is_flag=True, help="Also move cursors that count already, forward and backward.")
@acting
def seed_command(
    config: Path | None,
    assignments: tuple[str, ...],
    *,
    aggregate: str | None,
    consumer: str | None,
    file: BinaryIO | None,
    producer_dsn_file: Path | None,
    types: tuple[str, ...],
    at: int | None,
    source: str | None,
    prepare: bool,
    force: bool,
    way: Way,
) -> None:
    """Let a consumer that joins late start from now.

    Nothing before it, everything after it, in order.
    Each cursor is put at the producer's counter. An event that is committed when the counters are read is before, published
    or not: when it comes, it is dropped as a duplicate. What is committed later is applied. Aggregates that are new then
    start at 1. Cursors that count already are left alone. A consumer with inbox.start_from = "now" does not run before this.

    With the producer's database at hand (RELAY_PRODUCER_DSN, or RELAY_PRODUCER_DSN_FILE) one command does it: first the
    queue and its bindings, then the counters, so that every later event is in the queue. Otherwise three, in this order:

    \b
    relay inbox seed --prepare                   here: the queue, so that it collects
    relay counters > counters.jsonl              on the producer's side
    relay inbox seed --counters counters.jsonl   here

    \b
    relay inbox seed --type order                only orders; bind only those (inbox.bindings = order.#)
    relay inbox seed order/42 --at 17            one aggregate by hand
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    settings = settings_from(config, assignments, inbox__consumer=consumer)
    name = settings.inbox.consumer
    if name is None:
        raise ConfigError("which consumer? Say --consumer NAME, or set inbox.consumer")
    _refuse_mixtures(aggregate, at, file, types, source, prepare=prepare)
    if prepare:
        click.echo(asyncio.run(_prepared(settings, name, dry_run=way.dry_run)))
    elif aggregate is not None and at is not None:
        asyncio.run(_seed_one(settings, name, Selection(aggregate=aggregate, source=source), at, force=force, way=way))
    else:
        order = Order(
            consumer=name,
            selection=Selection(aggregate_type=types[0] if len(types) == 1 else None, everything=not types),
            types=types,
            force=force,
        )
        if file is not None:
            with _seekable(file) as lines:
                asyncio.run(_seed_from_lines(settings, order, lines, types, way))
        else:
            asyncio.run(_seed_from_producer(settings, order, _producers(settings, producer_dsn_file), types, way))


def _refuse_mixtures(
    aggregate: str | None, at: int | None, file: object, types: Sequence[str], source: str | None, *, prepare: bool
) -> None:
    if (aggregate is None) != (at is None):
        raise ConfigError(
            "one aggregate needs its number, and a number its aggregate: relay inbox seed order/42 --at 17"
        )
    if aggregate is not None and (file is not None or types or prepare):
        raise ConfigError("one aggregate is seeded by itself: leave out --counters, --type and --prepare")
    if aggregate is None and source is not None:
        raise ConfigError("--source is for one aggregate; the counters say themselves whose they are")
    if prepare and (file is not None or types):
        raise ConfigError("--prepare only declares the queue: leave out --counters and --type")


async def _seed_one(settings: Settings, consumer: str, selection: Selection, at: int, *, force: bool, way: Way) -> None:
    exact = selection.exact()
    if exact is None:
        raise ConfigError(f"{selection.aggregate}: --at puts one aggregate's cursor; name it in full, without *")
    async with _consumers(settings) as opened:
        source = await source_for(opened, consumer, exact, selection.source)
        order = Order(consumer=consumer, selection=selection, at=at, force=force)
        await _carry_out(opened, order, producer.of_one(source, Counter(*exact, at)), way)


async def _seed_from_lines(settings: Settings, order: Order, file: BinaryIO, types: Sequence[str], way: Way) -> None:
    """The counters were read before, so the queue must have been there before."""
    counters = producer.of_lines(file, types=types)
    if not way.dry_run:
        await _require_prepared(settings, order.consumer)
    async with _consumers(settings) as opened:
        await _carry_out(opened, order, counters, way, notes=binding_notes(settings.inbox.bindings, types))


async def _seed_from_producer(
    settings: Settings, order: Order, database: PostgresSettings, types: Sequence[str], way: Way
) -> None:
    async with _consumers(settings) as opened, connection(database, application="relay counters") as reading:
        await require_current(reading)
        counters = await producer.of_database(reading, source=settings.source, types=types)
        prepare = functools.partial(_prepare, settings, order.consumer)
        await _carry_out(
            opened, order, counters, way, prepare=prepare, notes=binding_notes(settings.inbox.bindings, types)
        )


async def _carry_out(
    opened: Connection,
    order: Order,
    counters: Counters,
    way: Way,
    *,
    prepare: Callable[[], Awaitable[None]] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Count, ask; then the queue, and only then the counters for good."""
    operator = way.operator
    if order.types and not counters.aggregates:
        raise NothingSelected(
            f"source {counters.source} has counted nothing of the type {', '.join(order.types)}: nothing was changed"
        )
    if way.dry_run or not way.yes:
        found = await _compared(opened, order, counters)
        if way.dry_run:
            lines = [*compared_lines(order, counters, found, notes), "nothing was changed: it was a dry run"]
            _tell(as_json(order, counters, found) if way.as_json else lines)
            return
        ask(way, lambda: _say(compared_lines(order, counters, found, notes), err=True), "The cursors are put there.")
    if prepare is not None:
        await prepare()
    done = await seed(
        opened,
        consumer=order.consumer,
        source=counters.source,
        counters=counters.portions(),
        force=order.force,
        operator=operator,
        selection=order.selection,
        also=order.also,
        is_complete=order.at is None,
    )
    _tell(as_json(order, counters, done) if way.as_json else done_lines(order, done, notes))


async def _compared(opened: Connection, order: Order, counters: Counters) -> Compared:
    found = Compared()
    async with aclosing(counters.portions()) as portions:
        async for portion in portions:
            found += await compare(opened, order.consumer, counters.source, portion)
    return found


async def _prepared(settings: Settings, consumer: str, *, dry_run: bool) -> str:
    """Only the queue; what was done, or would be."""
    queue = _queue(settings, consumer)
    if not dry_run:
        await _prepare(settings, consumer)
        return f"the queue {queue.name} is there and collects; next: relay counters, then relay inbox seed --counters"
    try:
        await require_queue(settings.rabbitmq, queue.name)
        there = f"the queue {queue.name} is there already; "
    except BrokerRefused as exc:
        if exc.reply_code != NOT_FOUND:
            raise
        there = ""
    if not settings.rabbitmq.declare_topology:
        return there + f"would only look for the queue {queue.name}: rabbitmq.declare_topology is false"
    bound = f"bound to {settings.rabbitmq.exchange} with {', '.join(queue.bindings)}"
    return f"{there}would declare the queue {queue.name}, {bound}\nnothing was changed: it was a dry run"


async def _prepare(settings: Settings, consumer: str) -> None:
    """The queue and its bindings: from now on it collects."""
    session = await connect_broker(settings.rabbitmq, name=f"relay inbox seed {consumer}")
    try:
        await ensure_queue(session, settings.rabbitmq, _queue(settings, consumer))
    finally:
        await close_session(session)


async def _require_prepared(settings: Settings, consumer: str) -> None:
    name = _queue(settings, consumer).name
    try:
        await require_queue(settings.rabbitmq, name)
    except BrokerRefused as exc:
        if exc.reply_code != NOT_FOUND:
            raise
        raise ConfigError(
            f"the queue {name!r} does not exist, so events after these counters may be lost to it. First relay inbox seed --prepare, "
            "then relay counters anew, then this again"
        ) from exc


def _queue(settings: Settings, consumer: str) -> InboxQueue:
    """As `relay inbox run` declares it."""
    return InboxQueue(
        name=settings.inbox.queue or consumer,
        bindings=settings.inbox.bindings,
        delivery_limit=settings.inbox.delivery_limit,
    )


def _producers(settings: Settings, file: Path | None) -> PostgresSettings:
    """Where the producer's database is. Raises ConfigError, which never shows the DSN."""
    text = os.environ.get(_DSN)
    if text is not None and file is not None:
        raise ConfigError(f"{_DSN} and a file with the producer's DSN are both given: leave one out")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as exc:
            raise ConfigError(
                f"cannot read the producer's DSN from {file}: {getattr(exc, 'strerror', None) or 'not UTF-8'}"
            ) from None
    if text is None:
        raise ConfigError(
            f"where has the producer counted? Set {_DSN} (or {_DSN}_FILE) to its database, or give what relay counters printed there "
            "with --counters FILE"
        )
    try:
        return PostgresSettings(
            dsn=SecretStr(text),
            connect_timeout_s=settings.postgres.connect_timeout_s,
            command_timeout_s=settings.postgres.command_timeout_s,
        )
    except ValidationError as exc:
        raise ConfigError(f"the producer's DSN: {exc.errors()[0]['msg'].removeprefix('Value error, ')}") from None


@asynccontextmanager
async def _consumers(settings: Settings) -> AsyncIterator[Connection]:
    """The consumer's own database."""
    opened = await connect(settings.postgres, application="relay inbox seed", plans=PLANS)
    try:
        await require_current(opened)
        yield opened
    finally:
        await close(opened)


@contextmanager
def _seekable(file: BinaryIO) -> Iterator[BinaryIO]:
    """A file that can be read twice: a pipe is kept on disk meanwhile."""
    if file.seekable():
        yield file
        return
    with tempfile.TemporaryFile() as kept:
        shutil.copyfileobj(file, kept)
        kept.seek(0)
        yield kept


def _tell(outcome: dict[str, Any] | list[str]) -> None:
    """The end, on standard output: an object, or lines."""
    _say(outcome) if isinstance(outcome, list) else click.echo(json.dumps(outcome))


def _say(lines: Sequence[str], *, err: bool = False) -> None:
    for line in lines:
        click.echo(printable(line), err=err)
