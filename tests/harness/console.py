"""Operator commands in the test's own process: what they print, and their exit codes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from click.testing import CliRunner

from relay.cli.main import cli

_AGE = re.compile(r"(?<!\S)(?:in )?(?:\d+ (?:d|h|min|s)(?: \d+ (?:h|min))?|now)(?: ago)?(?![^\s,:.])")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its standard output, read."""
        return json.loads(self.out)

    def lines(self) -> list[str]:
        """Standard output by line, runs of blanks as one, whatever says how long ago, for how long or in how long as AGE."""
        return [_AGE.sub("AGE", " ".join(line.split())) for line in self.out.splitlines()]


def relay(dsn: str, *arguments: str, columns: int | None = None) -> Answer:
    """`relay ...` on a database. Call it where no event loop runs. Without `columns` its output is a pipe's."""
    environment = {"RELAY_POSTGRES_DSN": dsn, "COLUMNS": None if columns is None else str(columns)}
    result = CliRunner().invoke(cli, list(arguments), env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Answer(result.exit_code, result.stdout, result.stderr)
