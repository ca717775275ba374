"""Free loopback ports that stay free while a server is down."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from relay.errors import SandboxError

LOOPBACK = "127.0.0.1"
EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST, HIGHEST = 10_000, 65_000


def free_ports(count: int) -> list[int]:
    """Different free ports, none of them from the range that the kernel hands to outgoing connections.

    A client that keeps connecting to a port of that range while the server is down can be given that very port as its
    own (TCP "self-connect"); the server then cannot bind it when it comes back.
    """
    ephemeral = _ephemeral_ports()
    candidates = [port for port in range(LOWEST, HIGHEST) if port not in ephemeral]
    random.SystemRandom().shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        if len(found) == count:
            return found
        if _is_free(port):
            found.append(port)
    raise SandboxError(f"no {count} free ports on {LOOPBACK}")


def _ephemeral_ports() -> range:
    if not EPHEMERAL_RANGE.exists():
        return range(49_152, 65_536)  # RFC 6335, what the BSDs and macOS use
    low, high = EPHEMERAL_RANGE.read_text().split()
    return range(int(low), int(high) + 1)


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
