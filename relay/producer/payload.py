"""A payload as JSON that PostgreSQL stores and any consumer can read. Pure.

Every refusal is a ValueError whose text completes the sentence "payload: ..." and never shows content.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from relay.message import MAX_BODY_BYTES

MAX_DEPTH = 200
"""Deepest nesting. Readers recurse: Python 3.11 gives up near 1000 levels of its stack, PostgreSQL at its max_stack_depth."""

MAX_NUMBER_BITS = 14_000
"""Longest whole number: about 4 200 digits. Python refuses to read more than 4 300."""

MAX_NUMBER_CHARACTERS = 1_000
"""Longest number with a fraction or exponent in a JsonText. PostgreSQL's numeric ends at 16 383 decimal places."""

MAX_EXPONENT = 1_000
"""Of a number in a JsonText: PostgreSQL refuses even 0e-20000."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class JsonText(str):
    """A payload that is JSON text already, for example pydantic's `model_dump_json()`; inserted as it is.

    The way to keep numbers that a float cannot hold exactly.
    """

    __slots__ = ()


def text_flaw(text: str) -> str | None:
    """Why PostgreSQL cannot store a text, as the rest of a sentence; None if it can."""
    if "\0" in text:
        return "contains NUL (U+0000)"
    if not text.isascii() and _SURROGATE.search(text):
        return "contains a lone surrogate (half a UTF-16 pair), which is not valid Unicode"
    return None


def encoded(value: object) -> str:
    """The compact JSON text of a value that can be a payload. Raises ValueError for one that cannot."""
    check(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=False)


def check(value: object) -> None:
    """Raise ValueError for what is not a JSON value, or is too deep or too large to be a payload."""
    size = 0
    for text, depth in _walk(value):
        size += 1 + len(text)
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested deeper than {MAX_DEPTH} levels (or contains itself); flatten it")
        if size > MAX_BODY_BYTES:
            raise ValueError(
                f"is over {MAX_BODY_BYTES} bytes (16 MiB); store large content elsewhere and send a reference to it"
            )
        if flaw := text_flaw(text):
            raise ValueError(f"a string or key in it {flaw}; remove it, PostgreSQL cannot store it")


def decoded(text: str) -> Any:
    """The value of a JSON text. Raises ValueError also for what Python would read but others would not or not alike."""
    try:
        return STRICT.decode(text)
    except json.JSONDecodeError as exc:
        raise ValueError(f"is not valid JSON: {exc.msg} at character {exc.pos + 1}") from None
    except RecursionError:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels; flatten it") from None


def _walk(value: object) -> Iterator[tuple[str, int]]:
    """Every text in a value (empty for what is none) with its depth; without recursion, so that no depth is too deep."""
    pending = [iter(((value, 0),))]
    while pending:
        found = next(pending[-1], None)
        if found is None:
            pending.pop()
            continue
        inner, depth = found
        if isinstance(inner, dict):
            for key in inner:
                if not isinstance(key, str):
                    raise ValueError(f"a key in it is of type {type(key).__name__}; JSON has only str keys")  # noqa: TRY004 - one kind of refusal
                yield key, depth
            pending.append(iter([(v, depth + 1) for v in inner.values()]))
        elif isinstance(inner, list | tuple):
            yield "", depth
            pending.append(iter([(v, depth + 1) for v in inner]))
        else:
            yield _scalar(inner), depth


def _scalar(value: object) -> str:
    """A string itself, nothing for the others."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        if value.bit_length() > MAX_NUMBER_BITS:
            raise ValueError("holds a whole number of more than 4200 digits; send it as a string")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(
                "holds NaN or Infinity (or a number beyond 1.8e308), which JSON cannot say; use null or a string"
            )
    elif value is not None:
        raise ValueError(
            f"holds a value of type {type(value).__name__}, which JSON does not know; convert it, for example with str()"
        )
    return ""


def _constant(_: str) -> NoReturn:
    raise ValueError("holds NaN or Infinity, which JSON cannot say; use null or a string")


def _int(text: str) -> int:
    if len(text) > 4_200:
        raise ValueError("holds a whole number of more than 4200 digits; send it as a string")
    return int(text)


def _float(text: str) -> float:
    if len(text) > MAX_NUMBER_CHARACTERS:
        raise ValueError("holds a number of over 1000 characters; send it as a string")
    mantissa, _, exponent = text.lower().partition("e")
    value = float(text)
    lost = value == 0 and re.search("[1-9]", mantissa)
    if lost or not math.isfinite(value) or abs(int(exponent or "0")) > MAX_EXPONENT:
        raise ValueError("holds a number beyond the range of a double; send it as a string")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) != len(pairs):
        raise ValueError("holds an object with the same key twice, of which one would be lost; remove one")
    return whole


STRICT = json.JSONDecoder(parse_constant=_constant, parse_int=_int, parse_float=_float, object_pairs_hook=_object)
"""Reads JSON, and refuses with ValueError what would be read differently, or not at all, further down the road."""
