"""The checker finds every way of being wrong, says which one it is, and finds nothing wrong with a good run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.lab.checker import EVERY_RUN, judge
from tests.faults.lab.evidence import (
    Committed,
    Effect,
    Evidence,
    Key,
    Leftovers,
    Process,
    Sample,
    Struck,
    Witnessed,
)
from tests.faults.lab.verdict import MB, Verdict

A1, A2, LONELY = ("account", "a1"), ("account", "a2"), ("lonely", "l1")
BOUNDS = {"relay killed": 15.0, "broker killed": 30.0, "lonely unbound": 10.0}
SECONDS = 120
RATE = 10  # events a second, of each aggregate
BEGAN = 1_000_000.0


def event(key: Key, seq: int, at: float) -> Committed:
    return Committed(token=f"{key[1]}-{seq}", key=key, seq=seq, sha=f"sha {key[1]} {seq}", amount=seq % 7 + 1, at=at)


def effect(event: Committed, *, after: float = 0.05) -> Effect:
    return Effect(
        token=event.token,
        key=event.key,
        seq=event.seq,
        position=event.seq,
        message_id=f"id of {event.token}",
        sha=event.sha,
        amount=event.amount,
        at=event.at + after,
    )


def message(event: Committed) -> Witnessed:
    return Witnessed(
        message_id=f"id of {event.token}", key=event.key, seq=event.seq, token=event.token, at=event.at + 0.02
    )


def renumbered(effects: Iterable[Effect]) -> list[Effect]:
    """With the positions that these effects would have got, one after the other."""
    counts: dict[Key, int] = {}
    result = []
    for each in effects:
        counts[each.key] = counts.get(each.key, 0) + 1
        result.append(replace(each, position=counts[each.key]))
    return result


def balances(effects: Iterable[Effect]) -> dict[Key, tuple[int, int]]:
    """As a handler would have kept them that did just this."""
    kept: dict[Key, tuple[int, int]] = {}
    for each in effects:
        applied, balance = kept.get(each.key, (0, 0))
        kept[each.key] = (applied + 1, balance + each.amount)
    return kept


def good_run() -> Evidence:
    """Two minutes, three aggregates, three faults; whatever is committed is applied 0.05 s later."""
    committed = [
        event(key, i + 1, BEGAN + i / RATE + shift)
        for i in range(SECONDS * RATE)
        for key, shift in ((A1, 0.0), (A2, 0.01), (LONELY, 0.02))
    ]
    effects = [effect(each) for each in committed]
    return Evidence(
        seed=7,
        profile="by hand",
        began=BEGAN,
        ended=BEGAN + SECONDS,
        settled=BEGAN + SECONDS + 1,
        committed=committed,
        undone=frozenset({"undone-1"}),
        effects=effects,
        balances=balances(effects),
        witnessed=[message(each) for each in committed if each.key != LONELY],
        unwitnessed_types=frozenset({"lonely"}),
        struck=[
            Struck(kind="relay killed", begun=BEGAN + 20, healed=BEGAN + 24, bites=1),
            Struck(kind="broker killed", begun=BEGAN + 30, healed=BEGAN + 36, bites=3),
            Struck(kind="lonely unbound", begun=BEGAN + 60, healed=BEGAN + 70, bites=9, confined_to="lonely"),
        ],
        samples=samples(lambda _: Process(pid=4711, rss=90 * MB, descriptors=30, connections=6, tasks=12)),
        expected_conflicts=2,
        leftovers=Leftovers(conflicts=2),
        transactions={"ok": 1800, "undone": 300, "unknown": 20, "failed": 80},
        cursor_writes=600,
        log_lines=900,
    )


def samples(process: Callable[[int], Process]) -> list[Sample]:
    return [
        Sample(at=BEGAN + i, committed=i * 3 * RATE, applied=i * 3 * RATE, processes={"relay-1": process(i)})
        for i in range(0, SECONDS, 3)
    ]


GOOD = good_run()


PROMISED = EVERY_RUN | {"fairness"}


def verdict(evidence: Evidence, must_examine: frozenset[str] = frozenset()) -> Verdict:
    return judge(evidence, kinds_needed=3, bounds=BOUNDS, must_examine=must_examine)


def found(judged: Verdict) -> dict[str, int]:
    return {finding.name: finding.count for finding in judged.findings}


def examples(judged: Verdict) -> list[str]:
    return [example for finding in judged.findings for example in finding.examples]


# --- ways of being wrong: each takes a good run and returns a bad one that is otherwise as consistent as it can be


def with_effects(run: Evidence, effects: Iterable[Effect]) -> Evidence:
    """Positions and balances as a consumer would have written them that applied just these, one after the other."""
    applied = renumbered(effects)
    return replace(run, effects=applied, balances=balances(applied))


def with_effect(aggregate: Key, number: int, **changes: object) -> Callable[[Evidence], Evidence]:
    def change(run: Evidence) -> Evidence:
        effects = [
            replace(e, **changes) if (e.key, e.seq) == (aggregate, number) else e  # type: ignore[arg-type]
            for e in run.effects
        ]
        return replace(run, effects=effects, balances=balances(effects))

    return change


def with_message(aggregate: Key, number: int, **changes: object) -> Callable[[Evidence], Evidence]:
    def change(run: Evidence) -> Evidence:
        changed = [
            replace(w, **changes) if (w.key, w.seq) == (aggregate, number) else w  # type: ignore[arg-type]
            for w in run.witnessed
        ]
        return replace(run, witnessed=changed)

    return change


def without_effect(key: Key, seq: int) -> Callable[[Evidence], Evidence]:
    return lambda run: with_effects(run, [e for e in run.effects if (e.key, e.seq) != (key, seq)])


def with_fault(number: int, **changes: object) -> Callable[[Evidence], Evidence]:
    def change(run: Evidence) -> Evidence:
        struck = [replace(f, **changes) if i == number else f for i, f in enumerate(run.struck)]  # type: ignore[arg-type]
        return replace(run, struck=struck)

    return change


def with_latency(start: float, end: float, latency: float, *keys: Key) -> Callable[[Evidence], Evidence]:
    """Events committed between `start` and `end` (seconds of the run) have their effect that much later."""

    def change(run: Evidence) -> Evidence:
        late = {
            c.token: c.at + latency
            for c in run.committed
            if start <= c.at - BEGAN < end and c.key in (keys or (A1, A2, LONELY))
        }
        return replace(run, effects=[replace(e, at=late.get(e.token, e.at)) for e in run.effects])

    return change


def applied_too(token: str) -> Callable[[Evidence], Evidence]:
    extra = replace(effect(event(A1, SECONDS * RATE + 1, BEGAN + 119)), token=token)
    return lambda run: with_effects(run, [*run.effects, extra])


def published_too(token: str) -> Callable[[Evidence], Evidence]:
    extra = replace(message(event(A1, SECONDS * RATE + 1, BEGAN + 119)), token=token)
    return lambda run: replace(run, witnessed=[*run.witnessed, extra])


def applied_twice(run: Evidence) -> Evidence:
    twelve = next(e for e in run.effects if (e.key, e.seq) == (A1, 12))
    return with_effects(run, [*run.effects, twelve])


def applied_in_another_order(run: Evidence) -> Evidence:
    places = {("a1-12"): 13, ("a1-13"): 12}
    return replace(run, effects=[replace(e, position=places.get(e.token, e.position)) for e in run.effects])


def two_at_one_position(run: Evidence) -> Evidence:
    return replace(run, effects=[replace(e, position=12) if e.token == "a1-13" else e for e in run.effects])


def kept(key: Key, applied: int, balance: int) -> Callable[[Evidence], Evidence]:
    def change(run: Evidence) -> Evidence:
        before = run.balances[key]
        return replace(run, balances={**run.balances, key: (before[0] + applied, before[1] + balance)})

    return change


def forgotten_account(run: Evidence) -> Evidence:
    return replace(run, balances={key: kept for key, kept in run.balances.items() if key != A2})


def a_number_left_out(run: Evidence) -> Evidence:
    """The producer's last event has a number too high; everybody handles it so."""
    last = SECONDS * RATE
    return replace(
        run,
        committed=[replace(c, seq=last + 1) if c.token == f"a1-{last}" else c for c in run.committed],
        effects=[replace(e, seq=last + 1) if e.token == f"a1-{last}" else e for e in run.effects],
        witnessed=[replace(w, seq=last + 1) if w.token == f"a1-{last}" else w for w in run.witnessed],
    )


def published_again_under_another_id(run: Evidence) -> Evidence:
    return replace(run, witnessed=[*run.witnessed, replace(run.witnessed[0], message_id="another")])


def one_id_for_two(run: Evidence) -> Evidence:
    both = ("l1-1", "l1-2")
    return replace(run, effects=[replace(e, message_id="the same") if e.token in both else e for e in run.effects])


def never_published(run: Evidence) -> Evidence:
    return replace(run, witnessed=[w for w in run.witnessed if w.token != "a1-12"])


def published_in_another_order(run: Evidence) -> Evidence:
    messages = list(run.witnessed)
    messages[2], messages[4] = messages[4], messages[2]
    return replace(run, witnessed=messages)


def published_again(moment: float) -> Callable[[Evidence], Evidence]:
    """One message more, a copy of the first, at that second of the run."""
    return lambda run: replace(run, witnessed=[*run.witnessed, replace(run.witnessed[0], at=BEGAN + moment)])


def published_late(token: str, moment: float) -> Callable[[Evidence], Evidence]:
    """At that second of the run, after others of its aggregate; applied as ever, which the clocks of two machines might show."""

    def change(run: Evidence) -> Evidence:
        late = next(w for w in run.witnessed if w.token == token)
        others = [w for w in run.witnessed if w is not late]
        place = next(i for i, w in enumerate(others) if w.at > BEGAN + moment)
        return replace(run, witnessed=[*others[:place], replace(late, at=BEGAN + moment), *others[place:]])

    return change


def in_a_chain_of_faults(run: Evidence) -> Evidence:
    """From 18 to 58 s a fault is on for one second in four; each is healed well before the next, and has 15 s to be recovered from."""
    chain = [
        Struck(kind="relay killed", begun=BEGAN + at, healed=BEGAN + at + 1, bites=1, note="chain")
        for at in range(18, 58, 4)
    ]
    return replace(run, struck=[*chain, *(f for f in run.struck if f.kind == "lonely unbound"), BROKER_LATER])


BROKER_LATER = Struck(kind="broker killed", begun=BEGAN + 100, healed=BEGAN + 101, bites=1)


def standing_still(start: float, end: float, key: Key) -> Callable[[Evidence], Evidence]:
    """What this aggregate commits in that time is applied at its end, in order."""

    def change(run: Evidence) -> Evidence:
        late = {c.token: BEGAN + end for c in run.committed if start <= c.at - BEGAN < end and c.key == key}
        return replace(run, effects=[replace(e, at=late.get(e.token, e.at)) for e in run.effects])

    return change


def confined_to(where: str) -> Callable[[Evidence], Evidence]:
    """The last of the three faults, which is on from 60 to 70 s."""
    return lambda run: with_fault(2, kind="handler raises", confined_to=where)(run)


def short_lives(seconds: int, **rate: float) -> Callable[[Evidence], Evidence]:
    """A process that is killed that often, and uses so much more each second that it lives."""
    usual = {"rss": 90 * MB, "descriptors": 30, "connections": 6, "tasks": 12}

    def process(i: int) -> Process:
        more = {name: n + int(rate.get(name, 0) * (i % seconds)) for name, n in usual.items()}
        return Process(pid=i // seconds, **more)

    return lambda run: replace(run, samples=samples(process))


def strict(change: Callable[[Evidence], Evidence]) -> Callable[[Evidence], Evidence]:
    return lambda run: replace(change(run), strict=True)


def left(**counts: int) -> Callable[[Evidence], Evidence]:
    return lambda run: replace(run, leftovers=replace(run.leftovers, **counts))


def unsettled(run: Evidence) -> Evidence:
    return replace(run, settled=None)


def growing(**growth: int) -> Callable[[Evidence], Evidence]:
    """A process that uses more from sample to sample."""
    usual = {"rss": 90 * MB, "descriptors": 30, "connections": 6, "tasks": 12}
    return lambda run: replace(
        run,
        samples=samples(
            lambda i: Process(pid=4711, **{name: n + growth.get(name, 0) * i // SECONDS for name, n in usual.items()})
        ),
    )


def spiking(**spike: int) -> Callable[[Evidence], Evidence]:
    """A process that uses that much for one sample, near its end."""
    usual = {"rss": 90 * MB, "descriptors": 30, "connections": 6, "tasks": 12}
    return lambda run: replace(
        run, samples=samples(lambda i: Process(pid=4711, **{**usual, **(spike if i == 114 else {})}))
    )


def complaining(run: Evidence) -> Evidence:
    return replace(run, complaints=["relay-1: Task exception was never retrieved"])


WRONG: Mapping[str, tuple[Callable[[Evidence], Evidence], str, str]] = {
    # what happened: (how, the check that must catch it, alone, words that its example must contain)
    "the last event of an aggregate has no effect": (
        without_effect(A1, 1200),
        "no loss",
        "account/a1 number 1200 (token a1-1200) was never applied; the broker had it as message id of a1-1200",
    ),
    "an event has no effect, but its successor has": (
        without_effect(A1, 12),
        "no loss",
        "account/a1 number 12 (token a1-12) was never applied; the broker had it as message id of a1-12, and number 1200",
    ),
    "a rolled back event is applied": (
        applied_too("undone-1"),
        "no phantom",
        "applied, but its transaction was rolled",
    ),
    "an unknown event is applied": (applied_too("forged"), "no phantom", "applied, but nobody committed it"),
    "a rolled back event is published": (published_too("undone-1"), "no phantom", "published, but its transaction"),
    "an unknown event is published": (published_too("forged"), "no phantom", "published, but nobody committed it"),
    "an event is applied twice": (applied_twice, "exactly one effect", "number 12 (token a1-12, message id of a1-12)"),
    "a balance was moved twice": (kept(A1, 0, 5), "exactly one effect", "account/a1 has 1200 events and a balance of"),
    "an effect left no row": (kept(A1, 1, 0), "exactly one effect", "1201 events and a balance of"),
    "an account has vanished": (forgotten_account, "exactly one effect", "account/a2 has 0 events"),
    "an event is applied before its predecessor": (applied_in_another_order, "order", "was applied after number 13"),
    "two effects were at work at the same time": (two_at_one_position, "order", "position 12, but is effect 13"),
    "a number is left out": (a_number_left_out, "numbers", "where number 1200 should be, 1201"),
    "an event is applied with another digest": (with_effect(A1, 12, sha="x"), "content", "with another content"),
    "an event is applied with another amount": (with_effect(A1, 12, amount=99), "content", "amount 99, was 6"),
    "an event is applied under another number": (with_effect(A1, 1200, seq=9999), "content", "committed as account/a1"),
    "an event is applied to another aggregate": (
        lambda run: with_effects(run, with_effect(A1, 1200, key=("account", "a9"))(run).effects),
        "content",
        "account/a9 number 1200 (token a1-1200, message id of a1-1200) was applied, but it was committed as account/a1",
    ),
    "an event is published under another number": (
        with_message(A1, 1200, seq=9999),
        "content",
        "published, but it was",
    ),
    "an event is published as another aggregate's": (
        with_message(A1, 1200, key=("account", "a9")),
        "content",
        "account/a9 number 1200 (token a1-1200, message id of a1-1200) was published, but it was",
    ),
    "an effect has another message id than the message": (
        with_effect(A1, 12, message_id="other"),
        "message id",
        "it is message id of a1-12 too",
    ),
    "a copy is published under another message id": (published_again_under_another_id, "message id", "message another"),
    "two events have one message id": (one_id_for_two, "message id", "token l1-1 has that message id too"),
    "the cursor passes an event that the broker does not have": (never_published, "cursor", "account/a1 number 12"),
    "a relay that has lost the log moves its cursor": (
        lambda run: replace(run, stale_checkpoints=2),
        "single writer",
        "2 checkpoints were written by a session that had lost the log",
    ),
    "an event is published again for no reason": (
        published_again(100),
        "quiet copies",
        "account/a1 number 1 (token a1-1, message id of a1-1) was published again [30.0 s after 'lonely unbound'",
    ),
    "an event is first published out of order for no reason": (
        published_late("a1-900", 95),
        "quiet copies",
        "account/a1 number 900 (token a1-900, message id of a1-900) was first published after number 950",
    ),
    "strict relays publish out of order": (strict(published_in_another_order), "first publication", "number 2 (token"),
    "rows are parked": (left(parked=3), "leftovers", "rows parked: 3, expected 0"),
    "messages are held": (left(held=3), "leftovers", "messages held in the inbox: 3, expected 0"),
    "there are gaps": (left(gaps=3), "leftovers", "gaps: 3, expected 0"),
    "rows are unread": (left(unread=3), "leftovers", "rows that the cursor has not passed: 3, expected 0"),
    "the queue is not empty": (left(queued=3), "leftovers", "messages in the consumer's queue: 3, expected 0"),
    "there are dead letters": (left(dead=3), "leftovers", "dead letters: 3, expected 0"),
    "a forged message was taken for a duplicate": (
        left(conflicts=1),
        "leftovers",
        "conflicts in quarantine: 1, expected 2",
    ),
    "a conflict was nobody's": (left(conflicts=3), "leftovers", "conflicts in quarantine: 3, expected 2"),
    "a stranger was nobody's": (left(strangers=1), "leftovers", "strangers in quarantine: 1, expected 0"),
    "it takes too long in the end": (unsettled, "settled", "not applied when the time for it was over"),
    "it takes too long after a fault": (
        with_latency(69, 69.05, 13, LONELY),
        "recovery",
        "after 'lonely unbound' it took 12.0 s, at most 10 s are allowed",
    ),
    "an event waits for no reason": (
        with_latency(100, 100.1, 8, A1),
        "waiting",
        "waited for 8.0 s, 8.0 s of them without",
    ),
    "an aggregate stands still through a chain of short faults, each healed before the next": (
        lambda run: standing_still(19, 57, A1)(in_a_chain_of_faults(run)),
        "held up",
        "account/a1 number 191 (token a1-191, message id of a1-191) waited for 38.0 s, but faults were on for 9.0 s of them,"
        " and recovery from the slowest may take 15 s",
    ),
    "one event of another aggregate waits during a fault that is not its own": (
        with_latency(62, 62.05, 6, A1),
        "fairness",
        "'lonely unbound' concerned 'lonely' alone, but account/a1 waited for 6.0 s while no other fault could hold it up",
    ),
    "an event waits during a fault of its aggregate's neighbour": (
        lambda run: with_latency(62, 62.05, 6, A2)(confined_to("account/a1")(run)),
        "fairness",
        "'handler raises' concerned 'account/a1' alone, but account/a2 waited for 6.0 s",
    ),
    "others wait for a fault that is not theirs": (
        with_latency(60, 70, 1.2, A1, A2),
        "fairness",
        "'lonely unbound' concerned 'lonely' alone, but 99 % of the 201 others took up to 1.20 s",
    ),
    "a process eats memory": (growing(rss=200 * MB), "growth", "relay-1 (pid 4711): rss in MB grew from"),
    "a process leaks descriptors": (growing(descriptors=60), "growth", "descriptors grew from 43 in the first quarter"),
    "a process leaks connections": (growing(connections=30), "growth", "connections grew from"),
    "a process leaks tasks": (growing(tasks=90), "growth", "tasks grew from"),
    "a process takes too much memory for a moment": (spiking(rss=600 * MB), "growth", "rss in MB reached 600"),
    "a process opens too much for a moment": (spiking(descriptors=999), "growth", "descriptors reached 999"),
    "a process that is killed every 30 s leaks descriptors": (
        short_lives(30, descriptors=3),
        "growth",
        "relay-1: descriptors grew by 3.0 a second in 4 lives of less than a minute",
    ),
    "a process that is killed every 30 s eats memory": (short_lives(30, rss=2 * MB), "growth", "rss in MB grew by 2.0"),
    "a process that is killed every 30 s leaks tasks": (
        short_lives(30, tasks=1),
        "growth",
        "tasks grew by 1.0 a second",
    ),
    "a daemon ends by itself": (
        lambda run: replace(run, exits=["relay-1 ended with 1"]),
        "exits",
        "relay-1 ended with 1",
    ),
    "a fault sees a promise broken": (
        with_fault(0, broken="it ended with -9 after SIGTERM", bites=0),
        "promises",
        "'relay killed' saw: it ended with -9 after SIGTERM",
    ),
    "a transaction has another outcome than its producer was told": (
        lambda run: replace(run, mistaken=["a1-12"]),
        "known outcomes",
        "the outcome of token a1-12 is another",
    ),
    "producers cannot work": (
        lambda run: replace(run, transactions={"ok": 1000, "failed": 60}),
        "producers",
        "60 of 1060 transactions failed (5.7 %)",
    ),
    "a daemon complains": (complaining, "complaints", "relay-1: Task exception was never retrieved"),
}


def test_nothing_is_wrong_with_a_good_run_and_every_claim_was_put_to_the_test() -> None:
    judged = verdict(GOOD, PROMISED)
    assert (judged.outcome, found(judged)) == ("passed", {})
    assert [check.name for check in judged.checks if not check.examined] == []


@pytest.mark.parametrize("what", WRONG)
def test_each_way_of_being_wrong_is_found_by_its_own_check_and_no_other(what: str) -> None:
    how, check, words = WRONG[what]
    judged = verdict(how(GOOD), PROMISED)
    assert judged.outcome == "failed"
    assert list(found(judged)) == [check]
    assert words in examples(judged)[0]


def test_every_check_is_shown_to_find_something() -> None:
    names = {check.name for check in verdict(replace(GOOD, strict=True)).checks}
    assert {check for _, check, _ in WRONG.values()} == names


def test_every_field_of_the_leftovers_is_looked_at() -> None:
    for each in fields(Leftovers):
        assert found(verdict(left(**{each.name: 5})(GOOD))) == {"leftovers": 1}, each.name


DOUBTFUL: Mapping[str, tuple[Callable[[Evidence], Evidence], set[str], str]] = {
    "a fault does not bite": (
        with_fault(0, bites=0),
        {"bitten", "kinds"},
        "nothing shows that 'relay killed' did anything [while 'relay killed' was on]",
    ),
    "a fault does not bite, but its kind does another time": (
        lambda run: replace(
            run, struck=[*run.struck, replace(run.struck[0], begun=BEGAN + 90, healed=BEGAN + 94, bites=0)]
        ),
        {"bitten"},
        "'relay killed'",
    ),
    "a fault cannot be injected": (
        with_fault(0, failure="OSError: no such process"),
        {"injected"},
        "'relay killed' could not be injected: OSError: no such process",
    ),
    "a kind of fault is missing": (
        lambda run: replace(run, struck=run.struck[1:]),
        {"kinds"},
        "2 kinds of fault have bitten, 3 were asked for: broker killed, lonely unbound",
    ),
    "nothing is committed": (
        lambda run: replace(run, committed=(), effects=(), witnessed=(), balances={}),
        {"load"},
        "no event was committed",
    ),
    "a daemon never tells its tasks": (
        lambda run: replace(
            run, samples=samples(lambda _: Process(pid=4711, rss=90 * MB, descriptors=30, connections=6))
        ),
        {"tasks told"},
        "relay-1 (pid 4711) did not tell its tasks once in 117 s",
    ),
    "nobody looked who writes the cursor": (lambda run: replace(run, cursor_writes=0), {"examined"}, "'single writer'"),
    "nobody read the logs": (
        lambda run: replace(run, log_lines=0),
        {"examined"},
        "'complaints' had nothing to look at",
    ),
    "nobody looked at the daemons": (lambda run: replace(run, samples=()), {"examined"}, "'exits' had nothing"),
    "no fault allowed to compare others": (
        lambda run: replace(run, struck=[*run.struck[:2], replace(run.struck[2], confined_to=None)]),
        {"examined"},
        "'fairness' had nothing to look at",
    ),
}


@pytest.mark.parametrize("what", DOUBTFUL)
def test_a_run_that_could_not_have_shown_anything_is_inconclusive(what: str) -> None:
    how, names, words = DOUBTFUL[what]
    judged = verdict(how(GOOD), PROMISED if "examined" in names else frozenset())
    assert judged.outcome == "inconclusive"
    assert set(found(judged)) == names
    assert words in examples(judged)[0]


def test_a_violation_outweighs_a_doubt() -> None:
    assert verdict(with_fault(0, bites=0)(without_effect(A1, 12)(GOOD))).outcome == "failed"


def test_two_causes_are_two_findings() -> None:
    """A number that was given to two events, each of which was then applied."""
    twelve = {"a1-13": 12}
    judged = verdict(
        replace(
            GOOD,
            committed=[replace(c, seq=twelve.get(c.token, c.seq)) for c in GOOD.committed],
            effects=[replace(e, seq=twelve.get(e.token, e.seq)) for e in GOOD.effects],
            witnessed=[replace(w, seq=twelve.get(w.token, w.seq)) for w in GOOD.witnessed],
        )
    )
    assert found(judged) == {"exactly one effect": 1, "numbers": 1}
    assert "and so was token a1-12 under that number" in examples(judged)[0]


def test_an_example_names_the_fault_that_was_on() -> None:
    at_22_s = without_effect(A1, 221)(GOOD)
    assert examples(verdict(at_22_s))[0].endswith("[while 'relay killed' was on]")
    at_40_s = without_effect(A1, 401)(GOOD)
    assert examples(verdict(at_40_s))[0].endswith("[4.0 s after 'broker killed' was healed]")
    before = without_effect(A1, 12)(GOOD)
    assert examples(verdict(before))[0].endswith("[before the first fault]")


def test_all_are_counted_and_five_are_told() -> None:
    judged = verdict(with_effects(GOOD, [e for e in GOOD.effects if e.key != A1]))
    assert found(judged) == {"no loss": 1200}
    assert len(examples(judged)) == 5


def test_first_publications_out_of_order_are_a_figure_unless_the_relays_are_strict() -> None:
    judged = verdict(published_in_another_order(GOOD))
    assert (judged.outcome, judged.figures.out_of_turn) == ("passed", 1)


def test_copies_at_the_broker_are_a_figure() -> None:
    judged = verdict(replace(GOOD, witnessed=[*GOOD.witnessed, *GOOD.witnessed[:10]]))
    assert (judged.outcome, judged.figures.copies) == ("passed", 10)


def test_rows_that_the_cursor_has_not_passed_are_no_false_confirm() -> None:
    assert found(verdict(left(unread=1)(never_published(GOOD)))) == {"leftovers": 1}
    assert found(verdict(left(parked=1)(never_published(GOOD)))) == {"leftovers": 1}


def test_a_spike_within_the_bounds_is_no_leak() -> None:
    assert verdict(spiking(rss=300 * MB, descriptors=100, connections=20, tasks=300)(GOOD)).outcome == "passed"


def test_a_process_that_comes_down_again_has_no_leak() -> None:
    """Busy during its last quarter, but for one moment."""

    def process(i: int) -> Process:
        busy = i > 80 and i != 99
        return Process(
            pid=4711, rss=(300 if busy else 90) * MB, descriptors=100 if busy else 30, connections=6, tasks=9
        )

    assert verdict(replace(GOOD, samples=samples(process))).outcome == "passed"


def test_the_growth_of_a_process_that_lived_too_short_is_not_judged() -> None:
    assert verdict(short_lives(18, rss=5 * MB, descriptors=3)(GOOD)).outcome == "passed"


def test_a_standby_that_becomes_the_owner_in_each_of_its_short_lives_has_no_leak() -> None:
    def process(i: int) -> Process:
        owner = i % 30 >= 15
        return Process(
            pid=i // 30, rss=(150 if owner else 90) * MB, descriptors=60, connections=20, tasks=222 if owner else 4
        )

    assert verdict(replace(GOOD, samples=samples(process))).outcome == "passed"


# --- recovery and waiting


def test_recovery_is_measured_from_the_heal() -> None:
    judged = verdict(with_latency(22, 22.05, 6, A1)(GOOD))
    assert [(r.kind, round(r.seconds), r.alone) for r in judged.recoveries] == [
        ("relay killed", 4, True),
        ("broker killed", 0, True),
        ("lonely unbound", 0, True),
    ]


def test_recovery_from_faults_that_overlap_is_measured_from_the_last_heal_by_the_longest_bound() -> None:
    overlapping = with_fault(1, begun=BEGAN + 23, healed=BEGAN + 28)(GOOD)
    assert verdict(with_latency(22, 22.05, 33, A1)(overlapping)).outcome == "passed"
    judged = verdict(with_latency(22, 22.05, 37, A1)(overlapping))
    assert found(judged) == {"recovery": 1}
    assert [(r.kind, round(r.seconds), r.bound_s, r.alone) for r in judged.recoveries[:2]] == [
        ("relay killed", 31, 30, False),
        ("broker killed", 31, 30, False),
    ]


def test_a_fault_that_begins_while_the_last_one_is_recovered_from_is_one_with_it() -> None:
    judged = verdict(with_latency(22, 22.05, 12, A1)(GOOD))  # until 34, while the broker was killed from 30 to 36
    assert [(round(r.seconds), r.alone) for r in judged.recoveries[:2]] == [(0, False), (0, False)]


def test_a_recovery_that_is_too_long_does_not_hide_behind_the_next_fault() -> None:
    late = with_fault(1, begun=BEGAN + 40, healed=BEGAN + 44)(GOOD)
    judged = verdict(with_latency(22, 22.05, 21, A1)(late))
    assert found(judged) == {"recovery": 1}
    assert judged.recoveries[0].seconds == pytest.approx(19)


def test_waiting_in_a_queue_that_a_fault_has_left_behind_is_part_of_its_recovery() -> None:
    backlog: Callable[[Evidence], Evidence] = lambda run: with_latency(20, 25, 6)(with_latency(25, 31, 5.5)(run))  # noqa: E731
    one_fault = with_fault(1, begun=BEGAN + 50, healed=BEGAN + 51)
    assert verdict(one_fault(backlog(GOOD))).outcome == "passed"


def test_an_event_that_stays_behind_when_all_faults_are_long_over_is_found() -> None:
    judged = verdict(with_latency(60, 60.05, 40, LONELY)(GOOD))
    assert set(found(judged)) == {"recovery", "waiting"}


def test_latencies_that_another_fault_explains_are_not_held_against_a_confined_one() -> None:
    disturbed = with_fault(1, begun=BEGAN + 59, healed=BEGAN + 69)(with_latency(60, 70, 3, A1, A2)(GOOD))
    judged = verdict(disturbed)
    assert judged.outcome == "passed"
    assert next(check.examined for check in judged.checks if check.name == "fairness") == 0


def test_latencies_right_beside_another_fault_are_not_held_against_a_confined_one() -> None:
    beside = with_fault(1, begun=BEGAN + 57, healed=BEGAN + 59.5)(with_latency(60, 61.4, 3, A1, A2)(GOOD))
    assert verdict(beside).outcome == "passed"


def test_others_may_be_as_slow_as_they_are_at_their_slowest_in_quiet_times() -> None:
    slow_at_times = with_latency(80, 84, 2)(GOOD)
    assert verdict(with_latency(60, 70, 3.9, A1, A2)(slow_at_times)).outcome == "passed"
    assert found(verdict(with_latency(60, 70, 4.5, A1, A2)(slow_at_times))) == {
        "fairness": 3
    }  # both together, and each


def test_a_chain_of_faults_may_hold_up_everybody_while_they_are_on_and_for_one_bound() -> None:
    chain = in_a_chain_of_faults(GOOD)
    assert verdict(standing_still(19, 43, A1)(chain)).outcome == "passed"
    judged = verdict(chain)
    assert (judged.figures.disturbances, judged.figures.alone) == (12, 12)


def test_recovery_from_a_fault_before_the_event_explains_its_wait() -> None:
    """Committed when the broker is back, and applied behind all that had queued up."""
    assert verdict(with_latency(36.1, 36.15, 28, A1)(with_latency(35, 36, 29, A1, A2)(GOOD))).outcome == "passed"


def test_a_fault_of_one_aggregate_does_not_explain_what_its_neighbour_waits_for() -> None:
    def chain(where: str | None) -> Evidence:
        faults = [
            Struck(kind="relay killed", begun=BEGAN + at, healed=BEGAN + at + 3, bites=1, confined_to=where)
            for at in range(18, 58, 4)
        ]
        return replace(GOOD, struck=[*faults, BROKER_LATER, GOOD.struck[2]])

    assert found(verdict(standing_still(18, 56, A1)(chain(None)))) == {}
    assert found(verdict(standing_still(18, 56, A1)(chain("account/a1")))) == {}
    assert set(found(verdict(standing_still(18, 56, A1)(chain("account/a2"))))) >= {"held up", "fairness"}


def test_a_fault_of_one_aggregate_may_hold_up_that_one() -> None:
    assert verdict(standing_still(60, 70, A1)(confined_to("account/a1")(GOOD))).outcome == "passed"


def test_slow_quiet_times_do_not_allow_others_more_than_quiet_times_may_take() -> None:
    slow = with_latency(80, 110, 4.9)(GOOD)
    assert verdict(slow).outcome == "passed"
    assert "fairness" in found(verdict(with_latency(60, 70, 6, A1, A2)(slow)))


def test_a_promise_of_a_check_that_does_not_exist_is_kept_by_none() -> None:
    judged = verdict(GOOD, frozenset({"order", "no such check"}))
    assert (judged.outcome, found(judged)) == ("inconclusive", {"examined": 1})


def test_a_confined_fault_may_hold_up_its_own_type() -> None:
    assert verdict(with_latency(60, 70, 9, LONELY)(GOOD)).outcome == "passed"


# --- any history


@st.composite
def good_histories(draw: st.DrawFn) -> Evidence:
    """Up to four aggregates, committed, published (some twice) and applied in one random order after the other."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    keys = [("account", f"a{i}") for i, n in enumerate(counts) for _ in range(n)]
    numbers: dict[Key, int] = {}
    committed = []
    for at, key in enumerate(draw(st.permutations(keys))):
        numbers[key] = numbers.get(key, 0) + 1
        committed.append(event(key, numbers[key], BEGAN + at / 10))
    effects = [effect(each) for each in committed]
    copies = draw(st.lists(st.sampled_from(committed), max_size=3))
    return Evidence(
        seed=draw(st.integers(0, 9)),
        profile="any",
        began=BEGAN,
        ended=BEGAN + 10,
        settled=BEGAN + 11,
        committed=draw(st.permutations(committed)),
        undone=frozenset({"undone"}),
        effects=draw(st.permutations(effects)),
        balances=balances(effects),
        witnessed=[message(each) for each in (*committed, *copies)],
    )


@given(good_histories())
@settings(max_examples=50, deadline=None)
def test_any_good_history_passes(history: Evidence) -> None:
    judged = judge(history)
    assert (judged.outcome, found(judged)) == ("passed", {})


@given(history=good_histories(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_is_done_to_one_effect_of_any_good_history_is_found(history: Evidence, data: st.DataObject) -> None:
    effects = list(history.effects)
    place = data.draw(st.integers(0, len(effects) - 1))
    victim = effects[place]
    others = [other for other in effects if other.key == victim.key and other is not victim]
    match data.draw(st.sampled_from(["drop", "double", "alter", *(["swap"] if others else [])])):
        case "drop":
            del effects[place]
        case "double":
            effects.append(replace(victim, position=len(others) + 2))
        case "swap":
            other = data.draw(st.sampled_from(others))
            effects[place] = replace(victim, position=other.position)
            effects[effects.index(other)] = replace(other, position=victim.position)
        case "alter":
            effects[place] = data.draw(st.sampled_from(altered(victim, [each.token for each in effects])))
    if data.draw(st.booleans(), label="the handler's balances agree with the effects"):
        history = replace(history, balances=balances(effects))
    assert judge(replace(history, effects=effects)).outcome == "failed"


def altered(victim: Effect, tokens: list[str]) -> list[Effect]:
    return [
        *(replace(victim, token=token) for token in ("forged", "undone", *tokens) if token != victim.token),
        replace(victim, key=("account", "elsewhere"), position=1),
        replace(victim, seq=victim.seq + 1),
        replace(victim, seq=victim.seq - 1),
        replace(victim, position=victim.position + 1),
        replace(victim, sha="other"),
        replace(victim, amount=victim.amount + 1),
        replace(victim, message_id="other"),
    ]


def test_the_work_grows_no_faster_than_the_events() -> None:
    """30 000 events, all in disorder, in a fraction of the time that comparing each with each would take (many minutes)."""
    dice = random.Random(1)
    committed = [event(("account", f"a{i % 50}"), i // 50 + 1, BEGAN + i / 150) for i in range(30_000)]
    effects = [effect(each) for each in committed if dice.random() > 0.1]
    struck = [Struck(kind=f"kind {i}", begun=BEGAN + i, healed=BEGAN + i + 0.9, bites=1) for i in range(200)]
    messages = [message(each) for each in committed]
    dice.shuffle(messages)
    run = replace(
        GOOD, committed=committed, effects=effects, witnessed=messages, balances=balances(effects), struck=struck
    )
    began = time.process_time()
    judged = judge(run)
    assert time.process_time() - began < 3
    assert judged.outcome == "failed"
