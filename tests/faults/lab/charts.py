"""The drawings of the report, as SVG: lanes of faults, areas and lines over one common axis of time. Pure: values in, markup out.

Colours are the page's CSS variables, so the drawings are light or dark as the page is.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

WIDTH, LEFT, RIGHT = 1180, 345, 14
LANE, CHART, FOOT = 19, 130, 22
"""Heights: one lane, one chart, the axis under it."""

Point = tuple[float, float]
Span = tuple[float, float]


def plain(text: object) -> str:
    """Fit for any terminal and any file: control characters and lone surrogates written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def escaped(text: object) -> str:
    """Safe inside of HTML and SVG, whatever an error message or an aggregate's name contains."""
    return html.escape(plain(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A span of time in a lane; `after`: what follows it, drawn paler."""

    start: float
    end: float
    after: float
    look: str  # CSS class
    words: str  # shown when pointed at


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Runs of points: the line is interrupted between two runs."""

    name: str
    runs: Sequence[Sequence[Point]]
    look: str  # CSS class: decides the colour


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """The horizontal axis of all drawings."""

    start: float
    end: float

    def x(self, moment: float) -> float:
        """In the drawing's units."""
        share = (moment - self.start) / max(self.end - self.start, 1e-9)
        return LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)

    def axis(self, y: float) -> str:
        """Ticks at round times since the start."""
        seconds = self.end - self.start
        steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)
        step = next((step for step in steps if seconds / step <= 12), 28800)
        return "".join(
            f'<line class="grid" x1="{self.x(self.start + t):.1f}" x2="{self.x(self.start + t):.1f}" y1="0" y2="{y:.0f}"/>'
            f'<text class="tick" x="{self.x(self.start + t):.1f}" y="{y + 15:.0f}" text-anchor="middle">{clock(t)}</text>'
            for t in range(0, int(seconds) + 1, step)
        )


def clock(seconds: float) -> str:
    """1:05, or 2:03:04."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def lanes(time: Time, title: str, named: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """One lane for each name."""
    height = LANE * len(named)
    stripes, marks = [], []
    for number, (name, bars) in enumerate(named):
        y = number * LANE
        stripes.append(f'<rect class="stripe{number % 2}" x="0" y="{y}" width="{WIDTH}" height="{LANE}"/>')
        marks.append(f'<text class="label" x="{LEFT - 10}" y="{y + 13.5}" text-anchor="end">{escaped(name)}</text>')
        marks.extend(_bar(time, bar, y) for bar in bars)
    return _svg(title, height, "".join((*stripes, time.axis(height), *marks)))


def chart(
    time: Time,
    title: str,
    lines: Sequence[Line],
    *,
    shades: Iterable[Span],
    words: Callable[[float], str],
    logarithmic: bool = False,
    filled: bool = False,
) -> str:
    """Lines over time; `shades`: spans to be darkened; `words`: how a value is written at the axis."""
    values = [value for line in lines for run in line.runs for _, value in run]
    if not values:
        return _svg(
            title, CHART, f'<text class="label" x="{LEFT}" y="{CHART / 2}">{escaped(title)}: nothing was seen</text>'
        )
    ticks = decades(values) if logarithmic else round_steps(max(values))
    place = _log_place(ticks) if logarithmic else _linear_place(ticks)
    parts = [
        f'<rect class="shade" x="{time.x(start):.1f}" y="0" width="{max(time.x(end) - time.x(start), 0.5):.1f}" height="{CHART}"/>'
        for start, end in shades
    ]
    parts.append(time.axis(CHART))
    parts.append(f'<text class="title" x="0" y="16">{escaped(title)}</text>')
    for tick in ticks:
        y = place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escaped(words(tick))}</text>'
        )
    for number, line in enumerate(lines):
        if len(lines) > 1:
            y = 38 + 17 * number
            parts.append(f'<rect class="key {line.look}" x="0" y="{y - 8}" width="14" height="4" rx="2"/>')
            parts.append(f'<text class="label" x="20" y="{y}">{escaped(line.name)}</text>')
        for run in line.runs:
            path = " ".join(f"{time.x(at):.1f},{place(value):.1f}" for at, value in run)
            if filled and run:
                ends = f"{time.x(run[0][0]):.1f},{CHART} {path} {time.x(run[-1][0]):.1f},{CHART}"
                parts.append(f'<polygon class="area {line.look}" points="{ends}"/>')
            parts.append(f'<polyline class="line {line.look}" points="{path}"/>')
    return _svg(title, CHART, "".join(parts))


def round_steps(highest: float) -> list[float]:
    """Three to six round values, from 0 to at least the highest."""
    raw = max(highest, 1e-9) / 4
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw)
    return [step * n for n in range(math.ceil(highest / step) + 1)] if highest > 0 else [0.0, 1.0]


def decades(values: Sequence[float]) -> list[float]:
    """Powers of ten around all values, at least two."""
    low = math.floor(math.log10(max(min(values), 1e-3)))
    high = max(math.ceil(math.log10(max(max(values), 1e-3))), low + 1)
    return [10.0**exponent for exponent in range(low, high + 1)]


def thinned(points: Sequence[Point], most: int, pick: Callable[[Iterable[float]], float] = max) -> list[Point]:
    """At most so many points; of several that fall together, the highest value: peaks must not vanish."""
    size = math.ceil(len(points) / most) if points else 1
    chunks = (points[i : i + size] for i in range(0, len(points), size))
    return [(chunk[0][0], pick(value for _, value in chunk)) for chunk in chunks]


def _linear_place(ticks: Sequence[float]) -> Callable[[float], float]:
    return lambda value: CHART - 1 - value / ticks[-1] * (CHART - 10)


def _log_place(ticks: Sequence[float]) -> Callable[[float], float]:
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    return lambda value: CHART - 1 - (math.log10(max(value, ticks[0])) - low) / (high - low) * (CHART - 10)


def _bar(time: Time, bar: Bar, y: float) -> str:
    start, end, after = time.x(bar.start), time.x(bar.end), time.x(bar.after)
    title = f"<title>{escaped(bar.words)}</title>"
    pale = ""
    if after > end:
        pale = f'<rect class="after {bar.look}" x="{end:.1f}" y="{y + 7}" width="{after - end:.1f}" height="5">{title}</rect>'
    width = max(end - start, 2.0)
    return f'{pale}<rect class="bar {bar.look}" x="{start:.1f}" y="{y + 3.5}" width="{width:.1f}" height="12" rx="2.5">{title}</rect>'


def _svg(title: str, height: float, content: str) -> str:
    box = f"0 0 {WIDTH} {height + FOOT:.0f}"
    return f'<svg viewBox="{box}" role="img" aria-label="{escaped(title)}" xmlns="http://www.w3.org/2000/svg">{content}</svg>'
