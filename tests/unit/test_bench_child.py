"""A process of the benchmark is in the state that the process is in which it measures."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest

from relay.bench import child
from relay.bench.children import revealed
from relay.bench.parent import Parent
from relay.settings import Settings


@pytest.fixture
def calmed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened to a process that plays, in order: `calm`, and that it played."""
    happened: list[str] = []

    async def role(settings: Settings, spec: Mapping[str, Any], parent: Parent) -> None:
        happened.append("played")

    roles = ModuleType("relay.bench.roles.of_test")
    for name in child._MODULES:
        setattr(roles, name, role)
    monkeypatch.setitem(sys.modules, roles.__name__, roles)
    monkeypatch.setattr(child, "_MODULES", dict.fromkeys(child._MODULES, "of_test"))
    monkeypatch.setattr(child, "calm", lambda: happened.append("calm"))
    monkeypatch.setattr(child, "configure_logging", lambda _: None)
    return happened


@pytest.mark.parametrize("role", ["apply", "relay", "consume", "publish", "read", "statements"])
async def test_the_daemons_and_their_ceilings_begin_as_the_daemons_do(role: str, calmed: list[str]) -> None:
    await child.play({"role": role, "settings": revealed(Settings())}, None)  # type: ignore[arg-type]
    assert calmed == ["calm", "played"]


@pytest.mark.parametrize("role", ["insert", "produce"])
async def test_an_application_is_left_as_python_starts_it(role: str, calmed: list[str]) -> None:
    await child.play({"role": role, "settings": revealed(Settings())}, None)  # type: ignore[arg-type]
    assert calmed == ["played"]
