"""relay as a process that is killed at a named point: `python -m tests.faults.crash POINT NTH run --drain`.

    python -m tests.faults.crash POINT NTH ARGUMENT...     run relay with these arguments; SIGKILL at the NTH time at POINT
    python -m tests.faults.crash --nursery SOCKET          fork such processes on request, until standard input is closed

A new interpreter takes half a second to import relay, a fork of one that has imported it a few milliseconds. The nursery is a
process with one thread that never runs an event loop, so what it forks is as good as new. One connection to its socket is one
process: a line of JSON (a `Birth`) goes in; `born PID`, a line for each point that is reached, and `died STATUS` come out.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import NoReturn

import relay.cli.inbox
import relay.cli.main
import relay.daemon
import relay.inbox.consumer
import relay.outbox.retention
from relay.failpoints import Point, install
from relay.inbox import Event, Inbox
from relay.postgres.connect import Connection
from tests.faults.shop import APPLY


class InHandler(Enum):
    """Points in the application's own code, which relay knows nothing of."""

    HANDLER_CALLED = "a handler is called, nothing of its effect is there"
    HANDLER_DONE = "its effect is in the transaction, nothing else of it"


Place = Point | InHandler
PLACES: Mapping[str, Place] = {place.name: place for place in (*Point, *InHandler)}

HOW = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
"""What happens at the point: the end, or a pause in which a test prepares a worse end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """What a process is to be. `nth` 0: it lives."""

    point: str
    nth: int
    arguments: Sequence[str]
    environment: Mapping[str, str]
    log: str  # where its output goes
    how: str = "kill"

    def as_line(self) -> bytes:
        """For the nursery."""
        return json.dumps(asdict(self)).encode() + b"\n"


class Crash:
    """The hook: tells every point that is reached, then ends the process at the nth time at its own."""

    def __init__(self, place: Place, nth: int, how: str, tell: Callable[[str], object]) -> None:
        self._place = place
        self._nth = nth
        self._signal = HOW[how]
        self._tell = tell
        self._seen: Counter[Place] = Counter()

    def __call__(self, place: Place) -> None:
        self._seen[place] += 1
        self._tell(f"{place.name} {self._seen[place]}\n")
        if place is self._place and self._seen[place] == self._nth:
            os.kill(os.getpid(), self._signal)


# --- the application: effects that count themselves, and failures that heal

inbox = Inbox("effects")
_hook: Callable[[Place], None] | None = None
_failed: Counter[str] = Counter()


@inbox.on("Booked")
async def book(event: Event, tx: Connection) -> None:
    """One effect. An event that says so fails a few times in each process before."""
    content = event.json()
    if _hook is not None:
        _hook(InHandler.HANDLER_CALLED)
    if _failed[event.message_id] < content.get("fails", 0):
        _failed[event.message_id] += 1
        raise RuntimeError("not yet")
    await tx.execute(APPLY, event.aggregate_id, event.seq, content["token"], content["amount"])
    if _hook is not None:
        _hook(InHandler.HANDLER_DONE)


def _live(point: str, nth: int, how: str, arguments: Sequence[str], tell: Callable[[str], object]) -> NoReturn:
    """Be relay, until the point is reached."""
    global _hook
    _hook = Crash(PLACES[point], nth, how, tell)
    install(_hook)
    relay.outbox.retention._LEAST_S = 0.0  # or a slot would be left alone for the hour after it was filled
    relay.cli.main.cli(list(arguments), prog_name="relay")
    raise AssertionError("click ends the process")


# --- the nursery


class Nursery:
    """Forks. Ends with standard input, and takes its children along."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(20)
        self._children: dict[int, tuple[int, socket.socket]] = {}  # by pidfd
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(sys.stdin, selectors.EVENT_READ)

    def run(self) -> None:
        """Until standard input is closed."""
        print("ready", flush=True)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is sys.stdin:
                    self._end()
                    return
                if key.fileobj is self._listener:
                    self._bear(self._listener.accept()[0])
                else:
                    self._bury(key.fd)

    def _bear(self, line: socket.socket) -> None:
        with line.makefile("rb") as request:
            birth = Birth(**json.loads(request.readline()))
        pid = os.fork()
        if pid == 0:
            self._grow_up(birth, line)
        line.sendall(f"born {pid}\n".encode())
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = (pid, line)
        self._selector.register(pidfd, selectors.EVENT_READ)

    def _grow_up(self, birth: Birth, line: socket.socket) -> NoReturn:
        self._selector.close()
        self._listener.close()
        for pidfd, (_, other) in self._children.items():
            os.close(pidfd)
            other.close()
        log = os.open(birth.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.clear()
        os.environ.update(birth.environment)
        _live(birth.point, birth.nth, birth.how, birth.arguments, lambda text: line.sendall(text.encode()))

    def _bury(self, pidfd: int) -> None:
        pid, line = self._children.pop(pidfd)
        _, status = os.waitpid(pid, 0)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        with line, suppress(OSError):  # nobody may be listening any more
            line.sendall(f"died {os.waitstatus_to_exitcode(status)}\n".encode())

    def _end(self) -> None:
        for pid, _ in self._children.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def main() -> None:
    """See the module."""
    if sys.argv[1] == "--nursery":
        Nursery(sys.argv[2]).run()
        return
    point, nth, *arguments = sys.argv[1:]
    sys.path.insert(0, str(Path.cwd()))
    _live(point, int(nth), "kill", arguments, sys.stderr.write)


if __name__ == "__main__":
    from tests.faults import crash  # the handlers are looked up by this name: not a second copy of it

    crash.main()
