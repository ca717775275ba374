"""Runs one server and guarantees that it ends: a program of its own (standard library only), not imported by relay.

    python keeper.py --parent PID --remove FOLDER --log FILE [--user NAME] -- COMMAND...

It starts COMMAND, prints the command's process id, then obeys its standard input: each line is a signal number to send
to the command. When the command ends, every process it left behind is killed, and the keeper ends with the command's
exit code (128 + signal number if a signal ended it). When the standard input closes or the parent changes, which is
what happens at the parent's `kill -9`, everything is killed at once and FOLDER is removed.

Why a process and not only PR_SET_PDEATHSIG on the server: that signal follows the *thread* that started the server (so
a server started in a worker thread dies with it), it is not inherited by the server's own children, and Erlang and
PostgreSQL move their children to sessions of their own, out of reach of a process group. The keeper is instead a
"child subreaper" (prctl(2)): whatever is orphaned below it, in whatever session, becomes its child, so it can find it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36

# The closed pipe tells of the parent's death at once, unless a fork of the parent holds it open too: then this does.
PARENT_CHECK_S = 0.5


class ParentGoneError(Exception):
    """The process that wanted the server is no more."""


class TerminatedError(Exception):
    """Somebody asked the keeper itself to end."""


class Keeper:
    """One running command and everything that descends from it."""

    def __init__(self, command: list[str], *, user: str | None, log: Path) -> None:
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._wake, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.signal(signal.SIGTERM, _raise_terminated)
        if libc is not None:
            libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        with log.open("ab") as output:
            # If the keeper itself is killed with -9, the server must not live on: that is what PDEATHSIG is good for.
            # The keeper has one thread, so preexec_fn is safe, and it runs after the change of user, which resets it.
            self._server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                process_group=0,
                user=user,
                group=_group_of(user),
                extra_groups=None if user is None else [],
                preexec_fn=None if libc is None else lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
            )
        self.pid = self._server.pid

    def run(self, parent: int) -> int:
        """Obey standard input until the command ends; return its exit code. Raises `ParentGoneError`."""
        commands = sys.stdin.fileno()
        while True:
            ready, _, _ = select.select([commands, self._wake], [], [], PARENT_CHECK_S)
            if self._wake in ready:
                os.read(self._wake, 4096)
            if self._reap():
                return self._exit_code()
            if os.getppid() != parent:
                raise ParentGoneError
            if commands in ready:
                self._obey(os.read(commands, 4096))

    def kill_all(self) -> None:
        """Kill the command and all its descendants and wait until the last of them is gone."""
        try:
            while True:
                for pid in (*_children_of(os.getpid()), *self._unreaped()):
                    _kill(pid)
                pid, status = os.waitpid(-1, 0)  # one at a time: its own children are ours only from now on
                self._note(pid, status)
        except ChildProcessError:
            return

    def _obey(self, lines: bytes) -> None:
        if not lines:
            raise ParentGoneError
        for number in lines.split():
            os.kill(self.pid, int(number))

    def _reap(self) -> bool:
        """Collect whatever has ended, orphans included; true when the command itself has."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                self._note(pid, status)
        except ChildProcessError:
            pass  # nothing left to collect
        return self._server.returncode is not None

    def _note(self, pid: int, status: int) -> None:
        if pid == self.pid:
            self._server.returncode = os.waitstatus_to_exitcode(status)

    def _unreaped(self) -> list[int]:
        return [self.pid] if self._server.returncode is None else []

    def _exit_code(self) -> int:
        code = self._server.returncode
        return code if code >= 0 else 128 - code


def _raise_terminated(_number: int, _frame: object) -> None:
    raise TerminatedError


def _group_of(user: str | None) -> int | None:
    if user is None:
        return None
    import pwd

    return pwd.getpwnam(user).pw_gid


def _children_of(parent: int) -> list[int]:
    """The live children of a process. Empty where there is no /proc (then only the command itself can be killed)."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text(errors="replace")
        except OSError:  # it ended while we were looking
            continue
        fields = text[text.rindex(")") + 2 :].split()  # the name in the parentheses may contain anything
        if int(fields[1]) == parent:
            children.append(int(stat.parent.name))
    return children


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # ended in between: that is what we want


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--remove", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--user")
    parser.add_argument("command", nargs="+")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    arguments = _arguments(argv)
    keeper = Keeper(arguments.command, user=arguments.user, log=arguments.log)
    try:
        os.write(sys.stdout.fileno(), b"%d\n" % keeper.pid)
        return keeper.run(arguments.parent)
    except (ParentGoneError, TerminatedError, BrokenPipeError):
        keeper.kill_all()
        shutil.rmtree(arguments.remove, ignore_errors=True)
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        keeper.kill_all()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
