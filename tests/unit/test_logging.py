"""The log: one event a line, nothing that moves a cursor, no content, no secret."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.inbox.failures import ABORTED, ENDED, MOVED, described, loggable, too_long
from relay.log import configure_logging, printable
from relay.settings import DaemonSettings

FORMATS: tuple[Literal["json", "text"], ...] = ("json", "text")
NASTY = [
    "a\nb",
    "\x1b[2J\x1b[31m",
    "\r{}",
    "\x9b1m",
    "\u2028",
    "\u202e",
    "\0",
    "\ud800",
    "tab\t",
    '"}\n{"event": "forged"',
]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """What configure_logging changed is put back."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    levels = {name: logging.getLogger(name).level for name in ("aiormq", "aio_pika", "asyncpg", "asyncio")}
    yield
    structlog.reset_defaults()
    root.setLevel(level)
    root.handlers[:] = handlers
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


@pytest.mark.parametrize("log_format", FORMATS)
@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_whatever_is_logged_stays_on_its_line(
    text: str, log_format: Literal["json", "text"], capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(DaemonSettings(log_format=log_format))
    structlog.get_logger().warning("parked", aggregate=text, place=("order", text), detail={"a": text})
    logging.getLogger("aiormq.connection").warning("surprise: %r %s", text, text)
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 2
    assert not [c for c in printed if not c.isprintable() and c != "\n"]
    if log_format == "json":
        assert [json.loads(line)["level"] for line in printed.splitlines()] == ["warning", "warning"]
        assert json.loads(printed.splitlines()[0])["aggregate"] == text


@given(text=st.text(st.characters()))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_printable_is_printable_and_leaves_the_harmless_alone(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    if text.isprintable():
        assert printable(text) == text


@pytest.mark.parametrize("log_format", FORMATS)
def test_a_traceback_is_part_of_its_line(
    log_format: Literal["json", "text"], capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(DaemonSettings(log_format=log_format))
    logging.getLogger("aiormq.connection").error("reader exited", exc_info=ValueError("oh\x1b[2J\nno"))
    lines = capsys.readouterr().err.splitlines()
    assert "ValueError: oh" in lines[-1]
    assert len(lines) == {"json": 1, "text": 2}[log_format]
    assert "\x1b" not in "".join(lines)


def test_configuring_twice_prints_once(capsys: pytest.CaptureFixture[str]) -> None:
    for log_format in FORMATS:
        configure_logging(DaemonSettings(log_format=log_format))
    logging.getLogger("asyncio").error("once")
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_libraries_never_tell_more_than_warnings(
    level: Literal["debug", "info", "warning", "error"], capsys: pytest.CaptureFixture[str]
) -> None:
    """aiormq's DEBUG prints frames with their bodies."""
    configure_logging(DaemonSettings(log_level=level))
    for name in ("aiormq.channel", "aio_pika", "asyncpg.pool", "asyncio", "anything"):
        logging.getLogger(name).debug("canary")
        logging.getLogger(name).info("canary")
    assert capsys.readouterr().err == ""


def test_messages_that_aiormq_is_surprised_by_are_told_by_their_class_only(capsys: pytest.CaptureFixture[str]) -> None:
    class DeliveredMessage:
        def __repr__(self) -> str:
            return "body=b'canary'"

    configure_logging(DaemonSettings())
    logging.getLogger("aiormq.channel").error("Unhandled message %r returning", DeliveredMessage())
    logging.getLogger("aiormq.channel").error("%s of %d: %r", "kept", 3, ValueError("kept too"))
    printed = capsys.readouterr().err
    assert "canary" not in printed
    assert "DeliveredMessage" in printed
    assert "kept of 3: ValueError('kept too')" in printed


@pytest.mark.parametrize(
    ("exc", "table", "log"),
    [
        (
            ValueError("invalid literal for int(): 'canary'"),
            "ValueError: invalid literal for int(): 'canary'",
            "ValueError",
        ),
        (KeyError("canary"), "KeyError: 'canary'", "KeyError"),
        (ValueError(), "ValueError", "ValueError"),
        (ValueError("first\ncanary"), "ValueError: first", "ValueError"),
        (ValueError("x" * 1000), "ValueError: " + "x" * 300, "ValueError"),
        (TimeoutError("canary"), "TimeoutError: canary", "TimeoutError"),
    ],
)
def test_what_a_handler_says_goes_into_the_table_and_not_into_the_log(exc: Exception, table: str, log: str) -> None:
    assert described(exc) == table
    assert loggable(described(exc)) == log


@pytest.mark.parametrize("error", [ENDED, ABORTED, MOVED, too_long(30), too_long(0.3), too_long(1e9)])
def test_what_relay_says_about_a_handler_goes_into_both(error: str) -> None:
    assert loggable(error) == error
