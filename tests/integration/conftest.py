"""What ships is tried on the event loops on which it runs: what both AMQP clients keep to, on asyncio's and on uvloop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

_CONTRACTS = ("test_publisher_contract.py", "test_consumer_contract.py")


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, LoopFactory]:
    """pytest-asyncio runs each test of a module once on each of these."""
    found: dict[str, LoopFactory] = {"asyncio": asyncio.new_event_loop}
    if item.path.name in _CONTRACTS:
        found["uvloop"] = uvloop.new_event_loop
    return found
