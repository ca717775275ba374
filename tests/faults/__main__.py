"""`python -m tests.faults PROFILE`: the fault laboratory from the command line; `make faults PROFILE=standard SEED=7` is the same.

Exit code 0: everything held, and every kind of fault was seen to bite. 1: something was lost, doubled, swapped or did not recover.
2: inconclusive, a fault did not bite.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from pathlib import Path

import click

from relay.errors import SandboxError
from tests.faults.lab.profile import PROFILES, Options
from tests.faults.lab.run import run

EXIT_CODES = {"passed": 0, "failed": 1, "inconclusive": 2}


@click.command()
@click.argument("profile", type=click.Choice(list(PROFILES)))
@click.option("--seed", type=int, help="Replays a run's faults and load. Default: a random one, printed.")
@click.option("--postgres", help="Major version of the servers: 15, 18. Default: the first that is found.")
@click.option("--kinds", help="Only these faults, with commas between them.")
@click.option(
    "--repair/--no-repair",
    default=True,
    help="Without repair nothing heals what another mistake has lost; faults that lose messages are left out.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for report, history and logs. Default: a fresh one."
)
def main(
    profile: str, seed: int | None, postgres: str | None, kinds: str | None, repair: bool, out: Path | None
) -> None:
    """Break the whole system on purpose while it works, and compare in the end."""
    options = Options(
        profile=PROFILES[profile],
        seed=random.randrange(10**6) if seed is None else seed,
        postgres=postgres,
        kinds=[kind.strip() for kind in kinds.split(",")] if kinds else (),
        repair=repair,
        folder=out,
    )
    for library in ("aiormq", "aio_pika"):  # a connection that a fault cuts is worth no traceback
        logging.getLogger(library).setLevel(logging.CRITICAL)
    began = time.monotonic()

    def tell(words: str) -> None:
        click.echo(f"{time.monotonic() - began:7.1f} s  {words}")

    try:
        result = asyncio.run(run(options, tell))
    except SandboxError as error:
        raise click.ClickException(str(error)) from error
    click.echo(result.text)
    click.echo(f"report: {result.folder / 'report.html'}")
    raise SystemExit(EXIT_CODES[result.verdict.outcome])


if __name__ == "__main__":
    main()
