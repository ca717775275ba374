"""Which refusals of a full queue to doubt. Pure: the caller brings the clock.

When the policy that limits a quorum queue is deleted while the queue is full, RabbitMQ tells nobody that it takes messages again
(rabbitmq-server issue 12206; that the limit was raised it does not always tell either): it goes on to refuse them on every channel
that was open, for as long as that is, and takes them on a new one. Only a new channel knows, so one row is tried on one, now and then.

If it is taken there, this session refuses without reason and is to end. Or the queue is just being emptied: between its limit and
80 % of it new channels may publish, and old ones not yet. That looks the same; a new session is let in, and refused again soon. So
the first time is believed at once, and each further time only after twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from relay.outbox.store import Due

_REFUSALS = 3
"""Of one row, before it is doubted: with the defaults, 3 s after the first. A queue that is full for a moment costs nothing."""

_SAME_KEY_S = 10.0
"""Time between two doubts about one routing key: its messages go to the same queues, so the answer to one is the answer to all."""

_ANY_KEY_S = 1.0
"""Time between any two doubts: a connection each is the price while queues are full."""

_PATIENCE_S = (10.0, 960.0)
"""The shortest and the longest time after a session was found wrong, before another is doubted."""

_KEYS = 1000
"""So many routing keys are remembered."""


class Doubts:
    """What was doubted, and found right or wrong, by this session and those before it."""

    def __init__(self) -> None:
        self._doubted: dict[str, float] = {}  # routing key: when, the longest ago first
        self._not_before = -math.inf
        self._found_wrong_at = -math.inf
        self._patience_s = _PATIENCE_S[0]

    def choose(self, nacked: Sequence[tuple[Due, str]], now: float) -> Due | None:
        """Of rows that were nacked now, with their routing keys, the one to be tried on a channel of its own, if any.

        The key that was doubted longest ago comes first: behind a queue that stays full, another may have been freed.
        """
        if now < self._not_before:
            return None
        when = {key: self._doubted.get(key, -math.inf) for _, key in nacked}
        may = [(d, key) for d, key in nacked if d.attempts + 1 >= _REFUSALS and now >= when[key] + _SAME_KEY_S]
        if not may:
            return None
        chosen, key = min(may, key=lambda found: when[found[1]])
        self._doubted.pop(key, None)
        self._doubted[key] = now
        if len(self._doubted) > _KEYS:
            del self._doubted[next(iter(self._doubted))]
        self._not_before = now + _ANY_KEY_S
        return chosen

    def found_wrong(self, now: float) -> None:
        """The doubt was justified: the row was taken, and this session ends."""
        shortest_s, longest_s = _PATIENCE_S
        again = now - self._found_wrong_at <= 4 * self._patience_s
        self._patience_s = min(longest_s, 2 * self._patience_s) if again else shortest_s
        self._found_wrong_at = now
        self._not_before = now + self._patience_s
