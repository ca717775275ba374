"""The traps of aio-pika, aiormq, pamqp and asyncpg, by the letters of RELIABILITY.md, section 3: what holds each of them shut.

For a letter there are two kinds of tests. `today_...` pins what the library does: it fails when an upgrade changes that, and its
text says what then may go. The others hold our seam to its contract whatever the library does, most of them against a broker that
does what the test says (tests/harness/stub_broker.py).

A   a delivery tag too many: each answer is taken for the next message's, a nack confirms
        tests/faults/test_library_traps_publisher.py::TestA
        tests/faults/test_library_traps_fast_publisher.py::TestA
        tests/integration/test_publisher_contract.py::test_what_cannot_be_sent_is_refused_by_itself_and_its_neighbours_are_confirmed
        tests/integration/test_publisher_contract.py::test_cancelling_destroys_the_session_and_nothing_hangs
B   a returned message is told by its id: with two of one id in flight the wrong one is confirmed
        tests/faults/test_library_traps_publisher.py::TestB
        tests/faults/test_library_traps_fast_publisher.py::TestB
        tests/integration/test_publisher_contract.py::test_a_message_id_twice_in_one_batch_is_a_mistake_of_the_caller
        tests/integration/test_publisher_contract.py::test_exactly_the_unroutable_messages_are_returned
C   a time-out that a stalled writer or a lock keeps from being kept
        tests/faults/test_library_traps_publisher.py::TestC
        tests/integration/test_publisher_contract.py::test_a_broker_that_does_not_answer_is_given_up_after_the_confirm_timeout
D   a connection that died of its heartbeat arrives as a cancellation that nobody asked for
        tests/faults/test_library_traps_publisher.py::TestD
        tests/faults/test_library_traps_consumer.py::TestD
E   heartbeats: negotiated as set, and a dead connection noticed and closed within the bound
        tests/faults/test_library_traps_publisher.py::TestE
        tests/faults/test_library_traps_fast_publisher.py::TestE
F   an alarm: connection.blocked is hardly told, and a goodbye waits for the socket
        tests/faults/test_library_traps_publisher.py::TestF
        tests/faults/test_library_traps_fast_publisher.py::TestF
        tests/faults/test_library_traps_consumer.py::TestL::test_closing_is_bounded_at_a_broker_that_answers_nothing_any_more
G   the queues inside the library: what is in flight is ours to bound, and a stuck channel stalls its connection
        tests/faults/test_library_traps_publisher.py::TestG
        tests/faults/test_library_traps_fast_publisher.py::TestG
        tests/faults/test_library_traps_consumer.py::TestG
H   hostile input ends the connection, or fails in a task where nobody sees it
        tests/faults/test_library_traps_consumer.py::TestH
        tests/integration/test_bad_input_messages.py::test_a_message_that_cannot_be_read_goes_to_the_dead_letters_alone
        tests/integration/test_bad_input_messages.py::test_whatever_is_not_an_event_is_quarantined_whole_and_everything_else_flows
I   what is encoded is not what was given: floats, long names, large numbers
        tests/faults/test_library_traps_publisher.py::TestI
        tests/integration/test_bad_input_messages.py::test_numbers_of_every_width_that_a_stock_publisher_sends_are_read_rightly
J   one answer for many messages, and answers to messages that never were
        tests/faults/test_library_traps_publisher.py::TestJ
        tests/faults/test_library_traps_fast_publisher.py::TestJ
K   the robust layer: connections that come back without what they had
        tests/faults/test_library_traps.py::test_relay_never_uses_the_robust_layer
        tests/faults/test_library_traps_consumer.py::TestK
L   a task for each delivery, so that later ones can overtake; a call that is cut short leaves a socket behind
        tests/faults/test_library_traps_consumer.py::TestL
        tests/integration/test_consumer_contract.py::test_deliveries_come_in_the_broker_s_order_and_at_most_limit_at_a_time
        tests/integration/test_consumer_contract.py::test_cancelling_receive_loses_nothing
M   a listener that hears nothing does not notice
        tests/faults/test_library_traps_postgres.py::TestM
        tests/integration/test_outbox.py::test_a_terminated_connection_costs_nothing_but_a_new_session
        tests/integration/test_wakeup.py::test_a_lost_notification_costs_one_poll_interval_and_no_event
N   a goodbye that waits for a cancellation for ever
        tests/faults/test_library_traps_postgres.py::TestN
O   a pooler between relay and PostgreSQL
        tests/integration/test_bad_input_pooler.py::test_every_pool_mode_is_refused_again_and_again
        tests/integration/test_bad_input_pooler.py::test_every_command_refuses_transaction_pooling_with_2
        tests/faults/test_library_traps.py::test_relay_never_uses_a_pool
P   the kernel's keepalive, which no library asks for
        tests/faults/test_library_traps_postgres.py::TestP
        tests/faults/test_library_traps_consumer.py::TestP

The pitfalls of PostgreSQL that follow them there:

Q1  ids are given out before commit: `id > last` loses rows; and two writers of one aggregate collide
        tests/integration/test_outbox_property.py::test_24_hostile_producers_lose_nothing_and_an_open_transaction_delays_only_its_own_aggregate
        tests/integration/test_schema_trigger.py::TestTwoTransactionsOnOneAggregate
Q2  visible before durable: a limit, told in the README, "What is guaranteed" (`synchronous_commit = off`, and the database crashes)
        tests/faults/test_library_traps.py::test_the_readme_tells_the_limit_of_asynchronous_commit
Q3  NOTIFY: a lock over all commits, a queue that one listener can fill, no two-phase commit
        tests/integration/test_wakeup.py::test_no_notification_is_sent_under_continuous_load
        tests/integration/test_wakeup.py::test_in_poll_mode_nobody_notifies_and_everything_arrives
        tests/integration/test_wakeup.py::test_two_phase_commit_works_for_producers_in_poll_mode_and_while_the_relay_is_awake
        tests/integration/test_schema_trigger.py::TestTheWakeUpBarrier
        tests/faults/test_library_traps_postgres.py::TestM::test_a_listener_is_never_in_a_transaction
Q4  bloat, and plans that go wrong: the log is read by its indexes and emptied by truncation
        tests/integration/test_reader_plans.py::test_a_steady_window_reads_only_what_is_new
        tests/integration/test_reader_plans.py::test_an_empty_window_costs_a_look_at_each_index
        tests/integration/test_retention.py::test_a_slot_with_only_old_and_published_rows_is_emptied_and_its_file_shrinks
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LETTERS = [*"ABCDEFGHIJKLMNOP", "Q1", "Q2", "Q3", "Q4"]


def held_by(text: str) -> dict[str, list[str]]:
    """The table: a letter at the margin, and below it, indented, the tests."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if letter := re.match(r"([A-P]|Q\d) +\S", line):
            found[letter[1]] = []
        elif test := re.match(r" {8}(tests/\S+::\S+)$", line):
            found[list(found)[-1]].append(test[1])
    return found


TABLE = held_by(__doc__)


def test_every_trap_is_in_the_table_and_held_by_a_test() -> None:
    assert list(TABLE) == LETTERS
    assert all(TABLE.values())
    lines = [line for line in __doc__.splitlines() if "::" in line]
    assert sum(map(len, TABLE.values())) == len(lines), "a line of the table is not understood"


@pytest.mark.parametrize("name", sorted({name for names in TABLE.values() for name in names}))
def test_the_tests_that_the_table_names_exist(name: str) -> None:
    path, *parts = name.split("::")
    inside: list[ast.stmt] = ast.parse((ROOT / path).read_text()).body
    for part in parts:
        found = [node for node in inside if isinstance(node, ast.ClassDef | _FUNCTIONS) and node.name == part]
        assert found, f"{part} is not in {path}"
        inside = found[0].body
    if isinstance(found[0], ast.ClassDef):
        assert any(isinstance(node, _FUNCTIONS) and node.name.startswith("test_") for node in inside)
    else:
        assert found[0].name.startswith("test_")


_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def test_every_letter_of_these_files_is_in_the_table() -> None:
    for path in sorted((ROOT / "tests/faults").glob("test_library_traps_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                letter = node.name.removeprefix("Test")
                named = TABLE[letter]
                assert f"tests/faults/{path.name}::{node.name}" in named, f"{path.name}::{node.name} is not told"


@functools.cache
def used_names() -> frozenset[tuple[Path, str]]:
    """Every name that the product's code imports, calls or reads; not what its comments and texts say."""
    return frozenset(_names())


def _names() -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / "relay").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import() | ast.ImportFrom():
                    module = getattr(node, "module", None) or ""
                    for alias in node.names:
                        yield path, f"{module}.{alias.name}"
                case ast.Attribute():
                    yield path, node.attr
                case ast.Name():
                    yield path, node.id
                case _:
                    pass


def test_relay_never_uses_the_robust_layer() -> None:
    assert [(path, name) for path, name in used_names() if "robust" in name.lower()] == []
    assert ("stock_publisher.py", "aio_pika") in {(path.name, name) for path, name in used_names()}  # names are found


def test_relay_never_uses_a_pool() -> None:
    """A pool resets what it takes back: locks are released, listeners dropped. (A producer may come with a pool of its own.)"""
    found = {path.relative_to(ROOT / "relay") for path, name in used_names() if name.rpartition(".")[2] in POOLS}
    assert found == {Path("producer/asyncpg.py")}
    assert not any(name.endswith("create_pool") for _, name in used_names())


POOLS = {"create_pool", "pool", "Pool", "PoolConnectionProxy", "PoolAcquireContext"}


def test_the_readme_tells_the_limit_of_asynchronous_commit() -> None:
    assert "synchronous_commit = off" in (ROOT / "README.md").read_text()
