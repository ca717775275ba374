"""The end: read all tables, judge, see whether the faults really happened, print it, choose the exit code."""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text

from relay.demo.screen import INBOX, NAIVE, NAIVE_ALONE, Screen, faults_table, verdict_table
from relay.demo.sql import sql
from relay.demo.stage import Cast
from relay.demo.verdict import Books, Findings, Step, Truth, judge
from relay.postgres.connect import Connection, connection

EXIT_HOLDS = 0
EXIT_INCONCLUSIVE = 9
EXIT_FAILS = 10


async def conclude(cast: Cast, screen: Screen, *, on_time: bool) -> int:
    """Print what happened and what came of it; the exit code."""
    truth = await _truth(cast)
    findings = await _judged(cast, truth)
    leftovers = await _leftovers(cast)
    return _print(cast, findings, screen, events=len(truth.journal), leftovers=leftovers, on_time=on_time)


async def _truth(cast: Cast) -> Truth:
    async with connection(cast.databases["shop"], application="demo verdict") as opened:
        orders = await opened.fetch(sql("shop_orders"))
        return Truth(
            journal=[Step(*row) for row in await opened.fetch(sql("shop_journal"))],
            states={row["order_id"]: row["state"] for row in orders},
            paid_cents={row["order_id"]: row["paid_cents"] for row in orders},
        )


async def _judged(cast: Cast, truth: Truth) -> dict[str, Findings]:
    findings = {}
    for column, name in ((NAIVE_ALONE, "dual_write"), (NAIVE, "naive"), (INBOX, "billing")):
        async with connection(cast.databases[name], application="demo verdict") as opened:
            findings[column] = judge(truth, await _books(opened))
    return findings


async def _books(opened: Connection) -> Books:
    return Books(
        effects=[Step(*row) for row in await opened.fetch(sql("billing_effects"))],
        states={row["order_id"]: row["state"] for row in await opened.fetch(sql("billing_orders"))},
        billed_cents={row["order_id"]: row["cents"] for row in await opened.fetch(sql("billing_invoices"))},
        balance_cents=await opened.fetchval(sql("billing_balance")),
    )


async def _leftovers(cast: Cast) -> int:
    """Messages that the inbox still holds, or has put aside."""
    async with connection(cast.databases["billing"], application="demo verdict") as opened:
        count: int = await opened.fetchval(sql("inbox_leftovers"))
        return count


def _print(
    cast: Cast, findings: Mapping[str, Findings], screen: Screen, *, events: int, leftovers: int, on_time: bool
) -> int:
    faults, stats = cast.nemesis.faults, cast.stats
    kills = sum(relay.kills for relay in cast.relays)
    bitten = {
        "no relay was killed": kills > 0 and bool(faults.takeovers_s),
        "the inbox was not killed": cast.billing.kills > 0,
        "the broker was not restarted": faults.broker_restarts > 0,
        "no copies reached the broker": cast.audit.copies > 0,
        "the inbox was given no duplicates": stats.duplicates > 0,
        "the inbox was given nothing early": stats.early > 0,
        "the naive consumer applied nothing twice": findings[NAIVE].repeated > 0,
        "the naive consumer applied nothing out of order": findings[NAIVE].overtaken > 0,
        "no transaction was rolled back": cast.shop.tally.rolled_back > 0,
        "somebody was not done when time was up": on_time,
    }
    screen.print(
        faults_table(
            [
                ("transactions rolled back after they emitted", str(cast.shop.tally.rolled_back)),
                ("kill -9 of the relay that owned the log", str(kills)),
                ("  its standby took over within", _seconds(faults.takeovers_s)),
                ("kill -9 of billing's inbox", str(cast.billing.kills)),
                ("kill -9 of RabbitMQ, and started again", str(faults.broker_restarts)),
                ("copies of messages seen at the broker", str(cast.audit.copies)),
                ("consumers that died with messages in hand", f"{faults.dead_consumers} ({faults.taken} messages)"),
                ("duplicates delivered: naive consumer, inbox", f"{cast.naive.repeated}, {stats.duplicates}"),
                ("overtaken by a later one: naive consumer", str(cast.naive.overtaken)),
                ("early, and held until its turn: inbox", str(stats.early)),
            ]
        ),
        verdict_table(findings, events),
    )
    missing = [what for what, happened in bitten.items() if not happened]
    if leftovers or not findings[INBOX].clean:
        late = "" if on_time else ", when time was up"
        screen.print(
            Text(
                f"The verdict FAILS: relay got something wrong, see its column ({leftovers} messages held or put aside{late}).",
                style="bold red",
            )
        )
        return EXIT_FAILS
    if missing:
        screen.print(
            Text(f"Inconclusive: {'; '.join(missing)}. Give it more to do: --orders, --seconds.", style="bold yellow")
        )
        return EXIT_INCONCLUSIVE
    screen.print(
        Text(
            f"The verdict holds: relay applied all {events} committed events once and in order.",
            style="bold green",
        )
    )
    return EXIT_HOLDS


def _seconds(takeovers_s: list[float]) -> str:
    return ", ".join(f"{s:.1f}" for s in takeovers_s) + " s"
