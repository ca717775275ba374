"""`python -m tests.bench.peers outbox|inbox [--rounds 5] [--events 50000] [--json FILE]`: relay beside its peers.

Peers are the textbook relay, written by us as well as it can be (tests/bench/textbook.py), and public packages, installed from PyPI
and npm into a temporary folder, each driven as its documentation says and in its fastest correct configuration (`--list` tells which).
All run as processes of their own, in turns, each on a fresh database and virtual host of one throwaway PostgreSQL (fsync on) and
RabbitMQ; what each did is counted: exactly so many messages in the queue, exactly one effect of each event. Ratios are of medians over
the same rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from relay.sandbox import Postgres, RabbitMQ, SandboxPostgres, SandboxRabbitMQ
from tests.bench.peers import inbox, outbox
from tests.bench.peers.contenders import Contender
from tests.bench.peers.figures import Run, as_json, lines, table
from tests.bench.peers.install import Installed, NotInstalled, install
from tests.bench.peers.place import Failed
from tests.bench.peers.watch import Stalled

SETTINGS = {
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "max_connections": "300",
    "autovacuum_naptime": "1s",  # a table that has just been made is analysed at once, as it long is in production
    "wal_level": "logical",  # one of the packages reads the log; the others, relay among them, pay for it as well
}
CONTENDERS = {"outbox": outbox.CONTENDERS, "inbox": inbox.CONTENDERS}


def main() -> int:
    """Measure; 0 unless one of ours failed. A peer that does not work is named, with its own words, and left out."""
    given = _arguments()
    chosen = [
        c for c in CONTENDERS[given.side] if not given.only or c.ours or any(part in c.name for part in given.only)
    ]
    if given.list:
        for contender in chosen:
            print(f"{contender.name}\n  {contender.how}\n  order: {contender.order}\n  {contender.safety}")
        return 0
    with ExitStack() as stack:
        kept = os.environ.get("PEERS_FOLDER")
        folder = Path(kept or stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-peers-")))
        installed, absent = _install(chosen, folder)
        chosen = [contender for contender in chosen if contender.name not in absent]
        postgres = stack.enter_context(SandboxPostgres(fsync=True, settings=SETTINGS))
        rabbitmq = stack.enter_context(SandboxRabbitMQ())
        runs, failed = asyncio.run(_rounds(postgres, rabbitmq, chosen, installed, given))
    ours = [contender.name for contender in chosen if contender.ours]
    found = lines(runs, ours=ours)
    print(f"\n{table(found, ours=ours)}")
    absent |= failed
    for name, why in absent.items():
        print(f"\nleft out: {name}: {why}")
    if given.json:
        about = {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "side": given.side,
            "rounds": given.rounds,
            "settings": SETTINGS,
            "contenders": {c.name: {"how": c.how, "order": c.order, "safety": c.safety} for c in chosen},
            "left_out": absent,
        }
        given.json.write_text(json.dumps(as_json(runs, found, ours=ours, about=about), indent=1) + "\n")
    return 1 if any(name in failed for name in ours) else 0


def _install(chosen: Sequence[Contender], folder: Path) -> tuple[dict[str, Installed], dict[str, str]]:
    """By contender: where its packages are; and why not."""
    installed: dict[str, Installed] = {}
    absent: dict[str, str] = {}
    for contender in chosen:
        if contender.packages is not None:
            print(f"installing {', '.join(contender.packages.pins)}", flush=True)
            try:
                installed[contender.name] = install(contender.packages, folder)
            except NotInstalled as why:
                absent[contender.name] = str(why)
    return installed, absent


async def _rounds(
    postgres: Postgres,
    rabbitmq: RabbitMQ,
    chosen: Sequence[Contender],
    installed: dict[str, Installed],
    given: argparse.Namespace,
) -> tuple[list[Run], dict[str, str]]:
    """All of them in turns, beginning with another one in each round. Who fails once is left out from then on."""
    runs: list[Run] = []
    failed: dict[str, str] = {}
    for number in range(1, given.rounds + 1):
        turn = [*chosen[number % len(chosen) :], *chosen[: number % len(chosen)]]
        for queue_type in given.queue_types:
            for contender in turn:
                if contender.name in failed:
                    continue
                try:
                    runs.append(await _one(postgres, rabbitmq, contender, installed, given, queue_type, number))
                except (Failed, Stalled, TimeoutError) as why:
                    failed[contender.name] = f"{type(why).__name__}: {why}"
                    print(f"round {number}, {queue_type}: {contender.name}: {failed[contender.name]}", file=sys.stderr)
                    continue
                last = runs[-1]
                print(
                    f"round {number}, {queue_type:8} {contender.name:45} {last.rate:10,.0f}/s  {last.wall_s:6.1f} s",
                    flush=True,
                )
    return [run for run in runs if run.contender not in failed], failed


async def _one(
    postgres: Postgres,
    rabbitmq: RabbitMQ,
    contender: Contender,
    installed: dict[str, Installed],
    given: argparse.Namespace,
    queue_type: str,
    number: int,
) -> Run:
    where = installed.get(contender.name)
    if given.side == "outbox":
        return await outbox.run(
            postgres, rabbitmq, contender, where, queue_type=queue_type, events=given.events, number=number
        )
    return await inbox.run(
        postgres,
        rabbitmq,
        contender,
        where,
        events=given.events,
        number=number,
        duplicates=given.duplicates,
        swaps=given.swaps,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=sorted(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=50_000)
    parser.add_argument("--queue-types", nargs="+", choices=("quorum", "classic"))
    parser.add_argument("--only", nargs="+", metavar="PART", help="peers whose name contains one of these")
    parser.add_argument("--duplicates", type=float, default=0.0, help="inbox: share of messages sent twice")
    parser.add_argument("--swaps", type=float, default=0.0, help="inbox: share of messages that change places")
    parser.add_argument("--list", action="store_true", help="who is compared, and what each promises")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.side == "inbox":
        if given.queue_types not in (None, ["quorum"]):
            parser.error("inboxes are compared on a quorum queue: relay's own is always one")
        given.queue_types = ["quorum"]
    else:
        given.queue_types = given.queue_types or ["quorum", "classic"]
    return given


if __name__ == "__main__":
    sys.exit(main())
