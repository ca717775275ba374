"""The filters that select rows, the same words on every command; each command gets them as one `Selection`.

@cli.command()
@config_option
@set_option
@selecting("outbox", act=True)
def retry(config, assignments, *, selection: Selection, ...): ...
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import click

from relay.operate.selection import Selection

OUTBOX_CAUSES = (
    "unroutable",
    "nacked",
    "refused",
    "too_large",
    "unencodable",
    "unconfirmed",
    "behind",
    "paused",
    "tombstone",
)
INBOX_CAUSES = ("failed", "early", "behind", "gap", "conflict", "foreign", "malformed", "taken", "stranded")
ALL_CAUSES = tuple(dict.fromkeys(OUTBOX_CAUSES + INBOX_CAUSES))
OUTBOX_STATES = ("waiting", "published", "parked", "retrying", "stuck", "paused", "skipped")
INBOX_STATES = ("waiting", "retrying", "stuck")

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d+)?)([smhdw]?)")
_RANGE = re.compile(r"(\d{0,18})(-?)(\d{0,18})")


def duration(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Callback of an option: seconds, from `90`, `90s`, `10m`, `2h`, `3d` or `1w`."""
    if value is None:
        return None
    if (match := _DURATION.fullmatch(value)) is None:
        raise click.BadParameter(f"{value!r} is not a duration: write for example 90s, 10m, 2h or 3d")
    return float(match[1]) * _UNITS[match[2] or "s"]


def moment(_: click.Context, __: click.Parameter, value: str | None) -> datetime | None:
    """Callback of an option: a time as ISO 8601 (UTC unless it names an offset), or how long ago: `2h`."""
    if value is None:
        return None
    try:
        if (match := _DURATION.fullmatch(value)) is not None and match[2]:
            return datetime.now(UTC) - timedelta(seconds=float(match[1]) * _UNITS[match[2]])
        read = datetime.fromisoformat(value)
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"{value!r} is not a time: write for example 2026-03-01T03:00 (UTC), 2026-03-01T03:00+01:00, or 2h for two hours ago"
        ) from None
    return read if read.tzinfo else read.replace(tzinfo=UTC)


def seq_range(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int | None, int | None]:
    """Callback of an option: sequence numbers, inclusive, from `7`, `3-9`, `3-` or `-9`; None where it is open."""
    if value is None:
        return None, None
    match = _RANGE.fullmatch(value)
    if match is None or not (match[1] or match[3]):
        raise click.BadParameter(f"{value!r} is not a range of numbers: write for example 7, 3-9, 3- or -9")
    first = int(match[1]) if match[1] else None
    last = int(match[3]) if match[3] else (None if match[2] else first)
    if first is not None and last is not None and first > last:
        raise click.BadParameter(f"{value!r} is empty: {first} comes after {last}")
    return first, last


Side = Literal["outbox", "inbox", "both"]
Command = Callable[..., Any]
Option = Callable[[Command], Command]


def selecting(
    side: Side,
    *,
    act: bool = False,
    without: tuple[str, ...] = (),
    states: tuple[str, ...] | None = None,
    causes: tuple[str, ...] | None = None,
) -> Callable[[Command], Command]:
    """Options of a command that works on a selection, handed to it as the keyword argument `selection`.

    `act`: it changes something, so `--all` is there and a selection without a filter is a usage error.
    `without`: options that this command has no use for, by name: "aggregate", "seq", "older_than" ...
    `states`, `causes`: those that this command knows; default: all of the side.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def collect(*args: Any, **kwargs: Any) -> Any:
            selection = _selection({name: kwargs.pop(name, None) for name in _PARAMETERS if name not in without})
            if act:
                selection.require_bounds()
            else:
                selection.parts()  # complains about what names no aggregate
            return command(*args, selection=selection, **kwargs)

        collected: Command = collect
        for name, option in reversed(_options(side, act=act, states=states, causes=causes)):
            if name not in without:
                collected = option(collected)
        return collected

    return decorate


_PARAMETERS = (
    "aggregate",
    "aggregate_type",
    "event_type",
    "cause",
    "state",
    "error",
    "older_than",
    "since",
    "until",
    "seq",
    "ids",
    "source",
    "consumer",
    "everything",
)


def _selection(given: dict[str, Any]) -> Selection:
    first, last = given.get("seq") or (None, None)
    return Selection(
        aggregate=given.get("aggregate"),
        aggregate_type=given.get("aggregate_type"),
        event_type=given.get("event_type"),
        cause=given.get("cause"),
        state=given.get("state"),
        error=given.get("error"),
        older_than_s=given.get("older_than"),
        since=given.get("since"),
        until=given.get("until"),
        from_seq=first,
        to_seq=last,
        ids=tuple(given["ids"]) if given.get("ids") else None,
        source=given.get("source"),
        consumer=given.get("consumer"),
        everything=bool(given.get("everything")),
    )


def _options(
    side: Side, *, act: bool, states: tuple[str, ...] | None, causes: tuple[str, ...] | None
) -> list[tuple[str, Option]]:
    """(name, decorator) in the order in which --help shows them."""
    reasons = causes or {"outbox": OUTBOX_CAUSES, "inbox": INBOX_CAUSES, "both": ALL_CAUSES}[side]
    known = states or {"outbox": OUTBOX_STATES, "inbox": INBOX_STATES, "both": ("retrying", "stuck", "paused")}[side]
    options: list[tuple[str, Option]] = [
        ("aggregate", click.argument("aggregate", metavar="[TYPE/ID]", required=False)),
        ("aggregate_type", click.option("--type", "aggregate_type", metavar="TYPE", help="Of this aggregate type.")),
        ("event_type", click.option("--event-type", metavar="TYPE", help="Of this event type, for example OrderPaid.")),
        ("cause", click.option("--cause", type=click.Choice(reasons), metavar="CAUSE", help=f"For this reason: {', '.join(reasons)}.")),
        ("state", click.option("--state", type=click.Choice(known), metavar="STATE", help=f"In this state: {', '.join(known)}.")),
        ("error", click.option("--error", metavar="TEXT", help="Whose error contains this text (upper or lower case).")),
        ("older_than", click.option("--older-than", callback=duration, metavar="AGE", help="For longer than this: 90s, 10m, 2h, 3d.")),
        ("since", click.option("--since", callback=moment, metavar="TIME", help="Since then: 2026-03-01T03:00 (UTC), or 2h for two hours ago.")),
        ("until", click.option("--until", callback=moment, metavar="TIME", help="Before then.")),
        ("seq", click.option("--seq", callback=seq_range, metavar="RANGE", help="With these sequence numbers: 7, 3-9, 3- or -9.")),
        ("ids", click.option("--id", "ids", type=click.IntRange(0), multiple=True, metavar="ID", help="The row with this id. Repeatable.")),
    ]  # fmt: skip
    if side in ("inbox", "both"):
        options.append(("source", click.option("--source", metavar="NAME", help="Events of this source only.")))
        options.append(("consumer", click.option("--consumer", metavar="NAME", help="Of this consumer only.")))
    if act:
        options.append(("everything", click.option("--all", "everything", is_flag=True, help="Really everything, without a filter.")))  # fmt: skip
    return options
