"""`relay bench`: what this version does on this machine, beside the ceilings of the same run."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from relay.cli.options import config_option, set_option, settings_from
from relay.event_loop import EventLoop
from relay.log import configure_logging
from relay.settings import DaemonSettings

if TYPE_CHECKING:
    from relay.bench.run import Report

EXIT_STOPPED = 128 + signal.SIGINT

_STAGES = ("insert", "read", "publish", "drain", "live", "consume", "statements", "apply", "end-to-end", "asleep")


class _Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them, each within bounds."""

    name = "N[,N...]"

    def __init__(self, low: int, high: int) -> None:
        self._low, self._high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(dict.fromkeys(int(part) for part in str(value).split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a whole number, nor several with commas between them", param, ctx)
        if not all(self._low <= number <= self._high for number in found):
            self.fail(f"{value}: each must be {self._low} to {self._high}", param, ctx)
        return found


@click.command()
@config_option
@set_option
@click.option("--stage", "stages", multiple=True, type=click.Choice(_STAGES), help="Only this; with the ceilings that it is compared with. Repeatable. Default: all.")  # fmt: skip
@click.option("--events", default="20000", show_default=True, type=_Numbers(100, 100_000_000), help="Events in each stage without a rate.")  # fmt: skip
@click.option("--aggregates", default="1000", show_default=True, type=_Numbers(1, 10_000_000), help="Aggregates they are spread over.")  # fmt: skip
@click.option("--payload", default="256", show_default=True, type=_Numbers(12, 1024 * 1024), help="Payload, bytes; large ones are fewer (256 MiB in all).")  # fmt: skip
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Rounds; medians are reported, and the spread.")  # fmt: skip
@click.option("--rate", default=5000, show_default=True, type=click.IntRange(1, 1_000_000), help="live: transactions a second.")  # fmt: skip
@click.option("--rows", default=1, show_default=True, type=click.IntRange(1, 1000), help="live: events in a transaction.")  # fmt: skip
@click.option("--rates", default="1000,10000", show_default=True, type=_Numbers(1, 1_000_000), help="end-to-end: events a second.")  # fmt: skip
@click.option("--seconds", default=5.0, show_default=True, type=click.FloatRange(0.1, 3600), help="How long each stage with a rate is.")  # fmt: skip
@click.option("--producers", default=8, show_default=True, type=click.IntRange(1, 64), help="Connections that insert at a rate.")  # fmt: skip
@click.option("--samples", default=20, show_default=True, type=click.IntRange(min=2), help="asleep: events in a round.")
@click.option(
    "--interval", default=1.0, show_default=True, type=click.FloatRange(0.2, 60), help="asleep: seconds between two."
)
@click.option("--client", type=click.Choice(["fast", "stock"]), help="AMQP client. Default: rabbitmq.client.")
@click.option(
    "--event-loop", type=click.Choice(["uvloop", "asyncio"]), help="Of our processes. Default: daemon.event_loop."
)
@click.option("--own-servers", is_flag=True, help="On the servers of the settings, in a database and queues of its own. Puts full load on them.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def bench(
    config: Path | None,
    assignments: tuple[str, ...],
    stages: tuple[str, ...],
    events: tuple[int, ...],
    aggregates: tuple[int, ...],
    payload: tuple[int, ...],
    client: str | None,
    event_loop: EventLoop | None,
    own_servers: bool,
    as_json: bool,
    **numbers: Any,
) -> None:
    """Measure outbox, relay and inbox, beside their ceilings.

    On throwaway servers on this machine: fsync on, messages persistent, every one confirmed, every stage verified. About
    ten minutes. relay's part runs in processes of its own, so that processor time can be told apart. Several values of
    --events, --aggregates or --payload are measured one beside the other.

    \b
    relay bench --stage drain --events 50000 --rounds 5
    relay bench --stage apply --aggregates 1000,1000000
    relay bench --stage drain --payload 256,1024,65536,1048576 --aggregates 1,100,100000
    relay bench --own-servers -c relay.toml --stage live --rate 2000

    --own-servers makes databases and, at the broker, exchanges and queues, all named relay_bench_..., says so, and removes
    them; it touches nothing else. The database user needs CREATEDB, the broker's user configure, write and read on those
    names.
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    # Not before it is asked for: a daemon needs neither this nor the sandbox.
    from relay.bench.report import as_json as told_to_programs
    from relay.bench.report import as_tables
    from relay.bench.run import Options, measure
    from relay.bench.workload import Workload

    configure_logging(DaemonSettings(log_level="warning", log_format="text"))
    loads = tuple(
        Workload(
            events=count,
            aggregates=spread,
            payload_bytes=size,
            seconds=numbers["seconds"],
            live_rate=numbers["rate"],
            live_rows=numbers["rows"],
            rates=numbers["rates"],
            producers=numbers["producers"],
            samples=numbers["samples"],
            interval_s=numbers["interval"],
        )
        for count, spread, size in itertools.product(events, aggregates, payload)
    )
    settings = settings_from(config, assignments, rabbitmq__client=client, daemon__event_loop=event_loop)
    options = Options(
        loads=loads,
        stages=stages,
        rounds=numbers["rounds"],
        own_servers=own_servers,
        event_loop=settings.daemon.event_loop,
    )
    progress = Console(stderr=True)
    measuring = measure(options, settings, tell=lambda text: progress.print(text, style="dim", markup=False))
    report = asyncio.run(_until_signalled(measuring))
    if as_json:
        click.echo(json.dumps(told_to_programs(report)))
    else:
        Console().print(as_tables(report))


async def _until_signalled(measuring: Coroutine[Any, Any, Report]) -> Report:
    """Ctrl-C and SIGTERM end the measurement, and what it made is removed."""
    work = asyncio.create_task(measuring)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    try:
        return await work
    except asyncio.CancelledError:
        click.echo("relay: the benchmark was stopped, what it made is removed", err=True)
        raise click.exceptions.Exit(EXIT_STOPPED) from None
