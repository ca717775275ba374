"""The comparison with public packages, tiny, from the installation to the table. Needs PyPI, npm, node and some minutes: a soak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.peers.__main__ import CONTENDERS
from tests.bench.peers.place import ROOT


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("side", ["outbox", "inbox"])
def test_every_contender_does_what_it_is_measured_for(side: str, tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    command = [
        sys.executable,
        "-m",
        "tests.bench.peers",
        side,
        "--rounds",
        "1",
        "--events",
        "3000",
        "--json",
        str(told),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(told.read_text())
    assert found["left_out"] == {}
    assert {run["contender"] for run in found["runs"]} == {contender.name for contender in CONTENDERS[side]}
