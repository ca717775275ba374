"""What the sandbox lacks on this machine, and how it gets there."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from relay.errors import SandboxError
from relay.sandbox import postgres, postgres_binaries, rabbitmq, rabbitmq_programs

DEBIAN_SCRIPT = Path(__file__).with_name("install_rabbitmq.sh")
BY_HAND = "apt-get install rabbitmq-server (as root), or set RELAY_TEST_RABBITMQ_URL to a broker of yours"


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """One server that can be neither found nor started here."""

    server: str  # "PostgreSQL" or "RabbitMQ"
    reason: str  # what was looked for
    install: str  # the one line that gets it


def missing() -> list[Missing]:
    """The servers this machine lacks, none when the sandbox can start. One named in the environment is not missing."""
    return [lack for lack in (_missing_postgres(), _missing_rabbitmq()) if lack is not None]


def install_rabbitmq() -> None:
    """Install Debian's rabbitmq-server without starting its service. Raises `SandboxError` when we may not."""
    command = ["/bin/sh", str(DEBIAN_SCRIPT)]
    if shutil.which("apt-get") is None:
        raise SandboxError(
            f"RabbitMQ is missing and there is no apt-get here; install RabbitMQ yourself, or: {BY_HAND}"
        )
    if os.geteuid() != 0:
        if not _may_sudo():
            raise SandboxError(f"RabbitMQ is missing and we are not root; run: {BY_HAND}")
        command = ["sudo", "-n", *command]
    if subprocess.run(command, check=False).returncode != 0:
        raise SandboxError(f"RabbitMQ could not be installed, see above; try: {BY_HAND}")


def _missing_postgres() -> Missing | None:
    if os.environ.get(postgres.EXTERNAL_DSN):
        return None
    try:
        postgres_binaries.find_postgres_binaries()
    except SandboxError as error:
        return Missing(server="PostgreSQL", reason=str(error), install=postgres_binaries.INSTALL_HINT)
    return None


def _missing_rabbitmq() -> Missing | None:
    if os.environ.get(rabbitmq.EXTERNAL_URL):
        return None
    try:
        rabbitmq_programs.find_rabbitmq_programs()
    except SandboxError as error:
        return Missing(server="RabbitMQ", reason=str(error), install=rabbitmq_programs.INSTALL_HINT)
    return None


def _may_sudo() -> bool:
    if shutil.which("sudo") is None:
        return False
    return subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0
