"""Random schedules of the outbox: everything is drawn from the seed, so the seed is all that is needed to see one again."""

from __future__ import annotations

import random

from relay.settings import Settings
from tests.faults.simulation.connection import FATES
from tests.faults.simulation.outbox_world import World, settings_for
from tests.faults.simulation.violation import told

NAMES = ("a", "b", "c")
PRODUCERS = 3
_PAUSES_S = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)
_ACTS = (3, 7)

SETTINGS: tuple[Settings, ...] = (
    settings_for(),
    settings_for(page_rows=1),
    settings_for(order="strict"),
    settings_for(page_rows=2, checkpoint_interval_s=0),
    settings_for(page_rows=10, checkpoint_interval_s=0.2),
    settings_for(page_rows=10, parked_limit=2),
    settings_for(wakeup="poll", poll_interval_s=0.4),
)


def play(seed: int) -> World:
    """Play the schedule of a seed to its end. Raises Violation."""
    dice = random.Random(seed)
    world = World(seed, dice.choice(SETTINGS), relays=dice.choice((1, 1, 2)))
    try:
        if dice.random() < 0.8:
            world.run(0.4)
        is_calm = dice.random() < 0.25
        for _ in range(dice.randint(*_ACTS)):
            if is_calm or dice.random() < 0.65:
                _produce(world, dice)
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


def _produce(world: World, dice: random.Random) -> None:
    producer = dice.randrange(PRODUCERS)
    draw = dice.random()
    if draw < 0.1:
        world.begin(producer)
    elif draw < 0.35:
        _emit(world, dice, producer, dice.choice(NAMES))
    elif draw < 0.65:
        _emit(world, dice, producer, dice.choice(NAMES))
        world.commit(producer)
    elif draw < 0.9:
        world.commit(producer)
    else:
        world.roll_back(producer)


def _emit(world: World, dice: random.Random, producer: int, name: str) -> None:
    world.emit(producer, name, dice.choice(("Booked", "Paid")))
    if dice.random() < 0.5:
        world.emit(producer, name)
        world.emit(producer, dice.choice(NAMES))


def _break(world: World, dice: random.Random) -> None:
    """A fault; mostly with something to do for those whom it hits."""
    relay = dice.randrange(len(world.processes))
    name = dice.choice(NAMES)
    match dice.randrange(16):
        case 0:
            world.kill(relay)
        case 1 | 2 | 3:
            world.strike(relay, dice.randint(1, 12), dice.choice(FATES))
        case 4 | 5:
            world.lose_lease(dice.choice((0.05, 0.5, 3.0)))
            world.run(dice.choice((0.0, 0.3)))
        case 6:
            world.cut_broker(down_for=dice.choice((0.0, 0.3, 2.0)))
        case 7:
            world.block_broker(dice.choice((0.1, 0.8)))
        case 8 | 9:
            world.nack(dice.randint(1, 3), kept=dice.random() < 0.3)
        case 10 | 11 | 12:
            world.refuse(dice.choice(("unbound", "full", "hanging")), name)
        case 13:
            world.accept(name)
            world.resume()
        case 14:
            world.poison(name)
        case _:
            if dice.random() < 0.5:
                world.pause(name)
            else:
                world.pause(event_type="Paid")
    if dice.random() < 0.75:
        _emit(world, dice, PRODUCERS, name)
        world.commit(PRODUCERS)
