"""How the report says things: the same words on the page and in the terminal. Pure."""

from __future__ import annotations

from tests.faults.lab.charts import clock
from tests.faults.lab.evidence import Evidence
from tests.faults.lab.verdict import Check, Verdict


def seconds(value: float | None) -> str:
    """With the precision that it deserves."""
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def number(value: int) -> str:
    """With the thousands set apart."""
    return f"{value:,}"


def outcome(evidence: Evidence, verdict: Verdict) -> str:
    """One sentence."""
    f = verdict.figures
    if verdict.outcome == "failed":
        wrong = [check.name for check in verdict.checks if check.count]
        return f"{len(wrong)} of {len(verdict.checks)} claims do not hold: {', '.join(wrong)}"
    faults = f"{number(f.struck)} faults of {f.kinds} kinds"
    if verdict.outcome == "inconclusive":
        doubts = ", ".join(doubt.claim for doubt in verdict.doubts if doubt.count)
        return f"nothing is wrong, but the run does not prove it: it is not true that {doubts}"
    return f"{number(f.events)} events, {faults}: each applied once, in order, with its own content"


def marks(check: Check) -> str:
    """What the reader of a claim must know first."""
    if check.count:
        return "NOT TRUE: "
    return "" if check.examined else "(nothing to examine) "


def figures(evidence: Evidence, verdict: Verdict) -> list[tuple[str, str]]:
    """Label and value."""
    f = verdict.figures
    transactions = [evidence.transactions.get(end, 0) for end in ("undone", "unknown", "failed")]
    return [
        ("events committed", number(f.events)),
        ("events rolled back", number(f.undone)),
        ("transactions committed", number(f.transactions)),
        ("undone / outcome unknown / failed", " / ".join(map(number, transactions))),
        ("effects", number(f.effects)),
        ("duplicates at the broker", number(f.copies)),
        ("first publications out of order", number(f.out_of_turn)),
        ("load", f"{clock(f.load_s)} at {f.events_per_s:.0f} events/s"),
        ("all applied after the load within", seconds(f.settle_s)),
        ("quiet latency, 50 % / 99 %", f"{seconds(f.quiet_p50_s)} / {seconds(f.quiet_p99_s)}"),
        ("longest latency", seconds(f.longest_s)),
        ("faults / kinds that have bitten", f"{number(f.struck)} / {f.kinds}"),
        ("disturbances / faults that stood alone", f"{f.disturbances} / {f.alone}"),
        ("worst recovery", seconds(f.worst_recovery_s)),
    ]
