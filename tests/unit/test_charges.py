"""What is remembered against a message: enough to set a poison one apart, never enough to lose an innocent one."""

from __future__ import annotations

from relay.inbox import charges
from relay.inbox.charges import Charges, Suspects
from relay.inbox.failures import DIED
from tests.unit.test_sequencer import arrival, held

MESSAGE = ("shop", "1/1")


def test_a_message_is_convicted_when_the_third_connection_breaks_under_it() -> None:
    suspects = Suspects()
    assert not suspects
    for _ in range(2):
        suspects.accuse(MESSAGE)
        assert MESSAGE in suspects
        assert not suspects.is_convicted(MESSAGE)
    suspects.accuse(MESSAGE)
    assert suspects.is_convicted(MESSAGE)
    assert Charges(suspects).verdict(arrival(1)) == Charges(suspects).verdict(held(1)) == DIED
    assert Charges(suspects).verdict(arrival(2)) is None


def test_a_convicted_message_that_is_held_may_break_one_connection_at_each_later_attempt() -> None:
    suspects = Suspects()
    for _ in range(3):
        suspects.accuse(MESSAGE)
    suspects.held(MESSAGE)
    assert not suspects.is_convicted(MESSAGE)
    suspects.accuse(MESSAGE)
    assert suspects.is_convicted(MESSAGE)


def test_a_success_clears_a_message() -> None:
    suspects = Suspects()
    for _ in range(3):
        suspects.accuse(MESSAGE)
    suspects.clear(MESSAGE)
    assert not suspects
    suspects.clear(MESSAGE)


def test_a_bounded_number_of_suspects_is_remembered_the_latest_ones() -> None:
    suspects = Suspects()
    for i in range(charges._SUSPECTS + 5):
        suspects.accuse(("shop", str(i)))
        suspects.accuse(MESSAGE)
    assert MESSAGE in suspects
    assert ("shop", "0") not in suspects
    assert ("shop", str(charges._SUSPECTS + 4)) in suspects


def test_three_collisions_of_a_handler_are_forgiven_in_a_batch() -> None:
    known = Charges(Suspects())
    assert [known.forgives([arrival(1)]) for _ in range(5)] == [True, True, True, False, False]
    assert known.forgives([arrival(1), arrival(2)])
    assert Charges(Suspects()).forgives([arrival(1)])


def test_a_doomed_arrival_keeps_its_reason() -> None:
    known = Charges(Suspects())
    known.doom(arrival(1).name, "too slow")
    assert known.verdict(arrival(1)) == "too slow"
    assert known.verdict(held(1)) is None


def test_of_many_in_one_call_none_is_accused_and_the_smallest_company_is_remembered() -> None:
    suspects = Suspects()
    suspects.accuse_one_of([MESSAGE, ("shop", "2/1")], 200)
    suspects.accuse_one_of([MESSAGE, ("shop", "3/1")], 7)
    suspects.accuse_one_of([MESSAGE, ("shop", "4/1")], 90)
    assert [suspects.company(("shop", f"{n}/1")) for n in (1, 2, 3, 4, 5)] == [7, 200, 7, 90, 0]
    assert MESSAGE in suspects
    assert not suspects.is_convicted(MESSAGE)
    assert Charges(suspects)
    suspects.accuse(MESSAGE)
    assert suspects.company(MESSAGE) == 1
    suspects.clear(MESSAGE)
    assert suspects.company(MESSAGE) == 0
    for n in (2, 3, 4):
        suspects.clear(("shop", f"{n}/1"))
    assert not suspects
    assert not Charges(suspects)


def test_of_those_who_were_together_none_is_forgotten_however_many_they_are() -> None:
    suspects = Suspects()
    suspects.accuse_one_of([MESSAGE], 9)
    many = [("shop", str(i)) for i in range(charges._COMPANY + 5)]
    suspects.accuse_one_of(many, len(many))
    assert all(message in suspects for message in many)
    assert MESSAGE not in suspects
