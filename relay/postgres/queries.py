"""The named SQL blocks of sql/queries: `query("open_window")`. Python holds no SQL of its own.

`sql/` lies at the top of the source tree and inside the package in a wheel; both are found here.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from relay.errors import ConfigError

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def sql_root() -> Traversable:
    """The folder with migrations/, queries/ and roles.sql."""
    packaged, source = resources.files("relay") / "sql", Path(__file__).parents[2] / "sql"
    if packaged.is_dir():
        return packaged
    if (
        not source.is_dir()
    ):  # told as what it is: within `postgres_errors` a missing file would be a server that is not there
        raise ConfigError(f"relay's own SQL is missing: neither {packaged} nor {source} is there. Install relay again.")
    return source


@cache
def query(name: str) -> str:
    """The text of a named block. Raises KeyError for a name that is in no file."""
    return all_queries()[name]


@cache
def all_queries() -> dict[str, str]:
    """All blocks by name. A name used twice is a ValueError."""
    blocks: dict[str, str] = {}
    for file in sorted((sql_root() / "queries").iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".sql"):
            continue
        parts = _NAME.split(file.read_text(encoding="utf-8"))
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            if name in blocks:
                raise ValueError(f"sql/queries/{file.name}: the block {name} exists already")
            blocks[name] = text.strip()
    return blocks
