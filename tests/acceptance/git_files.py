"""The other end of `git_history`: a consumer that keeps the files of a repository in a table.

    relay inbox run tests.acceptance.git_files:inbox

It trusts that each event comes once and in order: it never asks whether it has seen one before, and it fails loudly on a
file that is added twice, or changed or removed while it is not there.
"""

from __future__ import annotations

from relay.inbox import Event, Inbox
from relay.postgres.connect import Connection

TABLES = """
CREATE TABLE file (path text PRIMARY KEY, content text NOT NULL);
CREATE TABLE story (at bigint GENERATED ALWAYS AS IDENTITY, path text, seq bigint, event_type text, commit_id text);
"""

inbox = Inbox("files")


@inbox.on("FileAdded")
async def add(event: Event, tx: Connection) -> None:
    """There must be none yet: the primary key sees to that."""
    await tx.execute("INSERT INTO file VALUES ($1, $2)", event.aggregate_id, event.json()["file"])
    await note(event, tx)


@inbox.on("FileModified")
async def modify(event: Event, tx: Connection) -> None:
    """There must be one."""
    require_one(
        event,
        await tx.execute("UPDATE file SET content = $2 WHERE path = $1", event.aggregate_id, event.json()["file"]),
    )
    await note(event, tx)


@inbox.on("FileDeleted", "FileRenamed")
async def remove(event: Event, tx: Connection) -> None:
    """There must be one; under its new name a renamed file is added by an event of that path."""
    require_one(event, await tx.execute("DELETE FROM file WHERE path = $1", event.aggregate_id))
    await note(event, tx)


async def note(event: Event, tx: Connection) -> None:
    """Write down what was applied, in the order in which it was."""
    await tx.execute(
        "INSERT INTO story (path, seq, event_type, commit_id) VALUES ($1, $2, $3, $4)",
        event.aggregate_id,
        event.seq,
        event.event_type,
        event.json()["commit"],
    )


def require_one(event: Event, command_tag: str) -> None:
    """Raise unless the statement hit exactly one row."""
    if not command_tag.endswith(" 1"):
        raise LookupError(f"{event.event_type} of {event.aggregate_id}, but there is no such file")
