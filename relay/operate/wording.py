"""How a selection is written for people: as the options that make it."""

from __future__ import annotations

import re
from collections.abc import Mapping

_OPTIONS = {
    "aggregate_type": "type",
    "older_than_s": "older-than",
    "ids": "id",
    "types": "type",
    "resumes": "resume",
    "replay": "abandon",
}
_PLAIN = re.compile(r"[\w./:@%+=,*-]+")


def as_options(told: Mapping[str, object]) -> str:
    """What `Selection.as_json` tells, and what the audit keeps beside it: `order/42 --seq 2-3 --cause nacked`."""
    rest = dict(told)
    words = [_quoted(rest.pop("aggregate"))] if "aggregate" in rest else []
    first, last = rest.pop("from_seq", None), rest.pop("to_seq", None)
    for name, value in rest.items():
        option = f"--{_OPTIONS.get(name, name.replace('_', '-'))}"
        if value is True:
            words.append(option)
        elif isinstance(value, list | tuple):
            words += [f"{option} {_quoted(one)}" for one in value]
        elif value is not None and value is not False:
            words.append(f"{option} {_quoted(value)}")
    if first is not None or last is not None:
        words.append(f"--seq {first if first == last else f'{_or_open(first)}-{_or_open(last)}'}")
    return " ".join(words)


def _or_open(number: object) -> str:
    return "" if number is None else str(number)


def _quoted(value: object) -> str:
    text = f"{int(value) if value.is_integer() else value}s" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else f'"{text}"'
