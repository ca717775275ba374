"""How much is handed out at once: a number of messages, and an amount of memory."""

from __future__ import annotations

from collections import deque

import pytest

from relay.rabbitmq import subscription
from relay.rabbitmq.subscription import taken


def batches(sizes: list[int], limit: int) -> list[list[int]]:
    """The numbers of the deliveries in each batch that a buffer is handed out in."""
    buffer = deque(enumerate(sizes))
    found = []
    while buffer:
        found.append([number for number, _ in taken(buffer, limit, lambda delivery: delivery[1])])
    return found


def test_a_batch_is_bounded_by_count_and_by_bytes_and_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription, "BATCH_BYTES", 100)
    assert batches([1, 1, 1, 1, 1], 2) == [[0, 1], [2, 3], [4]]
    assert batches([60, 40, 1, 99], 10) == [[0, 1], [2, 3]]


def test_a_body_larger_than_the_bound_is_a_batch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription, "BATCH_BYTES", 100)
    assert batches([500, 500, 10, 500], 10) == [[0], [1], [2], [3]]
