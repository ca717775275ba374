"""A git history as events: every commit a transaction, every file an aggregate that tells its own story.

    python -m tests.acceptance.git_history [REPOSITORY [REVISION]] | relay emit -

The commits are those of `git log --first-parent`, oldest first; a merge is what it changed for its first parent, and the
first commit (in a shallow clone: the first one that is there) is all files that it has. Event types of the aggregate type
`file`, whose ids are paths:

    FileAdded     the file is there from now on; `from`: it was renamed, and that path's story ended in the same commit
    FileModified  other content, mode or type (a file became a symbolic link)
    FileRenamed   the file is gone; `to`: the path whose story goes on in the same commit
    FileDeleted   the file is gone; a later FileAdded may bring it back

A rename is two events because it concerns two aggregates: the old path learns that its file left, the new one that a file
came. So every path's events, in their order, say all about that path, and no consumer needs the order between two paths.
A copy is a FileAdded like any other: the file that it was copied from does not change. A commit's departures come before
its arrivals, for the sake of a path that is both.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from relay.producer import NewEvent

AGGREGATE_TYPE = "file"
DEPARTURES = ("FileDeleted", "FileRenamed")


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit of the first-parent history, and what it did to files: possibly nothing."""

    id: str
    events: list[NewEvent] = field(default_factory=list)


def commits(repository: Path, revision: str = "HEAD") -> list[Commit]:
    """The first-parent history up to a revision, oldest commit first. Raises CalledProcessError with git's own words."""
    log = _git(repository, "rev-list", "--first-parent", "--reverse", "--parents", revision)
    pairs = [line.split()[:2] for line in log.decode().splitlines()]  # a commit and its first parent, if it has one
    changes = _git(
        repository,
        *("diff-tree", "--stdin", "--root", "-r", "--find-renames", "-z"),
        stdin="".join(" ".join(pair) + "\n" for pair in pairs),
    )
    found = {pair[0]: Commit(pair[0]) for pair in pairs}
    commit = ""
    fields = iter(changes.split(b"\0")[:-1])
    for first in fields:
        if first.startswith(b":"):
            found[commit].events.extend(_events(commit, first.decode(), fields))
        else:
            commit = first.decode()
    for done in found.values():
        done.events.sort(key=lambda event: event.event_type not in DEPARTURES)
    return list(found.values())


def tree(repository: Path, revision: str = "HEAD") -> dict[str, str]:
    """All files of a revision as git lists them: path -> mode and object."""
    files = {}
    for entry in _git(repository, "ls-tree", "-r", "-z", "--full-tree", revision).split(b"\0")[:-1]:
        about, _, path = entry.partition(b"\t")
        mode, _, object_id = about.decode().split()
        files[path_text(path)] = f"{mode} {object_id}"
    return files


def path_text(path: bytes) -> str:
    """A path, which git keeps as any bytes, as the text of an aggregate id: what is not UTF-8 becomes %XX, and % itself %25."""
    text = path.replace(b"%", b"%25").decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", text)


def as_line(event: NewEvent) -> str:
    """The event as a line for `relay emit`."""
    return json.dumps(
        {
            "aggregate_type": event.aggregate_type,
            "aggregate_id": event.aggregate_id,
            "event_type": event.event_type,
            "payload": event.payload,
        }
    )


def _events(commit: str, change: str, fields: Iterator[bytes]) -> Iterator[NewEvent]:
    """One change of `git diff-tree`, `:old-mode new-mode old-object new-object status`, whose paths follow it."""
    _, mode, _, object_id, status = change.split()
    path = path_text(next(fields))
    here = {"commit": commit, "file": f"{mode} {object_id}"}
    match status[0]:
        case "A":
            yield _event("FileAdded", path, here)
        case "M" | "T":
            yield _event("FileModified", path, here)
        case "D":
            yield _event("FileDeleted", path, {"commit": commit})
        case "R":
            new_path = path_text(next(fields))
            yield _event("FileRenamed", path, {"commit": commit, "to": new_path})
            yield _event("FileAdded", new_path, here | {"from": path})
        case other:
            raise ValueError(f"git diff-tree reports the status {other} for {path} in commit {commit}")


def _event(event_type: str, path: str, payload: dict[str, Any]) -> NewEvent:
    return NewEvent(aggregate_type=AGGREGATE_TYPE, aggregate_id=path, event_type=event_type, payload=payload)


def _git(repository: Path, *arguments: str, stdin: str = "") -> bytes:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, input=stdin.encode(), stdout=subprocess.PIPE, check=True).stdout


def main(repository: str = ".", revision: str = "HEAD") -> None:
    """Print the events as JSON Lines."""
    for event in chain.from_iterable(commit.events for commit in commits(Path(repository), revision)):
        print(as_line(event))


if __name__ == "__main__":
    main(*sys.argv[1:])
