"""What a simulation raises when a promise is broken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SHOWN = 80


class Violation(AssertionError):
    """A promise of DESIGN.md section 2 was broken, or a contract between two parts."""


def told(journal: Sequence[tuple[Any, ...]]) -> str:
    """What happened, for people: the end of it."""
    return "\n".join(" ".join(map(str, entry)) for entry in journal[-_SHOWN:])
