"""`relay migrate` and `relay check` as programs: what they print, and the exit codes that scripts rely on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from relay.postgres.migrate import migrations
from relay.sandbox.postgres_binaries import find_postgres_binaries
from tests.harness.outbox import connected

PROGRAM = (sys.executable, "-m", "relay")
EXIT_SCHEMA = 3
NOWHERE = "postgresql://nobody@127.0.0.1:1/nowhere"


def test_migrate_then_check_says_all_is_well(empty_database: str) -> None:
    migrated = _relay(empty_database, "migrate")
    assert migrated.returncode == 0, migrated.stderr
    assert migrated.stdout.splitlines() == [f"applied {m.version:04} {m.name}" for m in migrations()]
    again = _relay(empty_database, "migrate")
    assert (again.returncode, again.stdout) == (0, "the schema is up to date\n")
    checked = _relay(empty_database, "check")
    assert (checked.returncode, checked.stdout) == (0, "the schema is complete\n")
    assert json.loads(_relay(empty_database, "check", "--json").stdout) == {"ok": True, "missing": []}


def test_five_processes_at_once_apply_everything_exactly_once(empty_database: str) -> None:
    running = [
        subprocess.Popen(
            [*PROGRAM, "migrate"],
            env=_environment(empty_database),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(5)
    ]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in running]
    assert [code for _, _, code in ended] == [0] * 5, ended
    assert sorted(out.count("applied") for out, _, _ in ended) == [0, 0, 0, 0, len(migrations())]


def test_print_needs_no_connection_and_gives_psql_a_schema_that_check_accepts(
    empty_database: str, tmp_path: Path
) -> None:
    printed = _relay(NOWHERE, "migrate", "--print")
    assert printed.returncode == 0, printed.stderr
    script = tmp_path / "relay.sql"
    script.write_text(printed.stdout, encoding="utf-8")
    fed = subprocess.run(
        [
            _psql(),
            "--no-psqlrc",
            "--quiet",
            "--single-transaction",
            "-v",
            "ON_ERROR_STOP=1",
            "-f",
            str(script),
            empty_database,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert fed.returncode == 0, fed.stderr
    checked = _relay(empty_database, "check")
    assert (checked.returncode, checked.stdout) == (0, "the schema is complete\n")
    assert _relay(empty_database, "migrate").stdout == "the schema is up to date\n"


def test_the_printed_script_fed_to_a_database_that_has_it_stops_and_changes_nothing(
    database: str, tmp_path: Path
) -> None:
    script = tmp_path / "relay.sql"
    script.write_text(_relay(NOWHERE, "migrate", "--print").stdout, encoding="utf-8")
    fed = subprocess.run(
        [_psql(), "--no-psqlrc", "--single-transaction", "-v", "ON_ERROR_STOP=1", "-f", str(script), database],
        capture_output=True,
        text=True,
        check=False,
    )
    assert fed.returncode != 0
    assert "already exists" in fed.stderr
    assert _relay(database, "check").returncode == 0


async def test_check_names_what_is_missing_and_exits_with_3(database: str) -> None:
    async with connected(database) as connection:
        await connection.execute(
            "DROP INDEX relay.outbox_by_id; DROP TRIGGER outbox_assign ON relay.outbox; DROP FUNCTION relay.emit"
        )
        await connection.execute("ALTER TABLE relay.outbox DROP COLUMN headers")
    checked = _relay(database, "check")
    assert checked.returncode == EXIT_SCHEMA
    for name in (
        "index relay.outbox_by_id",
        "trigger outbox_assign",
        "function relay.emit",
        "column relay.outbox.headers",
    ):
        assert f"missing or different: {name}" in checked.stdout
    told = json.loads(_relay(database, "check", "--json").stdout)
    assert not told["ok"]
    assert len(told["missing"]) == len(checked.stdout.splitlines())


def test_check_of_a_database_without_the_schema_exits_with_3(empty_database: str) -> None:
    checked = _relay(empty_database, "check")
    assert checked.returncode == EXIT_SCHEMA
    assert "Run `relay migrate`" in checked.stderr


@pytest.mark.parametrize("command", ["migrate", "check"])
async def test_a_newer_database_exits_with_3_and_names_the_migration(database: str, command: str) -> None:
    async with connected(database) as connection:
        await connection.execute("INSERT INTO relay.migration (version, name, checksum) VALUES (9999, 'future', 'x')")
    refused = _relay(database, command)
    assert refused.returncode == EXIT_SCHEMA
    assert "9999 future" in refused.stderr


def _relay(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments], env=_environment(dsn), capture_output=True, text=True, check=False, timeout=120
    )


def _environment(dsn: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "PG"))}
    return clean | {"RELAY_POSTGRES_DSN": dsn}


def _psql() -> str:
    """psql, which comes with every PostgreSQL that the sandbox could have started."""
    return shutil.which("psql") or str(find_postgres_binaries().folder / "psql")
