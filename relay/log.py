"""Structured logs: one event a line, ids and sizes only. Never a payload, never a secret."""

from __future__ import annotations

import logging
import sys

import structlog

from relay.settings import DaemonSettings

_QUIET = ("aiormq", "aio_pika", "asyncpg", "asyncio")


def configure_logging(settings: DaemonSettings) -> None:
    """Send relay's log to standard error, and keep the libraries at WARNING: aiormq's DEBUG prints whole frames with bodies."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
