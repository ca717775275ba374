"""The fault laboratory's smoke profile: the whole system on servers of its own, every fault that is quick, and the checker's verdict."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from relay.errors import SandboxError
from relay.sandbox.postgres_binaries import find_postgres_binaries
from tests.faults.lab.daemons import Daemon
from tests.faults.lab.profile import PROFILES, Options
from tests.faults.lab.run import chosen, run

SEED = 4


def _is_here(version: str) -> bool:
    try:
        find_postgres_binaries(version)
    except SandboxError:
        return False
    return True


@pytest.mark.timeout(420)  # on an idle machine it is over in two minutes
@pytest.mark.parametrize(("version", "repair"), [("15", False), ("18", True)], ids=["15 without repair", "18"])
async def test_nothing_is_lost_doubled_or_swapped_whatever_breaks(version: str, repair: bool, tmp_path: Path) -> None:
    """Once without repair, which would heal what is lost by a mistake as well."""
    if not _is_here(version):
        pytest.skip(f"PostgreSQL {version} is not on this machine")
    options = Options(profile=PROFILES["smoke"], seed=SEED, postgres=version, repair=repair, folder=tmp_path)
    result = await run(options, print)
    assert result.verdict.outcome == "passed", result.text


def test_a_run_without_repair_leaves_out_the_faults_that_only_repair_can_heal() -> None:
    standard = PROFILES["standard"]
    with_it = {fault.kind for fault in chosen(Options(profile=standard, seed=1))}
    without = {fault.kind for fault in chosen(Options(profile=standard, seed=1, repair=False))}
    assert {"queue purged", "queue deleted", "messages stolen for good"} <= with_it - without
    assert len(without) >= standard.kinds_needed


async def test_a_daemon_that_is_being_started_when_the_laboratory_closes_is_ended_like_the_others(
    tmp_path: Path,
) -> None:
    daemon = Daemon("relay", "run", folder=tmp_path, environment={})
    starting = asyncio.create_task(daemon.start())
    await asyncio.sleep(0)  # it has begun, and nothing of it can have come back yet
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert daemon.pid is not None
    await daemon.kill9()
    assert daemon.pid is None
