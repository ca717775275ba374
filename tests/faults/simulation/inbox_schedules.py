"""Random schedules of the inbox: everything is drawn from the seed, so the seed is all that is needed to see one again."""

from __future__ import annotations

import random

from relay.settings import Settings
from tests.faults.simulation.connection import FATES
from tests.faults.simulation.inbox_world import KINDS, MOODS, InboxWorld, settings_for
from tests.faults.simulation.violation import told

NAMES = ("a", "b")
_PAUSES_S = (0.0, 0.0, 0.002, 0.01, 0.05, 0.3)
_ACTS = (3, 8)

SETTINGS: tuple[Settings, ...] = (
    settings_for(),
    settings_for(batch=2, prefetch=4),
    settings_for(batch=1, prefetch=1),
    settings_for(appliers=3),
)
_KINDS = ("order",) * 4 + tuple(KINDS)


def play(seed: int, *, in_batches: bool = False) -> InboxWorld:
    """Play the schedule of a seed to its end, with a batch handler or without. Raises Violation."""
    dice = random.Random(seed)
    world = InboxWorld(seed, dice.choice(SETTINGS), consumers=dice.choice((1, 2, 2)), in_batches=in_batches)
    try:
        if dice.random() < 0.7:
            world.run(0.2)
        for _ in range(dice.randint(*_ACTS)):
            if dice.random() < 0.7:
                _send(world, dice)
            else:
                _break(world, dice)
            if pause := dice.choice(_PAUSES_S):
                world.run(pause)
        world.run(dice.choice((0.0, 0.3, 1.0)))
        world.finish()
    except BaseException as exc:
        exc.add_note(told(world.journal))
        raise
    finally:
        world.close()
    return world


def _send(world: InboxWorld, dice: random.Random) -> None:
    kind, name = dice.choice(_KINDS), dice.choice(NAMES)
    seq = dice.randint(1, world.sent.get((kind, name), 0) + 1)
    position = dice.choice((None, None, dice.randrange(10)))
    draw = dice.random()
    if draw < 0.55:
        for _ in range(dice.randint(1, 3)):
            world.send(kind, name, position=position, lost=dice.random() < 0.1)
    elif draw < 0.8:
        world.send_again(kind, name, seq, position)
    elif draw < 0.88:
        world.contradict(kind, name, seq)
    elif draw < 0.94:
        world.bury(kind, name, seq)
    else:
        world.repair()


def _break(world: InboxWorld, dice: random.Random) -> None:
    consumer = dice.randrange(len(world.processes))
    match dice.randrange(10):
        case 0:
            world.kill(consumer)
        case 1 | 2 | 3:
            world.strike(consumer, dice.randint(1, 14), dice.choice(FATES))
        case 4:
            world.cut_broker(down_for=dice.choice((0.0, 0.5)), in_disorder=dice.random() < 0.7)
        case 5 | 6 | 7:
            kind, name = dice.choice(_KINDS), dice.choice(NAMES)
            seq = dice.randint(1, world.sent.get((kind, name), 0) + 1)
            world.upset(kind, name, seq, dice.choice(MOODS))
            if dice.random() < 0.75:
                world.send(kind, name)
        case 8:
            world.soothe()
        case _:
            world.shuffle()
