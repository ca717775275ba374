"""Who looks as relay_monitor sees everything but contents; and what others have written cannot break a terminal, nor a line."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from relay.errors import PrivilegeError
from relay.sandbox import Postgres
from tests.harness.blocked import block_inbox, block_outbox
from tests.harness.console import relay
from tests.harness.logins import Logins
from tests.harness.outbox import connected

COMMANDS = (
    ("status",),
    ("stuck",),
    ("stuck", "--by", "cause"),
    ("show", "order/1"),
    ("list",),
    ("list", "--state", "parked"),
    ("audit",),
    ("inbox", "held"),
    ("inbox", "gaps"),
    ("inbox", "quarantine"),
)
HOSTILE = "a\x1b[2J\x07\nb\u202ec\u2028\U000e0041"
LONG = "x" * 500


@pytest.fixture(scope="module")
def blocked(postgres: Postgres, template_database: str) -> Iterator[str]:
    """Both sides, everything blocked that can be; only to be read."""
    yield from _made(postgres, template_database)


@pytest.fixture(scope="module")
def logins(postgres: Postgres, blocked: str) -> Iterator[Logins]:
    with Logins(postgres) as made:
        yield made


def _made(postgres: Postgres, template: str, *more: tuple[str, tuple[Any, ...]]) -> Iterator[str]:
    name = f"relay_see_{secrets.token_hex(4)}"
    dsn = postgres.create_database(name, template)
    asyncio.run(_fill(dsn, *more))
    yield dsn
    postgres.drop_database(name)


async def _fill(dsn: str, *more: tuple[str, tuple[Any, ...]]) -> None:
    async with connected(dsn) as db:
        await block_outbox(db)
        await block_inbox(db)
        for statement, arguments in more:
            await db.execute(statement, *arguments)


class TestTheMonitor:
    def test_every_command_works_and_shows_neither_contents_nor_what_handlers_said(
        self, blocked: str, logins: Logins
    ) -> None:
        monitor = logins.create(blocked, "relay_monitor")
        for command in COMMANDS:
            for more in ((), ("--json",)):
                answer = relay(monitor, *command, *more)
                assert (answer.code, answer.err) == (0, ""), command
                assert "payload-" not in answer.out, command
                assert "KeyError" not in answer.out, command
        assert relay(monitor, "status").lines()[2:] == relay(blocked, "status").lines()[2:]

    def test_it_is_told_what_it_does_not_see(self, blocked: str, logins: Logins) -> None:
        monitor = logins.create(blocked, "relay_monitor")
        assert "What handlers said is shown to members of relay_operator only." in relay(monitor, "stuck").lines()
        assert (
            "What the handler said is shown to members of relay_operator only."
            in relay(monitor, "show", "order/1").lines()
        )
        assert relay(monitor, "stuck", "--json").json["errors_readable"] is False

    @pytest.mark.parametrize(
        "command",
        [
            ("show", "order/1", "--payload"),
            ("list", "--id", "1", "--payload"),
            ("inbox", "held", "--payload"),
            ("inbox", "quarantine", "--payload"),
            ("stuck", "--error", "KeyError"),
            ("inbox", "held", "--error", "KeyError"),
        ],
    )
    def test_contents_and_errors_need_an_operator(self, blocked: str, logins: Logins, command: tuple[str, ...]) -> None:
        refused = relay(logins.create(blocked, "relay_monitor"), *command)
        assert refused.code == PrivilegeError.exit_code
        assert refused.out == ""
        allowed = relay(logins.create(blocked, "relay_operator"), *command)
        assert (allowed.code, allowed.err) == (0, "")

    def test_a_stranger_is_told_what_is_missing(self, blocked: str, logins: Logins) -> None:
        answer = relay(logins.create(blocked), "status")
        assert answer.code == PrivilegeError.exit_code
        assert "Grant the role that relay logs in as one of the roles" in answer.err


@pytest.fixture(scope="module")
def hostile(postgres: Postgres, template_database: str) -> Iterator[str]:
    """The same, and one aggregate whose every text is hostile."""
    name = f"{HOSTILE}{LONG}"[:500]
    emit = "SELECT relay.emit('order', $1, 'Changed', '{}')"
    park = (
        "INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, detail, state, attempts)"
        " SELECT id, 0, aggregate_type, aggregate_id, seq, 'nacked', $2, 'stuck', 20 FROM relay.outbox WHERE aggregate_id = $1"
    )
    hold = (
        "INSERT INTO relay.inbox_held (consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, body, digest,"
        " reason, state, error) VALUES ($2, $2, $2, $1, 1, $2, $2, '', convert_to($2, 'UTF8'), '', 'failed', 'stuck', $2)"
    )
    quarantine = (
        "INSERT INTO relay.inbox_quarantine (consumer, reason, detail, message_id, exchange, routing_key, properties, body)"
        " VALUES ($1, 'foreign', $1, $1, $1, $1, '{}', '\\xff00')"
    )
    gap = (
        "INSERT INTO relay.inbox_gap (consumer, source, aggregate_type, aggregate_id, to_seq, found_by, state, detail)"
        " VALUES ($2, $2, $2, $1, 9, 'mark', 'stuck', $2)"
    )
    act = "INSERT INTO relay.audit (who, side, act, selection, why, rows) VALUES ($1, 'outbox', 'skip', '{\"all\": true}', $1, 1)"
    more = ((emit, (name,)), (park, (name, HOSTILE + LONG)), (hold, (name, HOSTILE)), (quarantine, (HOSTILE,)), (gap, (name, HOSTILE)), (act, (HOSTILE,)))  # fmt: skip
    yield from _made(postgres, template_database, *more)


class TestWhatOthersWrote:
    @pytest.mark.parametrize("columns", [None, 80])
    def test_nothing_of_it_reaches_the_terminal_unescaped(self, hostile: str, columns: int | None) -> None:
        name = f"{HOSTILE}{LONG}"[:500]
        contents = (
            ("inbox", "held", "--payload"),
            ("inbox", "quarantine", "--payload"),
            ("show", f"order/{name}", "--payload"),
        )
        for command in (*COMMANDS, ("show", f"order/{name}"), ("show", f"{HOSTILE}/{name}"), *contents):
            answer = relay(hostile, *command, columns=columns)
            assert answer.code == 0, (command, answer.err)
            assert all(line.isprintable() for line in answer.out.splitlines()), command
            assert answer.out.replace("\n", "").isprintable(), command

    def test_one_row_is_one_line_in_a_pipe_however_long_it_is(self, hostile: str) -> None:
        told = relay(hostile, "stuck", "--json").json
        table = relay(hostile, "stuck").out.split("\n\n")[0].splitlines()
        assert len(table) == 1 + told["total"]
        assert all(len(line) < 700 for line in table)

    def test_json_has_it_whole_and_escaped(self, hostile: str) -> None:
        answer = relay(hostile, "stuck", "--json")
        assert answer.out.isascii()
        assert f"{HOSTILE}{LONG}"[:500] in {b["aggregate_id"] for b in answer.json["blocked"]}

    def test_an_unknown_hostile_name_is_answered_on_one_line(self, hostile: str) -> None:
        answer = relay(hostile, "show", f"order/{HOSTILE}")
        assert answer.code == 11
        assert answer.err.count("\n") == 1
        assert answer.err.rstrip("\n").isprintable()
