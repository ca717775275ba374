"""What can be measured: the stages by name, what each is measured against, and the ratios that are printed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from relay.bench.figures import Key, Ratio, Result
from relay.bench.measure import Bench
from relay.bench.stages.inbox import DISORDER, apply, consume, statements
from relay.bench.stages.live import live
from relay.bench.stages.outbox import drain, insert, publish, read
from relay.bench.stages.whole import asleep, end_to_end
from relay.bench.workload import Workload

QUEUE_TYPES = ("quorum", "classic")
HANDLERS: Mapping[str, str] = {
    "batch": "a batch handler, one statement for many",
    "statement": "a handler of one statement a message",
    "empty": "an empty handler",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One measurement of one round."""

    stage: str
    variant: str
    told: str  # for people
    run: Callable[[Bench, Workload], Awaitable[Result]]


def _inserts(_: Workload) -> Iterable[Step]:
    ways = {
        "one": "one row a transaction",
        "statement": "500 rows a statement",
        "emit_many": "emit_many of 500 events",
    }
    for way, told in ways.items():
        yield Step("insert", way, f"outbox insert, {told}", partial(insert, way=way))


def _reads(_: Workload) -> Iterable[Step]:
    yield Step("read", "reader", "ceiling: reading the outbox, nothing published", read)


def _publishes(_: Workload) -> Iterable[Step]:
    for kind in QUEUE_TYPES:
        yield Step(
            "publish", kind, f"ceiling: confirmed publishing without the database, {kind}", partial(publish, kind=kind)
        )


def _drains(_: Workload) -> Iterable[Step]:
    for kind in QUEUE_TYPES:
        yield Step("drain", kind, f"relay run --drain, {kind}", partial(drain, kind=kind))


def _lives(load: Workload) -> Iterable[Step]:
    each = f", {load.live_rows} events each" if load.live_rows > 1 else ""
    rate = f"producers at {load.live_rate:,} transactions/s{each}"
    yield Step("live", "without", f"{rate}, no relay", partial(live, variant="without"))
    yield Step("live", "relay", f"{rate}, relay run; insert to confirm", partial(live, variant="relay"))


def _consumes(_: Workload) -> Iterable[Step]:
    yield Step("consume", "quorum", "ceiling: consume and acknowledge without the database", consume)


def _statements(_: Workload) -> Iterable[Step]:
    yield Step("statements", "bare", "ceiling: the handler's statement on one connection", statements)


def _applies(_: Workload) -> Iterable[Step]:
    for share in (0.0, DISORDER):
        for handler, told in HANDLERS.items():
            variant, disorder = (f"{handler}-disorder", ", 10 % twice, 10 % swapped") if share else (handler, "")
            yield Step(
                "apply", variant, f"relay inbox run, {told}{disorder}", partial(apply, handler=handler, share=share)
            )


def _end_to_ends(load: Workload) -> Iterable[Step]:
    for rate in load.rates:
        told = f"insert to handler commit at {rate:,}/s, everything running"
        yield Step("end-to-end", f"{rate}/s", told, partial(end_to_end, rate=rate))


def _asleeps(_: Workload) -> Iterable[Step]:
    yield Step("asleep", "one by one", "asleep: producer commit to handler commit", asleep)


_STEPS: Mapping[str, Callable[[Workload], Iterable[Step]]] = {
    "insert": _inserts,
    "read": _reads,
    "publish": _publishes,
    "drain": _drains,
    "live": _lives,
    "consume": _consumes,
    "statements": _statements,
    "apply": _applies,
    "end-to-end": _end_to_ends,
    "asleep": _asleeps,
}
STAGES = tuple(_STEPS)

CEILINGS: Mapping[str, tuple[str, ...]] = {"drain": ("read", "publish"), "apply": ("consume", "statements")}
"""What is measured with a stage, so that its ratio to the ceiling is one of the same run."""


def steps(stages: Iterable[str], load: Workload) -> list[Step]:
    """The measurements of one round, in the order of a message's way; with their ceilings. No stage: all of them."""
    asked = set(stages) or set(STAGES)
    asked |= {ceiling for stage in asked for ceiling in CEILINGS.get(stage, ())}
    return [step for name in STAGES if name in asked for step in _STEPS[name](load)]


def _against(stage: str, variant: str, below: Key, told: str) -> Ratio:
    return Ratio(f"{stage}/{variant} : {below[0]}/{below[1]}", told, (stage, variant), below)


RATIOS: tuple[Ratio, ...] = (
    *(_against("drain", k, ("publish", k), f"relay drain to raw publishing, {k}") for k in QUEUE_TYPES),
    *(_against("drain", k, ("read", "reader"), f"relay drain to raw reading, {k}") for k in QUEUE_TYPES),
    *(
        _against(
            "apply", f"{h}{d}", ("consume", "quorum"), f"inbox to raw consuming, {h} handler{', disorder' * bool(d)}"
        )
        for d in ("", "-disorder")
        for h in ("batch", "empty")
    ),
    *(
        _against("apply", f"statement{d}", ("statements", "bare"), f"inbox to bare statements{', disorder' * bool(d)}")
        for d in ("", "-disorder")
    ),
    Ratio(
        "live/relay : live/without, transaction_ms",
        "a transaction's time with the relay to that without",
        ("live", "relay"),
        ("live", "without"),
        "transaction_ms",
    ),
    Ratio(
        "live/relay : live/without, seconds",
        "the producers' wall clock with the relay to that without",
        ("live", "relay"),
        ("live", "without"),
        "seconds",
    ),
)
