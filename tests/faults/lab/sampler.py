"""Looks at the whole system every half second: how far it is, and what its processes use."""

from __future__ import annotations

import asyncio
import time

import psutil

from tests.faults.lab.daemons import Daemon
from tests.faults.lab.evidence import Process, Sample
from tests.faults.lab.stage import NOT_NOW, Stage

LOOK_S = 0.5
PROCESSES_EVERY = 6
"""Looks between two looks at the processes."""

COMMITTED = "SELECT coalesce(sum(last_seq), 0)::bigint AS n FROM relay.outbox_aggregate"
APPLIED = "SELECT coalesce(sum(applied), 0)::bigint AS n FROM account"


class Sampler:
    """Keeps `stage.committed` and `stage.applied` new, and all samples."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.samples: list[Sample] = []

    async def run(self) -> None:
        """Ends by cancellation."""
        looks = 0
        while True:
            await self.look(processes=looks % PROCESSES_EVERY == 0)
            looks += 1
            await asyncio.sleep(LOOK_S)

    async def look(self, *, processes: bool = False) -> None:
        """Once. A server that does not answer keeps its last count."""
        stage = self._stage
        try:
            async with asyncio.timeout(5):
                stage.committed = (await stage.producer_sql(COMMITTED))[0]["n"]
        except NOT_NOW:
            stage.history.record("not_sampled", what="committed")
        try:
            async with asyncio.timeout(5):
                stage.applied = (await stage.consumer_sql(APPLIED))[0]["n"]
        except NOT_NOW:
            stage.history.record("not_sampled", what="applied")
        seen = {d.name: found for d in stage.daemons if (found := _process(d))} if processes else {}
        sample = Sample(at=time.time(), committed=stage.committed, applied=stage.applied, processes=seen)
        self.samples.append(sample)
        if processes:
            stage.history.record(
                "sample",
                committed=sample.committed,
                applied=sample.applied,
                rss={name: p.rss for name, p in seen.items()},
                tasks={name: p.tasks for name, p in seen.items()},
            )


def _process(daemon: Daemon) -> Process | None:
    """What a daemon uses now; its tasks are those of the look before. None while it does not run."""
    pid = daemon.pid
    if pid is None:
        return None
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            rss, descriptors = process.memory_info().rss, process.num_fds()
        connections = len(process.net_connections(kind="tcp"))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None
    told = daemon.tasks
    daemon.ask_for_tasks()
    return Process(
        pid=pid,
        rss=rss,
        descriptors=descriptors,
        connections=connections,
        tasks=told[1] if told is not None and told[0] == pid else None,
    )
