"""What is printed: tables for people, one JSON object with stable keys for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from relay.bench.figures import Latency, Result, Spread, median_latency, medians
from relay.bench.plan import RATIOS, Step
from relay.bench.run import Measured, Report

_PROCESSES = ("producers", "relay", "inbox", "postgresql", "rabbitmq")
_DAEMONS = (
    "drain",
    "live",
    "apply",
    "end-to-end",
    "asleep",
)  # stages in which relay run or relay inbox run is measured
_UNKNOWN = "-"


def as_json(report: Report) -> dict[str, Any]:
    """For `--json`. Numbers as measured, medians beside the figures of every round."""
    return {
        "machine": asdict(report.place),
        "rounds": report.options.rounds,
        "servers": "own" if report.options.own_servers else "throwaway",
        "event_loop": report.options.event_loop,
        "settings": _settings(report),
        "workloads": [
            {
                "workload": asdict(measured.load),
                "results": [_result_json(step, found) for step, found in _found(measured)],
                "ratios": {name: asdict(spread) for name, _, spread in _ratios(measured)},
            }
            for measured in report.measured
        ],
    }


def as_tables(report: Report) -> RenderableType:
    """For people: a table of each workload with its ratios, and the rates of all workloads side by side."""
    parts: list[RenderableType] = [Text(str(report.place))]
    for measured in report.measured:
        parts += [_rate_table(measured), _cost_table(measured), _rest(measured), _ratio_table(measured)]
    if len(report.measured) > 1:
        parts.append(_side_by_side(report))
    return Group(*parts)


def _settings(report: Report) -> dict[str, Any]:
    """Those that matter for speed: no addresses, no names."""
    tuned = report.settings.model_dump(mode="json", include={"outbox", "inbox"})
    client = getattr(report.settings.rabbitmq, "client", "stock")
    return {"rabbitmq": {"client": client}, **tuned}


def _found(measured: Measured) -> Iterator[tuple[Step, list[Result]]]:
    for step in measured.steps:
        results = [found[step.stage, step.variant] for found in measured.rounds if (step.stage, step.variant) in found]
        if results:
            yield step, results


def _ratios(measured: Measured) -> Iterator[tuple[str, str, Spread]]:
    for ratio in RATIOS:
        if (spread := ratio.of(measured.rounds)) is not None:
            yield ratio.name, ratio.told, spread


def _latency(results: list[Result]) -> Latency | None:
    known = [r.latency for r in results if r.latency is not None]
    return median_latency(known) if known else None


def _result_json(step: Step, results: list[Result]) -> dict[str, Any]:
    latency = _latency(results)
    return {
        "stage": step.stage,
        "variant": step.variant,
        "events": results[0].events,
        "rate": asdict(Spread.of([r.rate for r in results])),
        "seconds": asdict(Spread.of([r.seconds for r in results])),
        "latency": None if latency is None else asdict(latency),
        "cpu_us_per_event": medians([r.cpu_us for r in results]),
        "peak_rss_mib": medians([r.rss_mib for r in results]),
        "more": medians([r.more for r in results]),
        "rounds": [asdict(r) | {"rate": r.rate} for r in results],
    }


def _rate_table(measured: Measured) -> Table:
    table = Table(title=f"{measured.load.name}; median of {len(measured.rounds)} (lowest to highest)")
    table.add_column("stage")
    for name in ("events/s", "p50 ms", "p99 ms", "p99.9 ms"):
        table.add_column(name, justify="right")
    for step, results in _found(measured):
        latency = _latency(results)
        delays = () if latency is None else (latency.p50_ms, latency.p99_ms, latency.p999_ms)
        table.add_row(
            step.told,
            _spread(Spread.of([r.rate for r in results]), ",.0f"),
            *(f"{d:,.1f}" for d in delays),
        )
    return table


def _cost_table(measured: Measured) -> Table:
    """Of each process, by the names of the stages; and what else they found."""
    table = Table(title="processor time, us an event; highest memory of our processes, MiB")
    table.add_column("stage")
    for name in (*_PROCESSES, "MiB"):
        table.add_column(name, justify="right")
    for step, results in _found(measured):
        cpu = medians([r.cpu_us for r in results])
        table.add_row(
            f"{step.stage} {step.variant}",
            *(_cpu(cpu, process) for process in _PROCESSES),
            _memory(medians([r.rss_mib for r in results])),
        )
    return table


def _rest(measured: Measured) -> Text:
    """What only some stages have."""
    lines = []
    for step, results in _found(measured):
        more = [
            f"{name} {_number(value)}"
            for name, value in medians([r.more for r in results]).items()
            if value is not None
        ]
        if more:
            lines.append(f"{step.stage} {step.variant}: {', '.join(more)}")
    return Text("\n".join(lines))


def _ratio_table(measured: Measured) -> RenderableType:
    table = Table(title="ratios, each within its round: median (lowest to highest)")
    table.add_column("ratio")
    table.add_column("", justify="right")
    for _, told, spread in _ratios(measured):
        table.add_row(told, _spread(spread, ".2f"))
    return table if table.rows else Text("")


def _side_by_side(report: Report) -> Table:
    """Median rates and the daemons' memory by workload: a cliff is seen here."""
    table = Table(title="events/s by workload, medians; highest memory of the daemons, MiB")
    for name in ("events", "bytes", "aggregates"):
        table.add_column(name, justify="right")
    found = [{f"{s.stage} {s.variant}": results for s, results in _found(m)} for m in report.measured]
    names = list(dict.fromkeys(name for results in found for name in results))
    for name in (*names, "MiB"):
        table.add_column(name, justify="right")
    for measured, results in zip(report.measured, found, strict=True):
        load = measured.load
        rates = (_rate(results[name]) if name in results else "" for name in names)
        sizes = (f"{n:,}" for n in (load.events, load.payload_bytes, load.aggregates))
        table.add_row(*sizes, *rates, _daemons_memory(results.values()))
    return table


def _rate(results: Sequence[Result]) -> str:
    return format(Spread.of([r.rate for r in results]).median, ",.0f")


def _daemons_memory(found: Iterable[Sequence[Result]]) -> str:
    """Not that of the ceilings, which hold all messages."""
    each = [r for results in found for r in results if r.stage in _DAEMONS]
    known = [mib for r in each for name, mib in r.rss_mib.items() if name != "producers" and mib is not None]
    return f"{max(known):,.0f}" if known else _UNKNOWN


def _spread(spread: Spread, form: str) -> str:
    if spread.low == spread.high:
        return format(spread.median, form)
    return f"{spread.median:{form}} ({spread.low:{form}} to {spread.high:{form}})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"


def _cpu(cpu: Mapping[str, float | None], process: str) -> str:
    if process not in cpu:
        return ""
    value = cpu[process]
    return _UNKNOWN if value is None else f"{value:,.1f}"


def _memory(rss: Mapping[str, float | None]) -> str:
    return " ".join(_UNKNOWN if value is None else f"{value:,.0f}" for value in rss.values())
