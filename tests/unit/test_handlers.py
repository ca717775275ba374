"""Registering handlers, and finding an Inbox by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from relay.errors import ConfigError
from relay.inbox import Event, Inbox, load
from relay.inbox.handlers import Grouped
from relay.inbox.start import Start
from relay.message import TOMBSTONE
from relay.postgres.connect import Connection
from relay.settings import InboxSettings


def event(event_type: str, aggregate_type: str | None = "order") -> Event:
    return Event(
        source="s",
        aggregate_type=aggregate_type,
        aggregate_id="1",
        seq=1,
        event_type=event_type,
        message_id="m",
        content_type="",
    )


async def one(event: Event, tx: Connection) -> None: ...


async def two(event: Event, tx: Connection) -> None: ...


def test_a_handler_is_found_by_event_type_and_the_more_specific_one_wins() -> None:
    inbox = Inbox("billing")
    inbox.on("A", "B")(one)
    inbox.on("A", aggregate_type="order")(two)
    assert inbox.handler(event("A")) is two
    assert inbox.handler(event("A", "cart")) is one
    assert inbox.handler(event("B")) is one
    assert inbox.handler(event("C")) is None
    assert inbox.event_types == {"A", "B"}


def test_a_second_handler_for_the_same_type_is_refused_and_both_are_named() -> None:
    inbox = Inbox("billing")
    inbox.on("A")(one)
    with pytest.raises(ConfigError, match="two handlers for A: one and two"):
        inbox.on("A")(two)


def test_a_function_that_is_not_async_is_refused() -> None:
    def plain(event: Event, tx: Connection) -> None: ...

    with pytest.raises(ConfigError, match="plain of A is not an `async def` function"):
        Inbox("billing").on("A")(plain)  # type: ignore[type-var]


def test_an_object_with_an_async_call_is_a_handler() -> None:
    class Callable:
        async def __call__(self, event: Event, tx: Connection) -> None: ...

    Inbox("billing").on("A")(Callable())


def test_on_without_event_types_or_with_reserved_ones_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one event type"):
        Inbox("billing").on()
    with pytest.raises(ConfigError, match="at least one event type"):
        Inbox("billing").on(one)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="relay's own"):
        Inbox("billing").on("relay.tombstone")(one)
    with pytest.raises(ConfigError, match="name"):
        Inbox("")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inbox_app_fine", "expected MODULE:OBJECT"),
        ("no_such_module_at_all:inbox", "there is no module 'no_such_module_at_all'"),
        ("inbox_app_fine:nothing", "has no 'nothing'"),
        ("inbox_app_fine:number", "is a int, not a relay.inbox.Inbox"),
        ("inbox_app_fine:empty", "has no handlers"),
        ("inbox_app_broken:inbox", "importing inbox_app_broken failed: ZeroDivisionError"),
        ("inbox_app_needs:inbox", "importing inbox_app_needs failed: No module named 'missing_dependency'"),
        ("inbox_app_twice:inbox", "two handlers for A"),
    ],
)
def test_everything_that_can_be_wrong_with_a_name_is_told_apart(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = "from relay.inbox import Inbox\ninbox = Inbox('x')\n"
    handler = "@inbox.on('A')\nasync def {0}(event, tx): ...\n"
    for module, text in {
        "inbox_app_fine": head + handler.format("f") + "empty = Inbox('y')\nnumber = 1\n",
        "inbox_app_broken": "1 / 0",
        "inbox_app_needs": "import missing_dependency",
        "inbox_app_twice": head + handler.format("f") + handler.format("g"),
    }.items():
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load("inbox_app_fine:inbox").name == "x"
    with pytest.raises(ConfigError, match=message):
        load(name)


async def all_of(events: Sequence[Event], tx: Connection) -> None: ...


def test_a_batch_handler_is_registered_by_the_rules_of_on() -> None:
    inbox = Inbox("billing")
    inbox.on("A")(one)
    inbox.on_batch("A", "B", aggregate_type="order")(all_of)
    inbox.on_batch("C", limit=7)(all_of)
    found = inbox.handler(event("A"))
    assert isinstance(found, Grouped)
    assert (found.function, found.limit) == (all_of, 1000)
    assert inbox.handler(event("A", "cart")) is one
    assert inbox.handler(event("B", "cart")) is None
    assert inbox.event_types == {"A", "B", "C"}
    assert inbox.takes_batches
    assert not Inbox("other").takes_batches
    limited = inbox.handler(event("C"))
    assert isinstance(limited, Grouped)
    assert limited.limit == 7


def test_one_function_with_one_limit_is_one_batch_handler_however_it_was_registered() -> None:
    inbox = Inbox("billing")
    inbox.on_batch("A")(inbox.on_batch("B")(all_of))
    inbox.on_batch("C", limit=5)(all_of)
    assert inbox.handler(event("A")) is inbox.handler(event("B"))
    assert inbox.handler(event("C")) is not inbox.handler(event("B"))


def test_a_type_has_one_handler_of_one_kind() -> None:
    inbox = Inbox("billing")
    inbox.on("A")(one)
    inbox.on_batch("B")(all_of)
    with pytest.raises(ConfigError, match="two handlers for A: one and all_of"):
        inbox.on_batch("A")(all_of)
    with pytest.raises(ConfigError, match="two handlers for B: all_of and one"):
        inbox.on("B")(one)
    with pytest.raises(ConfigError, match="two handlers for B: all_of and all_of"):
        inbox.on_batch("B")(all_of)
    with pytest.raises(ConfigError, match=r"two handlers for B: one of inbox.functions and one of Inbox\('billing'\)"):
        inbox.with_functions({"B": one})
    assert inbox.with_functions({"*": two}).takes_batches


def test_what_cannot_be_a_batch_handler_is_refused() -> None:
    def plain(events: Sequence[Event], tx: Connection) -> None: ...

    inbox = Inbox("billing")
    with pytest.raises(ConfigError, match="plain of A is not an `async def` function"):
        inbox.on_batch("A")(plain)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"inbox.on_batch\(...\): name at least one event type"):
        inbox.on_batch()
    with pytest.raises(ConfigError, match="at least one event type"):
        inbox.on_batch(all_of)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="relay's own"):
        inbox.on_batch("relay.tombstone")(all_of)
    for limit in (0, -1, True, 1.5, None):
        with pytest.raises(ConfigError, match="the most events of one call, a whole number from 1"):
            inbox.on_batch("A", limit=limit)  # type: ignore[arg-type]


def test_an_inbox_of_batch_handlers_alone_is_found_and_is_not_for_store_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inbox_app_batches.py").write_text(
        "from relay.inbox import Inbox\ninbox = Inbox('x')\n@inbox.on_batch('A')\nasync def f(events, tx): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = load("inbox_app_batches:inbox")
    assert found.takes_batches
    assert Start(found, InboxSettings(functions={"B": "billing.b"})).inbox.takes_batches
    with pytest.raises(ConfigError, match=r"two handlers for A: \S+ of inbox\.functions"):
        Start(found, InboxSettings(functions={"A": "billing.a"}))
    with pytest.raises(ConfigError, match="must have no handlers"):
        Start(found, InboxSettings(mode="store"))


def test_a_tombstone_has_no_handler_whatever_takes_all_others() -> None:
    async def function(event: Event, tx: Connection) -> None:
        """Nothing."""

    inbox = Inbox("billing").with_functions({"*": function})
    assert inbox.handler(event("A")) is function
    assert inbox.handler(event(TOMBSTONE)) is None
