"""The comparison with other relays and inboxes, as far as it is pure: what is measured, counted and told. The run itself needs registries."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from relay.message import SEQUENCE
from tests.bench.peers import inbox, outbox
from tests.bench.peers.contenders import Contender, Packages
from tests.bench.peers.figures import Run, as_json, fastest_peer, lines, table
from tests.bench.peers.install import NotInstalled, _run
from tests.bench.peers.messages import Wanted, pages
from tests.bench.peers.place import DRIVERS
from tests.bench.peers.watch import STALLED_S, Stalled, Watch

CONTENDERS = outbox.CONTENDERS + inbox.CONTENDERS


# What is measured


def test_the_clock_runs_from_the_first_arrival_to_the_last_and_start_up_is_left_out() -> None:
    watch = Watch(1000)
    assert watch.look(10.0, 0) is None
    assert watch.look(12.0, 200) is None
    assert watch.look(13.0, 600) is None
    seen = watch.look(14.0, 1000)
    assert seen is not None
    assert (seen.events, seen.seconds, seen.rate) == (800, 2.0, 400.0)


def test_a_run_that_brings_nothing_more_for_a_minute_has_stalled() -> None:
    watch = Watch(1000)
    watch.look(0.0, 10)
    assert watch.look(STALLED_S, 10) is None
    with pytest.raises(Stalled, match="10 of 1,000 arrived"):
        watch.look(STALLED_S + 0.1, 10)


def test_a_run_that_never_begins_has_stalled() -> None:
    watch = Watch(1000)
    watch.look(5.0, 0)
    with pytest.raises(Stalled, match="0 of 1,000"):
        watch.look(5.1 + STALLED_S, 0)


def test_a_run_that_was_over_before_the_first_look_is_no_figure() -> None:
    with pytest.raises(Stalled, match="too few to measure"):
        Watch(10).look(1.0, 10)


# What is told


def ran(contender: str, *rates: float, queue_type: str = "quorum", in_order: bool | None = None) -> list[Run]:
    return [
        Run(
            contender=contender,
            queue_type=queue_type,
            round=n,
            events=100,
            rate=rate,
            wall_s=1,
            cpu_us=5,
            in_order=in_order,
        )
        for n, rate in enumerate(rates, 1)
    ]


RUNS = [
    *ran("slow", 10, 12, 500),
    *ran("relay", 1000, 900, 1200),
    *ran("fast", 240, 250, 260),
    *ran("relay", 300, queue_type="classic"),
    *ran("fast", 200, queue_type="classic"),
]


def test_ratios_are_of_medians_on_the_same_type_of_queue() -> None:
    found = {(line.queue_type, line.contender): line for line in lines(RUNS, ours=["relay"])}
    assert found["quorum", "fast"].ours == {"relay": 4.0}
    assert found["quorum", "slow"].ours["relay"] == pytest.approx(1000 / 12)
    assert found["classic", "fast"].ours == {"relay": 1.5}
    assert (found["quorum", "slow"].lowest, found["quorum", "slow"].highest) == (10, 500)


def test_the_fastest_peer_is_none_of_ours() -> None:
    found = lines(RUNS, ours=["relay"])
    peer = fastest_peer(found, "quorum", ours=["relay"])
    assert peer is not None
    assert peer.contender == "fast"
    assert as_json(RUNS, found, ours=["relay"], about={})["fastest_peer"]["classic"]["rate"] == 200


def test_the_table_is_one_line_for_each_contender_the_fastest_first() -> None:
    rows = table(lines(RUNS, ours=["relay"]), ours=["relay"]).splitlines()
    assert [row.split(" | ")[:2] for row in rows[2:]] == [
        ["| classic", "relay"],
        ["| classic", "fast"],
        ["| quorum", "relay"],
        ["| quorum", "fast"],
        ["| quorum", "slow"],
    ]
    assert len({row.count("|") for row in rows}) == 1


def test_an_inbox_that_was_out_of_order_once_is_not_in_order() -> None:
    runs = ran("inbox", 1, in_order=True) + ran("inbox", 1, in_order=False)
    assert [line.in_order for line in lines(runs, ours=[])] == [False]


# What inboxes are given


def test_each_event_is_sent_and_only_the_chosen_share_twice() -> None:
    wanted = Wanted(events=5000, aggregates=100, duplicates=0.1)
    counts = Counter(message.message_id for page in pages(wanted) for message in page)
    assert len(counts) == 5000
    assert set(counts.values()) == {1, 2}
    assert 400 < sum(count == 2 for count in counts.values()) < 600


def test_ids_are_distinct_within_a_page_also_among_duplicates() -> None:
    for page in pages(Wanted(events=3000, aggregates=10, duplicates=0.9)):
        assert len({message.message_id for message in page}) == len(page)


@pytest.mark.parametrize(("swaps", "least", "most"), [(0.0, 0, 0), (0.1, 200, 300)])
def test_the_chosen_share_of_messages_changes_places_with_the_next_one_of_its_aggregate(
    swaps: float, least: int, most: int
) -> None:
    last: Counter[object] = Counter()
    backwards = 0
    for page in pages(Wanted(events=5000, aggregates=100, swaps=swaps)):
        for message in page:
            aggregate, seq = message.headers["x-aggregate-id"], message.headers[SEQUENCE]
            assert isinstance(seq, int)
            backwards += seq < last[aggregate]
            last[aggregate] = seq
    assert least <= backwards <= most


def test_the_same_seed_gives_the_same_messages() -> None:
    wanted = Wanted(events=1000, aggregates=10, duplicates=0.1, swaps=0.1, seed=7)
    assert list(pages(wanted)) == list(pages(wanted))


# Who is compared


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: f"{c.side}: {c.name}")
def test_each_contender_says_how_it_is_run_and_what_it_promises(contender: Contender) -> None:
    assert contender.how
    assert contender.order
    assert contender.safety
    if contender.packages is not None:
        assert (DRIVERS / contender.driver).is_file()
    if contender.side == "outbox":
        assert {"$1", "$2", "$3"} <= set(re.findall(r"\$\d", contender.fill))


@pytest.mark.parametrize("packages", {c.packages.key: c.packages for c in CONTENDERS if c.packages}.values())
def test_the_packages_that_are_compared_are_pinned(packages: Packages) -> None:
    for pin in packages.pins:
        assert re.fullmatch(r"[a-z-]+(\[[a-z,]+\])?==[\d.]+|[a-z-]+@[\d.]+", pin), pin


def test_a_failed_installation_says_what_the_client_said() -> None:
    with pytest.raises(NotInstalled, match="no such place"):
        _run(["sh", "-c", "echo no such place >&2; exit 3"])
