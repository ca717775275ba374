"""Real servers for every test that asks for one; nothing is started for a run that needs none.

RELAY_TEST_POSTGRES_DSN and RELAY_TEST_RABBITMQ_URL name servers to use instead of private ones; RELAY_SANDBOX_POSTGRES
(15, 18, system, embedded) selects the private PostgreSQL.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager

import pytest
import structlog

from relay.sandbox import Postgres, RabbitMQ, find_postgres, find_rabbitmq
from tests.harness.databases import Databases, fresh_name

# A machine may forbid byte code; but then each of the hundreds of processes that tests start compiles relay anew: a
# quarter of what its start costs.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

MEMORY = "/dev/shm"  # noqa: S108 - the sandbox makes a private folder in it
MEMORY_NEEDED = 8 * 2**30
"""Free bytes from which on servers may be there: a worker's may take more than one gigabyte, and a container may have 64 megabytes."""

WAITING = ("tests/faults/test_smoke.py", "tests/faults/test_whole_path.py")
"""Tests of a minute and more, most of which is waiting: one after the other and begun first, beside all the others."""

YIELDING = 5
"""In a worker that yields: of a processor that it shares with one that does not, it has a quarter."""

BEGUN = pytest.StashKey[bool]()

LONG = (
    "tests/faults/test_simulation_inbox.py::test_six_thousand",
    "tests/faults/test_simulation_outbox.py::test_six_thousand",
    "tests/integration/test_outbox_property.py",
    "tests/faults/test_purged_queue.py",
)
"""Tests of half a minute: each of the other workers begins with some. The one that happened to be the last would be waited for."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In an order that is the same in every worker: what takes long is at the front of the workers' shares.

    These are equal parts of the list (pytest-xdist's worksteal); of what is left of a share others take the end.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    waiting = [item for item in items if item.nodeid.startswith(WAITING)]
    long = [item for item in items if item.nodeid.startswith(LONG)]
    rest = [item for item in items if not item.nodeid.startswith((*WAITING, *LONG))]
    first = [waiting, *(long[n :: workers - 1] for n in range(workers - 1))] if workers > 1 else [waiting + long]
    left = len(items)
    items.clear()
    for n, share in enumerate(first):
        size = left // (workers - n)
        left -= size
        short = max(size - len(share), 0)
        items += [*share, *rest[:short]]
        del rest[:short]
    items += rest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A worker that does not begin with what mostly waits lets the one that does go first: how long its faults last is judged."""
    if "PYTEST_XDIST_WORKER" in os.environ and BEGUN not in item.config.stash and not item.nodeid.startswith(WAITING):
        os.nice(YIELDING)  # and all servers and programs that it will start
    item.config.stash[BEGUN] = True


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


@contextmanager
def in_memory() -> Iterator[None]:
    """A server that is started within it keeps its data in memory where there is room, as no test can notice: none cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= MEMORY_NEEDED:
            patch.setattr(tempfile, "tempdir", MEMORY)
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One PostgreSQL for the whole run, without fsync. To make and drop a database is to make and delete 300 files."""
    with in_memory():
        server = find_postgres(fsync=False).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQ]:
    """One RabbitMQ for the whole run. Most of what a broker's test waits for is fsync: of a virtual host, of a queue, of a message."""
    with in_memory():
        broker = find_rabbitmq().start()
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def databases(postgres: Postgres) -> Iterator[Databases]:
    """Makes databases with relay's schema in the PostgreSQL of the whole run."""
    with closing(Databases(postgres)) as made:
        yield made


@pytest.fixture(scope="session")
def template_database(databases: Databases) -> str:
    """The name of a database that was migrated once and can be cloned. Never connect to it."""
    return databases.template


@pytest.fixture
def database(databases: Databases) -> Iterator[str]:
    """The DSN of a fresh database with relay's schema."""
    with databases.one() as dsn:
        yield dsn


@pytest.fixture
def consumer_database(databases: Databases) -> Iterator[str]:
    """The DSN of a second service's database."""
    with databases.one("consumer") as dsn:
        yield dsn


@pytest.fixture
def empty_database(postgres: Postgres) -> Iterator[str]:
    """The DSN of a fresh database without anything in it."""
    name = fresh_name("test")
    yield postgres.create_database(name)
    postgres.drop_database(name)


@pytest.fixture
def broker(rabbitmq: RabbitMQ) -> Iterator[str]:
    """The AMQP URL of a fresh virtual host."""
    name = fresh_name("test")
    yield rabbitmq.create_vhost(name)
    rabbitmq.delete_vhost(name)
