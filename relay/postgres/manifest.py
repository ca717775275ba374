"""`python -m relay.postgres.manifest DSN > sql/manifest.txt`: what a database migrated by this source tree consists of.

DSN is an empty database of its owner; `make manifest` runs this against a throwaway one. To be run whenever a migration
changes: `relay check` compares with the file.
"""

from __future__ import annotations

import asyncio
import sys

from pydantic import SecretStr

from relay.errors import RelayError, SchemaError
from relay.postgres.connect import connection
from relay.postgres.migrate import manifest, migrate
from relay.settings import PostgresSettings


async def manifest_of_migrated(dsn: str) -> list[str]:
    """Migrate an empty database and return its manifest. Raises SchemaError, before it changes anything, if it is not empty of relay's schema."""
    async with connection(PostgresSettings(dsn=SecretStr(dsn)), application="relay manifest") as opened:
        if await manifest(opened):
            raise SchemaError("the database has a schema relay already; give an empty one")
        await migrate(opened)
        return await manifest(opened)


def main(arguments: list[str]) -> int:
    """Print the manifest; the exit code is the error's."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m relay.postgres.manifest postgresql://... > sql/manifest.txt\n")
        return 2
    try:
        lines = asyncio.run(manifest_of_migrated(arguments[0]))
    except RelayError as exc:
        sys.stderr.write(f"{exc}\n")
        return exc.exit_code
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
