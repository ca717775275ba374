"""The endurance run, as far as it is pure: probes become windows and bursts, and windows a picture."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from tests.bench.endurance.load import Plan
from tests.bench.endurance.plot import drawing
from tests.bench.endurance.windows import CAUGHT_UP, Burst, Meter, Window, minute, percentile
from tests.bench.flat_cost import Measured, Way, table


def closed(meter: Meter, now: float, *, held: bool = False) -> Window:
    return meter.window(now, held=held, relay_cpu=0.1, dead_rows=5, table_bytes=100)


def test_a_window_tells_what_arrived_since_the_last_one_and_what_is_still_missing() -> None:
    meter = Meter("relay")
    for number in range(10, 1010, 10):
        meter.insert(number, 0.002)
        meter.arrive(number / 200, number, 0.010, quiet=True)
    meter.insert(1500, 0.004)
    window = closed(meter, 5.0)
    assert (window.rate, window.backlog) == (200.0, 491)  # 491 to 500: probes tell it in tens
    assert (window.p50_ms, window.p99_ms, window.insert_ms) == (10.0, 10.0, 2.0)
    meter.arrive(6.0, 1500, 0.5, quiet=True)
    assert closed(meter, 10.0).rate == 100.0


def test_few_probes_give_no_percentile() -> None:
    meter = Meter("relay")
    for _ in range(19):
        meter.arrive(1.0, 10, 0.01, quiet=True)
    assert closed(meter, 5.0).p99_ms is None


def test_probes_behind_a_burst_do_not_count_for_latency() -> None:
    meter = Meter("relay")
    for n in range(100):
        meter.arrive(1.0, 10, 0.01 if n % 2 else 9.0, quiet=bool(n % 2))
    assert closed(meter, 5.0).p99_ms == 10.0


def test_a_burst_ends_when_all_of_it_arrived_and_the_backlog_is_the_usual_one() -> None:
    meter = Meter("textbook")
    meter.insert(1000, 0.01)
    meter.arrive(1.0, 1000, 0.01, quiet=True)
    meter.burst(2.0, 11_000, held=True)
    meter.insert(12_000, 0.01)
    meter.arrive(4.0, 11_000, 1.0, quiet=False)
    assert not meter.bursts, "more than the usual backlog is missing"
    meter.arrive(7.0, 12_000 - CAUGHT_UP, 1.0, quiet=False)
    (burst,) = meter.bursts
    assert not meter.bursting
    assert (burst.held, burst.seconds, burst.rate) == (True, 5.0, (12_000 - CAUGHT_UP - 1000) / 5)


def test_a_percentile_is_a_value_that_was_seen() -> None:
    assert percentile([1, 2, 3, 4], 0.5) == 2
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([7], 0.99) == 7


def test_the_sides_get_their_bursts_half_a_round_apart_and_none_at_the_very_end() -> None:
    plan = Plan(seconds=120, hold=(0, 0), rate=100)
    assert plan.bursts(0) == [15.0, 75.0]
    assert plan.bursts(1) == [45.0]
    assert Plan(seconds=120, hold=(0, 0), rate=100, burst_every_s=0).bursts(0) == []


def windows(minutes: int = 10) -> list[Window]:
    found = []
    for n in range(1, minutes * 12 + 1):
        for side in ("relay", "textbook"):
            slow = 1.0 if side == "relay" else 1.0 + n
            found.append(
                Window(
                    side=side,
                    second=5.0 * n,
                    held=24 < n <= 96,
                    rate=2000.0,
                    backlog=int(10 * slow),
                    p50_ms=3 * slow,
                    p99_ms=None if n == 50 else 12 * slow,
                    insert_ms=1.0,
                    relay_cpu=0.1,
                    dead_rows=n * 1000,
                    table_bytes=n,
                )
            )
    return found


def test_a_minute_is_twelve_windows_of_one_side() -> None:
    assert [w.second for w in minute(windows(), "relay", 2)] == [65.0 + 5 * n for n in range(12)]


def test_the_picture_is_wellformed_small_and_interrupted_where_nothing_was_measured() -> None:
    bursts = [
        Burst(side=side, second=60.0 * n + 15, held=False, events=10_000, seconds=2.0)
        for n in range(10)
        for side in ("relay", "textbook")
    ]
    svg = drawing(windows(), bursts, sides=("relay", "textbook"), about="2,000 events/s & <held>")
    root = ElementTree.fromstring(svg)  # noqa: S314 - made by ourselves
    assert len(svg.encode()) < 60_000
    names = {"s": "http://www.w3.org/2000/svg"}
    charts = root.findall("s:svg", names)
    assert len(charts) == 4
    assert [len(c.findall("s:polyline", names)) for c in charts] == [2, 4, 2, 2]
    assert all(len(c.findall("s:rect[@class='shade']", names)) == 1 for c in charts)


def test_flat_cost_is_the_ratio_of_medians_to_those_of_the_size_compared_with_and_to_raw_publishing() -> None:
    def measured(size: int, way: Way, us: float, *, number: int = 1) -> Measured:
        cpu_us = {"relay": us / 2, "rabbitmq": None}
        return Measured(size=size, way=way, round=number, events=size, wall_us=us, cpu_us=cpu_us)

    found = [
        *(measured(100, "analysed", us, number=n) for n, us in enumerate((10, 20, 90))),
        measured(100, "never analysed", 30),
        measured(100, "raw", 10),
        measured(1000, "analysed", 22),
        measured(1000, "never analysed", 18),
        measured(1000, "raw", 11),
    ]
    rows = table(found, against=100)
    assert [(r["events"], r["way"], r["ratio"], r["of_raw"]) for r in rows] == [
        (100, "raw", 1.0, 1.0),
        (100, "analysed", 1.0, 2.0),
        (100, "never analysed", 1.5, 3.0),
        (1000, "raw", 1.1, 1.0),
        (1000, "analysed", 1.1, 2.0),
        (1000, "never analysed", 0.9, 1.636),
    ]
    assert rows[1]["cpu_us"] == {"relay": 10.0, "rabbitmq": None}
