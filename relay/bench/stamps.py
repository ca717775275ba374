"""When an event was inserted, carried by the event itself, so that one clock tells every delay.

The clock is CLOCK_MONOTONIC, which all processes of a machine share; PostgreSQL's may be another machine's. A stamp is the
moment just before the producer's statement, in nanoseconds; its last ten bits name the connection, so that no two are alike.
"""

from __future__ import annotations

import time

CONNECTIONS = 1024
"""Most connections that can be told apart."""

_PREFIX = b'{"at": '
_ENOUGH = 40  # bytes of a body that hold any stamp


def now_ns() -> int:
    """The shared clock."""
    return time.monotonic_ns()


def stamp(connection: int) -> int:
    """A stamp of this moment (to the microsecond) that no other transaction has."""
    return now_ns() // CONNECTIONS * CONNECTIONS + connection


def stamp_of(body: bytes) -> int | None:
    """The stamp in the payload of `bench_produce`; None if it has none."""
    head = bytes(body[:_ENOUGH])
    if not head.startswith(_PREFIX):
        return None
    digits = head[len(_PREFIX) :].partition(b",")[0]
    return int(digits)
