"""The acting commands as a person and a script meet them: what they print, ask, refuse and return."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result

from relay.cli import acting
from relay.cli.main import cli
from relay.errors import Declined
from relay.sandbox import Postgres
from tests.harness.logins import Logins

Run = Callable[..., Result]
PROGRAM = (sys.executable, "-m", "relay")
KEYS = ["act", "side", "consumer", "dry_run", "counted", "rows", "aggregates", "sample", "notes", "audit_id"]
"""What --json prints: a contract with scripts."""

OUTBOX = ("retry", "skip", "purge")
INBOX = ("retry", "skip", "purge", "reset", "dismiss")
ACTS = [*((name,) for name in OUTBOX), *(("inbox", name) for name in INBOX)]


@pytest.fixture
def db(database: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """Two parked aggregates (order/1 with two rows), and a consumer with something for every act."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(_SOME_OF_EVERYTHING)
        yield connection


_SOME_OF_EVERYTHING = """
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload)
VALUES ('order', '1', 'Paid', '{}'), ('order', '1', 'Shipped', '{}'), ('order', '2', 'Paid', '{}');
INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state, attempts)
SELECT id, shard, aggregate_type, aggregate_id, seq, CASE seq WHEN 1 THEN 'nacked' ELSE 'behind' END, CASE seq WHEN 1 THEN 'stuck' ELSE 'waiting' END,
       CASE seq WHEN 1 THEN 20 ELSE 0 END FROM relay.outbox;
INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq) VALUES ('billing', 'shop', 'order', '1', 4);
INSERT INTO relay.inbox_held (consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, body, digest, reason, state, error)
VALUES ('billing', 'shop', 'order', '1', 5, 'm', 'Paid', 'application/json', '{}', '', 'failed', 'stuck', 'KeyError'),
       ('billing', 'shop', 'order', '1', 6, 'n', 'Paid', 'application/json', '{}', '', 'behind', 'waiting', NULL);
INSERT INTO relay.inbox_gap (consumer, source, aggregate_type, aggregate_id, to_seq, found_by, state) VALUES ('billing', 'shop', 'order', '9', 2, 'mark', 'stuck');
INSERT INTO relay.inbox_quarantine (consumer, reason, detail, exchange, routing_key, properties, body) VALUES ('billing', 'foreign', 'd', '', '', '{}', '');
"""


@pytest.fixture
def run(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command in this process; `answer`: what the person at the terminal types, without it there is no terminal."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, answer: str | None = None, dsn: str = database) -> Result:
        monkeypatch.setattr(acting, "has_terminal", lambda: answer is not None)
        return CliRunner().invoke(cli, arguments, input=answer, env={"RELAY_POSTGRES_DSN": dsn, "COLUMNS": "200"})

    return invoke


def tables(db: psycopg.Connection[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Everything that an act could change."""
    names = [
        row[0]
        for row in db.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'relay'::regnamespace AND relkind = 'r' ORDER BY 1"
        )
    ]
    return [(name, db.execute(f"SELECT t::text FROM relay.{name} t ORDER BY 1").fetchall()) for name in names]


class TestAsking:
    def test_shows_what_would_happen_and_does_it_after_a_yes(self, run: Run, db: psycopg.Connection[Any]) -> None:
        result = run("skip", "order/1", "--why", "booked by hand", "--who", "ada", answer="y\n")
        assert result.exit_code == 0, result.stderr
        assert result.stderr == (
            f"would skip 1 row of 1 aggregate in the outbox of database {db.info.dbname}: order/1\n"
            "  it is seq 1, Paid: nacked, stuck, 20 attempts\n"
            "The content will not be delivered; a tombstone takes the place of each. Go on? [y/N]: y\n"
        )
        assert re.fullmatch(
            rf"skipped 1 row of 1 aggregate in the outbox of database {db.info.dbname} \(audit \d+\)\n"
            r"  relay publishes the tombstones as soon as a relay runs \(none does now\), in order; consumers pass over them\n",
            result.stdout,
        )
        assert db.execute("SELECT who, why, login = current_user, rows, selection FROM relay.audit").fetchall() == [
            ("ada", "booked by hand", True, 1, {"aggregate": "order/1"})
        ]

    @pytest.mark.parametrize("answer", ["n\n", "\n", ""], ids=["no", "enter", "end of input"])
    def test_changes_nothing_after_anything_else(self, run: Run, db: psycopg.Connection[Any], answer: str) -> None:
        before = tables(db)
        result = run("purge", "--all", answer=answer)
        assert (result.exit_code, result.stdout.strip("\n")) == (12, "")
        assert result.stderr.endswith("relay: nothing was changed\n")
        assert tables(db) == before

    def test_without_a_terminal_says_how_to_go_on(self, run: Run, db: psycopg.Connection[Any]) -> None:
        before = tables(db)
        for command in ACTS:
            result = run(*command, "--all")
            assert (result.exit_code, result.stdout) == (2, "")
            assert result.stderr == (
                "relay: no terminal to ask on: add --yes to do it, or --dry-run to see what it would do\n"
            )
        assert tables(db) == before

    def test_yes_is_not_asked(self, run: Run, db: psycopg.Connection[Any]) -> None:
        result = run("retry", "--all", "--yes")
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith(
            f"retried 2 rows of 2 aggregates in the outbox of database {db.info.dbname} (audit "
        )

    def test_a_sample_is_named_and_the_rest_counted(self, run: Run, db: psycopg.Connection[Any]) -> None:
        db.execute("DELETE FROM relay.outbox_parked")
        db.execute(
            "INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state)"
            " SELECT n, 0, 'order', to_char(n, 'FM00'), 1, 'nacked', 'stuck' FROM generate_series(1, 12) AS n"
        )
        result = run("retry", "--all", answer="n\n")
        assert (
            f"would retry 12 rows of 12 aggregates in the outbox of database {db.info.dbname}: order/01, order/02,"
            in result.stderr
        )
        assert "order/10 and 2 more\n" in result.stderr

    def test_an_interrupt_ends_the_question_in_a_running_loop_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(acting, "has_terminal", lambda: True)
        monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: os.kill(os.getpid(), signal.SIGINT))

        async def in_a_loop() -> None:
            acting.ask(acting.Way(), lambda: None, "What then?")

        with pytest.raises(Declined, match="nothing was changed"):
            asyncio.run(in_a_loop())

    @pytest.mark.parametrize(("typed", "code"), [(b"y\n", 0), (b"\x03", 12)], ids=["y", "Ctrl-C"])
    def test_at_a_real_terminal(self, db: psycopg.Connection[Any], database: str, typed: bytes, code: int) -> None:
        before = tables(db)
        output, returned = at_terminal(database, ["retry", "--all"], typed)
        assert (returned, "Go on? [y/N]:" in output) == (code, True), output
        assert (tables(db) == before) == (code != 0)


class TestDryRun:
    def test_counts_shows_and_changes_nothing(self, run: Run, db: psycopg.Connection[Any]) -> None:
        before = tables(db)
        for command in ACTS:
            result = run(*command, "--all", "--dry-run")
            assert (result.exit_code, result.stderr) == (0, ""), command
            told = rf"would {command[-1]} \d (row|message|cursor)s?( of \d aggregates?)? in the (outbox|inbox of consumer billing)\b"
            assert re.match(told, result.stdout), result.stdout
        over = run("inbox", "skip", "order/9", "--through", "2", "--dry-run")
        assert over.stdout.startswith("would skip 2 numbers of 1 aggregate in the inbox of consumer billing: order/9\n")
        outbox = f"in the outbox of database {db.info.dbname}"
        assert run("pause", "order/1", "--dry-run").stdout == f"would pause order/1 {outbox}\n"
        assert (
            run("pause", "--type", "order", "--dry-run").stdout
            == f"would pause all aggregates of type order {outbox}\n"
        )
        assert tables(db) == before


class TestJson:
    def test_has_these_keys_for_a_dry_run_and_for_the_act(self, run: Run, db: psycopg.Connection[Any]) -> None:
        for command in ACTS:
            dry = json.loads(run(*command, "--all", "--dry-run", "--json").stdout)
            assert list(dry) == KEYS
            assert dry["counted"] > 0
            assert (dry["dry_run"], dry["rows"], dry["audit_id"]) == (True, 0, None)
            done = json.loads(run(*command, "--all", "--yes", "--json").stdout)
            assert list(done) == KEYS
            expected = ("inbox", "billing") if command[0] == "inbox" else ("outbox", None)
            assert (done["side"], done["consumer"]) == expected
            assert (done["act"], done["dry_run"]) == (command[-1], False)
            assert done["rows"] == done["counted"] == dry["counted"]
            assert (done["audit_id"],) == db.execute("SELECT max(id) FROM relay.audit").fetchone()

    def test_pause_and_resume_and_what_is_so_already(self, run: Run, db: psycopg.Connection[Any]) -> None:
        first, again, resumed = (
            json.loads(run(*command, "--json", "--yes").stdout)
            for command in (("pause", "order/1"), ("pause", "order/1"), ("resume", "order/1"))
        )
        assert list(first) == list(again) == list(resumed) == KEYS
        assert [(r["rows"], r["audit_id"] is None) for r in (first, again, resumed)] == [
            (1, False),
            (0, True),
            (1, False),
        ]

    def test_the_question_goes_to_standard_error(self, run: Run, db: psycopg.Connection[Any]) -> None:
        result = run("retry", "--all", "--json", answer="y\n")
        assert json.loads(result.stdout.removeprefix("y\n"))["rows"] == 2


class TestRefusals:
    def test_an_unbounded_act_needs_all_and_all_excludes_filters(self, run: Run, db: psycopg.Connection[Any]) -> None:
        before = tables(db)
        for command in ACTS:
            result = run(*command, "--yes")
            assert result.exit_code == 2
            assert (
                "nothing is selected: name an aggregate (order/42) or a filter, or say --all for everything"
                in result.stderr
            )
            assert run(*command, "--yes", "--all", "order/1").exit_code == 2
        assert run("resume", "--yes", "--all", "order/1").exit_code == 2
        assert run("pause", "--yes").exit_code == 2
        assert tables(db) == before

    def test_what_selects_nothing_is_told_and_returns_11(self, run: Run, db: psycopg.Connection[Any]) -> None:
        for command in (*ACTS, ("resume",)):
            for more in ("--yes", "--dry-run"):
                result = run(*command, "order/none", more)
                assert (result.exit_code, result.stdout) == (11, "")
                assert "nothing was" in result.stderr
                assert result.stderr.count("\n") == 1

    def test_terminal_escapes_in_an_id_are_printed_as_text(self, run: Run, db: psycopg.Connection[Any]) -> None:
        name = "\x1b]0;owned\x07\x1b[31m"
        db.execute("UPDATE relay.outbox_parked SET aggregate_id = %s WHERE aggregate_id = '1'", (name,))
        result = run("retry", f"order/{name}", answer="y\n")
        assert result.exit_code == 0
        assert "\x1b" not in result.output
        assert r"order/\x1b]0;owned\x07\x1b[31m" in result.stderr

    def test_what_is_not_a_text_is_refused(self, run: Run) -> None:
        for option in ("--why", "--who", "--error"):
            result = run("retry", option, "\udcff", "order/1", "--yes")
            assert (result.exit_code, "is not a text" in result.stderr) == (2, True)

    def test_without_relays_schema_says_so(self, run: Run, empty_database: str) -> None:
        result = run("retry", "--all", "--yes", dsn=empty_database)
        assert (result.exit_code, "relay migrate" in result.stderr) == (3, True)


class TestTheWrongDatabase:
    """A consumer's, where the producer's is meant: its outbox was never used."""

    @pytest.fixture
    def billing(self, db: psycopg.Connection[Any]) -> str:
        db.execute("TRUNCATE relay.outbox, relay.outbox_parked, relay.outbox_counter, relay.outbox_tombstone")
        return db.info.dbname

    def test_a_pause_is_refused_where_an_inbox_is(self, run: Run, db: psycopg.Connection[Any], billing: str) -> None:
        before = tables(db)
        result = run("pause", "--type", "order", "--yes")
        assert (result.exit_code, result.stderr) == (
            2,
            f"relay: a pause here would hold nothing: no relay has ever run on database {billing}, and no event was"
            " committed to it; here is the inbox of billing. Is postgres.dsn the producer's?\n",
        )
        assert tables(db) == before

    def test_a_pause_before_the_first_event_is_done_and_warned_of(self, run: Run, database: str) -> None:
        result = run("pause", "--type", "order", "--yes")
        assert result.exit_code == 0
        assert "it holds nothing yet: no relay has ever run on database" in result.stdout

    def test_other_acts_point_at_the_inbox(self, run: Run, db: psycopg.Connection[Any], billing: str) -> None:
        for name in OUTBOX:
            result = run(name, "--all", "--yes")
            assert (result.exit_code, f"no relay has ever run on database {billing}" in result.stderr) == (11, True)
            assert result.stderr.endswith(f"Is postgres.dsn the producer's? Of the inbox: relay inbox {name}\n")
        assert "the inbox of billing" in run("resume", "--all", "--yes").stderr

    def test_so_do_counters(self, run: Run, db: psycopg.Connection[Any], billing: str) -> None:
        for source in ((), ("--set", "source=shop")):
            result = run("counters", *source)
            assert (result.exit_code, result.stdout) == (2, "")
            assert f"nothing to count: no relay has ever run on database {billing}" in result.stderr


class TestResume:
    def test_what_the_pause_of_a_type_holds_is_told(self, run: Run, db: psycopg.Connection[Any]) -> None:
        run("pause", "--type", "order", "--yes")
        result = run("resume", "order/1", "--yes")
        assert result.exit_code == 11
        assert (
            "order/1 is held by the pause of all aggregates of type order: nothing was resumed. That pause ends with: relay resume"
            " --type order\n"
        ) in result.stderr

    def test_all_names_the_pauses(self, run: Run, db: psycopg.Connection[Any]) -> None:
        for what in (("--type", "order"), ("order/1",), ("--shard", "0")):
            run("pause", *what, "--yes")
        shown = run("resume", "--all", "--dry-run").stdout.splitlines()
        assert shown[1:] == ["  all aggregates of type order", "  order/1", "  shard 0"]


class TestWhoIsThere:
    """Whether what is told happens now depends on who is connected."""

    @pytest.fixture
    def consumer(self, db: psycopg.Connection[Any], database: str) -> Iterator[None]:
        with psycopg.connect(database, application_name="relay inbox billing"):
            yield

    def test_a_reset_while_the_consumer_is_connected_needs_force(
        self, run: Run, db: psycopg.Connection[Any], consumer: None
    ) -> None:
        told = "1 consumer of billing is connected now: stop `relay inbox run` first"
        before = tables(db)
        for how in ({"answer": "y\n"}, {}):
            result = run("inbox", "reset", "--all", *(() if how else ("--yes",)), **how)
            assert (result.exit_code, told in result.stderr, "--force" in result.stderr) == (2, True, True)
        assert told in run("inbox", "reset", "--all", "--dry-run").stdout
        assert tables(db) == before
        assert run("inbox", "reset", "--all", "--yes", "--force").exit_code == 0

    def test_an_inbox_that_is_connected_tries_now(self, run: Run, db: psycopg.Connection[Any], consumer: None) -> None:
        assert "  the inbox tries them now\n" in run("inbox", "retry", "order/1", "--yes").stdout

    def test_one_that_is_not_tries_when_it_runs(self, run: Run, db: psycopg.Connection[Any]) -> None:
        told = "  the inbox tries them as soon as it runs (no consumer billing is connected now)\n"
        assert told in run("inbox", "retry", "order/1", "--yes").stdout

    def test_a_relay_that_owns_the_log_tries_now(self, run: Run, db: psycopg.Connection[Any]) -> None:
        assert "relay tries them as soon as a relay runs (none does now);" in run("retry", "order/1", "--yes").stdout
        db.execute("SELECT pg_advisory_lock(727003, 0)")
        assert "relay tries them now;" in run("retry", "order/2", "--yes").stdout


def test_who_may_only_look_is_told_which_role_acts(
    run: Run, db: psycopg.Connection[Any], postgres: Postgres, database: str
) -> None:
    before = tables(db)
    with Logins(postgres) as logins:
        monitor = logins.create(database, "relay_monitor")
        for command in (("retry", "--all"), ("pause", "order/1"), ("inbox", "retry", "order/1")):
            result = run(*command, "--yes", dsn=monitor)
            assert (result.exit_code, "relay_operator for acts (retry, skip," in result.stderr) == (4, True)
    assert tables(db) == before


class TestHelp:
    def test_has_examples_that_can_be_typed(self, run: Run, db: psycopg.Connection[Any]) -> None:
        for command in (*ACTS, ("pause",), ("resume",)):
            result = run(*command, "--help")
            assert result.exit_code == 0
            examples = re.findall(rf"(relay {' '.join(command)} .*?)(?:  .*)?$", result.stdout, re.MULTILINE)
            assert examples, result.stdout
            for example in examples:
                words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', example)][1:]
                tried = run(*words, *(() if "--dry-run" in words else ("--dry-run",)))
                assert tried.exit_code in (0, 11), f"{example}: {tried.stderr}"


class TestCompletion:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("relay pur", ["purge"]),
            ("relay inbox re", ["reset", "retry"]),
            ("relay skip --cause unr", ["unroutable"]),
            ("relay resume --sh", ["--shard"]),
        ],
    )
    def test_completes_commands_options_and_values(self, words: str, expected: list[str]) -> None:
        *before, incomplete = words.split()[1:]
        completions = BashComplete(cli, {}, "relay", "_RELAY_COMPLETE").get_completions(before, incomplete)
        assert sorted(found.value for found in completions) == expected

    @pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
    def test_the_script_for_bash_works_in_bash(self, tmp_path: Path) -> None:
        bin_ = tmp_path / "relay"
        bin_.write_text(f'#!/bin/sh\nexec {sys.executable} -m relay "$@"\n')
        bin_.chmod(0o755)
        script = 'eval "$(relay completion bash)"; COMP_WORDS=(relay inbox dis); COMP_CWORD=2; _relay_completion relay; echo "${COMPREPLY[@]}"'
        result = subprocess.run(
            ["bash", "--norc", "-c", script],
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.stdout, result.stderr) == ("dismiss\n", "")

    @pytest.mark.parametrize(("shell", "word"), [("zsh", "compdef"), ("fish", "complete")])
    def test_other_shells_have_one_too(self, run: Run, shell: str, word: str) -> None:
        result = run("completion", shell)
        assert result.exit_code == 0
        assert word in result.stdout
        assert "_RELAY_COMPLETE" in result.stdout


def at_terminal(database: str, arguments: list[str], typed: bytes) -> tuple[str, int]:
    """A command as a process with a terminal of its own; what it printed, and its exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["RELAY_POSTGRES_DSN"] = database
        os.execv(sys.executable, [*PROGRAM, *arguments])  # noqa: S606
    output = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        # Typed again and again: a signal that comes just before a process begins to read is noticed at the next key.
        if not select.select([terminal], [], [], 1.0)[0]:
            if b"[y/N]:" in output and b"\n" not in output.partition(b"[y/N]:")[2]:
                os.write(terminal, typed)
            continue
        try:
            read = os.read(terminal, 4096)
        except OSError:  # the process has ended
            break
        output += read
        if b"[y/N]:" in read:
            os.write(terminal, typed)
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return output.decode(), os.waitstatus_to_exitcode(status)
