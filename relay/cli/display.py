"""How figures and tables look on a terminal. What others made (ids, errors) is escaped; payloads are never among it unless asked for.

For machines there is `--json`: `as_json` turns the values of relay.operate into plain JSON, with times as ISO 8601.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from relay.log import printable
from relay.operate.rows import Content

_SHOWN = 80
"""Characters of an id or error that a table shows; --json has them whole."""

_WIDE = 1000
"""Width for a pipe: nothing is wrapped there, so that grep finds it."""

_BETWEEN = 2
"""Blanks between two columns."""

_WRAPPED = 20
"""Least width in which a free text is wrapped."""

_CONTENT = 4000
"""Characters of a payload that are printed; --json has more."""

Cell = str | int | float | None


def shorten(text: str, limit: int = _SHOWN) -> str:
    """The text, escaped, on one line; in the middle of a long one something is left out."""
    escaped = printable(text)
    if len(escaped) <= limit:
        return escaped
    tail = limit // 3
    return f"{escaped[: limit - tail - 1]}…{escaped[-tail:]}"


def aggregate(kind: str | None, name: str | None) -> str:
    """order/42; a dash for an event without an aggregate."""
    return "–" if kind is None or name is None else shorten(f"{kind}/{name}")


def duration(seconds: float | None) -> str:
    """0 s, 3 s, 12 min, 2 h 5 min, 4 d 3 h; a dash for None."""
    if seconds is None:
        return "–"
    s = round(max(0.0, seconds))
    for size, unit, smaller, lesser in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if s >= size:
            rest = s % size // smaller
            return f"{s // size} {unit}" + (f" {rest} {lesser}" if rest else "")
    return f"{s // 60} min" if s >= 60 else f"{s} s"


def ago(moment: datetime | None, now: datetime) -> str:
    """How long ago; nothing for None."""
    if moment is None:
        return ""
    seconds = (now - moment).total_seconds()
    return "now" if seconds < 1 else f"{duration(seconds)} ago"


def until(moment: datetime | None, now: datetime) -> str:
    """In how long; `now` for what is due, nothing for None."""
    if moment is None:
        return ""
    seconds = (moment - now).total_seconds()
    return "now" if seconds < 1 else f"in {duration(seconds)}"


def clock(moment: datetime | None) -> str:
    """The time in UTC, to the second."""
    return "–" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def size(count: int | None) -> str:
    """Bytes for people."""
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def number(count: float | None, *, more: bool = False) -> str:
    """1,234; with a plus where there are more."""
    return "–" if count is None else f"{count:,}{'+' if more else ''}"


def plural(count: int, noun: str) -> str:
    """1 row, 2 rows, no rows."""
    return f"{'no' if count == 0 else f'{count:,}'} {noun}{'' if count == 1 else 's'}"


def heading(text: str) -> None:
    """A title over a table."""
    click.echo(click.style(printable(text), bold=True))


def line(text: str = "") -> None:
    """A line of text, escaped: nothing in it has an effect on the terminal."""
    click.echo(printable(text))


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, indent: int = 2) -> None:
    """Rows under their columns; numbers to the right. Columns without any content are left out.

    Only the last column, which is for free text, is wrapped. What else is in a table is there to be copied, so a table that does not fit
    is wider than the terminal, and has one line for each row.
    """
    cells = [["" if c is None else c for c in row] for row in rows]
    kept = [i for i in range(len(columns)) if any(str(row[i]) not in ("", "–") for row in cells)]
    widths = [max(cell_len(text) for text in (columns[i], *(_cell(row[i]) for row in cells))) for i in kept]
    wraps = bool(kept) and kept[-1] == len(columns) - 1
    room = _width() - indent - sum(widths[:-1]) - _BETWEEN * len(widths[:-1])
    if wraps and _WRAPPED <= room < widths[-1]:
        widths[-1] = room
    grid = Table(box=None, pad_edge=False, show_edge=False, padding=(0, _BETWEEN, 0, 0), header_style="dim")
    for i, width in zip(kept, widths, strict=True):
        right = all(isinstance(row[i], int | float) or row[i] in ("", "–") for row in cells)
        grid.add_column(Text(columns[i]), justify="right" if right else "left", overflow="fold", width=width)
    for row in cells:
        grid.add_row(*(Text(_cell(row[i])) for i in kept))
    console = Console(width=sum(widths) + _BETWEEN * len(widths), highlight=False, soft_wrap=False, file=None)
    with console.capture() as captured:
        console.print(grid)
    for text in captured.get().splitlines():
        click.echo(" " * indent + text.rstrip())


def pairs(rows: Iterable[tuple[str, str]], *, indent: int = 2) -> None:
    """Names and what is told of each, in two columns."""
    told = list(rows)
    wide = max((len(name) for name, _ in told), default=0)
    for name, text in told:
        click.echo(" " * indent + printable(f"{name:<{wide}}  {text}").rstrip())


def content(found: Content | None) -> str:
    """What a message contains, escaped and cut."""
    if found is None:
        return "(no longer retained)"
    if found.text is None:
        shown = found.hex or ""
        return f"(not text) {shown[:_CONTENT]}{'…' if found.cut or len(shown) > _CONTENT else ''}"
    cut = found.cut or len(found.text) > _CONTENT
    return printable(found.text[:_CONTENT]) + ("… (cut; --json has more)" if cut else "")


def as_json(value: Any) -> Any:
    """Values of relay.operate as what json can print."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    return value


def print_json(value: Any) -> None:
    """One JSON object, escaped to ASCII: what is in it has no effect on a terminal."""
    click.echo(json.dumps(as_json(value), indent=2))


def _cell(value: Cell) -> str:
    return f"{value:,}" if isinstance(value, int) else printable(str(value))


def _width() -> int:
    """The terminal's width, or COLUMNS; a pipe's is without bound."""
    if "COLUMNS" in os.environ or sys.stdout.isatty():
        return max(60, shutil.get_terminal_size().columns)
    return _WIDE
