"""The evidence by token and by aggregate: built once, for all comparisons. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.faults.lab.evidence import Committed, Effect, Evidence, Key, Witnessed
from tests.faults.lab.pace import Wait


@dataclass(slots=True)
class Books:
    """The evidence by token and by aggregate."""

    committed: dict[str, Committed]
    numbers: dict[Key, list[int]]  # that were committed
    effects_of: list[tuple[Effect, Committed | None]]  # each with its event
    messages_of: list[tuple[Witnessed, Committed | None]]
    applied: dict[str, Effect] = field(default_factory=dict)  # token -> its first effect
    again: list[Effect] = field(default_factory=list)  # effects of a token beyond its first
    effects: dict[Key, list[Effect]] = field(default_factory=dict)  # in the order of their positions
    published: dict[str, Witnessed] = field(default_factory=dict)  # token -> the first message of it
    copies: list[Witnessed] = field(default_factory=list)  # messages of a token beyond its first
    out_of_turn: list[tuple[Witnessed, int]] = field(default_factory=list)  # first published after that number

    @classmethod
    def of(cls, evidence: Evidence) -> Books:
        committed = {event.token: event for event in evidence.committed}
        books = cls(
            committed=committed,
            numbers={},
            effects_of=[(effect, committed.get(effect.token)) for effect in evidence.effects],
            messages_of=[(message, committed.get(message.token)) for message in evidence.witnessed],
        )
        for event in evidence.committed:
            books.numbers.setdefault(event.key, []).append(event.seq)
        for effect in sorted(evidence.effects, key=lambda effect: effect.position):
            books.effects.setdefault(effect.key, []).append(effect)
            if effect.token in books.applied:
                books.again.append(effect)
            else:
                books.applied[effect.token] = effect
        highest: dict[Key, int] = {}
        for message in evidence.witnessed:
            if message.token in books.published:
                books.copies.append(message)
            else:
                books.published[message.token] = message
                before = highest.get(message.key, 0)
                if message.seq < before:
                    books.out_of_turn.append((message, before))
                else:
                    highest[message.key] = message.seq
        return books

    def waits(self) -> list[Wait]:
        """Every event that has an effect, in the order of the commits."""
        applied = ((event, self.applied.get(token)) for token, event in self.committed.items())
        return sorted(((event, effect) for event, effect in applied if effect is not None), key=lambda wait: wait[0].at)
