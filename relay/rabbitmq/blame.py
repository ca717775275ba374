"""Which end of a session one of its messages may be to blame for. Pure."""

from __future__ import annotations

from relay.rabbitmq.session import reply_code, reply_text

_MESSAGE_AT_FAULT = (311, 406, 501)
"""Reply codes with which RabbitMQ closes a channel or connection because of one message, not because of us: content too
large, precondition failed (larger than max_message_size), frame error."""


def blames_the_message(exc: BaseException) -> bool:
    """True when what ended the session may have been caused by a message that was published in it."""
    code = reply_code(exc)
    return code in _MESSAGE_AT_FAULT or (code == 403 and "access to topic '" in reply_text(exc))
