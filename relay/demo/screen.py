"""What the terminal shows: a live view while the shop is open, plain lines where nobody is looking, and the final tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from relay.demo.verdict import LABELS, Findings

NAIVE_ALONE = "no outbox,\nnaive consumer"
NAIVE = "relay outbox,\nnaive consumer"
INBOX = "relay outbox,\nrelay inbox"
COLUMNS = (NAIVE_ALONE, NAIVE, INBOX)

PLAIN_INTERVAL_S = 5.0
REFRESH_PER_S = 4
_TIMELINE_LINES = 7  # the whole view fits 24 lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumed:
    """One consumer, now."""

    delivered: int  # messages it was given
    applied: int  # effects in its table
    repeated: int  # of them, more than once
    dropped: int | None = None  # duplicates recognised; None: it cannot
    early: int | None = None  # arrived early and held; None: it cannot


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """The whole pipeline, now."""

    phase: str
    progress: float  # of the shop's day, 0 to 1
    committed: int  # transactions
    rolled_back: int
    events: int  # committed
    at_broker: int  # of them
    copies: int  # at the broker, beyond the first
    consumed: Mapping[str, Consumed]  # by column


class Screen:
    """One run's output. `plain`: lines only."""

    def __init__(self, console: Console, *, plain: bool) -> None:
        self._console = console
        self._plain = plain or not console.is_terminal
        self._started = time.monotonic()
        self._timeline: list[str] = []
        self._live: Live | None = None
        self._shown_at = 0.0

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """A line of its own, with the time."""
        line = f"{self.elapsed_s:5.1f} s  {text}"
        self._timeline.append(line)
        if self._live is None:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Within it, `update` redraws the view (on a terminal)."""
        if self._plain:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            before = len(self._timeline)
            try:
                yield
            finally:
                self._live = None
        for line in self._timeline[before:]:  # the view is gone now; what happened stays on the terminal
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def update(self, numbers: Numbers) -> None:
        """Show the numbers: drawn anew on a terminal, else a line every few seconds."""
        if self._live is not None:
            self._live.update(self._view(numbers), refresh=True)
        elif self._plain and self.elapsed_s - self._shown_at >= PLAIN_INTERVAL_S:
            self._shown_at = self.elapsed_s
            self._console.print(_line(self.elapsed_s, numbers), highlight=False, markup=False, soft_wrap=True)

    def print(self, *parts: RenderableType) -> None:
        """Print below everything else."""
        for part in parts:
            self._console.print(part, highlight=False)

    def _view(self, n: Numbers) -> RenderableType:
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        head.add_row(
            Text(n.phase, style="bold"), ProgressBar(total=1.0, completed=n.progress), f"{self.elapsed_s:.0f} s"
        )
        timeline = Text("\n".join(self._timeline[-_TIMELINE_LINES:]), no_wrap=True, overflow="ellipsis")
        return Group(
            head,
            Panel(_pipeline(n), title="the shop's database and the broker", title_align="left", border_style="dim"),
            Panel(_consumers(n), title="three ways to consume the same events", title_align="left", border_style="dim"),
            Panel(timeline, title="what happens", title_align="left", border_style="dim", height=_TIMELINE_LINES + 2),
        )


def faults_table(rows: Sequence[tuple[str, str]]) -> Table:
    """What really happened on the way."""
    table = Table(title="The faults that really happened", box=box.SIMPLE_HEAD, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, value in rows:
        table.add_row(label, value)
    return table


def verdict_table(findings: Mapping[str, Findings], events: int) -> Table:
    """Who got what wrong, by kind."""
    table = Table(
        title=f"What each got wrong, of {_n(events)} committed events: counted in the tables",
        caption="no outbox: the shop publishes by itself, inside its transaction\n"
        "naive consumer: apply each delivery, commit, acknowledge; the handlers are the same in all three",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for field, label in LABELS.items():
        table.add_row(label, *(_wrong(field, getattr(findings[name], field)) for name in COLUMNS))
    return table


def _wrong(field: str, value: int) -> Text:
    shown = f"{value / 100:,.2f}".replace(",", " ") if field == "cents_off" else _n(value)
    return Text(shown, style="bold red" if value else "green")


def _pipeline(n: Numbers) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    for _ in range(4):
        grid.add_column()
        grid.add_column(justify="right")
    grid.add_row(
        "transactions",
        _n(n.committed),
        "events",
        _n(n.events),
        "at the broker",
        _n(n.at_broker),
        "to publish",
        _left(n.events - n.at_broker),
    )
    grid.add_row("rolled back", _n(n.rolled_back), "", "", "copies there", _n(n.copies), "", "")
    return grid


def _consumers(n: Numbers) -> Table:
    table = Table(box=None, expand=True, pad_edge=False)
    table.add_column("")
    for name in COLUMNS:
        table.add_column(name, justify="right", style="bold" if name == INBOX else "")
    consumed = [n.consumed[name] for name in COLUMNS]
    table.add_row("delivered", *(_n(c.delivered) for c in consumed))
    table.add_row("applied", *(_n(c.applied) for c in consumed))
    table.add_row("applied again", *(_alarm(c.repeated) for c in consumed))
    table.add_row("duplicates dropped", *(_or_dash(c.dropped) for c in consumed))
    table.add_row("early, held until its turn", *(_or_dash(c.early) for c in consumed))
    return table


def _line(elapsed_s: float, n: Numbers) -> str:
    applied = " / ".join(f"{c.applied} ({c.repeated} again)" for c in (n.consumed[name] for name in COLUMNS))
    return (
        f"{elapsed_s:5.1f} s  {n.phase}: {n.committed} transactions, {n.rolled_back} rolled back, {n.events} events, {n.at_broker} at the broker "
        f"with {n.copies} copies; applied without outbox / naive / inbox: {applied}"
    )


def _n(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def _or_dash(value: int | None) -> str:
    return "–" if value is None else _n(value)


def _alarm(value: int) -> Text:
    return Text(_n(value), style="bold red" if value else "green")


def _left(value: int) -> Text:
    return Text(_n(max(value, 0)), style="yellow" if value > 0 else "green")
