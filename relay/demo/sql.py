"""The named SQL blocks of sql/demo: `sql("place_order")`. In the format of sql/queries, but apart from relay's own."""

from __future__ import annotations

import re
from functools import cache

from relay.postgres.queries import sql_root

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


@cache
def sql(name: str) -> str:
    """The text of a named block. Raises KeyError for a name that is in no file."""
    return _blocks()[name]


def all_blocks() -> frozenset[str]:
    """The names of all blocks."""
    return frozenset(_blocks())


@cache
def _blocks() -> dict[str, str]:
    blocks: dict[str, str] = {}
    for file in (sql_root() / "demo").iterdir():
        if file.name.endswith(".sql"):
            parts = _NAME.split(file.read_text(encoding="utf-8"))
            blocks.update(zip(parts[1::2], (text.strip() for text in parts[2::2]), strict=True))
    return blocks
