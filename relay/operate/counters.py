"""The producer's counters: the number of the newest event of each aggregate, read from its database or carried as JSON Lines.

{"source": "shop", "aggregate_type": "order", "aggregate_id": "42", "last_seq": 17}
{"source": "shop", "aggregates": 1}                                                 the last line: nothing was cut off
"""

from __future__ import annotations

import json
import re
from collections import Counter as Tally
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from relay.errors import ConfigError, InputError
from relay.message import MAX_SEQUENCE
from relay.operate.place import outbox_place
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query

BATCH = 10_000
"""Counters handed on at a time."""

_READ_TIMEOUT_S = 3600.0
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,99}")
_KEYS = {"source", "aggregate_type", "aggregate_id", "last_seq"}


@dataclass(frozen=True, slots=True)
class Counter:
    """How far the producer has counted one aggregate."""

    aggregate_type: str
    aggregate_id: str
    last_seq: int


Portions = AsyncGenerator[Sequence[Counter], None]
"""Counters in batches; close it (`contextlib.aclosing`): it may hold a transaction open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """All counters of one producer: what there is, and a way to read it as often as needed."""

    source: str
    types: dict[str, int]  # how many aggregates, by type
    portions: Callable[[], Portions]

    @property
    def aggregates(self) -> int:
        """How many there are."""
        return sum(self.types.values())


async def of_database(connection: Connection, *, source: str | None, types: Sequence[str]) -> Counters:
    """The counters of the producer's database; each reading is of its own moment."""
    return Counters(
        source=await source_of(connection, source),
        types=await count(connection, types),
        portions=lambda: read(connection, types),
    )


def of_lines(file: BinaryIO, *, types: Sequence[str]) -> Counters:
    """The counters in a seekable file, checked to its last line. Raises InputError, which names the line."""
    sources: set[str] = set()
    tally: Tally[str] = Tally()
    for source, counter in from_lines(file):
        sources.add(source)
        if counter is not None and (not types or counter.aggregate_type in types):
            tally[counter.aggregate_type] += 1
    if len(sources) > 1:
        raise InputError(f"the counters are of several sources ({', '.join(sorted(sources))}): give one file each")

    async def portions() -> Portions:
        file.seek(0)
        portion: list[Counter] = []
        for _, counter in from_lines(file):
            if counter is not None and (not types or counter.aggregate_type in types):
                portion.append(counter)
            if len(portion) == BATCH:
                yield portion
                portion = []
        if portion:
            yield portion

    return Counters(source=sources.pop(), types=dict(tally), portions=portions)


def of_one(source: str, counter: Counter) -> Counters:
    """One counter, given by hand."""

    async def portions() -> Portions:
        yield [counter]

    return Counters(source=source, types={counter.aggregate_type: 1}, portions=portions)


async def source_of(connection: Connection, configured: str | None) -> str:
    """The name under which the events of this database are published. Raises ConfigError if nobody knows it, or two disagree."""
    with postgres_errors():
        source: str | None = await connection.fetchval(query("counters_source"))
    if source is None:
        place = await outbox_place(connection)
        if place.consumers:
            raise ConfigError(f"nothing to count: {place.doubt}")
        if configured is None:
            raise ConfigError(
                f"no relay has run on database {place.database} yet, so its events have no name. Is postgres.dsn the producer's? If it"
                " is, set source as `relay run` will have it"
            )
    if source is not None and configured not in (None, source):
        raise ConfigError(
            f"this log is published as source {source!r}, the setting says {configured!r}: is this the right database?"
        )
    return source or configured or ""


async def count(connection: Connection, types: Sequence[str] | None) -> dict[str, int]:
    """How many aggregates there are, by type."""
    with postgres_errors():
        found = await connection.fetch(query("count_counters"), _or_all(types), timeout=_READ_TIMEOUT_S)
    return {r["aggregate_type"]: r["aggregates"] for r in found}


async def read(connection: Connection, types: Sequence[str] | None) -> Portions:
    """All counters as of one moment, in the order in which cursors are locked, in batches."""
    with postgres_errors():
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            cursor = await connection.cursor(query("read_counters"), _or_all(types), timeout=_READ_TIMEOUT_S)
            while found := await cursor.fetch(BATCH, timeout=_READ_TIMEOUT_S):
                yield [Counter(r["aggregate_type"], r["aggregate_id"], r["last_seq"]) for r in found]


def to_lines(source: str, counters: Iterable[Counter]) -> str:
    """Counters as JSON Lines."""
    return "".join(
        json.dumps(
            {
                "source": source,
                "aggregate_type": c.aggregate_type,
                "aggregate_id": c.aggregate_id,
                "last_seq": c.last_seq,
            },
            ensure_ascii=False,
        )
        + "\n"
        for c in counters
    )


def last_line(source: str, aggregates: int) -> str:
    """The line that tells a reader that it has got everything."""
    return json.dumps({"source": source, "aggregates": aggregates}) + "\n"


def from_lines(lines: Iterable[bytes]) -> Iterator[tuple[str, Counter | None]]:
    """(source, counter) of each line, None for the last one. Raises InputError for a line that is none, and where the last line is missing."""
    count = 0
    ended = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if ended:
            raise InputError(
                f"line {number}: comes after the last line; were two files put together? Give one at a time"
            )
        value = _object(number, line)
        if "aggregates" in value:
            if value["aggregates"] != count:
                raise InputError(
                    f"line {number}: {value['aggregates']} aggregates were written, {count} are here: lines are missing"
                )
            ended = True
            yield _source(number, value), None
        else:
            count += 1
            yield _source(number, value), _counter(number, value)
    if not ended:
        raise InputError(
            "the counters end before their last line: the file or pipe was cut off; let `relay counters` end"
        )


def _object(number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"line {number}: is not JSON; expected what `relay counters` prints") from None
    if not isinstance(value, dict):
        raise InputError(f"line {number}: is not a JSON object; expected what `relay counters` prints")
    return value


def _source(number: int, value: dict[str, Any]) -> str:
    source = value.get("source")
    if not isinstance(source, str) or not _NAME.fullmatch(source):
        raise InputError(f"line {number}: source is missing, or is not a name")
    return source


def _counter(number: int, value: dict[str, Any]) -> Counter:
    if value.keys() != _KEYS:
        raise InputError(f"line {number}: expected the keys {', '.join(sorted(_KEYS))}")
    kind, name, last_seq = value["aggregate_type"], value["aggregate_id"], value["last_seq"]
    if not isinstance(kind, str) or not _NAME.fullmatch(kind):
        raise InputError(f"line {number}: aggregate_type is not a name")
    if not isinstance(name, str) or "\0" in name or not 1 <= len(name.encode("utf-8", "replace")) <= 512:
        raise InputError(f"line {number}: aggregate_id is not a text of 1 to 512 bytes")
    if not name.isascii() and name != name.encode("utf-8", "replace").decode():
        raise InputError(f"line {number}: aggregate_id is not valid Unicode")
    if type(last_seq) is not int or not 1 <= last_seq <= MAX_SEQUENCE:
        raise InputError(f"line {number}: last_seq is not a whole number from 1")
    return Counter(kind, name, last_seq)


def _or_all(types: Sequence[str] | None) -> list[str] | None:
    return list(types) if types else None
