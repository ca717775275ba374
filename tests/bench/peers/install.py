"""Public packages into a temporary folder, with the registries' ordinary clients. Nothing of it is committed.

A folder that is complete is not installed again within the same run; `PEERS_FOLDER` names one to be kept over runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.bench.peers.contenders import Packages

INSTALL_S = 600
_DONE = ".installed"


class NotInstalled(Exception):
    """A package could not be installed: the client's own last words."""


@dataclass(frozen=True, slots=True)
class Installed:
    """Where a driver of these packages runs."""

    folder: Path
    interpreter: Path

    def command(self, driver: Path) -> list[str]:
        """A driver as a command. Node resolves packages from the script's own folder, so that is where it is copied to."""
        if self.interpreter.name != "node":
            return [str(self.interpreter), str(driver)]
        for script in driver.parent.glob("*.mjs"):  # it imports another one
            shutil.copyfile(script, self.folder / script.name)
        return [str(self.interpreter), str(self.folder / driver.name)]


def install(packages: Packages, parent: Path) -> Installed:
    """Install them unless they are there. Raises NotInstalled."""
    folder = parent / packages.key
    if packages.program == "python":
        found = Installed(folder, folder / "bin" / "python")
        steps = [
            [_python(packages.python), "-m", "venv", str(folder)],
            [str(found.interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages.pins],
        ]
    else:
        node = shutil.which("node")
        if node is None:
            raise NotInstalled("there is no node on the PATH")
        found = Installed(folder, Path(node))
        quiet = ["--no-save", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"]
        steps = [["npm", "install", *quiet, "--prefix", str(folder), *packages.pins]]
    if not (folder / _DONE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        for step in steps:
            _run(step)
        (folder / _DONE).touch()
    return found


def _python(least: tuple[int, int]) -> str:
    """An interpreter that is new enough: our own if it is, else one of the PATH or of pyenv. Raises NotInstalled."""
    if sys.version_info >= least:
        return sys.executable
    names = [f"python3.{minor}" for minor in range(least[1], least[1] + 3)]
    candidates = [shutil.which(name) for name in names]
    candidates += sorted(str(path) for path in Path.home().glob(".pyenv/versions/3.*/bin/python3.[0-9]*"))
    for candidate in candidates:  # run, not only looked up: pyenv leaves shims on the PATH that fail when called
        if candidate is not None and Path(candidate).name in names:
            asked = subprocess.run([candidate, "-c", "import venv, ssl"], capture_output=True, check=False)
            if asked.returncode == 0:
                return candidate
    raise NotInstalled(f"needs Python {least[0]}.{least[1]} or newer, and there is only {sys.version.split()[0]}")


def _run(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "PYTHON"))}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=INSTALL_S, check=False, cwd="/"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise NotInstalled((done.stderr or done.stdout).strip()[-600:] or f"{command[0]} ended with {done.returncode}")
