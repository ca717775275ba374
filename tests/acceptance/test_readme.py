"""The README is true: its examples run, its tables are those of the program."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import shlex
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import click
import django
import pytest
import sqlalchemy
from django.conf import settings as django_settings

from relay import errors
from relay.cli.main import cli
from tests.acceptance.readme import README, blocks, generated, settings_table
from tests.harness.outbox import RelayProcess, connected, settings_for, until

PRODUCERS = {re.split(r"\W", block.removeprefix("# "))[0]: block for block in blocks("python", "Producing")}


@pytest.fixture
def shop(database: str) -> str:
    """A producer's database with the one order that the examples pay."""

    async def prepare() -> None:
        async with connected(database) as db:
            await db.execute(
                "CREATE TABLE orders (id int PRIMARY KEY, paid boolean NOT NULL); INSERT INTO orders VALUES (42, false)"
            )

    asyncio.run(prepare())
    return database


def paid_and_emitted(dsn: str) -> bool:
    async def look() -> Any:
        async with connected(dsn) as db:
            return await db.fetchval(
                "SELECT paid FROM orders WHERE EXISTS (SELECT FROM relay.outbox WHERE aggregate_id = '42' AND seq = 1 "
                "AND event_type = 'OrderPaid' AND payload = '{\"amount\": 100}')"
            )

    return bool(asyncio.run(look()))


def test_there_is_an_example_for_every_driver() -> None:
    assert set(PRODUCERS) == {"asyncpg", "psycopg", "SQLAlchemy", "Django", "many"}


def test_the_sql_example_runs(shop: str) -> None:
    async def run() -> None:
        async with connected(shop) as db, db.transaction():
            await db.execute("UPDATE orders SET paid = true")
            await db.execute(blocks("sql", "Producing")[0])

    asyncio.run(run())
    assert paid_and_emitted(shop)


@pytest.mark.parametrize("example", ["asyncpg", "many"])
def test_the_asyncpg_examples_run(shop: str, example: str) -> None:
    async def run() -> None:
        namespace: dict[str, Any] = {}
        exec("async def example(pool):\n" + textwrap.indent(PRODUCERS[example], "    "), namespace)  # noqa: S102
        async with asyncpg.create_pool(shop, min_size=1, max_size=1) as pool:
            await namespace["example"](pool)

    asyncio.run(run())
    assert paid_and_emitted(shop)


def test_the_psycopg_example_runs(shop: str) -> None:
    exec(PRODUCERS["psycopg"], {"dsn": shop})  # noqa: S102
    assert paid_and_emitted(shop)


def test_the_sqlalchemy_example_runs(shop: str) -> None:
    engine = sqlalchemy.create_engine(shop.replace("postgresql://", "postgresql+psycopg://"))
    exec(PRODUCERS["SQLAlchemy"], {"engine": engine})  # noqa: S102
    engine.dispose()
    assert paid_and_emitted(shop)


def test_the_django_example_runs(shop: str) -> None:
    from django.db import connections

    if not django_settings.configured:
        django_settings.configure(DATABASES={})
        django.setup()
    url = sqlalchemy.make_url(shop)
    connections.databases["default"] = connections.configure_settings(
        {
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "HOST": url.host,
                "PORT": url.port,
                "USER": url.username,
                "PASSWORD": url.password,
                "NAME": url.database,
            }
        }
    )["default"]
    if hasattr(connections._connections, "default"):  # type: ignore[attr-defined]
        del connections["default"]
    try:
        exec(PRODUCERS["Django"], {})  # noqa: S102
    finally:
        connections["default"].close()
    assert paid_and_emitted(shop)


@pytest.mark.parametrize("example", [0, 1], ids=["one by one", "in batches"])
async def test_the_consumer_example_issues_the_invoice(
    database: str, broker: str, tmp_path: Path, example: int
) -> None:
    (tmp_path / "billing.py").write_text(blocks("python", "Consuming")[example], encoding="utf-8")
    settings = settings_for(database, broker)
    relay = await RelayProcess.start(settings)
    inbox = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "relay", "inbox", "run", "billing:inbox"),
        cwd=tmp_path,
        env=os.environ
        | {"RELAY_POSTGRES_DSN": database, "RELAY_RABBITMQ_URL": broker, "RELAY_INBOX_BINDINGS": "order.#"},
    )
    try:
        async with connected(database) as db:
            await db.execute("CREATE TABLE invoice (order_id text, amount int)")
            await db.execute(blocks("sql", "Producing")[0])
            assert await until(lambda: db.fetchrow("SELECT * FROM invoice")) == ("42", 100)
    finally:
        inbox.terminate()
        await inbox.wait()
        await relay.terminate()
    assert inbox.returncode == 0


@asynccontextmanager
async def billing_runs(database: str, broker: str, *arguments: str, **environment: str) -> AsyncIterator[Any]:
    """An inbox that is no Python of ours, a relay, and one paid order; yields a connection to the database of both."""
    relay = await RelayProcess.start(settings_for(database, broker))
    inbox = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "relay", "inbox", "run", *arguments),
        env={k: v for k, v in os.environ.items() if not k.startswith("RELAY_")}
        | {"RELAY_POSTGRES_DSN": database, "RELAY_RABBITMQ_URL": broker, "RELAY_INBOX_BINDINGS": "order.#"}
        | environment,
    )
    try:
        async with connected(database) as db:
            await db.execute("CREATE TABLE invoice (order_id text, amount int)")
            await db.execute(blocks("sql", "Producing")[0])
            yield db
    finally:
        inbox.terminate()
        await inbox.wait()
        await relay.terminate()
    assert inbox.returncode == 0


async def test_the_example_of_a_service_that_takes_issues_the_invoice(database: str, broker: str) -> None:
    take = blocks("sql", "Consuming")[0]
    async with billing_runs(database, broker, "--consumer", "billing", "--store") as db:
        await until(lambda: db.fetchval("SELECT EXISTS (SELECT FROM relay.inbox)"))
        await db.execute(take)
        assert await db.fetch("SELECT * FROM invoice") == [("42", 100)]
        assert await db.fetchval("SELECT count(*) FROM relay.inbox") == 0


async def test_the_example_of_an_sql_function_issues_the_invoice(database: str, broker: str) -> None:
    async with connected(database) as db:
        await db.execute("CREATE TABLE invoice (order_id text, amount int)")
        await db.execute(blocks("sql", "Consuming")[1])
        await db.execute("DROP TABLE invoice")
    (command,) = [b for b in blocks("console", "Consuming") if "RELAY_INBOX_FUNCTIONS" in b]
    exported = dict(part.split("=", 1) for part in shlex.split(command.splitlines()[0].removeprefix("$ export ")))
    async with billing_runs(database, broker, **exported) as db:
        assert await until(lambda: db.fetchrow("SELECT * FROM invoice")) == ("42", 100)


def test_the_settings_table_is_that_of_the_program() -> None:
    assert generated("settings") == settings_table(), "run: python -m tests.acceptance.readme"


def test_every_exit_code_is_listed() -> None:
    listed = {
        int(n)
        for row in re.findall(r"^\| ([\d, ]+) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
        for n in row.split(",")
    }
    ours = {c.exit_code for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.RelayError)}
    assert ours <= listed


def test_every_command_in_the_readme_exists() -> None:
    text = README.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^\$ |`)relay ((?!\.)[a-z]+)", text, re.MULTILINE))
    assert named <= set(cli.commands), named - set(cli.commands)
    assert set(cli.commands) <= named, set(cli.commands) - named
    inbox = cli.commands["inbox"]
    assert isinstance(inbox, click.Group)
    assert set(re.findall(r"(?:^\$ |`)relay inbox ([a-z]+)", text, re.MULTILINE)) == set(inbox.commands)


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (README.parent / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|\$ )make ([a-z]+)", README.read_text(encoding="utf-8")))
    assert named <= targets, named - targets


def test_every_path_in_the_readme_exists() -> None:
    text = README.read_text(encoding="utf-8")
    for path in set(re.findall(r"`((?:relay|tests|sql|deploy)/[\w./]*)`", text)):
        assert (README.parent / path).exists(), path
