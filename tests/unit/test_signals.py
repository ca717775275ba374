"""The first signal asks, the second insists, and what was there before is put back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from relay.cli.signals import stop_on_signals


async def test_the_first_signal_sets_the_event_and_the_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_on_signals(5) as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(5):
            await stop.wait()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_the_process_at_once(number: signal.Signals, code: int) -> None:
    program = (
        "import asyncio, os, signal\n"
        "from relay.cli.signals import stop_on_signals\n"
        "async def main():\n"
        "    with stop_on_signals() as stop:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        await stop.wait()\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], check=False, timeout=30, capture_output=True).returncode == code
    )
