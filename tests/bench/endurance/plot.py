"""One SVG for the README: capacity, latency, backlog and dead rows over time, the span of the held transaction darkened. Pure.

Drawn with the report's own charts (tests/faults/lab/charts.py), and with its colours in a style of its own: light or dark, as the
reader's system is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.bench.endurance.windows import Burst, Window
from tests.faults.lab.charts import CHART, FOOT, WIDTH, Line, Point, Time, chart, escaped

_STYLE = """
svg { --page: #fff; --ink: #1f2328; --soft: #59636e; --grid: #d8dee4; --shade: #f3d9b1; --c0: #1a7f37; --c1: #cf222e; }
@media (prefers-color-scheme: dark) {
svg { --page: #0d1117; --ink: #f0f6fc; --soft: #9198a1; --grid: #30363d; --shade: #4d3a17; --c0: #3fb950; --c1: #f85149; } }
text { font: 13px system-ui, sans-serif; } .page { fill: var(--page); }
.label { fill: var(--ink); } .tick { fill: var(--soft); font-size: 11px; } .title { fill: var(--ink); font-weight: 600; }
.grid { stroke: var(--grid); } .shade { fill: var(--shade); opacity: .55; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; } .key { fill: var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); }
"""
_MARGIN, _TOP, _GAP = 16, 34, 18

LOOKS = ("c0", "c1")


def drawing(windows: Sequence[Window], bursts: Sequence[Burst], *, sides: Sequence[str], about: str) -> str:
    """The whole picture."""
    end = max(w.second for w in windows)
    time = Time(start=0.0, end=end)
    held = [w.second for w in windows if w.held]
    shades = [(min(held) - (windows[0].second if windows else 0), max(held))] if held else []

    def over(pick: Callable[[Window], float | None]) -> list[Line]:
        return [
            _line(side, look, [(w.second, pick(w)) for w in windows if w.side == side]) for side, look in _looks(sides)
        ]

    draining = [
        _line(side, look, [(b.second, b.rate) for b in bursts if b.side == side]) for side, look in _looks(sides)
    ]
    charts = []
    if bursts:
        charts.append(chart(time, "draining a burst, events/s", draining, shades=shades, words=_count))
    charts += [
        chart(time, "latency p99", over(lambda w: w.p99_ms), shades=shades, words=_duration, logarithmic=True),
        chart(time, "backlog, events", over(lambda w: float(w.backlog)), shades=shades, words=_count),
        chart(time, "dead rows", over(lambda w: float(w.dead_rows)), shades=shades, words=_count),
    ]
    step = CHART + FOOT + _GAP
    placed = [
        picture.replace(
            "<svg ",
            f'<svg overflow="visible" x="{_MARGIN}" y="{_TOP + step * n}" width="{WIDTH}" height="{CHART + FOOT}" ',
            1,
        )
        for n, picture in enumerate(charts)
    ]
    width, height = WIDTH + 2 * _MARGIN, _TOP + step * len(charts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escaped(about)}">'
        f'<style>{_STYLE}</style><rect class="page" width="{width}" height="{height}"/>'
        f'<text class="label" x="{_MARGIN}" y="22">{escaped(about)}</text>{"".join(placed)}</svg>\n'
    )


def _looks(sides: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(sides, LOOKS, strict=True))


def _line(side: str, look: str, points: Sequence[tuple[float, float | None]]) -> Line:
    """Interrupted where nothing could be measured."""
    runs: list[list[Point]] = [[]]
    for second, value in points:
        if value is None:
            runs.append([])
        else:
            runs[-1].append((second, value))
    return Line(name=side, look=look, runs=[run for run in runs if run])


def _count(value: float) -> str:
    if value >= 1_000_000:
        return f"{value / 1_000_000:g} M"
    return f"{value / 1000:g} k" if value >= 1000 else f"{value:g}"


def _duration(ms: float) -> str:
    return f"{ms / 1000:g} s" if ms >= 1000 else f"{ms:g} ms"
