"""Where it was measured: the machine, the servers, the versions."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from relay.postgres.connect import Connection
from relay.postgres.queries import query
from relay.rabbitmq.session import close, connect
from relay.settings import Settings

_LIBRARIES = ("relay-outbox", "asyncpg", "aio-pika", "aiormq", "pamqp", "uvloop")


@dataclass(frozen=True, slots=True)
class Place:
    """The machine, the servers and the libraries; for people who compare figures."""

    cores: int
    machine: str
    memory_gib: float | None
    system: str
    python: str
    postgresql: Mapping[str, str]
    rabbitmq: Mapping[str, str]
    libraries: Mapping[str, str]

    def __str__(self) -> str:
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.0f} GiB"
        return (
            f"{self.cores} cores ({self.machine}{memory}), {self.system}; PostgreSQL {self.postgresql['version']} "
            f"(fsync {self.postgresql['fsync']}), RabbitMQ {self.rabbitmq['version']} ({self.rabbitmq['platform']}), "
            f"Python {self.python}"
        )


async def look(opened: Connection, settings: Settings) -> Place:
    """Ask both servers and this machine."""
    server = await opened.fetchrow(query("bench_server"))
    return Place(
        cores=os.cpu_count() or 0,
        machine=_processor(),
        memory_gib=_memory_gib(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        postgresql=dict(server or {}),
        rabbitmq=await _broker(settings),
        libraries=_versions(),
    )


async def _broker(settings: Settings) -> dict[str, str]:
    """What the broker says of itself when a connection is opened."""
    broker = await connect(settings.rabbitmq, name="relay bench")
    try:
        told = broker.transport.connection.server_properties if broker.transport is not None else {}
        return {name: str(told.get(name, "?")) for name in ("product", "version", "platform")}
    finally:
        await close(broker)


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # uvloop is none on PyPy
            continue
    return found


def _processor() -> str:
    named = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return named[1] if named else platform.machine()


def _memory_gib() -> float | None:
    found = re.search(r"^MemTotal:\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) / 1024**2 if found else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
