"""The fault matrix of README.md as values, and what reports of the laboratory say about its rows.

python -m tests.faults.matrix                  the laboratory's column, as the catalogue has it
python -m tests.faults.matrix REPORT.json ...  the worst recovery of each row, with the fault that took it
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.lab import kinds
from tests.faults.lab.fault import CATALOGUE

README = Path(__file__).with_name("README.md")

ROWS = range(1, 43)

_ROW = re.compile(r"\| (\d+) \|(.*)\|")
_TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    number: int
    fault: str
    must_hold: str
    tests: tuple[tuple[str, str], ...]  # (file below tests/, name)
    kinds: tuple[str, ...]  # of the laboratory
    recovery: str


def rows() -> dict[int, Row]:
    """The table of README.md."""
    found = {}
    for line in README.read_text().splitlines():
        if (matched := _ROW.fullmatch(line)) is None:
            continue
        fault, must_hold, tests, laboratory, recovery = (cell.strip() for cell in matched[2].split(" | "))
        number = int(matched[1])
        if number in found:
            raise ValueError(f"row {number} is there twice")
        named = tuple((file, name) for file, name in _TEST.findall(tests))
        found[number] = Row(number, fault, must_hold, named, tuple(re.findall(r"`([^`]+)`", laboratory)), recovery)
    return found


def laboratory(number: int) -> str:
    """What the catalogue has for a row, as the table writes it."""
    kinds.load()
    names = sorted(fault.kind for fault in CATALOGUE.values() if number in fault.rows)
    return "<br>".join(f"`{name}`" for name in names) or "–"


def worst(reports: Iterable[Mapping[str, Any]]) -> dict[int, tuple[float, str, bool]]:
    """By row: (the longest recovery in seconds, of which kind, whether no other fault overlapped). Alone counts for more."""
    found: dict[int, tuple[float, str, bool]] = {}
    kinds.load()
    for report in reports:
        for recovery in report["recoveries"]:
            fault = CATALOGUE.get(recovery["kind"])
            for number in fault.rows if fault else ():
                candidate = (recovery["seconds"], recovery["kind"], recovery["alone"])
                before = found.get(number)
                if before is None or (candidate[2], candidate[0]) > (before[2], before[0]):
                    found[number] = candidate
    return found


def main(arguments: list[str]) -> None:
    if not arguments:
        for number in ROWS:
            print(f"{number:>2}  {laboratory(number)}")
        return
    for number, (seconds, kind, alone) in sorted(worst(json.loads(Path(a).read_text()) for a in arguments).items()):
        print(f"{number:>2}  {seconds:6.1f} s  {kind}{'' if alone else ' (others overlapped)'}")


if __name__ == "__main__":
    main(sys.argv[1:])
