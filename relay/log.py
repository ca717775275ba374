"""Structured logs: one event a line, ids and sizes only. Never a payload, never a secret.

What others made (aggregate ids, a broker's words) can hold line breaks and terminal escapes: they are printed escaped.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from relay.settings import DaemonSettings

if TYPE_CHECKING:
    import structlog

_QUIET = ("aiormq", "aio_pika", "asyncpg", "asyncio")


def configure_logging(settings: DaemonSettings) -> None:
    """Send relay's log to standard error, and keep the libraries at WARNING: aiormq's DEBUG prints whole frames with bodies."""
    import structlog  # with all of rich: not for a command that only prints

    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    common: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[structlog.typing.Processor] = [structlog.processors.format_exc_info]
    if settings.log_format == "json":
        last += [structlog.processors.JSONRenderer()]
    else:
        last += [_escape, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    structlog.configure(
        processors=[*common, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    _adopt_libraries(common, last)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def printable(text: str) -> str:
    """The text on one line and without effect on a terminal: what is not printable appears as its Python escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _adopt_libraries(common: list[structlog.typing.Processor], last: list[structlog.typing.Processor]) -> None:
    """What the libraries log looks like what relay logs; their tracebacks become part of the one line."""
    import structlog

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    handler.addFilter(_without_content)
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, structlog.stdlib.ProcessorFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)


def _without_content(record: logging.LogRecord) -> bool:
    """Aiormq logs whole messages and frames where it is surprised by them: only their class is told."""
    if record.name.startswith(("aiormq", "aio_pika")) and isinstance(record.args, tuple):
        told = (str, int, float, BaseException, type(None))
        record.args = tuple(arg if isinstance(arg, told) else f"<{type(arg).__name__}>" for arg in record.args)
    return True


def _escape(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Only for people: JSON escapes by itself."""
    return {key: printable(value) if isinstance(value, str) else value for key, value in event.items()}
