"""How every command that changes something goes: count, ask, do, tell.

@cli.command()
@config_option
@set_option
@selecting("outbox", act=True)
@acting
def retry(config, assignments, *, selection: Selection, way: Way): ...
    carry_out(settings_from(config, assignments), Retry(selection), way, consequence="...")
"""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from relay.errors import ConfigError, Declined, NothingSelected
from relay.log import printable
from relay.message import Aggregate
from relay.operate.act import PLANS, SAMPLE, Act, Done, Plan, counted, perform
from relay.operate.audit import Operator, person
from relay.operate.place import OutboxPlace, outbox_place
from relay.operate.selection import aggregate_text, require_text
from relay.postgres.connect import Connection, close, connect
from relay.postgres.migrate import require_current
from relay.settings import PostgresSettings, Settings

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How an act is to be done: the options that all of them share."""

    dry_run: bool = False
    yes: bool = False
    why: str = ""
    who: str = ""
    as_json: bool = False

    @property
    def operator(self) -> Operator:
        """Who acts, and why. Raises ConfigError for what is not a text."""
        for name, text in (("--why", self.why), ("--who", self.who)):
            require_text(text, name)
        return Operator(who=self.who or person(), why=self.why)


Command = Callable[..., Any]


def acting(command: Command) -> Command:
    """The options that every act has, handed to the command as the keyword argument `way`."""

    @functools.wraps(command)
    def collect(*args: Any, dry_run: bool, yes: bool, why: str, who: str, as_json: bool, **kwargs: Any) -> Any:
        way = Way(dry_run=dry_run, yes=yes, why=why, who=who, as_json=as_json)
        return command(*args, way=way, **kwargs)

    collected: Command = collect
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print a JSON object; the question goes to standard error."),
        click.option("--who", default="", metavar="NAME", help="Who acts, for relay.audit. Default: user@host."),
        click.option("--why", default="", metavar="TEXT", help="The reason, for relay.audit."),
        click.option("--yes", "-y", is_flag=True, help="Do not ask."),
        click.option("--dry-run", is_flag=True, help="Only count and show; change nothing."),
    ):  # fmt: skip
        collected = option(collected)
    return collected


def carry_out(
    settings: Settings,
    act: Act,
    way: Way,
    *,
    consequence: str,
    unit: str = "row",
    what: str | None = None,
    force: bool = False,
) -> None:
    """Count, show, ask, do, tell. `consequence`: what a yes means, in one sentence. `what`: in place of how many `unit`s.

    `force`: whatever the plan names as an obstacle. Raises NothingSelected, Declined after a no, ConfigError where nobody can be asked, and what PostgreSQL raises.
    """
    operator = way.operator
    with session(settings.postgres, application=f"relay {act.name}") as (run, connection):
        place = run(outbox_place(connection)) if act.side == "outbox" else None
        with _doubted(act, place):
            plan = run(act.plan(connection))
        words = _Words(plan.unit or unit, what, _place(plan, place))
        if plan.obstacle is not None and not force and not way.dry_run:
            raise ConfigError(f"{plan.obstacle}; or say --force. Nothing was changed")
        if way.dry_run or not plan.rows:
            _tell(act, way, plan, None, words)
            return
        ask(way, lambda: _show(act, plan, words), consequence)
        _tell(act, way, plan, run(perform(connection, act, plan, operator)), words)


_BOTH_SIDES = ("retry", "skip", "purge")


@contextmanager
def _doubted(act: Act, place: OutboxPlace | None) -> Iterator[None]:
    """Where nothing is selected in an outbox that was never used: it may be the wrong database."""
    try:
        yield
    except NothingSelected as exc:
        if place is None or not place.doubt:
            raise
        other = f" Of the inbox: relay inbox {act.name}" if place.consumers and act.name in _BOTH_SIDES else ""
        raise NothingSelected(f"{exc} But {place.doubt}{other}") from exc


def ask(way: Way, show: Callable[[], None], consequence: str) -> None:
    """Show what would happen and ask, on standard error. Raises Declined, or ConfigError where there is nobody to ask."""
    if way.yes:
        return
    if not has_terminal():
        raise ConfigError("no terminal to ask on: add --yes to do it, or --dry-run to see what it would do")
    show()
    try:
        with _interruptible():
            agreed = click.confirm(f"{consequence} Go on?", default=False, err=True)
    except click.Abort:
        click.echo(err=True)
        agreed = False
    if not agreed:
        raise Declined("nothing was changed")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the question, also in a running event loop, which would only take note of it until the answer is typed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def has_terminal() -> bool:
    """Whether somebody can answer."""
    return sys.stdin.isatty()


class session:  # noqa: N801 - used as a context manager, like the functions beside it
    """A connection, and a runner of coroutines on it, so that a person can think between two of them."""

    def __init__(self, settings: PostgresSettings, *, application: str) -> None:
        self._settings = settings
        self._application = application
        self._runner = asyncio.Runner()
        self._connection: Connection | None = None

    def __enter__(self) -> tuple[Callable[[Any], Any], Connection]:
        self._runner.__enter__()
        try:
            self._connection = self._runner.run(self._open())
        except BaseException:
            self._runner.close()
            raise
        return self._runner.run, self._connection

    async def _open(self) -> Connection:
        connection = await connect(self._settings, application=self._application, plans=PLANS)
        try:
            await require_current(connection)
        except BaseException:
            await close(connection)
            raise
        return connection

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._connection is not None:
                self._runner.run(close(self._connection))
        finally:
            self._runner.close()
        if kind is KeyboardInterrupt:
            click.echo("relay: interrupted; what was being done was rolled back, unless relay.audit has it", err=True)
            sys.exit(INTERRUPTED)


@dataclass(frozen=True, slots=True)
class _Words:
    """How what an act is on is spoken of."""

    unit: str
    what: str | None
    place: str

    def amount(self, rows: int, aggregates: int) -> str:
        """How many of what."""
        if self.what is not None:
            return self.what
        many = counted(rows, self.unit)
        return f"{many} of {counted(aggregates, 'aggregate')}" if aggregates else many


_PAST = {
    "retry": "retried",
    "skip": "skipped",
    "purge": "purged",
    "pause": "paused",
    "resume": "resumed",
    "reset": "reset",
    "dismiss": "dismissed",
}


def _show(act: Act, plan: Plan, words: _Words, *, err: bool = True) -> None:
    """What would be done: before the question, and as the answer to --dry-run."""
    sample = "" if words.what is not None else _sample(plan)
    _say(f"would {act.name} {words.amount(plan.rows, plan.touched)} in {words.place}{sample}", err=err)
    for note in plan.notes:
        _say(f"  {note}", err=err)


def _tell(act: Act, way: Way, plan: Plan, done: Done | None, words: _Words) -> None:
    """The end: what was done, or what would be, or that all is as asked for already."""
    if way.as_json:
        click.echo(json.dumps(as_json(act, plan, done, dry_run=way.dry_run)))
    elif done is None and plan.rows:
        _show(act, plan, words, err=False)
    else:
        notes = plan.notes if done is None else done.notes
        if done is None or done.audit_id is None:
            _say(f"{words.what or act.name}: nothing to do")
        else:
            amount = words.amount(done.rows, done.aggregates)
            _say(f"{_PAST.get(act.name, act.name)} {amount} in {words.place} (audit {done.audit_id})")
        for note in notes:
            _say(f"  {note}")


def as_json(act: Act, plan: Plan, done: Done | None, *, dry_run: bool) -> dict[str, Any]:
    """What `--json` prints; a contract."""
    return {
        "act": act.name,
        "side": act.side,
        "consumer": plan.consumer,
        "dry_run": dry_run,
        "counted": plan.rows,
        "rows": 0 if done is None else done.rows,
        "aggregates": plan.touched if done is None else done.aggregates,
        "sample": [aggregate_text(*a) for a in plan.aggregates[:SAMPLE]],
        "notes": list(plan.notes if done is None else done.notes),
        "audit_id": None if done is None else done.audit_id,
    }


def _place(plan: Plan, place: OutboxPlace | None) -> str:
    return f"the inbox of consumer {plan.consumer}" if place is None else f"the outbox of database {place.database}"


def _sample(plan: Plan) -> str:
    shown: list[Aggregate] = list(plan.aggregates[:SAMPLE])
    if not shown:
        return ""
    more = plan.touched - len(shown)
    return f": {', '.join(short(aggregate_text(*a)) for a in shown)}{f' and {more:,} more' if more > 0 else ''}"


def short(text: str, length: int = 60) -> str:
    """A text that fits on a line; what was cut off shows."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _say(text: str, *, err: bool = False) -> None:
    click.echo(printable(text), err=err)
