"""`relay demo`: a short one as a process, and its verdict, which must be able to find each kind of wrongness."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path

import asyncpg
import pytest
from rich.console import Console

from relay.demo import stage
from relay.demo.billing import STATES
from relay.demo.conclusion import EXIT_FAILS
from relay.demo.run import run
from relay.demo.sql import all_blocks, sql
from relay.demo.verdict import LABELS, Books, Findings, Step, Truth, judge
from relay.errors import SandboxError
from relay.sandbox import SandboxPostgres, SandboxRabbitMQ
from relay.settings import PostgresSettings, RabbitmqSettings
from tests.harness.outbox import connected

CREATED, PAID, SHIPPED = (
    Step(1, n, f"Order{kind}", f"1-{n}") for n, kind in enumerate(("Created", "Paid", "Shipped"), 1)
)
OTHER = Step(2, 1, "OrderCreated", "2-1")
PHANTOM = Step(1, 3, "OrderCancelled", "rolled-back")

TRUTH = Truth(journal=[CREATED, PAID, SHIPPED, OTHER], states={1: "shipped", 2: "created"}, paid_cents={1: 500, 2: 0})
RIGHT = Books(
    effects=[CREATED, OTHER, PAID, SHIPPED],
    states={1: "shipped", 2: "created"},
    billed_cents={1: 500},
    balance_cents=500,
)


def test_a_consumer_that_did_all_once_and_in_order_is_clean() -> None:
    assert judge(TRUTH, RIGHT) == Findings(**dict.fromkeys(LABELS, 0))
    assert judge(TRUTH, RIGHT).clean


@pytest.mark.parametrize(
    ("books", "expected"),
    [
        (replace(RIGHT, effects=[CREATED, OTHER, PAID]), {"lost": 1}),
        (replace(RIGHT, effects=[CREATED, OTHER, PAID, PHANTOM, SHIPPED]), {"phantom": 1}),
        (replace(RIGHT, effects=[CREATED, OTHER, PAID, PAID, PAID, SHIPPED]), {"repeated": 2}),
        (replace(RIGHT, effects=[CREATED, OTHER, PAID, SHIPPED, PAID]), {"repeated": 1, "backwards": 1}),
        (replace(RIGHT, effects=[CREATED, OTHER, SHIPPED, PAID]), {"overtaken": 1, "backwards": 1}),
        (replace(RIGHT, effects=[PAID, CREATED, OTHER, SHIPPED]), {"overtaken": 1, "backwards": 1, "invoice_first": 1}),
        (replace(RIGHT, effects=[PAID, SHIPPED, OTHER]), {"lost": 1, "invoice_first": 1}),
        (replace(RIGHT, states={1: "paid", 2: "created"}), {"wrong_state": 1}),
        (replace(RIGHT, states={1: "shipped"}), {"wrong_state": 1}),
        (replace(RIGHT, states={1: "shipped", 2: "created", 3: "created"}), {"wrong_state": 1}),
        (replace(RIGHT, billed_cents={1: 1000}), {"wrong_billing": 1}),
        (replace(RIGHT, billed_cents={}), {"wrong_billing": 1}),
        (replace(RIGHT, billed_cents={1: 500, 3: 20}), {"wrong_billing": 1}),
        (replace(RIGHT, balance_cents=1000), {"cents_off": 500}),
        (replace(RIGHT, balance_cents=0), {"cents_off": 500}),
    ],
)
def test_the_verdict_finds_each_kind_of_wrongness_and_no_other(books: Books, expected: dict[str, int]) -> None:
    findings = judge(TRUTH, books)
    assert {f.name: value for f in fields(Findings) if (value := getattr(findings, f.name))} == expected
    assert not findings.clean


def test_events_of_different_orders_may_come_in_any_order() -> None:
    assert judge(TRUTH, replace(RIGHT, effects=[OTHER, CREATED, PAID, SHIPPED])).clean
    assert judge(TRUTH, replace(RIGHT, effects=[CREATED, PAID, SHIPPED, OTHER])).clean


def test_every_kind_has_a_label() -> None:
    assert set(LABELS) == {f.name for f in fields(Findings)}


async def test_every_block_of_sql_is_valid(database: str) -> None:
    tables = {"shop_tables", "billing_tables"}
    async with connected(database) as connection:
        for name in sorted(tables):
            await connection.execute(sql(name))
        failures = {}
        for name in all_blocks() - tables:
            try:
                await connection.prepare(sql(name))
            except asyncpg.PostgresError as error:
                failures[name] = str(error)
    assert failures == {}


def test_every_state_of_billing_is_one_of_the_shop() -> None:
    assert all(f"'{state}'" in sql("shop_tables") for state in STATES.values())


@pytest.fixture
def own_servers() -> None:
    """The demo kills its broker, so it takes none that the environment names."""
    try:
        SandboxPostgres()
        SandboxRabbitMQ()
    except SandboxError as error:
        pytest.skip(f"needs a PostgreSQL and a RabbitMQ of its own: {error}")


@pytest.mark.usefixtures("own_servers")
async def test_a_short_demo_holds_and_its_faults_really_bite() -> None:
    code, output = await _demo("--plain", "--orders", "200", "--seconds", "10")
    assert code == 0, output
    assert "The verdict holds" in output
    row = _numbers(output, LABELS["repeated"])
    assert row[1] > 0
    assert row[2] == 0
    assert _numbers(output, LABELS["overtaken"])[1] > 0
    for label in LABELS.values():
        assert _numbers(output, label)[2] == 0, label
    assert _numbers(output, "kill -9 of the relay that owned the log") == [4]


@pytest.mark.usefixtures("own_servers")
async def test_an_inbox_that_does_not_keep_the_order_fails_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = stage.environment

    def careless(postgres: PostgresSettings, rabbitmq: RabbitmqSettings) -> dict[str, str]:
        return environment(postgres, rabbitmq) | {"RELAY_INBOX_POLICY": "none"}

    monkeypatch.setattr(stage, "environment", careless)
    output = io.StringIO()
    code = await run(stage.Options(orders=150, seconds=6, plain=True), Console(file=output, width=80))
    assert code == EXIT_FAILS, output.getvalue()
    assert "The verdict FAILS" in output.getvalue()
    assert _numbers(output.getvalue(), LABELS["overtaken"])[2] > 0
    assert _numbers(output.getvalue(), LABELS["repeated"])[2] == 0


@pytest.mark.usefixtures("own_servers")
async def test_ctrl_c_ends_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    process = await _start("--plain", folder=tmp_path)
    assert process.stdout is not None
    async with asyncio.timeout(90):
        while b"the shop opens" not in await process.stdout.readline():
            pass
        daemons = _descendants(process.pid)
        assert len(daemons) >= 5, "servers, relays and inbox, each with its keeper"
        process.send_signal(signal.SIGINT)
        await process.communicate()
    assert process.returncode == 130
    assert [pid for pid in daemons if _is_alive(pid)] == []
    assert _left_in(tmp_path) == []


async def _start(*arguments: str, folder: Path | None = None) -> asyncio.subprocess.Process:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RELAY_")} | (
        {} if folder is None else {"TMPDIR": str(folder)}
    )
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "relay",
        "demo",
        *arguments,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def _demo(*arguments: str) -> tuple[int, str]:
    process = await _start(*arguments)
    async with asyncio.timeout(180):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def _numbers(output: str, label: str) -> list[float]:
    """The numbers of a table's row. Thousands are set apart by one space, columns by more."""
    (line,) = (line for line in output.splitlines() if line.strip().startswith(label))
    return [float(part.replace(" ", "")) for part in re.split(r"\s{2,}", line.strip().removeprefix(label).strip())]


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _left_in(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def _descendants(parent: int) -> list[int]:
    found = [
        int(child) for task in Path(f"/proc/{parent}/task").glob("*/children") for child in task.read_text().split()
    ]
    return [*found, *(deeper for child in found for deeper in _descendants(child))]
