"""`relay`: the program's one entry point, its commands and its exit codes."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from relay.cli.commands import Commands
from relay.cli.options import config_option, set_option, settings_from
from relay.cli.signals import stop_on_signals
from relay.collector import calm
from relay.errors import RelayError, SchemaError
from relay.event_loop import run_on
from relay.log import configure_logging, printable
from relay.postgres import migrate as schema
from relay.postgres.connect import connection
from relay.settings import Settings

if TYPE_CHECKING:
    from relay.daemon import Outbox

EXIT_PARKED = 8
"""`relay run --drain`: everything was read, but some rows are parked; or a shard is paused."""

ELSEWHERE = Commands(
    {
        "audit": "relay.cli.listing:audit",
        "bench": "relay.cli.bench:bench",
        "completion": "relay.cli.completion:completion",
        "counters": "relay.cli.counters:counters",
        "demo": "relay.cli.demo:demo",
        "emit": "relay.cli.emit:emit",
        "inbox": "relay.cli.inbox:inbox",
        "list": "relay.cli.listing:listing",
        "pause": "relay.cli.outbox_acts:pause",
        "purge": "relay.cli.outbox_acts:purge",
        "replay": "relay.cli.replay:replay",
        "resume": "relay.cli.outbox_acts:resume",
        "retry": "relay.cli.outbox_acts:retry",
        "show": "relay.cli.show:show",
        "skip": "relay.cli.outbox_acts:skip",
        "status": "relay.cli.status:status",
        "stuck": "relay.cli.stuck:stuck",
    }
)
"""What is not in this module."""


class Program(click.Group):
    """Turns relay's errors into one line on standard error and the exit code of their class."""

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; see the README for the exit codes."""
        try:
            return super().invoke(ctx)
        except RelayError as exc:
            click.echo(printable(f"relay: {exc}"), err=True)
            ctx.exit(exc.exit_code)


@click.group(
    cls=Program, commands=ELSEWHERE, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="relay-outbox", prog_name="relay")
def cli() -> None:
    """Transactional outbox and ordered inbox: committed rows arrive at their handler once, in order.

    Settings come from relay.toml, then RELAY_* environment variables, then --set; see the README for the list.
    """


@cli.command()
@config_option
@set_option
@click.option("--print", "printing", is_flag=True, help="Print the SQL instead of running it; needs no connection.")
def migrate(config: Path | None, assignments: tuple[str, ...], *, printing: bool) -> None:
    """Create or update relay's schema. Safe to run twice, and by two processes at once.

    \b
    relay migrate                      apply what is missing
    relay migrate --print | psql ...   let somebody else apply it
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    if printing:
        click.echo(schema.printed(), nl=False)
        return
    report = asyncio.run(_migrate(settings_from(config, assignments)))
    for name in report.applied:
        click.echo(f"applied {name}")
    if not report.applied:
        click.echo("the schema is up to date")
    if report.roles_skipped:
        click.echo(f"note: the roles were not created: {report.roles_skipped}", err=True)


async def _migrate(settings: Settings) -> schema.Report:
    async with connection(settings.postgres, application="relay migrate") as opened:
        return await schema.migrate(opened)


@cli.command()
@config_option
@set_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def check(config: Path | None, assignments: tuple[str, ...], *, as_json: bool) -> None:
    """Compare the schema with what this program needs.

    Names what is missing, and exits with 3 if anything is.
    """
    missing = asyncio.run(_check(settings_from(config, assignments)))
    if as_json:
        click.echo(json.dumps({"ok": not missing, "missing": missing}))
    else:
        for line in missing or ["the schema is complete"]:
            click.echo(line)
    if missing:
        sys.exit(SchemaError.exit_code)


async def _check(settings: Settings) -> list[str]:
    async with connection(settings.postgres, application="relay check") as opened:
        missing = await schema.missing(opened)
        await schema.require_current(opened)
        return missing


@cli.command()
@config_option
@set_option
@click.option("--drain", is_flag=True, help="End when everything that is committed has been published.")
def run(config: Path | None, assignments: tuple[str, ...], *, drain: bool) -> None:
    """The outbox daemon: publish committed events in order.

    Each is confirmed by the broker.
    Several may run: one owns the log, the others stand by and take over within seconds. The first SIGTERM or SIGINT drains
    within daemon.shutdown_grace_s, the second stops at once.
    """
    from relay.daemon import Outbox

    settings = settings_from(config, assignments)
    configure_logging(settings.daemon)
    outbox = Outbox(settings)
    calm()
    run_on(settings.daemon.event_loop, _run(outbox, drain=drain))
    if drain and outbox.parked:
        click.echo(f"relay: {outbox.parked} rows are parked: they could not be published, or are paused", err=True)
    if drain and outbox.paused:
        click.echo("relay: the shard is paused by an operator: nothing of it was published", err=True)
    if drain and (outbox.parked or outbox.paused):
        sys.exit(EXIT_PARKED)


async def _run(outbox: Outbox, *, drain: bool) -> None:
    with stop_on_signals() as stop:
        outbox.stop = stop
        await outbox.run(drain=drain)


def main() -> None:
    """Entry point of the `relay` program."""
    cli(prog_name="relay")
