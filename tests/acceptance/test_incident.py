"""The README's incident at 3 a.m., step by step: every command runs, and every line of an answer that is shown is really said."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from relay.sandbox import Postgres
from tests.acceptance.console import Step, steps
from tests.acceptance.readme import blocks
from tests.harness.outbox import connected, insert, until

SECTION = "An incident at 3 a.m."


class Night:
    """Two services in two databases, a relay and an inbox between them, and somebody at a terminal."""

    def __init__(self, folder: Path, shop: str, billing: str) -> None:
        self.folder = folder
        self.shop = shop
        self.billing = billing

    @asynccontextmanager
    async def running(self, *arguments: str) -> AsyncIterator[None]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "relay",
            *arguments,
            cwd=self.folder,
            env=_environment(),
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            yield
        finally:
            process.terminate()
            assert await process.wait() == 0

    def deploy(self, handler: str) -> None:
        (self.folder / "billing.py").write_text(handler, encoding="utf-8")

    async def type_in(self, step: Step) -> str:
        """What a command of the README answers; it must succeed and say what the README shows."""
        program, *arguments = shlex.split(step.command)
        assert program == "relay"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "relay", *arguments, cwd=self.folder, env=_environment(),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        text = output.decode()
        assert process.returncode == 0, text
        assert step.missing(text) == [], text
        return text

    async def pay(self, order: str, amount: object) -> None:
        async with connected(self.shop) as db:
            await insert(db, f"order/{order}", event_type="OrderPaid", payload=json.dumps({"amount": amount}))

    async def invoices(self, order: str) -> list[str]:
        async with connected(self.billing) as db:
            rows = await db.fetch("SELECT amount FROM invoice WHERE order_id = $1 ORDER BY id", order)
        return [str(r["amount"]) for r in rows]

    async def billing_is_connected(self) -> bool:
        async with connected(self.billing) as db:
            return bool(
                await db.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'relay inbox billing'"
                    " AND datname = current_database()"
                )
            )

    async def is_stuck(self) -> bool:
        async with connected(self.billing) as db:
            return bool(
                await db.fetchval(  # for a second, as the README shows how long ago
                    "SELECT count(*) = 3 AND bool_or(state = 'stuck') AND max(held_at) < now() - interval '1.5 s' FROM relay.inbox_held"
                )
            )


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RELAY_")}
    return kept | {"COLUMNS": "160", "RELAY_DAEMON_BACKOFF_MAX_S": "1"}


@pytest.fixture
def night(postgres: Postgres, template_database: str, database: str, broker: str, tmp_path: Path) -> Iterator[Night]:
    billing = postgres.create_database(f"{Path(database).name}_billing", template_database)
    (tmp_path / "shop.toml").write_text(_toml(database, broker, source='"shop"'), encoding="utf-8")
    quick = 'bindings = ["order.#"]\nmax_attempts = 3\nretry_first_s = 0.05\nretry_max_s = 0.1'
    (tmp_path / "billing.toml").write_text(_toml(billing, broker) + f"[inbox]\n{quick}\n", encoding="utf-8")
    yield Night(tmp_path, database, billing)
    postgres.drop_database(Path(billing).name)


def _toml(dsn: str, url: str, **top: str) -> str:
    lines = [f"{name} = {value}" for name, value in top.items()]
    return "\n".join([*lines, "[postgres]", f'dsn = "{dsn}"', "[rabbitmq]", f'url = "{url}"', ""])


@asynccontextmanager
async def _until_it_is_stuck(night: Night) -> AsyncIterator[list[list[Step]]]:
    """3 a.m.: the third payment of order 42 is one that the handler cannot read, two more wait behind it, others flow on."""
    broken, _ = blocks("python", SECTION)
    night.deploy(broken)
    async with connected(night.billing) as db:
        await db.execute("CREATE TABLE invoice (id int GENERATED ALWAYS AS IDENTITY, order_id text, amount numeric)")
    async with night.running("run", "-c", "shop.toml"):
        async with night.running("inbox", "run", "billing:inbox", "-c", "billing.toml"):
            for amount in (10, 20, "99.90", 30, 40):
                await night.pay("42", amount)
            await night.pay("43", 7)
            await until(night.is_stuck)
            await until(lambda: _is(night.invoices("43"), ["7"]))
            assert await night.invoices("42") == ["10", "20"]
            yield [steps(block) for block in blocks("console", SECTION)]


async def test_the_walk_through_from_the_alarm_to_the_release_in_order(night: Night) -> None:
    async with _until_it_is_stuck(night) as (look, release, _):
        for step in look:
            await night.type_in(step)
    _, mended = blocks("python", SECTION)
    night.deploy(mended)
    async with night.running("run", "-c", "shop.toml"):
        async with night.running("inbox", "run", "billing:inbox", "-c", "billing.toml"):
            await until(night.billing_is_connected)
            for step in release:
                await night.type_in(step)
            await until(lambda: _is(night.invoices("42"), ["10", "20", "99.90", "30", "40"]))
    assert await _acts(night) == [("retry", 1)]


async def test_the_variant_that_skips_the_event(night: Night) -> None:
    async with _until_it_is_stuck(night) as (_, _, skip):
        for step in skip:
            await night.type_in(step)
        await until(lambda: _is(night.invoices("42"), ["10", "20", "30", "40"]))
        async with connected(night.billing) as db:
            kept = await db.fetchrow(
                "SELECT reason, seq, convert_from(body, 'UTF8') AS body FROM relay.inbox_quarantine"
            )
        assert kept is not None
        assert (kept["reason"], kept["seq"], json.loads(kept["body"])) == ("skipped", 3, {"amount": "99.90"})
    assert await _acts(night) == [("skip", 1)]


async def _is(answer: Any, expected: object) -> bool:
    return bool(await answer == expected)


async def _acts(night: Night) -> list[tuple[str, int]]:
    async with connected(night.billing) as db:
        return [(r["act"], r["rows"]) for r in await db.fetch("SELECT act, rows FROM relay.audit ORDER BY id")]
