"""Console blocks of the README as a script: what is typed, and what is shown of the answer.

In an answer `…` stands for anything on that line, and how much white space there is does not matter; lines may be left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One command and the lines of its answer that the README shows."""

    command: str
    shown: tuple[str, ...]

    def missing(self, output: str) -> list[str]:
        """The shown lines that the output does not have, in this order."""
        rest = [_squeezed(line) for line in output.splitlines()]
        absent = []
        for line in self.shown:
            pattern = re.compile(".*".join(re.escape(_squeezed(part)) for part in line.split("…")))
            found = next((i for i, candidate in enumerate(rest) if pattern.search(candidate)), None)
            if found is None:
                absent.append(line)
            else:
                rest = rest[found + 1 :]
        return absent


def steps(block: str) -> list[Step]:
    """A console block, command by command."""
    found: list[Step] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(Step(line.removeprefix("$ ").partition("   #")[0].strip(), ()))
        elif line.strip() and line.strip() != "…":
            if not found:
                raise ValueError(f"an answer without a command: {line}")
            found[-1] = Step(found[-1].command, (*found[-1].shown, line))
    return found


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
