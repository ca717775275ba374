"""Where a connection was tried, as an error says it: never with anything of the password."""

from __future__ import annotations

import pytest

from relay.errors import PostgresUnavailable
from relay.postgres.connect import address, connect
from relay.settings import PostgresSettings


@pytest.mark.parametrize(
    ("dsn", "told"),
    [
        ("postgresql://relay:canary@db.example:5432/shop", "host db.example:5432, database shop"),
        ("postgresql://relay@a:1,b:2/shop?password=canary", "host a:1,b:2, database shop"),
        ("postgresql:///shop?host=/var/run/postgresql&user=relay", "host /var/run/postgresql, database shop"),
        ("postgresql://relay:c%40nary@[::1]:5432/my%20shop", "host [::1]:5432, database my shop"),
        ("postgresql://db.example", "host db.example"),
        ("postgresql://relay:can@ry@db.example/shop", "host db.example, database shop"),
        ("postgresql://relay:can/ary@db.example/shop", ""),
        ("postgresql://relay:can#ary@db.example/shop", ""),
        ("postgresql://relay:c@n#ary@db.example/shop", ""),
        ("postgresql://relay:can?ary@db.example/shop", ""),
        ("postgresql://[can:ary@db.example/shop", ""),
    ],
)
def test_host_and_database_are_named(dsn: str, told: str) -> None:
    assert address(dsn) == told


async def test_an_error_tells_that_nobody_named_a_database() -> None:
    given = PostgresSettings.model_validate({"dsn": "postgresql://u:canary@127.0.0.1:1/shop"})
    default = PostgresSettings.model_construct(_fields_set=set(), **given.__dict__)
    with pytest.raises(PostgresUnavailable, match=r"host 127.0.0.1:1, database shop, which is the default: neither"):
        await connect(default, application="test")
