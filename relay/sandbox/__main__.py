"""`python -m relay.sandbox check | install | up`: see, complete and try out the throwaway servers."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import click

from relay.errors import SandboxError
from relay.sandbox.install import install_rabbitmq, missing
from relay.sandbox.postgres import find_postgres
from relay.sandbox.rabbitmq import find_rabbitmq


@click.group(help=__doc__)
def main() -> None:
    """Throwaway PostgreSQL and RabbitMQ servers."""


@main.command()
def check() -> None:
    """Say what is missing on this machine, and how to get it. Exit code 1 if anything is."""
    lacks = missing()
    for lack in lacks:
        click.echo(f"{lack.server}: {lack.reason}\n  -> {lack.install}")
    if lacks:
        sys.exit(1)
    click.echo("nothing is missing")


@main.command()
def install() -> None:
    """Install what is missing (Debian's rabbitmq-server, as root or through sudo). Does nothing if nothing is."""
    lacks = {lack.server: lack for lack in missing()}
    if "RabbitMQ" in lacks:
        _or_exit_1(install_rabbitmq)
        lacks = {lack.server: lack for lack in missing()}
    for lack in lacks.values():
        click.echo(f"{lack.server} is missing: {lack.install}", err=True)
    if lacks:
        sys.exit(1)


@main.command()
@click.option("--postgres", "select", help="15, 18, system or embedded (default: RELAY_SANDBOX_POSTGRES, else any)")
def up(select: str | None) -> None:
    """Start both servers, print their addresses, and wait for Ctrl-C."""
    _or_exit_1(lambda: _up(select))


def _up(select: str | None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end in KeyboardInterrupt, and so in the stop()s
    try:
        with find_postgres(select) as postgres, find_rabbitmq() as rabbitmq:
            click.echo(f"PostgreSQL  {postgres.dsn()}")
            click.echo(f"RabbitMQ    {rabbitmq.url()}")
            click.echo("Ctrl-C stops both and deletes their data.")
            signal.pause()
    except KeyboardInterrupt:
        click.echo("stopped")


def _or_exit_1(act: Callable[[], None]) -> None:
    try:
        act()
    except SandboxError as error:
        click.echo(str(error), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="python -m relay.sandbox")
