"""`python -m tests.faults.lab.worker ARGUMENTS`: relay's own command, and two signals that the laboratory needs.

SIGUSR1: the event loop stands still for as many seconds as the file NAME.stall says. SIGUSR2: the number of tasks goes to
NAME.tasks. Marks are published more often than by default, so that no run waits a minute for the sweep.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from pathlib import Path
from types import FrameType

MARKS_S = (1.0, 5.0)
"""Between two announcements of what was published lately, and between two sweeps over all."""


_told = itertools.count()


def _folder() -> Path:
    return Path(os.environ["LAB_FOLDER"])


def _stall(_number: int, _frame: FrameType | None) -> None:
    """Runs in the main thread, in between two steps of the loop: like a handler that computes."""
    time.sleep(float((_folder() / f"{os.environ['LAB_NAME']}.stall").read_text()))


def _tell_tasks(_number: int, _frame: FrameType | None) -> None:
    try:
        tasks = len(asyncio.all_tasks(asyncio.get_running_loop()))
    except RuntimeError:
        return  # no loop yet, or no more
    told = _folder() / f"{os.environ['LAB_NAME']}.tasks"
    unfinished = told.with_suffix(f".{os.getpid()}.{next(_told)}")  # another signal may come in the middle of this
    unfinished.write_text(f"{os.getpid()} {tasks}")
    unfinished.replace(told)


def main() -> None:
    """Signals first: their default action would end the process."""
    signal.signal(signal.SIGUSR1, _stall)
    signal.signal(signal.SIGUSR2, _tell_tasks)

    from relay.cli.main import main as relay
    from relay.outbox.marks import Pace

    interval_s, sweep_s = MARKS_S
    (Pace.__init__.__kwdefaults__ or {}).update(interval_s=interval_s, sweep_s=sweep_s)
    if Pace().sweep_s != sweep_s:
        raise AssertionError("the marks keep their own pace: no run would heal in time")
    try:
        relay()
    finally:  # Python gives handlers back on its way out, and the sampler's question would end it with another exit code
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
