"""`relay bench`: rates and latency of this version on this machine."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from relay.log import configure_logging
from relay.settings import DaemonSettings

if TYPE_CHECKING:
    from relay.bench.run import Report


@click.command()
@click.option(
    "--events", default=20_000, show_default=True, type=click.IntRange(min=1000), help="Events in each stage."
)
@click.option(
    "--aggregates",
    default=1_000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Aggregates they are spread over.",
)
@click.option("--payload", default=256, show_default=True, type=click.IntRange(12, 1024 * 1024), help="Payload, bytes.")
@click.option(
    "--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Rounds; the median is reported."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def bench(events: int, aggregates: int, payload: int, rounds: int, *, as_json: bool) -> None:
    """Measure outbox, relay and inbox on throwaway servers.

    They run on this machine: fsync on, messages persistent, every one confirmed.
    """
    from relay.bench.run import measure  # not before it is asked for: a daemon needs neither this nor the sandbox
    from relay.bench.workload import Workload

    configure_logging(DaemonSettings(log_level="warning", log_format="text"))
    workload = Workload(-(-events // 500) * 500, aggregates, payload)
    progress = Console(stderr=True)
    report = asyncio.run(measure(workload, rounds=rounds, announce=lambda text: progress.print(f"[dim]{text}[/dim]")))
    if as_json:
        click.echo(json.dumps(report.as_json()))
    else:
        Console().print(_table(report))


def _table(report: Report) -> Table:
    load = report.workload
    table = Table(
        title=f"{load.events} events of {load.payload_bytes} bytes, {load.aggregates} aggregates; median of {report.rounds}; {report.machine}"
    )
    for name in ("stage", "how", "events/s", "p50 ms", "p99 ms"):
        table.add_column(name, justify="left" if name in ("stage", "how") else "right")
    for r in report.results:
        rate = "" if r.p50_ms is not None else f"{r.rate:,.0f}"
        table.add_row(r.stage, r.note, rate, *("" if v is None else f"{v:.1f}" for v in (r.p50_ms, r.p99_ms)))
    return table
