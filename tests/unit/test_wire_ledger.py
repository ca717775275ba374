"""The ledger of delivery tags, beside a model that keeps one state for each tag and looks at all of them each time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.rabbitmq.wire.ledger import ACKED, NACKED, UNKNOWN, Batch, Ledger, Violation

Step: TypeAlias = tuple[Literal["write", "ack", "nack", "return", "fail"], int, bool]

WRITES = st.tuples(st.just("write"), st.integers(1, 30), st.booleans())
CONFIRMS = st.tuples(st.sampled_from(["ack", "ack", "nack"]), st.integers(0, 1000), st.booleans())
RETURNS = st.tuples(st.just("return"), st.integers(0, 1000), st.booleans())
SCHEDULES = st.lists(st.one_of(WRITES, CONFIRMS, CONFIRMS, RETURNS), max_size=60)


class Model:
    """One state a tag."""

    def __init__(self) -> None:
        self.states: list[int] = []
        self.returned: dict[int, str] = {}

    def confirm(self, tag: int, multiple: bool, state: int) -> bool:
        """False: a violation."""
        if tag > len(self.states) or (tag == 0 and not multiple):
            return False
        for n in range(1, (tag or len(self.states)) + 1) if multiple else [tag]:
            if self.states[n - 1] == UNKNOWN:
                self.states[n - 1] = state
        return True


class Written:
    """Batches in a ledger, and which of them are done."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.batches: list[Batch] = []
        self.done: list[Batch] = []

    def write(self, count: int) -> Batch:
        first = sum(len(batch.ids) for batch in self.batches) + 1
        batch = self.ledger.write([f"m{first + n}" for n in range(count)], 10 * count, self.done.append)
        assert batch.first == first
        self.batches.append(batch)
        return batch

    def states(self) -> list[int]:
        return [state for batch in self.batches for state in batch.states]

    def is_open(self, tag: int) -> bool:
        return any(b.first <= tag < b.first + len(b.ids) and b not in self.done for b in self.batches)


@given(SCHEDULES, st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_tag_ends_as_in_a_model_that_looks_at_each_and_every_batch_is_done_once(
    schedule: list[Step], fails: bool
) -> None:
    written, model = Written(), Model()
    for kind, number, multiple in schedule:
        tag = number % (len(model.states) + 2)  # now and then one too many
        if kind == "write":
            written.write(number)
            model.states += [UNKNOWN] * number
        elif kind == "return":
            may = written.is_open(tag) and tag not in model.returned
            assert did(partial(written.ledger.returned, f"m{tag}", "NO_ROUTE")) == may
            if may:
                model.returned[tag] = "NO_ROUTE"
        else:
            allowed = model.confirm(tag, multiple, ACKED if kind == "ack" else NACKED)
            assert did(partial(written.ledger.confirm, tag, multiple, kind == "ack")) == allowed
        compare(written, model)
    if fails:
        written.ledger.fail()
        assert len(written.done) == len(written.batches)
        assert written.states() == model.states, "what is unknown stays so"


def did(act: Callable[[], None]) -> bool:
    try:
        act()
    except Violation:
        return False
    return True


def compare(written: Written, model: Model) -> None:
    assert written.states() == model.states
    assert written.ledger.unanswered == model.states.count(UNKNOWN)
    assert len({id(b) for b in written.done}) == len(written.done)
    for batch in written.batches:
        tags = range(batch.first, batch.first + len(batch.ids))
        states = [model.states[tag - 1] for tag in tags]
        assert (batch in written.done) == (UNKNOWN not in states)
        assert batch.left == states.count(UNKNOWN)
        assert {batch.first + position for position in batch.returned} == model.returned.keys() & set(tags)
        assert batch.all_acked == (set(states) == {ACKED} and not batch.returned)


@pytest.mark.parametrize(("tag", "multiple"), [(4, False), (4, True), (2**64 - 1, True), (0, False)])
def test_a_confirm_of_what_was_never_written_is_a_violation_and_answers_nothing(tag: int, multiple: bool) -> None:
    written = Written()
    batch = written.write(3)
    with pytest.raises(Violation):
        written.ledger.confirm(tag, multiple, True)
    assert bytes(batch.states) == bytes(3)
    assert written.done == []


def test_multiple_with_tag_0_stands_for_all_that_were_written() -> None:
    written = Written()
    batches = [written.write(2), written.write(3)]
    written.ledger.confirm(0, True, True)
    assert written.done == batches
    assert all(batch.all_acked for batch in batches)


@pytest.mark.parametrize("name", ["m4", None], ids=["unknown", "without an id"])
def test_a_return_that_nothing_in_flight_accounts_for_is_a_violation(name: str | None) -> None:
    """Else its message could be taken for confirmed."""
    written = Written()
    written.write(3)
    with pytest.raises(Violation):
        written.ledger.returned(name, "NO_ROUTE")


def test_a_batch_in_the_middle_is_done_before_those_around_it() -> None:
    written = Written()
    first, second, third = written.write(2), written.write(1), written.write(2)
    written.ledger.confirm(3, False, True)
    assert written.done == [second]
    written.ledger.confirm(5, True, False)
    assert written.done == [second, first, third]
    assert second.all_acked
    assert first.nacked


def test_a_nack_of_what_is_acked_already_changes_nothing() -> None:
    written = Written()
    batch = written.write(2)
    written.ledger.confirm(1, False, True)
    written.ledger.confirm(1, True, False)
    written.ledger.confirm(2, False, True)
    assert batch.all_acked
