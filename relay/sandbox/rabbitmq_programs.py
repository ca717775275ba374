"""Where this machine keeps RabbitMQ's own start scripts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from relay.errors import SandboxError

BIN_VARIABLE = "RELAY_SANDBOX_RABBITMQ_BIN"
INSTALL_HINT = "python -m relay.sandbox install"
FOLDERS = (
    "/usr/lib/rabbitmq/bin",
    "/usr/lib/rabbitmq/sbin",
    "/opt/rabbitmq/sbin",
    "/usr/local/sbin",
    "/opt/homebrew/sbin",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RabbitMQPrograms:
    """One installation of RabbitMQ."""

    server: Path  # rabbitmq-server, not Debian's wrapper in /usr/sbin, which insists on its own user
    ctl: Path  # rabbitmqctl, likewise


def find_rabbitmq_programs() -> RabbitMQPrograms:
    """RELAY_SANDBOX_RABBITMQ_BIN, else the usual folders. Raises `SandboxError` with the way to install it."""
    if shutil.which("erl") is None:
        raise SandboxError(f"Erlang (erl) is not installed; to get it with RabbitMQ: {INSTALL_HINT}")
    for folder in _folders():
        server, ctl = folder / "rabbitmq-server", folder / "rabbitmqctl"
        if os.access(server, os.X_OK) and os.access(ctl, os.X_OK):
            return RabbitMQPrograms(server=server, ctl=ctl)
    raise SandboxError(f"rabbitmq-server is not installed; to get it: {INSTALL_HINT}")


def _folders() -> Iterator[Path]:
    explicit = os.environ.get(BIN_VARIABLE)
    if explicit:
        yield Path(explicit)
        return
    yield from map(Path, FOLDERS)
    yield from sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin"), reverse=True)
