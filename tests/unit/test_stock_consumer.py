"""How much is handed out at once: a number of messages, and an amount of memory."""

from __future__ import annotations

from collections import deque

import pytest

from relay.message import Delivery
from relay.rabbitmq import stock_consumer
from relay.rabbitmq.stock_consumer import _taken


def delivery(tag: int, size: int) -> Delivery:
    return Delivery(
        tag=tag,
        redelivered=False,
        exchange="",
        routing_key="",
        message_id=None,
        event_type=None,
        source=None,
        content_type=None,
        occurred_at=None,
        headers={},
        body=bytes(size),
    )


def taken(sizes: list[int], limit: int) -> list[list[int]]:
    """The tags of the batches that a buffer is handed out in."""
    buffer = deque(delivery(tag, size) for tag, size in enumerate(sizes))
    found = []
    while buffer:
        found.append([d.tag for d in _taken(buffer, limit)])
    return found


def test_a_batch_is_bounded_by_count_and_by_bytes_and_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_consumer, "BATCH_BYTES", 100)
    assert taken([1, 1, 1, 1, 1], 2) == [[0, 1], [2, 3], [4]]
    assert taken([60, 40, 1, 99], 10) == [[0, 1], [2, 3]]


def test_a_body_larger_than_the_bound_is_a_batch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_consumer, "BATCH_BYTES", 100)
    assert taken([500, 500, 10, 500], 10) == [[0], [1], [2], [3]]
