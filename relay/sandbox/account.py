"""Whom a server runs as, and a private folder that this user can reach."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import tempfile
from pathlib import Path

from relay.errors import SandboxError

UNPRIVILEGED = ("postgres", "nobody")


def unprivileged_user() -> str | None:
    """The user for a server that refuses to run as root: None (ourselves) unless we are root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    for name in UNPRIVILEGED:
        if name in known:
            return name
    raise SandboxError(f"PostgreSQL does not run as root, and this machine has none of the users {UNPRIVILEGED}")


def private_folder(prefix: str, *, user: str | None = None) -> Path:
    """A new temporary folder that only `user` (default: ourselves) and root can enter."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):  # noqa: S108 - mkdtemp below is safe in any of them
        if user is None or reachable_by_all(Path(parent)):
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            give(folder, user)
            return folder
    raise SandboxError(f"the user {user} can enter no temporary folder: set TMPDIR to one with o+x on its whole path")


def give(path: Path, user: str | None) -> None:
    """Make `path` the property of `user`; nothing to do when that is ourselves."""
    if user is not None:
        entry = pwd.getpwnam(user)
        os.chown(path, entry.pw_uid, entry.pw_gid)


def reachable_by_all(path: Path) -> bool:
    """True when any user may pass through every folder on the way to `path`, and through `path` itself."""
    resolved = path.resolve()
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in (resolved, *resolved.parents))


def remove_folder(folder: Path) -> None:
    """Remove the folder and all that is in it; quiet if it is gone already."""
    shutil.rmtree(folder, ignore_errors=True)
