"""`relay inbox retry`, `skip`, `purge`, `reset`, `dismiss`: acts on what an inbox holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from relay.cli.acting import Way, acting, carry_out
from relay.cli.filters import selecting
from relay.cli.options import config_option, set_option, settings_from
from relay.errors import ConfigError
from relay.operate.inbox_acts import Dismiss, InboxAct, Purge, Retry, Skip
from relay.operate.inbox_cursors import Reset, SkipThrough
from relay.operate.selection import Selection


@click.command()
@config_option
@set_option
@selecting("inbox", act=True)
@acting
def retry(config: Path | None, assignments: tuple[str, ...], *, selection: Selection, way: Way) -> None:
    """Try messages again now whose handler failed.

    What waits behind them follows, in order. Gaps that are stuck are asked for again.

    In store mode: let messages be taken again now that their taker gave back. Attempts are kept: what is stuck and fails
    once more is stuck again.

    \b
    relay inbox retry order/42
    relay inbox retry "order/4*"          * is any characters, \\* an asterisk
    relay inbox retry --error "connection refused"
    relay inbox retry --state stuck --dry-run
    relay inbox retry --all --yes --why "billing 2.3.1 is deployed"
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    _carry_out(config, assignments, Retry(selection), way, "The inbox tries again now.")


@click.command()
@config_option
@set_option
@selecting("inbox", act=True)
@click.option(
    "--through",
    type=click.IntRange(1, 2**63 - 2),  # what follows must have a number, too
    metavar="N",
    help="One aggregate: go on after this number, whatever is missing.",
)
@acting
def skip(
    config: Path | None, assignments: tuple[str, ...], *, selection: Selection, through: int | None, way: Way
) -> None:
    """Give up messages whose handler failed; what waits goes on.

    In store mode: whose taker failed.

    Their content goes to relay.inbox_quarantine. With --through, pass over numbers that are missing and will not come, and
    over what is held up to there: see `relay inbox gaps`.

    \b
    relay inbox skip order/42
    relay inbox skip order/42 --through 7
    relay inbox skip --event-type OrderPaid --error KeyError --dry-run
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    if through is None:
        act: InboxAct = Skip(selection)
        consequence = "What is skipped will not be applied; what waits behind it will."
    else:
        act = SkipThrough(selection, through)
        consequence = f"Nothing up to number {through} will be applied, also if it still comes."
    _carry_out(config, assignments, act, way, consequence, "number" if through else "message")


@click.command()
@config_option
@set_option
@selecting("inbox", act=True)
@acting
def purge(config: Path | None, assignments: tuple[str, ...], *, selection: Selection, way: Way) -> None:
    """Give up every held message of the selection.

    What failed, and all that waits behind it or behind a gap.
    In store mode: what a taker gave back, and all that is stored behind it.

    Their content goes to relay.inbox_quarantine, and the cursors pass over them. A number that is missing is still waited
    for. --cause, --state, --error and --older-than describe the first message that is held of an aggregate.

    \b
    relay inbox purge order/42
    relay inbox purge --type test_order --dry-run
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    _carry_out(config, assignments, Purge(selection), way, "What is purged will not be applied.")


_RESETTABLE = ("event_type", "cause", "state", "error", "older_than", "since", "until", "seq", "ids")


@click.command()
@config_option
@set_option
@selecting("inbox", act=True, without=_RESETTABLE)
@click.option(
    "--to",
    type=click.IntRange(0, 2**63 - 2),
    default=0,
    show_default=True,
    metavar="N",
    help="What has been applied, as far as the cursors will say.",
)
@click.option("--force", is_flag=True, help="Also while a consumer is connected.")
@acting
def reset(
    config: Path | None, assignments: tuple[str, ...], *, selection: Selection, to: int, force: bool, way: Way
) -> None:
    """Move cursors back, so that events are applied again.

    For a rebuild of what your service keeps.

    Cursors move back only. What is held stays and waits for its turn again. With --all (of one consumer) events that
    come without order (no aggregate, or policy none) are forgotten, too.

    \b
    1. stop the inbox daemon                    3. relay inbox reset --all --consumer billing
    2. clear your own tables                    4. relay replay --all --to-queue billing   (at the producer)
                                                5. start the inbox daemon
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    consequence = "Events that come again are applied again."
    _carry_out(config, assignments, Reset(selection, to), way, consequence, "cursor", force=force)


@click.command()
@config_option
@set_option
@selecting("inbox", act=True, without=("state",))
@acting
def dismiss(config: Path | None, assignments: tuple[str, ...], *, selection: Selection, way: Way) -> None:
    """Say that you have looked at messages in the quarantine.

    They are not shown as problems any more. They stay there.

    \b
    relay inbox dismiss order/42 --cause conflict
    relay inbox dismiss --cause foreign --older-than 1d
    relay inbox dismiss --id 17
    """  # noqa: D301 - click's own mark: do not wrap this paragraph
    _carry_out(config, assignments, Dismiss(selection), way, "What is dismissed does not count as a problem any more.")


def _carry_out(
    config: Path | None,
    assignments: tuple[str, ...],
    act: InboxAct,
    way: Way,
    consequence: str,
    unit: str = "message",
    *,
    force: bool = False,
) -> None:
    settings = settings_from(config, assignments)
    if act.selection.consumer is None and settings.inbox.consumer is not None:
        act.selection = replace(act.selection, consumer=settings.inbox.consumer)
    if act.selection.consumer == "":
        raise ConfigError("--consumer is empty")
    carry_out(settings, act, way, consequence=consequence, unit=unit, force=force)
