"""The arguments of the two methods that a message from the broker begins with. Pure; raises nothing but FrameError."""

from __future__ import annotations

import struct
from functools import lru_cache

from relay.rabbitmq.wire.frames import FrameError

_u64 = struct.Struct(">Q").unpack_from
_u16 = struct.Struct(">H").unpack_from


def deliver(method: bytes) -> tuple[int, bool, str, str]:
    """Of a basic.deliver: (delivery tag, redelivered, exchange, routing key)."""
    try:
        at = 5 + method[4]  # behind the consumer tag
        (tag,) = _u64(method, at)
        redelivered = method[at + 8] & 1 == 1
        exchange, key = _exchange_and_key(method[at + 9 :])
    except (IndexError, struct.error):
        raise FrameError("a basic.deliver that is too short") from None
    return tag, redelivered, exchange, key


@lru_cache(maxsize=1000)
def _exchange_and_key(names: bytes) -> tuple[str, str]:
    """Remembered: a stream has few routing keys. What is refused is not."""
    end = 1 + names[0]
    key = names[end + 1 :]
    if len(key) != names[end]:
        raise FrameError("a basic.deliver with a wrong length")
    return _name(names[1:end]), _name(key)


def returned(method: bytes) -> tuple[int, str, str, str]:
    """Of a basic.return: (reply code, reply text, exchange, routing key)."""
    try:
        (code,) = _u16(method, 4)
        at = 6
        texts = []
        for _ in range(3):
            end = at + 1 + method[at]
            texts.append(_name(method[at + 1 : end]))
            at = end
        if at != len(method):
            raise FrameError("a basic.return with a wrong length")
    except (IndexError, struct.error):
        raise FrameError("a basic.return that is too short") from None
    return code, texts[0], texts[1], texts[2]


def _name(value: bytes) -> str:
    """RabbitMQ takes any bytes as a name; those that are no UTF-8 are shown as escapes."""
    return value.decode("utf-8", "backslashreplace")
