"""Fixtures for tests that torment a server: the session's own one, or a skip where it is somebody else's."""

from __future__ import annotations

import pytest

from relay.sandbox import Postgres, RabbitMQ, SandboxPostgres, SandboxRabbitMQ


@pytest.fixture
def own_broker(rabbitmq: RabbitMQ) -> SandboxRabbitMQ:
    """The session's broker, where it is ours to torment."""
    if not isinstance(rabbitmq, SandboxRabbitMQ):
        pytest.skip("needs a broker of our own: unset RELAY_TEST_RABBITMQ_URL")
    return rabbitmq


@pytest.fixture(scope="session")
def postgres_version(postgres: Postgres) -> str | None:
    """What to select so that a server of a test's own is of the version that the others use; None: whatever is found."""
    return str(postgres.binaries.major) if isinstance(postgres, SandboxPostgres) else None
