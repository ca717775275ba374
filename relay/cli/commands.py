"""A group's commands, imported when they are asked for: `relay status` does not wait for what only the daemons need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module

import click


class Commands(MutableMapping[str, click.Command]):
    """By name. `places` says where those are that nobody has asked for yet (`module:attribute`)."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)
        self._known: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._known:
            module, _, attribute = self._places[name].partition(":")
            self._known[name] = getattr(import_module(module), attribute)
        return self._known[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._known[name] = command

    def __delitem__(self, name: str) -> None:
        known = self._known.pop(name, None)
        if self._places.pop(name, known) is None:
            raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places | self._known)

    def __len__(self) -> int:
        return len(self._places | self._known)
