"""sql/manifest.txt, what `relay check` compares with, is what the migrations make, on every PostgreSQL that we support."""

from __future__ import annotations

import asyncio

import pytest

from relay.errors import SandboxError
from relay.postgres.manifest import manifest_of_migrated
from relay.postgres.migrate import expected_manifest
from relay.sandbox import SandboxPostgres


@pytest.mark.parametrize("kind", ["system", "embedded"])
def test_the_manifest_is_what_the_migrations_make(kind: str) -> None:
    try:
        server = SandboxPostgres(kind, fsync=False)
    except SandboxError as error:
        pytest.skip(str(error))
    with server:
        made = asyncio.run(manifest_of_migrated(server.dsn()))
    assert made == expected_manifest(), (
        f"on PostgreSQL {server.version}: sql/manifest.txt is stale, run `make manifest`"
    )
