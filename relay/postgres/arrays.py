"""Arrays as the text that PostgreSQL reads them from, for statements that say `$1::text::text[]`. Pure.

asyncpg asks of each element of a list whether it is a list itself, by abstract base classes: 0.2 to 0.4 us each, for a batch of the
inbox more than everything else about its statements. A text is copied, and the server reads it as fast as the binary form.
"""

from __future__ import annotations

from collections.abc import Sequence


def texts(values: Sequence[str]) -> str:
    """A text[]. Raises ValueError for a text with NUL, which PostgreSQL cannot store."""
    if not values:
        return "{}"
    joined = "\0".join(values)
    if joined.count("\0") != len(values) - 1:
        raise ValueError("a text contains NUL")
    escaped = joined.replace("\\", "\\\\").replace('"', '\\"').replace("\0", '","')
    return f'{{"{escaped}"}}'


def numbers(values: Sequence[int]) -> str:
    """A bigint[]."""
    return "{" + ",".join(map(str, values)) + "}"


def octets(values: Sequence[bytes | None]) -> str:
    """A bytea[], in which None is null."""
    return "{" + ",".join(["NULL" if value is None else f'"\\\\x{value.hex()}"' for value in values]) + "}"
