"""The filters of the command line become one Selection; what cannot be meant is refused with an example of what can."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import click
import pytest
from click.testing import CliRunner

from relay.cli.filters import selecting
from relay.cli.main import cli
from relay.errors import ConfigError
from relay.operate.selection import Selection


def selected(*arguments: str, side: Any = "both", act: bool = False) -> Selection:
    """What a command gets for these arguments."""
    got: list[Selection] = []

    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    @selecting(side, act=act)
    def command(*, as_json: bool, selection: Selection) -> None:
        got.append(selection)

    result = CliRunner().invoke(command, list(arguments))
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return got[0]


def refusal(*arguments: str, side: Any = "both") -> str:
    @click.command()
    @selecting(side)
    def command(*, selection: Selection) -> None: ...

    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == 2
    return result.output


def test_nothing_given_selects_nothing_in_particular() -> None:
    assert selected() == Selection()


def test_every_filter_arrives() -> None:
    assert selected(
        *("order/4*", "--type", "order", "--event-type", "OrderPaid", "--cause", "nacked", "--state", "stuck"),
        *("--error", "no such", "--older-than", "10m", "--since", "2026-03-01T03:00", "--until", "2026-03-01T05:00+01:00"),
        *("--seq", "3-9", "--id", "7", "--id", "8", "--source", "shop", "--consumer", "billing", "--json"),
    ) == Selection(
        aggregate="order/4*",
        aggregate_type="order",
        event_type="OrderPaid",
        cause="nacked",
        state="stuck",
        error="no such",
        older_than_s=600.0,
        since=datetime(2026, 3, 1, 3, tzinfo=UTC),
        until=datetime(2026, 3, 1, 4, tzinfo=UTC),
        from_seq=3,
        to_seq=9,
        ids=(7, 8),
        source="shop",
        consumer="billing",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("3d", 259200), ("1w", 604800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert selected("--older-than", text).older_than_s == seconds


def test_a_time_can_be_how_long_ago() -> None:
    since = selected("--since", "2h").since
    assert since is not None
    assert timedelta(0) <= datetime.now(UTC) - timedelta(hours=2) - since < timedelta(minutes=1)


@pytest.mark.parametrize(("text", "range_"), [("7", (7, 7)), ("3-9", (3, 9)), ("3-", (3, None)), ("-9", (None, 9))])
def test_ranges_of_numbers(text: str, range_: tuple[int | None, int | None]) -> None:
    selection = selected(f"--seq={text}")
    assert (selection.from_seq, selection.to_seq) == range_


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--older-than", "soon"), "write for example 90s, 10m, 2h or 3d"),
        (("--since", "yesterday"), "write for example 2026-03-01T03:00 (UTC)"),
        (("--seq", "a"), "write for example 7, 3-9, 3- or -9"),
        (("--seq", "-"), "write for example 7, 3-9, 3- or -9"),
        (("--seq", "9-3"), "9 comes after 3"),
        (("--cause", "bad luck"), "'unroutable'"),
        (("--id", "x"), "not a valid integer"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_an_example(arguments: tuple[str, ...], said: str) -> None:
    assert said in refusal(*arguments)


def test_what_names_no_aggregate_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected TYPE/ID, for example order/42"):
        selected("42")


def test_a_source_is_a_word_of_the_inbox_only() -> None:
    assert "No such option" in refusal("--source", "shop", side="outbox")


def test_an_act_without_a_filter_is_refused_and_all_beside_one_as_well() -> None:
    with pytest.raises(ConfigError, match="say --all for everything"):
        selected(act=True)
    with pytest.raises(ConfigError, match="say --all for everything"):
        selected("--consumer", "billing", act=True)
    with pytest.raises(ConfigError, match="--all means everything"):
        selected("--all", "order/1", act=True)
    assert selected("--all", act=True) == Selection(everything=True)


_ACTS = (("retry",), ("skip",), ("purge",), ("replay",), ("inbox", "retry"), ("inbox", "skip"), ("inbox", "purge"))


_NO_BOUNDS = (("*/*",), ("--seq", "1-"), ("--error", ""), ("--older-than", "0"))
_NOT_OF_REPLAY = (("--error", ""), ("--older-than", "0"))


@pytest.mark.parametrize(
    ("command", "nothing"),
    [(c, n) for c in _ACTS for n in _NO_BOUNDS if not (c == ("replay",) and n in _NOT_OF_REPLAY)],
)
def test_no_act_takes_a_filter_that_excludes_nothing_for_a_bound(
    command: tuple[str, ...], nothing: tuple[str, ...]
) -> None:
    """Refused before anything is connected to."""
    nowhere = {"RELAY_POSTGRES_DSN": "postgresql://127.0.0.1:1/none", "RELAY_RABBITMQ_URL": "amqp://127.0.0.1:1/"}
    result = CliRunner().invoke(cli, [*command, *nothing, "--yes"], env=nowhere)
    assert (result.exit_code, "excludes nothing" in result.output) == (2, True)
