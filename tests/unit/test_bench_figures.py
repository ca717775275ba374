"""The benchmark's arithmetic: percentiles, medians, ratios; disorder that is as promised; stamps; processor time from /proc."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from relay.bench.disorder import disordered, in_windows
from relay.bench.figures import (
    Latency,
    MeasurementFailed,
    Ratio,
    Result,
    Spread,
    median_latency,
    medians,
    percentile,
    ratio,
)
from relay.bench.plan import CEILINGS, RATIOS, STAGES, steps
from relay.bench.proc import listener, peak_rss_mib, tree_cpu_s
from relay.bench.roles.producers import shares
from relay.bench.stamps import CONNECTIONS, now_ns, stamp, stamp_of
from relay.bench.workload import Workload
from relay.cli.bench import bench

LOAD = Workload(events=1000, aggregates=10, payload_bytes=256)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([5.0], 0.5, 5.0),
        ([5.0], 0.999, 5.0),
        ([1.0, 2.0], 0.5, 1.0),
        ([1.0, 2.0, 3.0], 0.5, 2.0),
        ([float(n) for n in range(1, 101)], 0.99, 99.0),
        ([float(n) for n in range(1, 101)], 0.999, 100.0),
        ([float(n) for n in range(1, 1001)], 0.999, 999.0),
        ([float(n) for n in range(1, 1002)], 0.999, 1000.0),
    ],
)
def test_a_percentile_is_the_smallest_value_that_the_share_does_not_exceed(
    values: list[float], share: float, expected: float
) -> None:
    assert percentile(values, share) == expected


def test_a_latency_is_told_in_milliseconds_whatever_the_order() -> None:
    found = Latency.of([0.003, 0.001, 0.002])
    assert (found.samples, found.p50_ms, found.p99_ms, found.p999_ms, found.max_ms) == (3, 2.0, 3.0, 3.0, 3.0)


def test_no_delay_at_all_is_a_failed_measurement() -> None:
    with pytest.raises(MeasurementFailed, match="no delay"):
        Latency.of([])


def test_over_rounds_each_percentile_is_a_median_and_the_worst_is_the_worst() -> None:
    rounds = [Latency(10, 1, 5, 7, 9), Latency(10, 3, 4, 8, 20), Latency(10, 2, 9, 9, 10)]
    assert median_latency(rounds) == Latency(30, 2, 5, 8, 20)


def test_what_one_round_could_not_tell_has_no_median() -> None:
    assert medians([{"a": 1.0, "b": None}, {"a": 3.0, "b": 2.0}, {"a": 2.0, "b": 2.0}]) == {"a": 2.0, "b": None}


def test_a_ratio_to_nothing_is_none() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(3.0, 0.0) is None


def _result(stage: str, seconds: float, **more: float) -> Result:
    return Result(stage=stage, variant="x", events=100, seconds=seconds, more=more)


def test_ratios_are_taken_within_a_round_and_only_then_is_the_median_taken() -> None:
    # The machine was three times slower in the second round: the ratio of medians would not notice what each round tells.
    pairs = [(2.0, 1.0), (6.0, 3.0), (4.0, 1.0)]
    rounds = [{r.key: r for r in (_result("a", a), _result("b", b))} for a, b in pairs]
    assert Ratio("", "", ("a", "x"), ("b", "x"), "seconds").of(rounds) == Spread(2.0, 2.0, 4.0)
    assert Ratio("", "", ("a", "x"), ("b", "x")).of(rounds) == Spread(0.5, 0.25, 0.5)


def test_a_ratio_of_something_else_than_the_rate() -> None:
    rounds = [{r.key: r for r in (_result("a", 1, ms=3.0), _result("b", 1, ms=2.0))}]
    assert Ratio("", "", ("a", "x"), ("b", "x"), "ms").of(rounds) == Spread(1.5, 1.5, 1.5)


def test_a_ratio_without_both_is_none() -> None:
    assert Ratio("", "", ("a", "x"), ("b", "x")).of([{("a", "x"): _result("a", 1)}]) is None


def test_every_ratio_is_between_steps_that_exist_and_its_name_is_its_own() -> None:
    keys = {(step.stage, step.variant) for step in steps((), LOAD)}
    assert {ratio.above for ratio in RATIOS} | {ratio.below for ratio in RATIOS} <= keys
    assert len({ratio.name for ratio in RATIOS}) == len(RATIOS)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_brings_its_ceilings_and_nothing_else(stage: str) -> None:
    assert {step.stage for step in steps((stage,), LOAD)} == {stage, *CEILINGS.get(stage, ())}


def test_the_command_offers_exactly_the_stages_that_there_are() -> None:
    (option,) = (p for p in bench.params if p.name == "stages")
    assert tuple(getattr(option.type, "choices", ())) == STAGES


# --- the load


def test_large_payloads_are_fewer_so_that_memory_and_disks_hold_them() -> None:
    many = Workload(events=1_000_000, aggregates=1, payload_bytes=65536).bounded()
    assert many.events == 4096
    assert Workload(events=50, aggregates=1, payload_bytes=1024 * 1024).bounded().events == 50
    small = Workload(events=5_000_000, aggregates=1, payload_bytes=256)
    assert small.bounded() == small


def test_the_fill_makes_a_payload_of_that_size() -> None:
    assert len('{"fill": "' + LOAD.fill + '"}') == LOAD.payload_bytes


def test_shares_differ_by_one_at_most() -> None:
    assert shares(10, 3) == [4, 3, 3]
    assert shares(1, 2) == [1, 0]


# --- disorder

ITEMS = [(n % 50, n // 50 + 1) for n in range(5000)]  # (aggregate, seq), round robin


def test_without_disorder_everything_comes_once_and_as_it_was() -> None:
    found = disordered(ITEMS, key=lambda i: i[0], share=0.0, window=700, dice=random.Random(1))
    assert [i for window in found.windows for i in window] == ITEMS
    assert (found.duplicates, found.swaps) == (0, 0)
    assert list(found.windows) == in_windows(ITEMS, 700)


def test_a_tenth_comes_twice_and_a_tenth_is_swapped_with_its_successor() -> None:
    found = disordered(ITEMS, key=lambda i: i[0], share=0.1, window=700, dice=random.Random(1))
    flat = [i for window in found.windows for i in window]
    assert 350 < found.duplicates < 650
    assert 250 < found.swaps < 650
    counts = Counter(flat)
    assert set(counts) == set(ITEMS)
    assert sum(counts.values()) == len(ITEMS) + found.duplicates
    first = list(dict.fromkeys(flat))
    early = sum(1 for place, (aggregate, seq) in enumerate(first) if (aggregate, seq - 1) in first[place + 1 :])
    assert early == found.swaps


def test_no_window_holds_anything_twice() -> None:
    found = disordered(ITEMS, key=lambda i: i[0], share=0.3, window=500, dice=random.Random(2))
    assert all(len(set(window)) == len(window) for window in found.windows)


def test_where_successors_are_far_away_nothing_is_swapped() -> None:
    alone = [(n, 1) for n in range(1000)]
    assert disordered(alone, key=lambda i: i[0], share=0.5, window=100, dice=random.Random(1)).swaps == 0


# --- stamps


def test_a_stamp_is_read_back_from_the_payload_as_postgresql_prints_it() -> None:
    at = stamp(7)
    assert stamp_of(b'{"at": %d, "fill": "xxx"}' % at) == at
    assert stamp_of(b'{"fill": "xxx"}') is None
    assert stamp_of(b"") is None


def test_stamps_of_different_connections_differ_and_are_of_this_moment() -> None:
    before = now_ns()
    found = [stamp(connection) for connection in range(64)]
    assert len(set(found)) == 64
    assert [at % CONNECTIONS for at in found] == list(range(64))
    assert all(before - CONNECTIONS < at <= now_ns() + CONNECTIONS for at in found)


# --- /proc

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells it under /proc")


@linux
def test_processor_time_counts_children_that_run_and_those_that_have_ended() -> None:
    before = tree_cpu_s(os.getpid())
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    subprocess.run([sys.executable, "-c", burn], check=True)
    after = tree_cpu_s(os.getpid())
    assert before is not None
    assert after is not None
    assert after - before >= 0.28


@linux
def test_a_process_that_is_gone_has_no_processor_time() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert tree_cpu_s(gone.pid) is None


@linux
def test_the_highest_memory_of_this_process_is_some() -> None:
    found = peak_rss_mib()
    assert found is not None
    assert 10 < found < 10_000


@linux
def test_who_listens_on_a_port_is_found_by_port_and_name() -> None:
    name = Path("/proc/self/comm").read_text().strip()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listener(port, name) == os.getpid()
        assert listener(port, "somebody-else") is None
    assert listener(port, name) is None
