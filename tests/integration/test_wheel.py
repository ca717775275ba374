"""The wheel is complete: installed beside nothing of the source tree, it finds its SQL and everything else it brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from relay.postgres.migrate import printed
from relay.postgres.queries import all_queries

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source tree with the tools that are installed: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel in it; its dependencies are borrowed from ours."""
    home = tmp_path_factory.mktemp("installed")
    _run(sys.executable, "-m", "venv", "--without-pip", str(home), cwd=home)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # a path only: its own .pth files do not count
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(home / "bin" / "python"))
    _run(*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel), cwd=home)
    return home / "bin"


def test_the_wheel_holds_the_sql_and_what_is_not_python(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sql = {f"relay/{file.relative_to(ROOT)}" for file in (ROOT / "sql").rglob("*") if file.is_file()}
    assert sql | {"relay/py.typed", "relay/sandbox/install_rabbitmq.sh"} <= names


def test_the_wheel_holds_every_module_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {str(file.relative_to(ROOT)) for file in (ROOT / "relay").rglob("*.py")} <= names
    assert {name.split("/")[0] for name in names} == {"relay"}


def test_the_installed_program_is_the_wheels_and_not_the_source_trees(installed: Path) -> None:
    where = _run(installed / "python", "-c", "import relay; print(relay.__file__)", cwd=installed)
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_the_installed_program_tells_its_version(installed: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert _run(installed / "relay", "--version", cwd=installed).split()[-1] == version


def test_the_installed_program_prints_the_schema(installed: Path) -> None:
    assert _run(installed / "relay", "migrate", "--print", cwd=installed) == printed()


def test_the_installed_program_finds_every_block_and_the_manifest(installed: Path) -> None:
    program = (
        "import json; from relay.postgres.migrate import expected_manifest; from relay.postgres.queries import all_queries;"
        "print(json.dumps([all_queries(), len(expected_manifest())]))"
    )
    blocks, lines = json.loads(_run(installed / "python", "-c", program, cwd=installed))
    assert blocks == all_queries()
    assert lines > 100


def test_the_installed_program_migrates_and_checks_a_database(installed: Path, empty_database: str) -> None:
    environment = {"RELAY_POSTGRES_DSN": empty_database}
    _run(installed / "relay", "migrate", cwd=installed, **environment)
    assert _run(installed / "relay", "check", cwd=installed, **environment) == "the schema is complete\n"


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a program outside the source tree; its standard output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RELAY_", "PYTHON"))}
    done = subprocess.run(
        command, cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
