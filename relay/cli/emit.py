"""`relay emit`: JSON Lines from a file or a pipe into the outbox, in batches, for scripts and backfills."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from relay.cli.options import config_option, set_option, settings_from
from relay.errors import RelayError
from relay.postgres.connect import Connection, close, connect
from relay.producer.backfill import Tally, batches, insert_batch
from relay.producer.jsonl import BadLine, Line, read_lines
from relay.settings import Settings

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""


@click.command()
@config_option
@set_option
@click.argument("file", type=click.File("rb"), default="-")
@click.option(
    "--batch", type=click.IntRange(1, 20_000), default=1000, show_default=True, help="Events in one transaction."
)
@click.option(
    "--from-line", type=click.IntRange(1), default=1, show_default=True, help="Skip the lines before this one."
)
@click.option("--dry-run", is_flag=True, help="Only check the lines; without a database.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def emit(
    config: Path | None,
    assignments: tuple[str, ...],
    *,
    file: BinaryIO,
    batch: int,
    from_line: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Insert events from FILE or standard input, as JSON Lines.

    \b
    {"aggregate_type": "order", "aggregate_id": "42", "event_type": "OrderPaid", "payload": {"amount": 100}}

    Further keys: headers, routing_key, seq, content_type, and body_base64 instead of payload. Blank lines are skipped.

    Each batch is one transaction. At the first bad line it stops: that line is named, nothing of its batch is written, and
    the line to continue from (--from-line) is told. A pipe's batch is committed when it is full or the pipe ends.
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    settings = settings_from(config, assignments)
    tally = Tally(next_line=from_line)
    error: RelayError | None = None
    interrupted = False
    try:
        with _progress(file) as seen:
            lines = batches(read_lines(file, first=from_line, seen=seen), batch)
            _check(lines, tally) if dry_run else _insert(settings, lines, tally)
    except KeyboardInterrupt:
        interrupted = True
    except RelayError as caught:
        error = caught
    _report(tally, dry_run=dry_run, as_json=as_json, stopped="interrupted" if interrupted else error)
    if error is not None:
        raise error
    if interrupted:
        sys.exit(INTERRUPTED)


def _check(lines: Iterator[list[Line]], tally: Tally) -> None:
    for batch in lines:
        tally.done(batch)


def _insert(settings: Settings, lines: Iterator[list[Line]], tally: Tally) -> None:
    """Reads between two runs of the loop, not within one: a pipe that is silent can be interrupted, and so can an insert."""
    connection: Connection | None = None
    with asyncio.Runner() as runner:
        try:
            for batch in lines:
                if connection is None:
                    connection = runner.run(connect(settings.postgres, application="relay emit"))
                runner.run(insert_batch(connection, batch, tally))
        finally:
            if connection is not None:
                runner.run(close(connection))


@contextmanager
def _progress(file: BinaryIO) -> Iterator[Callable[[int], object]]:
    """A bar on standard error if that is a terminal; what it yields is told the bytes of each line."""
    if not _is_terminal():
        yield lambda _: None
        return
    size = _size(file)
    lines = TextColumn("{task.fields[lines]} lines")
    share = (TaskProgressColumn(), DownloadColumn(), TimeRemainingColumn()) if size else (TimeElapsedColumn(),)
    with Progress(BarColumn(), lines, *share, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("emit", total=size, lines=0)
        count = 0

        def seen(line_bytes: int) -> None:
            nonlocal count
            count += 1
            progress.update(task, advance=line_bytes, lines=count)

        yield seen


def _is_terminal() -> bool:
    return sys.stderr.isatty()


def _size(file: BinaryIO) -> int | None:
    """Bytes of a regular file; None for a pipe."""
    try:
        status = os.fstat(file.fileno())
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _report(tally: Tally, *, dry_run: bool, as_json: bool, stopped: RelayError | str | None) -> None:
    """The summary on standard output; why it is not all, and where to go on, on standard error."""
    done = "good" if dry_run else "committed"
    if as_json:
        summary = {
            "events": tally.events,
            "dry_run": dry_run,
            "next_line": tally.next_line,
            "in_doubt_lines": tally.in_doubt,
            "error": None if stopped is None else str(stopped),
            "error_line": stopped.line if isinstance(stopped, BadLine) else None,
        }
        click.echo(json.dumps(summary))
    elif stopped is None:
        click.echo(f"{tally.events} events {done}")
    if stopped is not None:
        click.echo(f"relay emit: {tally.events} events {done}; {_way_on(tally, stopped)}", err=True)


def _way_on(tally: Tally, stopped: RelayError | str) -> str:
    reason = "interrupted; " if isinstance(stopped, str) else ""
    if tally.in_doubt:
        first, last = tally.in_doubt
        return (
            f"{reason}the connection broke while lines {first} to {last} were being committed: they are written all or none. "
            f"Look whether the event of line {first} is there, then continue with --from-line {last + 1}, else {first}"
        )
    return f"{reason}nothing from line {tally.next_line} on is written. Continue with --from-line {tally.next_line}"
