"""Which rows an operator means: filters that are all to hold. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from relay.errors import ConfigError

_LIKE = re.compile(r"([\\%_])")
_WILD = re.compile(r"(?<!\\)\*")
"""An asterisk that stands for any characters; after a backslash it is an asterisk itself."""

_ANY_AGGREGATE = re.compile(r"\*+/\*+")
_IDLE = {"aggregate": "*/*", "error": "an empty error", "from_seq": "seq from 1", "older_than_s": "older than 0 s"}
"""What excludes nothing, as people say it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Filters; None: any. An act on a selection without a filter is refused unless `everything` is set."""

    aggregate: str | None = None  # `type/id`; `*` stands for any characters in either part, `\*` for an asterisk
    aggregate_type: str | None = None
    event_type: str | None = None
    cause: str | None = None  # the reason that `relay stuck` names: unroutable, nacked, failed, ...
    state: str | None = None  # retrying, stuck, waiting, paused, ...
    error: str | None = None  # text that the error contains, in any case of letters
    older_than_s: float | None = None  # parked, held or inserted longer ago than so many seconds
    since: datetime | None = None  # inserted at or after
    until: datetime | None = None  # inserted before
    from_seq: int | None = None
    to_seq: int | None = None  # inclusive
    ids: tuple[int, ...] | None = None  # row ids, as `relay list` and `relay stuck` show them
    source: str | None = None  # inbox: of whose events
    consumer: str | None = None  # inbox: of which consumer
    everything: bool = False  # --all

    def __post_init__(self) -> None:
        """Raise ConfigError for a text that no row can contain, rather than let PostgreSQL refuse it."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, str):
                require_text(value, f.name)

    @property
    def is_bounded(self) -> bool:
        """True when at least one filter narrows it: `*/*` or `--seq 1-` exclude nothing, and a consumer alone is the whole of an inbox."""
        return bool(self._given() - self._idle())

    def require_bounds(self) -> None:
        """Raise ConfigError for an act on everything that was not asked for as such, and for `--all` beside a filter."""
        idle = [text for name, text in _IDLE.items() if name in self._idle()]
        if idle and not self.is_bounded and not self.everything:
            raise ConfigError(
                f"what is given ({', '.join(idle)}) excludes nothing: name an aggregate (order/42) or a filter that does,"
                " or say --all for everything"
            )
        if not self.is_bounded and not self.everything:
            raise ConfigError(
                "nothing is selected: name an aggregate (order/42) or a filter, or say --all for everything"
            )
        if self.is_bounded and self.everything:
            raise ConfigError("--all means everything: leave it out, or leave out the filters")

    def _given(self) -> set[str]:
        names = (f.name for f in fields(self) if f.name not in ("everything", "consumer"))
        return {name for name in names if getattr(self, name) is not None}

    def _idle(self) -> set[str]:
        """The filters that are given and hold for every row."""
        from_seq = self.from_seq is not None and self.from_seq <= 1
        older_than_s = self.older_than_s is not None and self.older_than_s <= 0
        aggregate = self.aggregate is not None and _ANY_AGGREGATE.fullmatch(self.aggregate) is not None
        idle = {"from_seq": from_seq, "older_than_s": older_than_s, "aggregate": aggregate, "error": self.error == ""}
        return {name for name, is_idle in idle.items() if is_idle}

    def parts(self) -> tuple[str, str] | None:
        """(aggregate type, aggregate id) as patterns for LIKE; None: no aggregate was given. Raises ConfigError for other texts."""
        if self.aggregate is None:
            return None
        kind, slash, name = self.aggregate.partition("/")
        if not slash or not kind or not name:
            raise ConfigError(
                f"{self.aggregate!r} does not name an aggregate: expected TYPE/ID, for example order/42 or order/4*"
            )
        return _like(kind), _like(name)

    def exact(self) -> tuple[str, str] | None:
        """(aggregate type, aggregate id) when exactly one aggregate was named, else None."""
        if self.aggregate is None or _WILD.search(self.aggregate):
            return None
        self.parts()
        kind, _, name = self.aggregate.replace(r"\*", "*").partition("/")
        return kind, name

    def as_json(self) -> dict[str, Any]:
        """What was asked for, for the audit and for `--json`."""
        told: dict[str, Any] = {"all": True} if self.everything else {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and f.name != "everything":
                told[f.name] = value.isoformat() if isinstance(value, datetime) else value
        return told


def aggregate_text(aggregate_type: str, aggregate_id: str) -> str:
    """`type/id` as it can be given back: it selects this aggregate and no other."""
    return f"{aggregate_type}/{aggregate_id}".replace("*", r"\*")


def require_text(value: str, name: str) -> None:
    """Raise ConfigError for what PostgreSQL cannot store as text: NUL, bytes of the terminal that are not UTF-8."""
    if "\0" in value or value != value.encode("utf-8", "replace").decode():
        raise ConfigError(f"{name.replace('_', ' ')} {value[:60]!r} is not a text: it contains NUL, or is not UTF-8")


def like(text: str) -> str:
    """The text itself as a LIKE pattern."""
    return _LIKE.sub(r"\\\1", text)


def _like(text: str) -> str:
    """The text as a LIKE pattern: `*` is any characters, everything else is itself."""
    return "%".join(like(part.replace(r"\*", "*")) for part in _WILD.split(text))
