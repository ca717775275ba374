"""`relay emit`, in process and as a process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from click.testing import CliRunner, Result

from relay.cli import emit as emit_module
from relay.cli.emit import emit
from relay.errors import InputError, PostgresUnavailable, RelayError, SchemaError
from relay.producer import backfill
from relay.producer.backfill import Tally, insert_batch
from relay.producer.jsonl import BadLine, Line, parse

Run = Callable[..., Result]


def line(number: int, aggregate_id: str = "42", **more: Any) -> str:
    fields = {"aggregate_type": "order", "aggregate_id": aggregate_id, "event_type": "Paid", "payload": number}
    return json.dumps({**fields, **more}) + "\n"


def lines(count: int) -> str:
    return "".join(line(n) for n in range(1, count + 1))


def payloads(dsn: str) -> list[Any]:
    with psycopg.connect(dsn) as connection:
        return [row[0] for row in connection.execute("SELECT payload FROM relay.outbox ORDER BY id").fetchall()]


def relay_error(result: Result) -> RelayError:
    assert isinstance(result.exception, RelayError), result.output
    return result.exception


@pytest.fixture
def run(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def invoke(content: str | bytes, *options: str) -> Result:
        return CliRunner().invoke(emit, options, input=content, env={"RELAY_POSTGRES_DSN": database})

    return invoke


def test_lines_from_standard_input_are_committed_in_order(run: Run, database: str) -> None:
    result = run(lines(25), "--batch", "10")
    assert (result.exit_code, result.stdout) == (0, "25 events committed\n")
    assert payloads(database) == list(range(1, 26))


def test_lines_from_a_file_are_committed(run: Run, database: str, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(lines(3))
    result = run("", "events.jsonl", "--json")
    assert json.loads(result.stdout) == {
        "events": 3,
        "dry_run": False,
        "next_line": 4,
        "in_doubt_lines": None,
        "error": None,
        "error_line": None,
    }
    assert payloads(database) == [1, 2, 3]


def test_no_lines_are_no_error_and_need_no_database(run: Run) -> None:
    assert run("\n\n").stdout == "0 events committed\n"


def test_a_bad_line_stops_with_its_number_and_nothing_of_its_batch(run: Run, database: str) -> None:
    result = run(lines(14) + '{"event_typ": "Paid"}\n' + lines(5), "--batch", "10")
    error = relay_error(result)
    assert isinstance(error, InputError)
    assert str(error).startswith("line 15: unknown key 'event_typ'; did you mean 'event_type'?")
    assert error.exit_code == 6
    assert "10 events committed; nothing from line 11 on is written. Continue with --from-line 11" in result.stderr
    assert payloads(database) == list(range(1, 11))


def test_a_run_is_continued_from_the_line_that_was_told(run: Run, database: str) -> None:
    bad = lines(14) + "bad\n" + line(16)
    assert json.loads(run(bad, "--batch", "10", "--json").stdout)["next_line"] == 11
    assert run(bad.replace("bad", line(15).strip()), "--batch", "10", "--from-line", "11").exit_code == 0
    assert payloads(database) == list(range(1, 17))


@pytest.mark.parametrize("batch", ["1", "4", "1000"])
def test_an_event_that_postgresql_refuses_is_found_in_its_batch(run: Run, database: str, batch: str) -> None:
    content = "\n" + lines(5) + line(6, seq=99) + lines(3)
    result = run(content, "--batch", batch)
    error = relay_error(result)
    assert str(error).startswith(
        "line 7: PostgreSQL refused the event: relay.outbox: seq 99 was given for order/42, but the next one is 6 ("
    )
    assert error.exit_code == 6
    assert len(payloads(database)) == {"1": 5, "4": 4, "1000": 0}[batch]


def test_a_payload_that_only_the_database_finds_too_large_is_named(run: Run) -> None:
    """PostgreSQL prints jsonb with spaces: a compact text of under 16 MiB can be over it."""
    compact = "[" + ('"' + "x" * 197 + '",') * 83_800 + "1]"
    assert len(compact) < 16 * 2**20 < len(compact) + 83_800
    content = line(1) + '{"event_type": "Big", "payload": ' + compact + "}\n"
    error = relay_error(run(content))
    assert str(error).startswith("line 2: PostgreSQL refused the event: relay.outbox: the payload of Big")


def test_a_dry_run_needs_no_database_and_writes_nothing(run: Run, database: str) -> None:
    assert run(lines(3), "--dry-run").stdout == "3 events good\n"
    assert isinstance(relay_error(run(lines(3) + "bad", "--dry-run")), BadLine)
    assert payloads(database) == []


def test_errors_are_told_in_the_json_summary_too(run: Run) -> None:
    result = run(lines(2) + "bad\n", "--json", "--batch", "2")
    summary = json.loads(result.stdout)
    assert (summary["events"], summary["next_line"], summary["error_line"]) == (2, 3, 3)
    assert summary["error"].startswith("line 3: is not valid JSON")


def test_a_line_beyond_the_end_is_a_mistake(run: Run) -> None:
    assert "has only 3 lines" in str(relay_error(run(lines(3), "--from-line", "9")))


def test_a_missing_schema_and_a_missing_server_have_their_errors(
    empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for dsn, kind in ((empty_database, SchemaError), ("postgresql://127.0.0.1:1/none", PostgresUnavailable)):
        result = CliRunner().invoke(emit, [], input=lines(2), env={"RELAY_POSTGRES_DSN": dsn})
        assert isinstance(relay_error(result), kind)
        assert "0 events committed; nothing from line 1 on is written" in result.stderr


def test_a_batch_ends_at_its_size_too(run: Run, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backfill, "BATCH_BYTES", 3 * len(line(1)))
    assert json.loads(run(lines(7) + "bad", "--json").stdout)["events"] == 6
    assert len(payloads(database)) == 6


def test_a_terminal_sees_a_bar_on_standard_error_only(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "events.jsonl").write_text(lines(30))
    monkeypatch.setattr(emit_module, "_is_terminal", lambda: True)
    for options in (("events.jsonl",), ("-",)):
        result = run(lines(30), "--batch", "7", *options)
        assert result.stdout == "30 events committed\n"


# --- a commit whose answer is lost -----------------------------------------------------------------------------------


def batch_of(*numbers: int) -> list[Line]:
    return [Line(number=n, size=1, event=parse(line(n))) for n in numbers]


async def test_an_interrupt_during_commit_waits_for_its_answer(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = asyncio.Event()
    commit = asyncpg.transaction.Transaction.commit

    async def slow(self: Any) -> None:
        reached.set()
        await asyncio.sleep(0.05)
        await commit(self)

    monkeypatch.setattr(asyncpg.transaction.Transaction, "commit", slow)
    connection, tally = await asyncpg.connect(database), Tally()
    task = asyncio.ensure_future(insert_batch(connection, batch_of(1, 2), tally))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert tally == Tally(next_line=3, events=2)
    assert payloads(database) == [1, 2]
    await connection.close()


async def test_a_connection_that_dies_in_commit_leaves_the_batch_in_doubt(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, tally = await asyncpg.connect(database), Tally(next_line=5)
    commit = asyncpg.transaction.Transaction.commit

    async def cut(self: Any) -> None:
        connection.terminate()
        await commit(self)

    monkeypatch.setattr(asyncpg.transaction.Transaction, "commit", cut)
    with pytest.raises(PostgresUnavailable):
        await insert_batch(connection, batch_of(5, 6), tally)
    assert tally == Tally(next_line=5, in_doubt=(5, 6))
    assert "all or none" in emit_module._way_on(tally, "interrupted")


async def test_a_refused_commit_is_a_rolled_back_batch(database: str) -> None:
    """A deferred constraint speaks at COMMIT: nothing is in doubt then."""
    connection, tally = await asyncpg.connect(database), Tally()
    await connection.execute(
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'no' USING ERRCODE = '55000'; END$$;"
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON relay.outbox_counter DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION no()"
    )
    with pytest.raises(PostgresUnavailable, match="no"):
        await insert_batch(connection, batch_of(1), tally)
    assert tally == Tally()
    await connection.close()


# --- as a process ----------------------------------------------------------------------------------------------------


def start(database: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    # Who starts the tests in the background of a script has told all its children to ignore SIGINT.
    program = (
        "import signal, sys; from relay.cli.emit import emit; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); emit(sys.argv[1:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "RELAY_POSTGRES_DSN": database, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_it_is_a_filter_at_the_end_of_a_pipe(database: str, tmp_path: Path) -> None:
    with start(database, tmp_path, "--json") as process:
        output, errors = process.communicate(lines(2500), timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert json.loads(output)["events"] == 2500
    assert payloads(database) == list(range(1, 2501))


def test_ctrl_c_on_a_silent_pipe_says_what_is_committed(database: str, tmp_path: Path) -> None:
    with start(database, tmp_path, "--batch", "10") as process:
        assert process.stdin is not None
        process.stdin.write(lines(25))
        process.stdin.flush()
        deadline = time.monotonic() + 30
        while len(payloads(database)) < 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)  # the rest is read, and the pipe is silent
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert (
        "20 events committed; interrupted; nothing from line 21 on is written. Continue with --from-line 21" in errors
    )
    assert payloads(database) == list(range(1, 21))


def test_ctrl_c_during_an_insert_rolls_its_batch_back(database: str, tmp_path: Path) -> None:
    with psycopg.connect(database) as blocker, start(database, tmp_path, "--batch", "10") as process:
        blocker.execute("INSERT INTO relay.outbox_aggregate VALUES ('order', 'locked', 1)")
        assert process.stdin is not None
        process.stdin.write(lines(10) + line(11, "locked"))
        process.stdin.close()
        deadline = time.monotonic() + 30
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'relay emit' AND wait_event_type = 'Lock'"
        )
        with psycopg.connect(database, autocommit=True) as watcher:
            while time.monotonic() < deadline and watcher.execute(waiting).fetchall() != [(1,)]:
                time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr is not None
        assert "10 events committed; interrupted; nothing from line 11 on is written" in process.stderr.read()
        blocker.rollback()
    assert payloads(database) == list(range(1, 11))
