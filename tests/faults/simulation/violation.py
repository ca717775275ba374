"""What a simulation raises when a promise is broken."""

from __future__ import annotations


class Violation(AssertionError):
    """A promise of DESIGN.md section 2 was broken, or a contract between two parts."""
