"""One run, top to bottom: stage -> quiet -> faults -> quiet -> everything is applied -> evidence -> verdict -> report."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.lab import collect, cursor_log, kinds
from tests.faults.lab.checker import Verdict, judge
from tests.faults.lab.daemons import Daemon
from tests.faults.lab.evidence import Evidence, Leftovers
from tests.faults.lab.fault import CATALOGUE, Fault
from tests.faults.lab.history import History
from tests.faults.lab.nemesis import Nemesis
from tests.faults.lab.profile import Options
from tests.faults.lab.report import as_dict, as_html, as_text
from tests.faults.lab.sampler import Sampler
from tests.faults.lab.stage import Stage, staged
from tests.faults.lab.witness import QUEUE, Witness

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of it."""

    verdict: Verdict
    evidence: Evidence
    text: str  # the summary
    folder: Path


async def run(options: Options, tell: Tell) -> Result:
    """The whole run. Raises SandboxError when the system could not even be started."""
    folder = options.folder or Path(tempfile.mkdtemp(prefix="relay-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    faults = chosen(options)
    tell(
        f"profile {options.profile.name}, seed {options.seed}, {len(faults)} kinds of fault; everything goes to {folder}"
    )
    with History(folder / "history.jsonl") as history:
        history.record("run", profile=options.profile.name, seed=options.seed, kinds=[f.kind for f in faults])
        async with staged(folder, history, options) as stage:
            tell(f"PostgreSQL {stage.producer_postgres.version}, RabbitMQ, two relays and two consumers are at work")
            evidence = await _work(stage, faults, options, tell)
    verdict = judge(
        evidence,
        kinds_needed=1 if options.kinds else options.profile.kinds_needed,
        bounds={f.kind: f.recovery_s for f in faults},
        must_examine=frozenset() if options.kinds else options.profile.examines,
    )
    text = as_text(evidence, verdict)
    (folder / "report.txt").write_text(text)
    (folder / "report.html").write_text(as_html(evidence, verdict))
    (folder / "report.json").write_text(json.dumps(as_dict(evidence, verdict), indent=1))
    return Result(verdict=verdict, evidence=evidence, text=text, folder=folder)


def chosen(options: Options) -> list[Fault]:
    """The faults of a run, in the order of their names: the seed shuffles them. Raises KeyError for a kind that is not there."""
    kinds.load()
    if options.kinds:
        return [CATALOGUE[kind] for kind in options.kinds]
    return [
        fault
        for _, fault in sorted(CATALOGUE.items())
        if (fault.smoke or not options.profile.smoke)
        and (options.repair or not (fault.loses or fault.needs_repair))
        and fault.needs()
    ]


async def _work(stage: Stage, faults: Sequence[Fault], options: Options, tell: Tell) -> Evidence:
    profile, load, witness = options.profile, stage.workload, Witness(stage.broker.url())
    sampler = Sampler(stage)
    nemesis = Nemesis(stage=stage, faults=faults, profile=profile, seed=options.seed, tell=tell)
    async with _beside(witness.run()):
        await witness.ready.wait()
        began = time.time()
        async with _beside(sampler.run()):
            async with _beside(load.run(), finish=load.stop.set):
                await asyncio.sleep(profile.quiet_s)
                await nemesis.run()
                await asyncio.sleep(profile.quiet_s)
            ended = time.time()
            tell(f"the load is over: {load.outcomes}")
            settled = await _settled(stage, profile.settle_s)
            await sampler.look(processes=True)
        left = await _leftovers(stage)
        stopped = [await _stopped(daemon, stage.history) for daemon in stage.daemons]
        await stage.until(lambda: _is_empty(stage), timeout_s=20, every_s=0.3)
    async with stage.producer() as producer, stage.consumer() as consumer:
        committed = await collect.committed(producer)
        effects, balances = await collect.applied(consumer), await collect.balances(consumer)
        stale, writes = await cursor_log.stale(producer), await cursor_log.writes(producer)
    lines = list(collect.log_lines(stage.daemons))
    tokens = {c.token for c in committed}
    return Evidence(
        seed=options.seed,
        profile=profile.name if options.repair else f"{profile.name} without repair",
        began=began,
        ended=ended,
        settled=settled,
        committed=committed,
        undone=frozenset(load.tokens - tokens),
        effects=effects,
        balances=balances,
        witnessed=witness.messages,
        unwitnessed_types=collect.UNWITNESSED,
        struck=nemesis.struck,
        samples=sampler.samples,
        leftovers=left,
        expected_conflicts=stage.expected_conflicts,
        expected_strangers=stage.expected_strangers,
        transactions=dict(load.outcomes),
        mistaken=[*sorted(load.known["ok"] - tokens), *sorted(load.known["undone"] & tokens)],
        exits=[*collect.exits(stage.daemons), *(words for words in stopped if words)],
        cursor_writes=writes,
        stale_checkpoints=stale,
        log_lines=len(lines),
        complaints=[f"{name}: {line}" for name, line in lines if collect.is_complaint(line)],
    )


async def _stopped(daemon: Daemon, history: History) -> str | None:
    """SIGTERM at the end of everything: a daemon that has nothing to do ends with 0; otherwise in words."""
    with daemon.held():
        code = await daemon.terminate()
    history.record("stopped", daemon=daemon.name, code=code)
    return f"{daemon.name} ended with exit code {code} after SIGTERM" if code else None


async def _settled(stage: Stage, timeout_s: float) -> float | None:
    """When everything was applied and nothing was left over; None if not in time."""

    async def done() -> bool:
        if stage.applied < stage.committed:
            return False
        left = await _leftovers(stage)
        return not any((left.parked, left.held, left.gaps, left.unread, left.queued))

    return time.time() if await stage.until(done, timeout_s=timeout_s, every_s=0.5) else None


async def _leftovers(stage: Stage) -> Leftovers:
    async with stage.producer() as producer, stage.consumer() as consumer:
        return await collect.leftovers(producer, consumer, await collect.lengths(stage))


async def _is_empty(stage: Stage) -> bool:
    """The audit queue: the witness has seen all."""
    return (await collect.lengths(stage)).get(QUEUE, 0) == 0


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None], finish: Callable[[], None] | None = None) -> AsyncIterator[None]:
    """Runs beside what is in front of it: told to finish at its end, or cancelled; what it raises is raised."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(work)
        yield
        if finish is None:
            task.cancel()
        else:
            finish()
