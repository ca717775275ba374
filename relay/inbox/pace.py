"""How many messages to put into one transaction, so that it does not last much longer than a second. Pure."""

from __future__ import annotations

LONG_S = 1.0
"""Longer than this is too long: competing consumers wait for the cursors meanwhile, and a stop for the batch."""

SHORT_S = LONG_S / 2
"""Under this a batch of twice the size does not last longer than LONG_S: less, as some of the time is spent once a batch."""

_FIRST = 32
"""Where it starts: how slow the handlers are is found out with few messages, and fast ones lose five small batches."""


class Pace:
    """The size of the next batch, from how long the last ones took: at least halved, or doubled, between 1 and `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.limit = min(_FIRST, most)

    def took(self, messages: int, seconds: float) -> None:
        """Learn from a batch. One that was not full shows nothing about larger ones by having been fast.

        `seconds` without those in which it waited for other consumers: they say nothing about this one's size, and two that
        wait for each other would make each other's batches small. And without its COMMIT, which a busy disk or a standby makes
        slow, whatever is in it: with smaller batches there would only be more of them, down to a message a second. (What deferred
        triggers do in it is not told apart: nothing but the setting bounds a batch that they make slow.)
        """
        if seconds > LONG_S:
            self.limit = max(1, int(min(self.limit, messages) / max(2, seconds / LONG_S)))
        elif seconds < SHORT_S and messages >= self.limit:
            self.limit = min(self._most, self.limit * 2)
