"""Figures as people read them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from relay.cli.display import aggregate, ago, clock, content, duration, plural, shorten, size, table, until
from relay.operate.rows import Content

NOW = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(None, "–"), (0, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h"), (3900, "1 h 5 min"), (90000, "1 d 1 h"), (86400 * 400, "400 d")],
)  # fmt: skip
def test_durations_in_two_units_at_most(seconds: float | None, told: str) -> None:
    assert duration(seconds) == told


def test_moments_from_here() -> None:
    assert ago(NOW - timedelta(seconds=90), NOW) == "1 min ago"
    assert ago(NOW, NOW) == "now"
    assert ago(None, NOW) == ""
    assert until(NOW + timedelta(seconds=90), NOW) == "in 1 min"
    assert until(NOW - timedelta(seconds=90), NOW) == "now"
    assert until(None, NOW) == ""
    assert clock(NOW.astimezone()) == "2026-03-01 03:00:00Z"


@pytest.mark.parametrize(("count", "told"), [(None, "–"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (150 * 1024, "150 KiB"), (5 * 1024**3, "5.0 GiB"), (2 * 1024**4, "2.0 TiB")])  # fmt: skip
def test_sizes(count: int | None, told: str) -> None:
    assert size(count) == told


def test_counts_agree_with_their_nouns() -> None:
    assert [plural(n, "row") for n in (0, 1, 2, 1234)] == ["no rows", "1 row", "2 rows", "1,234 rows"]


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    text = shorten("a" * 100 + "b" * 100, 30)
    assert text == "a" * 19 + "…" + "b" * 10
    assert len(text) == 30
    assert shorten("short", 30) == "short"


def test_texts_of_others_are_escaped() -> None:
    assert shorten("a\x1b[2J\nb") == "a\\x1b[2J\\nb"
    assert aggregate("order", "4\r2") == "order/4\\r2"
    assert aggregate("order", None) == "–"


def test_contents_are_escaped_and_cut() -> None:
    assert content(Content(text="{}\n", hex=None, cut=False)) == "{}\\n"
    assert content(Content(text="x" * 5000, hex=None, cut=False)) == "x" * 4000 + "… (cut; --json has more)"
    assert content(Content(text=None, hex="ff00", cut=False)) == "(not text) ff00"
    assert content(None) == "(no longer retained)"


COLUMNS = ("aggregate", "cause", "id", "what was said")
SAID = "the broker said no, and no again"


def _table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, aggregate: str) -> list[str]:
    monkeypatch.setenv("COLUMNS", "60")
    table(COLUMNS, [(aggregate, "unroutable", "4711", SAID)], indent=0)
    return capsys.readouterr().out.splitlines()[1:]


def test_of_a_table_only_the_free_text_is_wrapped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *more = _table(capsys, monkeypatch, "shipment/7")
    assert first.startswith("shipment/7  unroutable  4711  the broker")
    assert more
    assert f"{first} {' '.join(line.strip() for line in more)}".endswith(SAID)


def test_a_table_that_does_not_fit_is_wider_than_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"shipment/{'7' * 40}"
    assert _table(capsys, monkeypatch, name) == [f"{name}  unroutable  4711  {SAID}"]
