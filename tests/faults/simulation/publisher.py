"""The broker as the outbox sees it: what it takes, in which order, and what it answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from relay.errors import BrokerUnavailable
from relay.message import AGGREGATE_ID, AGGREGATE_TYPE, SEQUENCE, Message
from relay.rabbitmq.contract import Confirmed, Nacked, Outcome, Refused, Returned, Unknown
from tests.faults.simulation.clock import VirtualLoop
from tests.faults.simulation.connection import Process

CONFIRM_TIMEOUT_S = 0.5
Place = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message that a queue took."""

    at: float
    process: str
    message_id: str
    place: Place
    seq: int


class Broker:
    """One exchange. What it does to messages is set from outside: by aggregate, or to the next few."""

    def __init__(self, loop: VirtualLoop, dice: random.Random) -> None:
        self.loop = loop
        self.dice = dice
        self.is_down = False
        self.is_blocked = False  # an alarm: nothing is read from publishers
        self.unbound: set[Place] = set()
        self.full: set[Place] = set()
        self.hanging: set[Place] = set()  # their queue takes messages and does not confirm
        self.poison: set[tuple[Place, int]] = set()  # closes the channel
        self.nacks = 0  # so many of the next messages are nacked ...
        self.nacked_are_kept = False  # ... though they are in the queue
        self.queue: list[Arrival] = []
        self.publishers: list[ModelPublisher] = []
        self.on_arrival: Callable[[Arrival, set[int]], None] = lambda _arrival, _refused: None
        self.on_refusal: Callable[[Place, int, str], None] = lambda _place, _seq, _answer: None
        self.on_confirmed: Callable[[Message], None] = lambda _message: None

    async def open(self, process: Process) -> ModelPublisher:
        """A connection and its channel. Raises BrokerUnavailable."""
        await self.loop.sleep(process.pause()[1])
        if self.is_down or process.is_dead:
            raise BrokerUnavailable("connection refused")
        return ModelPublisher(self, process)

    def go_down(self) -> None:
        """All connections break, new ones are refused."""
        self.is_down = True
        for publisher in [*self.publishers]:
            publisher.cut()


@dataclass(slots=True)
class _Call:
    """What of one call was refused, and when it ended. What is sent until it and all before it have ended may be behind that."""

    refused: dict[Place, set[int]] = field(default_factory=dict)
    ended_at: float | None = None


class ModelPublisher:
    """relay.rabbitmq.contract.Publisher."""

    def __init__(self, broker: Broker, process: Process) -> None:
        self._broker = broker
        self._process = process
        self._lost: BaseException | None = None
        self._ended = asyncio.Event()
        self._message_at_fault = False
        self._writing = asyncio.Lock()  # calls are written in the order in which they are begun
        self._calls: list[_Call] = []  # from the first one on that has not ended
        broker.publishers.append(self)
        process.links.append(self)

    @property
    def lost(self) -> BaseException | None:
        return self._lost

    @property
    def message_is_suspect(self) -> bool:
        return self._message_at_fault

    async def wait_lost(self) -> None:
        await self._ended.wait()

    async def close(self) -> None:
        self.cut()

    def cut(self, why: str = "the connection broke") -> None:
        """The session is over: nothing arrives any more, no answer comes any more."""
        if self._lost is None:
            self._lost = BrokerUnavailable(why)
            self._ended.set()
            self._broker.publishers.remove(self)
            if self in self._process.links:
                self._process.links.remove(self)

    async def publish(self, messages: Sequence[Message]) -> list[Outcome]:
        if len({message.message_id for message in messages}) != len(messages):
            raise ValueError("two messages of one batch have the same message_id")
        answers: list[Outcome | None] = [None] * len(messages)
        now = self._broker.loop.time()
        while self._calls and self._calls[0].ended_at is not None and self._calls[0].ended_at < now:
            self._calls.pop(0)
        self._calls.append(_Call())
        untold = [*self._calls]  # when this one was begun
        try:
            await self._exchange(messages, answers, untold)
        except asyncio.CancelledError:
            self.cut("publishing was cancelled")
            raise
        finally:
            untold[-1].ended_at = self._broker.loop.time()
        outcomes = [Unknown(str(self._lost)) if answer is None else answer for answer in answers]
        for message, outcome in zip(messages, outcomes, strict=True):
            if isinstance(outcome, Confirmed):
                self._broker.on_confirmed(message)
        return outcomes

    async def _exchange(self, messages: Sequence[Message], answers: list[Outcome | None], untold: list[_Call]) -> None:
        """Messages go out, arrive in order, are answered. The session may end in between, anywhere."""
        fate = self._process.next_fate()
        at_once, pause = self._process.pause()
        async with self._writing:
            if self._is_over():
                return
            if not at_once:
                await self._broker.loop.sleep(pause)
            if fate is not None and fate.endswith("before"):
                self._arrive(messages, self._broker.dice.randint(0, len(messages)), answers, untold)
                self._end_by(fate)
                return
            is_swallowed = self._broker.is_blocked
            given = self._arrive(messages, len(messages), answers, untold)
            if is_swallowed:  # it is not read, and so is nothing that is written behind it
                await self._wait_in_vain(answers)
        if at_once or fate is not None:
            await self._broker.loop.sleep(pause)
        if fate is not None:
            self._end_by(fate)
        if self._is_over():
            return
        for position, answer in enumerate(given):
            answers[position] = answer
        if any(answer is None for answer in answers):
            await self._wait_in_vain(answers)

    def _is_over(self) -> bool:
        return self._lost is not None

    def _end_by(self, fate: str) -> None:
        if fate.startswith("kill"):
            self._process.kill()
        self.cut()

    async def _wait_in_vain(self, answers: list[Outcome | None]) -> None:
        """Not everything is confirmed in time: the publisher gives up, unless the session ends before."""
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                await self._ended.wait()
        except TimeoutError:
            late = not self._broker.is_blocked
            self.cut("not confirmed in time")
            for position, answer in enumerate(answers):
                if answer is None:
                    answers[position] = Unknown(str(self._lost), timed_out=late)

    def _arrive(
        self, messages: Sequence[Message], sent: int, answers: list[Outcome | None], untold: list[_Call]
    ) -> list[Outcome | None]:
        """What the broker makes of what reached it, and what it will answer, if it can."""
        given: list[Outcome | None] = []
        if self._lost is not None or self._broker.is_blocked:
            return given
        for message in messages[:sent]:
            place, seq = _place(message)
            if (place, seq) in self._broker.poison:
                self.cut("PRECONDITION_FAILED")
                self._broker.on_refusal(place, seq, "closed")
                self._message_at_fault = True
                if len(messages) == 1:
                    answers[0] = Refused("refused", "PRECONDITION_FAILED")
                return given
            answer, taken = self._broker_says(place)
            given.append(answer)
            if not isinstance(answer, Confirmed):
                self._broker.on_refusal(place, seq, "unanswered" if answer is None else type(answer).__name__.lower())
            if taken:
                arrival = Arrival(self._broker.loop.time(), self._process.name, message.message_id, place, seq)
                self._broker.queue.append(arrival)
                self._broker.on_arrival(arrival, {seq for call in untold for seq in call.refused.get(place, ())})
            if isinstance(answer, Nacked | Returned):
                untold[-1].refused.setdefault(place, set()).add(seq)
        return given

    def _broker_says(self, place: Place) -> tuple[Outcome | None, bool]:
        """(the answer, whether a queue has the message)."""
        broker = self._broker
        if place in broker.unbound:
            return Returned("NO_ROUTE"), False
        if place in broker.full:
            return Nacked(), False
        if place in broker.hanging:
            return None, True
        if broker.nacks:
            broker.nacks -= 1
            return Nacked(), broker.nacked_are_kept
        return Confirmed(), True


def _place(message: Message) -> tuple[Place, int]:
    headers = message.headers
    return (str(headers[AGGREGATE_TYPE]), str(headers[AGGREGATE_ID])), int(headers[SEQUENCE])
