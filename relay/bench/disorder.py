"""Deliveries as a broker on a bad day makes them: some events twice, some before their predecessor. Pure but for the dice."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_REACH = 2000
"""Longest way between two that are swapped: an inbox waits for what is missing, and asks for it after seconds."""


@dataclass(frozen=True, slots=True)
class Disorder(Generic[T]):
    """Windows to be published one after the other; nothing is twice in one of them, as a publisher demands."""

    windows: Sequence[Sequence[T]]
    duplicates: int
    swaps: int


def in_windows(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """All of them in their order."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def disordered(
    items: Sequence[T], *, key: Callable[[T], Hashable], share: float, window: int, dice: random.Random
) -> Disorder[T]:
    """So many of them swapped with the next of the same key, so many once more a window later."""
    order, swaps = _swapped(items, key, share, dice)
    windows: list[Sequence[T]] = []
    again: list[T] = []
    duplicates = 0
    for chunk in in_windows(order, window):
        mixed = list(chunk)
        for item in again:
            mixed.insert(dice.randint(0, len(mixed)), item)
        windows.append(mixed)
        duplicates += len(again)
        again = [item for item in chunk if dice.random() < share]
    if again:
        windows.append(again)
    return Disorder(windows, duplicates + len(again), swaps)


def _swapped(
    items: Sequence[T], key: Callable[[T], Hashable], share: float, dice: random.Random
) -> tuple[list[T], int]:
    following = _following(items, key)
    order, moved, swaps = list(items), set[int](), 0
    for here, there in enumerate(following):
        if there is not None and there - here <= _REACH and moved.isdisjoint((here, there)) and dice.random() < share:
            order[here], order[there] = order[there], order[here]
            moved |= {here, there}
            swaps += 1
    return order, swaps


def _following(items: Sequence[T], key: Callable[[T], Hashable]) -> list[int | None]:
    """For each position that of the next item with the same key."""
    found: list[int | None] = [None] * len(items)
    latest: dict[Hashable, int] = {}
    for place in range(len(items) - 1, -1, -1):
        found[place] = latest.get(key(items[place]))
        latest[key(items[place])] = place
    return found
