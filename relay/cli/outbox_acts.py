"""`relay retry`, `skip`, `purge`, `pause`, `resume`: acts on the outbox."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from relay.cli.acting import Way, acting, carry_out
from relay.cli.filters import selecting
from relay.cli.options import config_option, set_option, settings_from
from relay.errors import ConfigError
from relay.operate.act import Act
from relay.operate.outbox_acts import Purge, Retry, Skip, SkipNumber
from relay.operate.outbox_pauses import Pause, Resume, scope_text
from relay.operate.selection import Selection

_GIVEN_UP = "The content will not be delivered; a tombstone takes the place of each."
_STATES = ("retrying", "stuck", "paused")


@click.command()
@config_option
@set_option
@selecting("outbox", act=True, states=_STATES)
@acting
def retry(config: Path | None, assignments: tuple[str, ...], *, selection: Selection, way: Way) -> None:
    """Try parked events again now.

    The first of each selected aggregate, then what waits behind it, in order.

    The filters describe the event that holds its aggregate up, as `relay stuck` shows it. Attempts are kept: what is stuck
    and refused once more is stuck again. What is paused is left alone (`relay resume`).

    \b
    relay retry order/42
    relay retry "order/4*"                * is any characters, \\* an asterisk
    relay retry --cause unroutable        after binding the queue
    relay retry --state stuck --type order --dry-run
    relay retry --all --yes --why "disk of the broker was full"
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    _carry_out(config, assignments, Retry(selection), way, "relay tries again now.")


@click.command()
@config_option
@set_option
@selecting("outbox", act=True, states=_STATES)
@acting
def skip(config: Path | None, assignments: tuple[str, ...], *, selection: Selection, way: Way) -> None:
    """Give up the one event that holds each aggregate up.

    Of each selected aggregate; what waits behind it is published.

    A tombstone with the same sequence number is published in its place, so that consumers pass over it. The event's content
    stays in relay.outbox until its time is over, but it will not be delivered.

    With --seq, skip exactly one number of one aggregate, wherever it is: parked, or published already (a consumer that holds
    it because its handler failed passes over it).

    \b
    relay skip order/42
    relay skip order/42 --seq 7 --why "refund booked by hand"
    relay skip --cause too_large --dry-run
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    one = selection.exact() is not None and (selection.from_seq, selection.to_seq) != (None, None)
    act: Act = SkipNumber(selection) if one else Skip(selection)
    _carry_out(config, assignments, act, way, _GIVEN_UP)


@click.command()
@config_option
@set_option
@selecting("outbox", act=True, states=_STATES)
@acting
def purge(config: Path | None, assignments: tuple[str, ...], *, selection: Selection, way: Way) -> None:
    """Give up every parked event of the selection.

    The one that holds its aggregate up, and all that waits behind it.

    Tombstones with the same sequence numbers are published in their places, so that consumers pass over them.
    --cause, --state, --error and --older-than describe the event that holds its aggregate up.

    \b
    relay purge order/42
    relay purge --type test_order --dry-run
    relay purge order/42 --seq 7-9        of what is parked of it, these numbers
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    _carry_out(config, assignments, Purge(selection), way, _GIVEN_UP)


_PAUSABLE = ("cause", "state", "error", "older_than", "since", "until", "seq", "ids")
_shard_option = click.option("--shard", type=click.IntRange(0, 32767), metavar="N", help="All of this shard.")


@click.command()
@config_option
@set_option
@selecting("outbox", without=_PAUSABLE)
@_shard_option
@acting
def pause(
    config: Path | None, assignments: tuple[str, ...], *, selection: Selection, shard: int | None, way: Way
) -> None:
    """Hold events back; producers go on as before.

    Of one aggregate, a type of aggregates, a type of events, or a shard.

    What is committed meanwhile waits, and is published in order after `relay resume`. A paused event holds back what comes
    after it in its aggregate, too: the order is kept.

    \b
    relay pause order/42 --why "address is being corrected"
    relay pause --type order
    relay pause --event-type OrderPaid
    relay pause --shard 0
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    act = Pause(selection, shard)
    name = scope_text(act.scope)
    carry_out(
        settings_from(config, assignments),
        act,
        way,
        consequence=f"relay publishes nothing of {name} until it is resumed.",
        what=name,
    )


@click.command()
@config_option
@set_option
@selecting("outbox", without=_PAUSABLE)
@_shard_option
@click.option("--all", "all_pauses", is_flag=True, help="Everything that is paused.")
@acting
def resume(
    config: Path | None,
    assignments: tuple[str, ...],
    *,
    selection: Selection,
    shard: int | None,
    all_pauses: bool,
    way: Way,
) -> None:
    """Let go on what `relay pause` holds.

    What has waited is published now, in order.

    \b
    relay resume order/42
    relay resume --type order
    relay resume --all
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    if all_pauses and (selection != Selection() or shard is not None):
        raise ConfigError("--all means everything: leave it out, or leave out what you name")
    act = Resume(replace(selection, everything=all_pauses), shard)
    carry_out(
        settings_from(config, assignments),
        act,
        way,
        consequence="relay publishes what was held back, in order.",
        unit="pause",
        what=None if act.scope is None else scope_text(act.scope),
    )


def _carry_out(config: Path | None, assignments: tuple[str, ...], act: Act, way: Way, consequence: str) -> None:
    carry_out(settings_from(config, assignments), act, way, consequence=consequence)
