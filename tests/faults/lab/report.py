"""What a run amounted to, three times: a page to look at, a text for the terminal, and values for a machine. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tests.faults.lab.charts import plain
from tests.faults.lab.evidence import Evidence
from tests.faults.lab.page import page
from tests.faults.lab.tally import by_kind
from tests.faults.lab.verdict import Check, Verdict
from tests.faults.lab.words import figures, marks, outcome, seconds


def as_html(evidence: Evidence, verdict: Verdict) -> str:
    """One page that needs nothing else: no script, no file, no server."""
    return page(evidence, verdict)


def as_dict(evidence: Evidence, verdict: Verdict) -> dict[str, Any]:
    """Everything but the events: only what JSON knows."""
    return {
        "outcome": verdict.outcome,
        "profile": evidence.profile,
        "seed": evidence.seed,
        "began": evidence.began,
        "ended": evidence.ended,
        "figures": asdict(verdict.figures),
        "checks": [_check(check) for check in verdict.checks],
        "doubts": [_check(doubt) for doubt in verdict.doubts],
        "kinds": [asdict(kind) for kind in by_kind(evidence, verdict)],
        "faults": [asdict(fault) for fault in evidence.struck],
        "recoveries": [asdict(recovery) for recovery in verdict.recoveries],
    }


def as_text(evidence: Evidence, verdict: Verdict) -> str:
    """For a terminal, at most a hundred columns where the words allow it."""
    lines = [f"{verdict.outcome.upper()}: {outcome(evidence, verdict)}", ""]
    lines += [f"  {label:<44} {value}" for label, value in figures(evidence, verdict)]
    lines += ["", f"  {'fault':<34} {'times':>5} {'bites':>7} {'recovery':>9} {'overlapped':>11}"]
    lines += [
        f"  {plain(kind.kind):<34} {kind.times:>5} {kind.bites:>7} {seconds(kind.alone_s):>9} {seconds(kind.company_s):>11}"
        for kind in by_kind(evidence, verdict)
    ]
    lines += ["", f"  {'check':<20} {'examined':>9} {'wrong':>6}"]
    lines += [
        f"  {check.name:<20} {check.examined:>9} {check.count or '-':>6}  {marks(check)}{check.claim}"
        for check in (*verdict.checks, *verdict.doubts)
    ]
    for finding in verdict.findings:
        lines += ["", f"{finding.name}: {finding.count}"]
        lines += [f"  - {plain(example)}" for example in finding.examples]
    return "\n".join((*lines, ""))


def _check(check: Check) -> dict[str, Any]:
    return {**asdict(check), "examples": list(map(plain, check.examples))}
