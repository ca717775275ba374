"""Who is compared, in which configuration, and what each does and does not promise. Pure: no package is installed or imported here.

Each public package runs at the fastest configuration that is correct by its own documentation: publisher confirms on, persistent
messages, the same queues, the same PostgreSQL with fsync. Versions are pinned, so that a figure can be repeated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Side = Literal["outbox", "inbox"]
Program = Literal["python", "node"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages:
    """What a driver needs, from PyPI or npm, into a folder of its own."""

    program: Program
    pins: tuple[str, ...]
    python: tuple[int, int] = (3, 11)  # the lowest version that the packages take

    @property
    def key(self) -> str:
        """A name for its folder; drivers with the same pins share an installation."""
        return re.sub(r"[^a-z0-9.]+", "-", "-".join((self.program, *self.pins)).lower())


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One line of the table."""

    name: str
    side: Side
    how: str  # the configuration, in words
    order: str  # what it promises about order
    safety: str  # confirms, crashes, poison
    packages: Packages | None = None  # None: runs in this tree's environment
    driver: str = ""  # file in drivers/, for packages
    arguments: tuple[str, ...] = ()  # `python -m ...` for our own, the driver's own otherwise
    environment: Mapping[str, str] = field(default_factory=dict)
    fill: str = ""  # outbox: SQL with $1 events, $2 aggregates, $3 bytes
    ends: bool = False  # by itself, when nothing is left
    most: int | None = None  # events that it is given at most; None: as many as are asked for

    @property
    def ours(self) -> bool:
        """What the others are compared with."""
        return self.name.startswith("relay")


FASTSTREAM = Packages(
    program="python", pins=("faststream-outbox[asyncpg]==0.19.0", "faststream[rabbit]==0.7.8", "asyncpg==0.31.0")
)
TXOUTBOX = Packages(program="python", pins=("txoutbox[postgres]==0.2.2", "aio-pika==10.2.1"))
PACTIX = Packages(program="python", pins=("pactix==0.2.0", "asyncpg==0.31.0", "aio-pika==10.2.1"), python=(3, 12))
NODE = Packages(program="node", pins=("pg-transactional-outbox@0.5.7", "amqplib@0.10.9"))

OUR_FILL = """
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload)
SELECT 'bench', (i % $2::bigint)::text, 'Measured', jsonb_build_object('fill', repeat('x', greatest($3::int - 12, 0)))
FROM generate_series(1, $1::bigint) AS i
"""
TXOUTBOX_FILL = """
INSERT INTO outbox (topic, key, payload, headers)
SELECT 'bench.Measured', (i % $2::bigint)::text,
       convert_to(jsonb_build_object('fill', repeat('x', greatest($3::int - 12, 0)))::text, 'UTF8'),
       jsonb_build_object('x-aggregate-type', 'bench', 'x-aggregate-id', (i % $2::bigint)::text)
FROM generate_series(1, $1::bigint) AS i
"""
FASTSTREAM_FILL = """
INSERT INTO outbox (queue, payload, headers)
SELECT 'bench', convert_to(jsonb_build_object('fill', repeat('x', greatest($3::int - 12, 0)))::text, 'UTF8'),
       jsonb_build_object('x-aggregate-type', 'bench', 'x-aggregate-id', (i % $2::bigint)::text)
FROM generate_series(1, $1::bigint) AS i
"""
NODE_FILL = """
INSERT INTO outbox (id, aggregate_type, aggregate_id, message_type, segment, concurrency, payload)
SELECT gen_random_uuid(), 'bench', (i % $2::bigint)::text, 'Measured', (i % $2::bigint)::text, 'parallel',
       jsonb_build_object('fill', repeat('x', greatest($3::int - 12, 0)))
FROM generate_series(1, $1::bigint) AS i
"""

NO_ORDER = "none: messages of one aggregate are in flight at once, a retry comes later"
