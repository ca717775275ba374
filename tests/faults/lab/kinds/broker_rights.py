"""Rights and passwords at the broker, taken away and given back. What is counted is the refusals that daemons logged."""

from __future__ import annotations

import asyncio
import json
import random
import re
import secrets
from collections.abc import Sequence

from tests.faults.lab.broker_operator import api, close_connections, count_logged, log_marks, wait
from tests.faults.lab.daemons import Daemon
from tests.faults.lab.fault import fault
from tests.faults.lab.kinds.rights import forbid_leaks
from tests.faults.lab.stage import ALL_PERMISSIONS, BROKER_USERS, Stage

RELAY_USER, CONSUMER_USER = BROKER_USERS
REFUSED = re.compile(r"BrokerRefused|ACCESS_REFUSED")


@fault("relay's rights revoked", rows=(11, 35), touches=("broker", "relay-amqp"))
async def relay_revoked(stage: Stage, dice: random.Random) -> int:
    """All of them, so that it is not let in; or only the right to publish, so that the broker closes its channel."""
    rights = dice.choice([None, ALL_PERMISSIONS | {"write": "^$"}])
    return await _revoked(stage, dice, RELAY_USER, stage.relays, rights)


@fault("consumer's rights revoked", rows=(11, 35), touches=("broker", "consumer-amqp"))
async def consumer_revoked(stage: Stage, dice: random.Random) -> int:
    """All of them, or only the right to read."""
    rights = dice.choice([None, ALL_PERMISSIONS | {"read": "^$"}])
    return await _revoked(stage, dice, CONSUMER_USER, stage.consumers, rights)


async def _revoked(
    stage: Stage, dice: random.Random, user: str, daemons: Sequence[Daemon], rights: dict[str, object] | None
) -> int:
    """Bitten as often as a daemon logged a refusal. A channel remembers what it was allowed, so connections are closed too."""
    marks = log_marks(daemons)
    permissions = f"/api/permissions/%2F/{user}"
    try:
        await (api(stage, "DELETE", permissions) if rights is None else api(stage, "PUT", permissions, rights))
        await close_connections(stage, user)
        await wait(stage, lambda: count_logged(REFUSED, daemons, marks) > 0, timeout_s=10)
        await asyncio.sleep(dice.uniform(0.5, 3))
    finally:
        await api(stage, "PUT", permissions, ALL_PERMISSIONS)
    return count_logged(REFUSED, daemons, marks)


@fault("relay's password changed", rows=(40,), touches=("broker", "relay-amqp"))
async def relay_password_changed(stage: Stage, dice: random.Random) -> int:
    """Somebody rotated it and forgot the relay; then the old one is valid again."""
    marks = log_marks(stage.relays)
    path = f"/api/users/{RELAY_USER}"
    user = json.loads(await api(stage, "GET", path))
    try:
        await api(stage, "PUT", path, {"password": secrets.token_hex(8), "tags": ""})
        await close_connections(stage, RELAY_USER)
        await wait(stage, lambda: count_logged(REFUSED, stage.relays, marks) > 0, timeout_s=10)
        await asyncio.sleep(dice.uniform(0.5, 3))
    finally:
        await api(stage, "PUT", path, {name: user[name] for name in ("password_hash", "hashing_algorithm", "tags")})
    forbid_leaks(stage.password, stage.relays)
    return count_logged(REFUSED, stage.relays, marks)
