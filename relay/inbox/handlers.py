"""The application's side: `Inbox` collects handlers, `load` finds an Inbox by name."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from asyncio import Event as StopEvent
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from relay.errors import ConfigError
from relay.message import Event
from relay.postgres.connect import Connection

if TYPE_CHECKING:
    from relay.inbox.stats import Stats
    from relay.settings import Settings

Handler = Callable[[Event, Connection], Awaitable[None]]
BatchHandler = Callable[[Sequence[Event], Connection], Awaitable[None]]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,99}")
_H = TypeVar("_H", bound=Handler)
_B = TypeVar("_B", bound=BatchHandler)

LIMIT = 1000
"""Most events of one call, unless a batch handler sets its own: with more the round trip of a statement is a small part already,
and its arrays, its time-out and what has to be taken apart when it fails only grow. The default batch is four times that."""


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """A batch handler, and how many events it takes at most in one call. One function with one limit is one Grouped."""

    function: BatchHandler
    limit: int


class Inbox:
    """The handlers of one consumer.

        inbox = Inbox("billing")

        @inbox.on("OrderPaid", "OrderCancelled")
        async def settle(event: Event, tx: Connection) -> None:
            await tx.execute("UPDATE ...", event.aggregate_id)

    A handler runs inside the inbox's transaction: what it does with `tx` is committed together with the cursor, once, in the
    order of the aggregate. It must not end that transaction (its own `async with tx.transaction()` is a savepoint and
    fine), and anything it does elsewhere (HTTP, mail) may happen again. It may be called again for an event whose first
    call was rolled back, for example because another event of the batch failed. It must not block the event loop.

    A batch handler takes many events in one call, for set-based statements (see `on_batch`):

        @inbox.on_batch("OrderPaid", "OrderCancelled")
        async def settle(events: Sequence[Event], tx: Connection) -> None:
            await tx.execute("INSERT ... SELECT * FROM unnest($1::text[])", [event.aggregate_id for event in events])
    """

    def __init__(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f'Inbox({name!r}): the name is 1 to 100 letters, digits, _ . : -, for example Inbox("billing")'
            )
        self.name = name
        self._handlers: dict[tuple[str | None, str], Handler | Grouped] = {}
        self._others: Handler | None = None

    def on(self, *event_types: str, aggregate_type: str | None = None) -> Callable[[_H], _H]:
        """Register a coroutine function for event types, of one aggregate type or of all.

        Event types without a handler are skipped (their number is used up); a handler for the aggregate type wins over one
        for all. Raises ConfigError for a second handler of the same types, and for a function that is not `async def`.
        """
        _check_types("on", event_types)

        def register(handler: _H) -> _H:
            _check(handler, event_types)
            for event_type in event_types:
                self._add((aggregate_type, event_type), handler)
            return handler

        return register

    def on_batch(self, *event_types: str, aggregate_type: str | None = None, limit: int = LIMIT) -> Callable[[_B], _B]:
        """Register a coroutine function that takes one or more events in one call, `limit` of them at most.

        It is called inside the inbox's transaction. The events of an aggregate come in its order, within a call and from
        call to call, also where its events have different handlers, of whatever kind. There is no order between aggregates.
        Every event counts once, as with `on`.

        When a call fails, nobody can tell which of its events is to blame, so everything is rolled back and called again in
        smaller parts, at last one event at a time in a savepoint: the one that fails then is held, with what comes after it
        in its aggregate, and all others are committed. What a handler does must not depend on how events are grouped, then:
        neither on how many there are, nor on which come together. `inbox.handler_timeout_s` is for one call.

        The rules of `on` hold: a type of an aggregate type has one handler, of one kind. Raises ConfigError.
        """
        _check_types("on_batch", event_types)
        if type(limit) is not int or limit < 1:
            raise ConfigError(f"inbox.on_batch(limit={limit!r}): the most events of one call, a whole number from 1")

        def register(handler: _B) -> _B:
            _check(handler, event_types)
            grouped = self._grouped(handler, limit)
            for event_type in event_types:
                self._add((aggregate_type, event_type), grouped)
            return handler

        return register

    def handler(self, event: Event) -> Handler | Grouped | None:
        """The handler of an event, a Grouped if it takes many; None: skip it, as each tombstone."""
        if event.is_tombstone:
            return None
        specific = self._handlers.get((event.aggregate_type, event.event_type))
        return specific or self._handlers.get((None, event.event_type)) or self._others

    @property
    def takes_batches(self) -> bool:
        """Whether there are batch handlers."""
        return any(isinstance(handler, Grouped) for handler in self._handlers.values())

    @property
    def event_types(self) -> frozenset[str]:
        """The event types that have a handler."""
        return frozenset(event_type for _, event_type in self._handlers)

    def with_functions(self, functions: Mapping[str, Handler]) -> Inbox:
        """The same inbox with handlers from the settings beside its own: by event type, and `*` for all that have none.

        Raises ConfigError for an event type that has a handler already, of whatever aggregate type.
        """
        joined = Inbox(self.name)
        joined._handlers = dict(self._handlers)
        for event_type, function in functions.items():
            if event_type == "*":
                joined._others = function
            elif event_type in self.event_types:
                raise ConfigError(
                    f"two handlers for {event_type}: {_name(function)} of inbox.functions and one of Inbox({self.name!r})"
                )
            else:
                joined._add((None, event_type), function)
        return joined

    async def run(
        self, settings: Settings, *, stop: StopEvent | None = None, on_commit: Callable[[Stats], None] | None = None
    ) -> Stats:
        """Apply events until `stop` is set; see `relay.inbox.consumer.run`."""
        from relay.inbox.consumer import run  # the consumer knows the handlers, not the other way round

        return await run(self, settings, stop=stop, on_commit=on_commit)

    def _grouped(self, function: BatchHandler, limit: int) -> Grouped:
        """The same for the same function, so that types that it was registered for one by one come in one call."""
        for known in self._handlers.values():
            if isinstance(known, Grouped) and known.function is function and known.limit == limit:
                return known
        return Grouped(function, limit)

    def _add(self, key: tuple[str | None, str], handler: Handler | Grouped) -> None:
        if (other := self._handlers.get(key)) is not None:
            of = f" of {key[0]}" if key[0] else ""
            raise ConfigError(f"two handlers for {key[1]}{of}: {_name(other)} and {_name(handler)}")
        self._handlers[key] = handler


def load(name: str) -> Inbox:
    """The Inbox that `module:object` names, looked for in the working directory as well. Raises ConfigError."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(f"{name!r} does not name an inbox: expected MODULE:OBJECT, for example shop.billing:inbox")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (module_name == exc.name or module_name.startswith(exc.name + ".")):
            raise ConfigError(f"there is no module {exc.name!r} (looked in {here} and the Python path)") from exc
        raise ConfigError(f"importing {module_name} failed: {exc}") from exc
    except ConfigError as exc:
        raise ConfigError(f"importing {module_name}: {exc}") from exc
    except Exception as exc:
        raise ConfigError(f"importing {module_name} failed: {type(exc).__name__}: {exc}") from exc
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"the module {module_name} has no {attribute!r}")
        found = getattr(found, part)
    return _inbox(found, name)


def _inbox(found: object, name: str) -> Inbox:
    if not isinstance(found, Inbox):
        raise ConfigError(f"{name} is a {type(found).__name__}, not a relay.inbox.Inbox")
    if not found.event_types:
        raise ConfigError(
            f"{name} has no handlers: every event would be skipped. Register some with @inbox.on(...) or @inbox.on_batch(...)"
        )
    return found


def _check_types(method: str, event_types: tuple[object, ...]) -> None:
    if not event_types or not all(isinstance(name, str) and name for name in event_types):
        raise ConfigError(
            f'inbox.{method}(...): name at least one event type, for example @inbox.{method}("OrderPaid")'
        )


def _check(handler: object, event_types: tuple[str, ...]) -> None:
    if not inspect.iscoroutinefunction(handler) and not inspect.iscoroutinefunction(getattr(handler, "__call__", None)):  # noqa: B004
        raise ConfigError(f"the handler {_name(handler)} of {', '.join(event_types)} is not an `async def` function")
    for event_type in event_types:
        if event_type.startswith("relay."):
            raise ConfigError(f"{event_type}: the types relay.* are relay's own, the inbox sees to them")


def _name(handler: object) -> str:
    handler = handler.function if isinstance(handler, Grouped) else handler
    return getattr(handler, "__qualname__", repr(handler))
