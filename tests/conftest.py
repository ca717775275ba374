"""Real servers for every test that asks for one; nothing is started for a run that needs none.

RELAY_TEST_POSTGRES_DSN and RELAY_TEST_RABBITMQ_URL name servers to use instead of private ones; RELAY_SANDBOX_POSTGRES
(15, 18, system, embedded) selects the private PostgreSQL.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Generator, Iterator

import asyncpg
import pytest
import structlog

from relay.postgres.migrate import migrate
from relay.sandbox import Postgres, RabbitMQ, find_postgres, find_rabbitmq


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hostile texts end up in captured logs; a lone surrogate among them could not be sent from a worker to the terminal."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def logging_is_nobodys() -> Iterator[None]:
    """A command that is run in the test's own process sets the level of the log: not for the tests after it."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One PostgreSQL for the whole run; without fsync, which no test can notice: none cuts the power."""
    with find_postgres(fsync=False) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQ]:
    """One RabbitMQ for the whole run."""
    with find_rabbitmq() as broker:
        yield broker


@pytest.fixture(scope="session")
def template_database(postgres: Postgres) -> Iterator[str]:
    """The name of a database that was migrated once and is cloned for every test. Never connect to it."""
    name = _fresh_name("template")
    dsn = postgres.create_database(name)
    try:
        _migrate(dsn)
        yield name
    finally:
        postgres.drop_database(name)


@pytest.fixture
def database(postgres: Postgres, template_database: str) -> Iterator[str]:
    """The DSN of a fresh database with relay's schema."""
    yield from _database(postgres, template_database)


@pytest.fixture
def empty_database(postgres: Postgres) -> Iterator[str]:
    """The DSN of a fresh database without anything in it."""
    yield from _database(postgres, None)


@pytest.fixture
def broker(rabbitmq: RabbitMQ) -> Iterator[str]:
    """The AMQP URL of a fresh virtual host."""
    name = _fresh_name("test")
    yield rabbitmq.create_vhost(name)
    rabbitmq.delete_vhost(name)


def _database(postgres: Postgres, template: str | None) -> Iterator[str]:
    name = _fresh_name("test")
    yield postgres.create_database(name, template)
    postgres.drop_database(name)


def _fresh_name(purpose: str) -> str:
    return f"relay_{purpose}_{secrets.token_hex(4)}"


def _migrate(dsn: str) -> None:
    """Migrate in a thread of its own: the test that asked first may have a running event loop."""
    failure: list[BaseException] = []

    async def run() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            await migrate(connection)
        finally:
            await connection.close()

    def target() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:  # noqa: BLE001 - raised again below, in the test's thread
            failure.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
