"""The report is one page that needs nothing else, shows every fault, tells every finding, and trusts no text."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tests.faults.lab.charts import Time, decades, round_steps, thinned
from tests.faults.lab.checker import Verdict, judge
from tests.faults.lab.evidence import Evidence, Process, Struck
from tests.faults.lab.report import as_dict, as_html, as_text
from tests.faults.lab.spans import merged
from tests.faults.lab.tally import BUCKET_S, by_kind, latency_lines, memory_lines
from tests.faults.lab.verdict import MB
from tests.faults.test_checker import (
    A1,
    BEGAN,
    BOUNDS,
    GOOD,
    SECONDS,
    samples,
    with_fault,
    with_latency,
    without_effect,
)

HOSTILE = "<script>alert('x')</script>\x1b[31m&\ud800\n\"quoted\""


class Page(HTMLParser):
    """What a browser would see. Raises AssertionError where it would have to guess."""

    EMPTY = frozenset({"meta", "br"})

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self.texts: list[str] = []
        self.references: list[str] = []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has {name}"
            if name == "class":
                self.classes.update((value or "").split())
            if name in {"src", "href", "xlink:href", "action", "style", "data"}:
                self.references.append(f"{tag} {name}")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def judged(evidence: Evidence, kinds_needed: int = 3) -> Verdict:
    return judge(evidence, kinds_needed=kinds_needed, bounds=BOUNDS)


def page(evidence: Evidence) -> Page:
    return Page(as_html(evidence, judged(evidence)))


@pytest.fixture(scope="module")
def good() -> Page:
    return page(GOOD)


def test_the_page_needs_no_other_file_and_no_script(good: Page) -> None:
    assert good.references == []
    assert not good.seen.keys() & {"script", "link", "img", "iframe", "object", "embed", "image", "use"}
    assert not re.search(r"@import|url\(", as_html(GOOD, judged(GOOD)))


def test_the_page_is_light_or_dark_as_its_reader_is(good: Page) -> None:
    assert "prefers-color-scheme: dark" in good.text


def test_the_page_says_what_came_of_the_run_and_how_to_repeat_it(good: Page) -> None:
    assert good.classes["passed"] == 1
    assert "3,600 events, 3 faults of 3 kinds: each applied once, in order, with its own content" in good.text
    assert "profile by hand, seed 7" in good.text


def test_every_fault_has_its_bar_and_every_kind_its_lane() -> None:
    again = replace(GOOD.struck[0], begun=BEGAN + 90, healed=BEGAN + 92)
    seen = page(replace(GOOD, struck=[*GOOD.struck, again]))
    assert seen.classes["bar"] == 4
    assert seen.classes["stripe0"] + seen.classes["stripe1"] == 3
    assert "relay killed, 1:30 to 1:32, bites: 1, recovered from in 50 ms" in seen.text


def test_the_bar_of_a_fault_shows_what_it_did() -> None:
    def bars(evidence: Evidence) -> list[str]:
        return re.findall(r'class="bar (\w+)"', as_html(evidence, judged(evidence)))

    assert bars(GOOD) == ["bit", "bit", "confined"]
    assert bars(with_fault(0, bites=0)(GOOD)) == ["toothless", "bit", "confined"]
    assert bars(with_fault(0, failure="OSError")(GOOD)) == ["broken", "bit", "confined"]


def test_the_page_draws_faults_backlog_latency_and_memory(good: Page) -> None:
    assert good.seen["svg"] == 4
    assert good.seen["polygon"] == 1  # the backlog's area
    assert good.seen["polyline"] == 1 + 2 + 1  # backlog, 50 % and 99 %, one daemon's memory


def test_all_checks_are_listed_with_what_they_looked_at_and_found(good: Page) -> None:
    verdict = judged(GOOD)
    for check in (*verdict.checks, *verdict.doubts):
        assert check.claim in good.text
    assert "nothing to examine" not in good.text
    assert "nothing to examine" in page(replace(GOOD, struck=())).text


def test_findings_come_first_and_name_the_event() -> None:
    bad = page(without_effect(A1, 12)(GOOD))
    assert bad.classes["failed"] == 1
    assert bad.text.index("account/a1 number 12 (token a1-12) was never applied") < bad.text.index("The run")


def test_hostile_text_is_shown_and_never_taken_for_markup() -> None:
    fault = Struck(
        kind=HOSTILE,
        begun=BEGAN + 5,
        healed=BEGAN + 6,
        bites=1,
        failure=HOSTILE,
        broken=HOSTILE,
        note=HOSTILE,
        confined_to=HOSTILE,
    )
    key = (HOSTILE, HOSTILE)
    committed = [replace(c, key=key, token=HOSTILE) if c.token == "a1-1200" else c for c in GOOD.committed]
    run = replace(
        GOOD,
        profile=HOSTILE,
        committed=committed,
        complaints=[HOSTILE],
        exits=[HOSTILE],
        mistaken=[HOSTILE],
        struck=[*GOOD.struck, fault],
        samples=[replace(s, processes=dict.fromkeys([HOSTILE], p)) for s in GOOD.samples for p in s.processes.values()],
    )
    seen = page(run)
    seen_raw, text = as_html(run, judged(run)), as_text(run, judged(run))
    assert seen.seen["script"] == 0
    assert r"<script>alert('x')</script>\x1b[31m&\ud800\n" in seen.text
    for made in (seen_raw, text, json.dumps(as_dict(run, judged(run)))):
        made.encode()
        assert "\x1b" not in made


def test_a_run_that_saw_nothing_can_be_drawn_too() -> None:
    empty = Evidence(
        seed=1,
        profile="empty",
        began=BEGAN,
        ended=BEGAN,
        settled=None,
        committed=(),
        undone=frozenset(),
        effects=(),
        balances={},
        witnessed=(),
    )
    seen = page(empty)
    assert seen.classes["failed"] == 1  # it has not settled
    assert "Latency: nothing was seen" in seen.text
    assert "FAILED" in as_text(empty, judged(empty))


def test_the_text_has_the_verdict_the_figures_the_faults_and_the_findings() -> None:
    run = with_fault(0, bites=0)(replace(GOOD, transactions={"ok": 1500, "undone": 200}))
    text = as_text(run, judged(run))
    assert text.startswith("INCONCLUSIVE: nothing is wrong, but the run does not prove it")
    assert re.search(r"transactions committed +1,500", text)
    assert re.search(r"events committed +3,600", text)
    assert re.search(r"disturbances / faults that stood alone +3 / 3", text)
    assert re.search(r"broker killed +1 +3 +50 ms", text)
    assert "- nothing shows that 'relay killed' did anything" in text


def test_the_values_are_json_and_have_all_but_the_events() -> None:
    values = json.loads(json.dumps(as_dict(GOOD, judged(GOOD))))
    assert (values["outcome"], values["seed"], values["figures"]["events"]) == ("passed", 7, 3600)
    assert [kind["kind"] for kind in values["kinds"]] == ["broker killed", "lonely unbound", "relay killed"]
    assert {check["count"] for check in values["checks"]} == {0}
    assert len(json.dumps(values)) < 20_000


def test_faults_of_one_kind_are_added_up_and_their_worst_recovery_is_told() -> None:
    again = replace(GOOD.struck[0], begun=BEGAN + 90, healed=BEGAN + 92, bites=4)
    run = with_latency(91, 91.05, 5, A1)(replace(GOOD, struck=[*GOOD.struck, again]))
    row = next(kind for kind in by_kind(run, judged(run)) if kind.kind == "relay killed")
    assert (row.times, row.bites, row.on_s, row.bound_s) == (2, 5, 6, 15)
    assert row.alone_s == pytest.approx(4)
    assert row.company_s is None


def test_latency_is_drawn_by_the_time_of_the_commit_and_not_where_nothing_was_committed() -> None:
    held = replace(GOOD, committed=[c for c in GOOD.committed if not 40 <= c.at - BEGAN < 50])
    worst, middle = latency_lines(with_latency(60, 65, 3, A1)(held), BEGAN + SECONDS)
    assert [len(run) for run in middle.runs] == [8, 14]
    at, value = max(worst.runs[1], key=lambda point: point[1])
    assert (at - BEGAN, round(value, 2)) == (60 + BUCKET_S / 2, 3.0)
    assert max(value for _, value in middle.runs[1]) == pytest.approx(0.05)


def test_memory_is_interrupted_where_a_daemon_was_started_anew() -> None:
    run = replace(GOOD, samples=samples(lambda i: Process(pid=i // 60, rss=80 * MB, descriptors=1, connections=1)))
    (line,) = memory_lines(run)
    assert [len(each) for each in line.runs] == [20, 20]


def test_peaks_survive_when_points_are_thinned() -> None:
    points = [(float(i), 100.0 if i == 777 else 1.0) for i in range(5000)]
    few = thinned(points, 100)
    assert len(few) <= 100
    assert max(value for _, value in few) == 100.0
    assert thinned([], 100) == []


@pytest.mark.parametrize(("highest", "ticks"), [(0, [0, 1]), (4, [0, 1, 2, 3, 4]), (950, [0, 250, 500, 750, 1000])])
def test_axes_have_round_numbers(highest: float, ticks: list[float]) -> None:
    assert round_steps(highest) == ticks


def test_a_logarithmic_axis_has_powers_of_ten_around_all_values() -> None:
    assert decades([0.02, 3.0]) == [0.01, 0.1, 1, 10]
    assert decades([0.1, 0.1]) == [0.1, 1]


def test_shades_do_not_overlap() -> None:
    assert merged([(5, 6), (1, 3), (2, 4), (4, 4.5)]) == [(1, 4.5), (5, 6)]


def test_what_lies_outside_of_the_time_axis_is_drawn_at_its_edge() -> None:
    time = Time(start=10, end=20)
    assert time.x(5) == time.x(10) < time.x(15) < time.x(20) == time.x(99)
