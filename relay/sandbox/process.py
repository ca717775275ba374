"""A server process that cannot outlive us: the side of `keeper.py` that lives in our own process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

from relay.errors import SandboxError

KEEPER = Path(__file__).with_name("keeper.py")
LOG_TAIL_BYTES = 4000
POLL_S = 0.05


class KeptProcess:
    """A running command whose every descendant ends with it, and which ends with us, even when we are killed with -9.

    `folder` is removed only if we die first. All methods block; none depends on the thread that calls it.
    """

    def __init__(
        self, command: Sequence[str], *, folder: Path, log: Path, env: Mapping[str, str], user: str | None = None
    ) -> None:
        self.log = log
        self._name = Path(command[0]).name
        options = [f"--parent={os.getpid()}", f"--remove={folder}", f"--log={log}"]
        if user is not None:
            options.append(f"--user={user}")
        with log.open("ab") as complaints:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(KEEPER), *options, "--", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env=dict(env),
                cwd="/",
                start_new_session=True,  # a Ctrl-C on the terminal is ours to handle, not the server's
            )
        self.pid = self._read_pid()

    def _read_pid(self) -> int:
        assert self._keeper.stdout is not None  # noqa: S101
        with self._keeper.stdout as stdout:
            line = stdout.readline()
        if not line:
            self._keeper.wait()
            self._close_commands()
            raise SandboxError(f"{self._name} could not be started; its log says:\n{self.log_tail()}")
        return int(line)

    @property
    def running(self) -> bool:
        """True until the command and all its descendants have ended."""
        if self._keeper.poll() is None:
            return True
        self._close_commands()  # also of one that ended by itself, for which nobody waits
        return False

    def signal(self, number: int) -> None:
        """Send a signal to the command itself. Does nothing when it has already ended."""
        if self._keeper.stdin is None or self._keeper.stdin.closed:
            return
        try:
            self._keeper.stdin.write(b"%d\n" % number)
            self._keeper.stdin.flush()
        except BrokenPipeError:
            return  # ended in between: there is nothing left to signal

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the end of the command and all its descendants; the exit code, or None after `timeout_s`."""
        try:
            code = self._keeper.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        self._close_commands()
        return code

    def end(self, *numbers: int, timeout_s: float) -> int:
        """Send the signals one after the other, each with `timeout_s` to act, until the command has ended."""
        for number in numbers:
            self.signal(number)
            code = self.wait(timeout_s)
            if code is not None:
                return code
        raise SandboxError(f"{self._name} (pid {self.pid}) does not end; its log says:\n{self.log_tail()}")

    def wait_until(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Poll `ready` until it is true. Raises `SandboxError` with the log's tail at the deadline or at our end."""
        started = time.monotonic()
        polling = Retrying(
            retry=retry_if_result(lambda done: not done), wait=wait_fixed(POLL_S), stop=stop_after_delay(timeout_s)
        )
        try:
            polling(lambda: ready() or not self.running)
        except RetryError as error:
            raise SandboxError(f"{self._name} is not ready after {timeout_s:g} s\n{self.log_tail()}") from error
        if not self.running:
            after_s = time.monotonic() - started
            code = self.wait(0)
            raise SandboxError(f"{self._name} ended after {after_s:.1f} s with exit code {code}\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines the server wrote."""
        if not self.log.exists():
            return "(no log)"
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip() or "(empty log)"

    def _close_commands(self) -> None:
        if self._keeper.stdin is not None and not self._keeper.stdin.closed:
            self._keeper.stdin.close()
