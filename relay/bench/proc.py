"""Processor time and memory of processes, as Linux tells it under /proc. Elsewhere every answer is None.

The servers are found by the port they listen on: one way for those of ours and for the user's own, and it is the server
itself that is found, not a wrapper that started it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_LISTEN = "0A"  # the kernel's TCP_LISTEN, in hexadecimal
_HIGHEST = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


class _Stat(NamedTuple):
    parent: int
    cpu_s: float  # its own, and that of its children that have ended and were waited for


def tree_cpu_s(root: int) -> float | None:
    """Processor seconds of a process, of all that descend from it, and of those that have ended; None if it is gone.

    PostgreSQL's backends come and go: those that went are in the postmaster's account. Resolution: 10 ms.
    """
    stats = _all_stats()
    if root not in stats:
        return None
    children: dict[int, list[int]] = {}
    for pid, stat in stats.items():
        children.setdefault(stat.parent, []).append(pid)
    total, left = 0.0, [root]
    while left:
        pid = left.pop()
        total += stats[pid].cpu_s
        left += children.get(pid, [])
    return total


def peak_rss_mib(pid: int | None = None) -> float | None:
    """The most memory that a process (None: this one) ever had resident, in MiB.

    Not getrusage: its ru_maxrss survives an exec, so that a child begins with the memory of its parent.
    """
    found = _HIGHEST.search(_read(_PROC / str(pid or "self") / "status"))
    return int(found[1]) / 1024 if found else None


def listener(port: int, program: str) -> int | None:
    """The process of this name that listens on a TCP port of this machine; None if there is none that we may look at.

    Of several that share the socket it is the one from which the others descend.
    """
    sockets = _listening(port)
    holders = {pid for pid in _pids() if sockets and _name(pid) == program and _holds(pid, sockets)}
    eldest = [pid for pid in holders if (stat := _stat(pid)) is not None and stat.parent not in holders]
    return min(eldest, default=None)


def _all_stats() -> dict[int, _Stat]:
    return {pid: stat for pid in _pids() if (stat := _stat(pid)) is not None}


def _stat(pid: int) -> _Stat | None:
    """See proc(5): the fields behind the name in brackets, which may itself contain anything."""
    fields = _read(_PROC / str(pid) / "stat").rpartition(")")[2].split()
    if len(fields) < 15:
        return None
    return _Stat(int(fields[1]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK"))


def _listening(port: int) -> frozenset[str]:
    """The inodes of the sockets that listen on a port, as /proc/<pid>/fd names them."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in _read(_PROC / "net" / table).splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return frozenset(found)


def _holds(pid: int, sockets: frozenset[str]) -> bool:
    try:
        return any(str(entry.readlink()) in sockets for entry in (_PROC / str(pid) / "fd").iterdir())
    except OSError:  # gone meanwhile, or another user's
        return False


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdecimal()] if _PROC.is_dir() else []


def _name(pid: int) -> str:
    return _read(_PROC / str(pid) / "comm").strip()


def _read(path: Path) -> str:
    """The text of a file of /proc; empty for a process that is gone, and where there is no /proc."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
