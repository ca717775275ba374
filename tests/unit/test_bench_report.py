"""What `relay bench` prints: names that scripts rely on, and what was not to be had is not made up."""

from __future__ import annotations

import io
import json

from rich.console import Console

from relay.bench.figures import Key, Latency, Result
from relay.bench.machine import Place
from relay.bench.plan import steps
from relay.bench.report import as_json, as_tables
from relay.bench.run import Measured, Options, Report
from relay.bench.workload import Workload
from relay.settings import Settings

LOAD = Workload(events=1000, aggregates=10, payload_bytes=256)
PLACE = Place(
    cores=2,
    machine="a machine",
    memory_gib=24.0,
    system="Linux",
    python="3.11.7",
    postgresql={"version": "15.1", "fsync": "on"},
    rabbitmq={"version": "3.10.8", "platform": "Erlang/OTP 25"},
    libraries={"asyncpg": "0.31.0"},
)


def _round(seconds: float) -> dict[Key, Result]:
    """Publishing takes a second; draining as long as given."""
    cpu = {"relay": 4.2, "postgresql": None}
    publish = Result(stage="publish", variant="quorum", events=1000, seconds=1.0, cpu_us=cpu, rss_mib={"relay": 50.0})
    drain = Result(
        stage="drain",
        variant="quorum",
        events=1000,
        seconds=seconds,
        latency=Latency(10, 1.25, 2.0, 3.0, 4.0),
        cpu_us=cpu,
        rss_mib={"relay": None},
        more={"whole_s": 7.0},
    )
    return {publish.key: publish, drain.key: drain}


def _report(*loads: Workload) -> Report:
    rounds = tuple(_round(seconds) for seconds in (2.0, 1.0, 4.0))
    measured = tuple(Measured(load, tuple(steps(("drain",), load)), rounds) for load in loads)
    return Report(PLACE, Options(loads=loads), Settings(), measured)


def _printed(report: Report) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(as_tables(report))
    return out.getvalue()


def test_the_json_has_medians_spreads_and_every_round() -> None:
    report = json.loads(json.dumps(as_json(_report(LOAD))))
    assert set(report) == {"machine", "rounds", "servers", "event_loop", "settings", "workloads"}
    (found,) = report["workloads"]
    assert found["workload"]["aggregates"] == 10
    publish, drain = found["results"]
    assert (drain["stage"], drain["variant"], drain["events"]) == ("drain", "quorum", 1000)
    assert drain["rate"] == {"median": 500.0, "low": 250.0, "high": 1000.0}
    assert drain["latency"]["p50_ms"] == 1.25
    assert drain["cpu_us_per_event"] == {"relay": 4.2, "postgresql": None}
    assert [r["seconds"] for r in drain["rounds"]] == [2.0, 1.0, 4.0]
    assert publish["latency"] is None
    assert found["ratios"] == {"drain/quorum : publish/quorum": {"median": 0.5, "low": 0.25, "high": 1.0}}


def test_no_address_and_no_secret_is_in_it() -> None:
    text = json.dumps(as_json(_report(LOAD)))
    assert "postgresql://" not in text
    assert "amqp://" not in text


def test_the_tables_say_what_was_measured_and_a_dash_for_what_was_not_to_be_had() -> None:
    text = _printed(_report(LOAD))
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert "relay run --drain, quorum 500 (250 to 1,000) 1.2 2.0 3.0" in lines
    assert "drain quorum 4.2 - -" in lines
    assert "relay drain to raw publishing, quorum 0.50 (0.25 to 1.00)" in lines
    assert "drain quorum: whole_s 7" in lines


def test_several_workloads_are_shown_side_by_side() -> None:
    other = Workload(events=1000, aggregates=1_000_000, payload_bytes=256)
    assert "events/s by workload" not in _printed(_report(LOAD))
    text = _printed(_report(LOAD, other))
    assert "events/s by workload" in text
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert "1,000 256 10 1,000 500 -" in lines
    assert "1,000 256 1,000,000 1,000 500 -" in lines
