"""The report as one self-contained page: verdict, figures, findings, the run drawn over time, faults by kind, all checks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from tests.faults.lab.charts import Bar, Time, chart, clock, escaped, lanes
from tests.faults.lab.evidence import Evidence, Struck
from tests.faults.lab.spans import merged
from tests.faults.lab.tally import Kind, backlog_line, by_kind, latency_lines, memory_lines
from tests.faults.lab.verdict import Check, Recovery, Verdict
from tests.faults.lab.words import figures, number, outcome, seconds

STYLE = """
:root { color-scheme: light dark;
  --page: #f7f7f5; --card: #fff; --ink: #1c1e21; --soft: #5d6570; --edge: #dfe1e4; --grid: #e9eaec; --stripe: #f5f6f7;
  --good: #1a7f4b; --bad: #c62f2f; --doubt: #b26a00; --shade: #8a93a01c;
  --c0: #2f6fdb; --c1: #d9622b; --c2: #1f9d74; --c3: #a04bc4; --c4: #c23a6b; --c5: #7a7f1c; }
@media (prefers-color-scheme: dark) { :root {
  --page: #121417; --card: #1a1d21; --ink: #e6e8eb; --soft: #9aa3ad; --edge: #2d3238; --grid: #272b31; --stripe: #1e2226;
  --good: #4cc38a; --bad: #ff6b62; --doubt: #e8a33d; --shade: #9aa7b81f;
  --c0: #6ea0ff; --c1: #ff9a62; --c2: #4fd0a3; --c3: #cb8bea; --c4: #f07aa3; --c5: #c6cb5c; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1140px; margin: 0 auto; }
h1 { font-size: 26px; margin: 0; line-height: 1.25; } h2 { font-size: 17px; margin: 34px 0 10px; }
.passed { --tone: var(--good); } .failed { --tone: var(--bad); } .inconclusive { --tone: var(--doubt); }
header { border-left: 6px solid var(--tone); padding: 2px 0 2px 16px; }
header h1 { color: var(--tone); } header p { margin: 4px 0 0; } .soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 14px 16px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); gap: 10px; margin: 22px 0 0; padding: 0; }
.tiles div { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 9px 13px; }
.tiles dt { color: var(--soft); font-size: 12.5px; } .tiles dd { margin: 0; font-size: 18px; font-variant-numeric: tabular-nums; }
.finding { border-left: 4px solid var(--bad); margin-bottom: 10px; } .finding.doubt { border-left-color: var(--doubt); }
.finding h3 { margin: 0 0 4px; font-size: 15px; } .finding ul { margin: 6px 0 0; padding-left: 20px; }
.finding li { font: 12.5px/1.55 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 12.5px; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
tr:last-child td { border-bottom: 0; } .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wrong { color: var(--bad); font-weight: 600; } .unsure { color: var(--doubt); font-weight: 600; } .fine { color: var(--good); }
svg { display: block; width: 100%; min-width: 760px; height: auto; font: 12px system-ui, "DejaVu Sans", sans-serif; }
svg + svg { margin-top: 14px; }
.label { fill: var(--ink); } .tick { fill: var(--soft); font-size: 11px; } .title { fill: var(--ink); font-weight: 600; }
.grid { stroke: var(--grid); } .stripe0 { fill: none; } .stripe1 { fill: var(--stripe); } .shade { fill: var(--shade); }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; } .area { fill: var(--c); opacity: .16; }
.key, .bar, .after { fill: var(--c); } .after { opacity: .38; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.bit { --c: var(--c0); } .confined { --c: var(--c2); } .toothless { --c: var(--doubt); } .broken { --c: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 12px; color: var(--soft); font-size: 12.5px; }
.legend i { display: inline-block; width: 14px; height: 9px; border-radius: 2px; background: var(--c); margin-right: 6px; }
"""

LEGEND = (
    ("bit", "has bitten"),
    ("confined", "has bitten, concerns one aggregate type alone"),
    ("toothless", "was not seen to bite"),
    ("broken", "saw a promise broken, or could not be injected"),
)


def page(evidence: Evidence, verdict: Verdict) -> str:
    """The whole page."""
    body = "".join(
        (
            _header(evidence, verdict),
            _tiles(figures(evidence, verdict)),
            _findings(verdict),
            _timeline(evidence, verdict),
            _kinds(by_kind(evidence, verdict)),
            _checks(verdict),
            _notes(evidence),
        )
    )
    title = f"{verdict.outcome}: {evidence.profile}, seed {evidence.seed}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head>"
        f'<body class="{escaped(verdict.outcome)}"><main>{body}</main></body></html>\n'
    )


def _header(evidence: Evidence, verdict: Verdict) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(evidence.began))
    return (
        f"<header><h1>{verdict.outcome.capitalize()}</h1><p>{escaped(outcome(evidence, verdict))}.</p>"
        f'<p class="soft">profile {escaped(evidence.profile)}, seed {evidence.seed}, {when}</p></header>'
    )


def _tiles(named: Iterable[tuple[str, str]]) -> str:
    tiles = "".join(f"<div><dt>{escaped(label)}</dt><dd>{escaped(value)}</dd></div>" for label, value in named)
    return f'<dl class="tiles">{tiles}</dl>'


def _findings(verdict: Verdict) -> str:
    if not verdict.findings:
        return ""
    cards = []
    for finding in verdict.findings:
        examples = "".join(f"<li>{escaped(example)}</li>" for example in finding.examples)
        more = f", the first {len(finding.examples)} of them" if finding.count > len(finding.examples) else ""
        doubt = " doubt" if finding in verdict.doubts else ""
        cards.append(
            f'<div class="card finding{doubt}"><h3>{escaped(finding.name)}: {number(finding.count)}{more}</h3>'
            f'<span class="soft">What must be true: {escaped(finding.claim)}.</span><ul>{examples}</ul></div>'
        )
    return f"<h2>Findings</h2>{''.join(cards)}"


def _timeline(evidence: Evidence, verdict: Verdict) -> str:
    moments = (evidence.ended, evidence.settled, *(sample.at for sample in evidence.samples[-1:]))
    end = max(moment for moment in moments if moment is not None)
    axis = Time(start=evidence.began, end=end)
    shades = merged((fault.begun, fault.healed) for fault in evidence.struck)
    legend = "".join(f'<span class="{look}"><i></i>{words}</span>' for look, words in LEGEND)
    legend += '<span class="bit"><i class="after"></i>paler: until all from before the heal was applied</span>'
    drawings = [
        lanes(axis, "Faults", _lanes(evidence, verdict)),
        chart(axis, "Backlog", [backlog_line(evidence)], shades=shades, words=lambda v: f"{v:g}", filled=True),
        chart(axis, "Latency", latency_lines(evidence, end), shades=shades, words=_scale, logarithmic=True),
        chart(axis, "Memory", memory_lines(evidence), shades=shades, words=lambda v: f"{v:g} MB"),
    ]
    return (
        f'<h2>The run</h2><div class="card"><div class="legend">{legend}</div>{"".join(drawings)}</div>'
        '<p class="soft">Backlog: events committed and not yet applied. Latency: from commit to effect, by the time of the commit.'
        " Memory: resident, of each daemon, interrupted where it was started anew. Darker: some fault was on.</p>"
    )


def _scale(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1000:g} ms"


def _lanes(evidence: Evidence, verdict: Verdict) -> list[tuple[str, list[Bar]]]:
    """Kinds in the order of their first appearance."""
    recoveries = {(each.kind, each.begun): each for each in verdict.recoveries}
    named: dict[str, list[Bar]] = {}
    for fault in sorted(evidence.struck, key=lambda fault: fault.begun):
        bar = _bar(fault, recoveries.get((fault.kind, fault.begun)), evidence.began)
        named.setdefault(fault.kind, []).append(bar)
    return list(named.items())


def _bar(fault: Struck, recovery: Recovery | None, began: float) -> Bar:
    look = (
        "broken" if fault.failure is not None or fault.broken is not None else "toothless" if not fault.bites else "bit"
    )
    if look == "bit" and fault.confined_to is not None:
        look = "confined"
    words = f"{fault.kind}, {clock(fault.begun - began)} to {clock(fault.healed - began)}, bites: {fault.bites}"
    after = fault.healed
    if recovery is not None and recovery.alone:
        after += recovery.seconds
        words += f", recovered from in {seconds(recovery.seconds)}"
    notes = (fault.broken, fault.failure, fault.note)
    return Bar(
        start=fault.begun, end=fault.healed, after=after, look=look, words=", ".join((words, *filter(None, notes)))
    )


def _kinds(kinds: Sequence[Kind]) -> str:
    rows = []
    for kind in kinds:
        teeth = "unsure" if kind.toothless else "n"
        slow = "wrong" if kind.alone_s is not None and kind.bound_s is not None and kind.alone_s > kind.bound_s else ""
        rows.append(
            f'<tr><td>{escaped(kind.kind)}</td><td class="n">{kind.times}</td><td class="n {teeth}">{number(kind.bites)}</td>'
            f'<td class="n">{kind.on_s:.0f} s</td><td class="n {slow}">{seconds(kind.alone_s)}</td>'
            f'<td class="n">{seconds(kind.company_s)}</td><td class="n">{seconds(kind.bound_s)}</td>'
            f"<td>{escaped(kind.confined_to or 'everybody')}</td></tr>"
        )
    head = _head("Fault|Times#|Bites#|On#|Worst recovery#|…overlapped by others#|Bound#|May hold up")
    return f'<h2>Faults by kind</h2><div class="card"><table>{head}{"".join(rows)}</table></div>'


def _checks(verdict: Verdict) -> str:
    rows = []
    for check, look in [(c, "wrong") for c in verdict.checks] + [(d, "unsure") for d in verdict.doubts]:
        rows.append(
            f"<tr><td>{escaped(check.name)}</td><td>{escaped(check.claim)}</td>"
            f'<td class="n">{number(check.examined)}</td>{_count(check, look)}</tr>'
        )
    return f'<h2>Checks</h2><div class="card"><table>{_head("Check|What must be true|Examined#|Wrong#")}{"".join(rows)}</table></div>'


def _count(check: Check, look: str) -> str:
    if check.count:
        return f'<td class="n {look}">{number(check.count)}</td>'
    return '<td class="n fine">0</td>' if check.examined else '<td class="n soft">nothing to examine</td>'


def _notes(evidence: Evidence) -> str:
    noted = [fault for fault in evidence.struck if fault.broken or fault.note or fault.failure]
    rows = "".join(
        f'<tr><td class="n">{clock(fault.begun - evidence.began)}</td><td>{escaped(fault.kind)}</td>'
        f"<td>{escaped(' '.join(filter(None, (fault.broken, fault.failure, fault.note))))}</td></tr>"
        for fault in noted
    )
    return f'<h2>Notes</h2><div class="card"><table>{_head("At#|Fault|")}{rows}</table></div>' if noted else ""


def _head(columns: str) -> str:
    """`Name|Name#`: # for a column of numbers."""
    cells = (f'<th class="n">{c[:-1]}</th>' if c.endswith("#") else f"<th>{c}</th>" for c in columns.split("|"))
    return f"<tr>{''.join(cells)}</tr>"
