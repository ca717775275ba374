"""A producer's database and another one, the consumer's, each with relay's schema."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from relay.sandbox import Postgres


@pytest.fixture
def consumer_database(postgres: Postgres, template_database: str) -> Iterator[str]:
    """The DSN of a second service's database."""
    name = f"relay_consumer_{secrets.token_hex(4)}"
    yield postgres.create_database(name, template_database)
    postgres.drop_database(name)
