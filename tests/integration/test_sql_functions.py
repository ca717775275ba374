"""SQL functions as handlers: found or explained at the start, called in the inbox's transaction, failing like any other handler."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from click.testing import CliRunner

from relay.cli.main import cli
from relay.errors import ConfigError, PrivilegeError
from relay.inbox import Event, Inbox
from relay.inbox.functions import sql_functions
from relay.sandbox import Postgres
from relay.settings import InboxSettings, Settings
from tests.harness.logins import Logins, role_of
from tests.harness.outbox import connected
from tests.integration.inbox_harness import DEADLINE_S, Sent, World, record, stream, world

NOBODY = Inbox("shop")
RECORDING = """
CREATE FUNCTION public.record(event relay.event) RETURNS void LANGUAGE sql
BEGIN ATOMIC
  INSERT INTO effect (aggregate, seq, event_type) VALUES ((event).aggregate_id, (event).seq, (event).event_type);
END
"""


async def run_to_its_error(on: World, inbox: Inbox = NOBODY, **settings: Any) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await inbox.run(on.settings.model_copy(update=settings))


class TestAHandler:
    async def test_gets_the_whole_event(self, database: str, broker: str) -> None:
        async with world(database, broker, functions={"T": "billing.keep"}) as on:
            await on.db.execute(
                "CREATE SCHEMA billing; CREATE TABLE billing.kept (LIKE relay.inbox); DROP TABLE billing.kept;"
                "CREATE TABLE billing.kept OF relay.event;"
                "CREATE FUNCTION billing.keep(event relay.event) RETURNS void LANGUAGE sql AS"
                " $$ INSERT INTO billing.kept SELECT ($1).* $$"
            )
            async with on.running(NOBODY):
                await on.publish([Sent(seq=1, body=b'{"amount": 100}'), Sent(seq=None, id=3, body=b"\xff")])
                await on.until(lambda total: total.applied == 2)
            first, second = await on.db.fetch("SELECT * FROM billing.kept ORDER BY seq NULLS LAST")
            assert (first["id"], first["consumer"], first["source"], first["aggregate_type"]) == (
                None,
                "shop",
                "shop",
                "order",
            )
            assert (first["aggregate_id"], first["seq"], first["event_type"]) == ("1", 1, "T")
            assert (first["content_type"], first["headers"]) == ("application/json", '{"traceparent": "00-x"}')
            assert (first["payload"], first["body"]) == ('{"amount": 100}', b'{"amount": 100}')
            assert first["message_id"]
            assert first["occurred_at"] is not None
            assert (second["aggregate_id"], second["payload"], second["body"]) == (None, None, b"\xff")

    async def test_commits_with_the_cursor_in_order_and_once(self, database: str, broker: str) -> None:
        async with world(database, broker, functions={"T": "public.record"}) as on:
            await on.db.execute(RECORDING)
            async with on.running(NOBODY):
                events = stream("1", 5)
                await on.publish([events[i] for i in (1, 0, 0, 3, 2, 4, 4)])
                await on.until(lambda total: total.received == 7)
            assert await on.effects() == [1, 2, 3, 4, 5]

    async def test_that_raises_is_held_with_its_error_and_holds_only_its_aggregate(
        self, database: str, broker: str
    ) -> None:
        async with world(
            database, broker, functions={"T": "public.record", "U": "public.refuse"}, max_attempts=1
        ) as on:
            await on.db.execute(RECORDING)
            await on.db.execute(
                "CREATE FUNCTION refuse(event relay.event) RETURNS void LANGUAGE plpgsql AS"
                " $$ BEGIN PERFORM record(event); RAISE EXCEPTION 'no account for %', event.aggregate_id; END $$"
            )
            async with on.running(NOBODY):
                await on.publish([Sent(seq=1), Sent(seq=2, event_type="U"), Sent(seq=3), *stream("2", 3)])
                await on.until(lambda total: total.received == 6)
            assert await on.effects("2") == [1, 2, 3]
            assert await on.effects("1") == [1]
            assert await on.held() == [(2, "failed", "stuck", 1), (3, "behind", "waiting", 0)]
            assert (
                await on.db.fetchval("SELECT error FROM relay.inbox_held WHERE seq = 2")
                == "RaiseError: no account for 1"
            )

    async def test_that_takes_too_long_has_failed(self, database: str, broker: str) -> None:
        async with world(database, broker, functions={"T": "public.doze"}, handler_timeout_s=0.3, max_attempts=1) as on:
            await on.db.execute(
                "CREATE FUNCTION doze(event relay.event) RETURNS void LANGUAGE sql AS $$ SELECT pg_sleep(30) $$"
            )
            async with on.running(NOBODY):
                await on.publish([Sent(seq=1)])
                await on.until(lambda total: total.stuck == 1)
            error = await on.db.fetchval("SELECT error FROM relay.inbox_held")
            assert error == "TimeoutError: the handler took longer than 0.3 s"

    async def test_for_all_other_types_stands_beside_python_handlers(self, database: str, broker: str) -> None:
        seen: list[str] = []
        inbox = Inbox("shop")

        @inbox.on("V")
        async def handle(event: Event, tx: Any) -> None:
            seen.append(event.event_type)
            await record(event, tx)

        async with world(database, broker, functions={"*": "public.record"}) as on:
            await on.db.execute(RECORDING)
            async with on.running(inbox):
                await on.publish([Sent(seq=1), Sent(seq=2, event_type="V"), Sent(seq=3, event_type="anything")])
                await on.until(lambda total: total.received == 3)
            assert (await on.effects(), seen) == ([1, 2, 3], ["V"])
            assert on.total.skipped == 0

    async def test_of_a_name_that_must_be_quoted_is_quoted(self, database: str, broker: str) -> None:
        name = '"a""b; DROP TABLE effect; --"."Rec.ord"'
        async with world(database, broker, functions={"T": name}) as on:
            await on.db.execute(
                f'CREATE SCHEMA "a""b; DROP TABLE effect; --"; {RECORDING.replace("public.record", name)}'
            )
            async with on.running(NOBODY):
                await on.publish([Sent(seq=1)])
                await on.until(lambda total: total.applied == 1)
            assert await on.effects() == [1]


class TestAtTheStart:
    @pytest.mark.parametrize(
        ("functions", "message"),
        [
            ({"T": "order_paid"}, "expected schema.function, for example billing.order_paid"),
            ({"T": "a.b.c"}, "does not name a function"),
            ({"T": "a.b(event)"}, "does not name a function"),
            ({"T": "a.b; DROP TABLE x"}, "does not name a function"),
            ({"T": 'a."b'}, "does not name a function"),
            ({"T": 'a.""'}, "does not name a function"),
            ({"T": "a." + "b" * 64}, "at most 63 bytes"),
            ({"relay.tombstone": "a.b"}, "no event type of yours"),
            ({"": "a.b"}, "no event type of yours"),
        ],
    )
    def test_what_is_no_name_is_refused_before_any_socket(self, functions: dict[str, str], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            sql_functions(functions, consumer="c")

    async def test_an_event_type_with_two_handlers_is_refused(self) -> None:
        inbox = Inbox("shop")
        inbox.on("T", aggregate_type="order")(record)
        settings = Settings(inbox=InboxSettings(functions={"T": "public.record"}))
        with pytest.raises(
            ConfigError, match=r"two handlers for T: public\.record of inbox\.functions and one of Inbox"
        ):
            await inbox.run(settings)

    @pytest.mark.parametrize(
        ("create", "there"),
        [
            ("SELECT", ""),
            ("CREATE SCHEMA billing", ""),
            (
                "CREATE SCHEMA billing; CREATE FUNCTION billing.paid(jsonb) RETURNS int LANGUAGE sql AS 'SELECT 1'",
                " (there is paid(jsonb))",
            ),
            (
                "CREATE SCHEMA billing; CREATE PROCEDURE billing.paid(e relay.event) LANGUAGE sql AS 'SELECT 1'",
                " (there is paid(IN e relay.event))",
            ),
            (
                "CREATE SCHEMA billing; CREATE FUNCTION billing.paid(e relay.event, n int) RETURNS int LANGUAGE sql AS 'SELECT 1'",
                " (there is paid(e relay.event, n integer))",
            ),
        ],
    )
    async def test_a_function_that_is_missing_is_explained(
        self, database: str, broker: str, create: str, there: str
    ) -> None:
        async with world(database, broker, functions={"T": "Billing.paid"}) as on:
            await on.db.execute(create)
            with pytest.raises(ConfigError) as told:
                await run_to_its_error(on)
        assert str(told.value) == (
            f"inbox.functions: T is to be handled by billing.paid(relay.event), which does not exist{there}. Create it: "
            "CREATE FUNCTION billing.paid(event relay.event) RETURNS void LANGUAGE plpgsql AS $$ BEGIN ... END $$"
        )

    async def test_what_may_not_be_called_names_the_grant_and_the_grant_suffices(
        self, database: str, broker: str, postgres: Postgres
    ) -> None:
        with Logins(postgres) as logins:
            login = logins.create(database, "relay_consumer")
            async with world(database, broker, functions={"*": "billing.paid"}) as on, connected(database) as owner:
                await owner.execute(
                    "CREATE SCHEMA billing; CREATE FUNCTION billing.paid(event relay.event) RETURNS void LANGUAGE sql AS ''"
                    "; REVOKE ALL ON FUNCTION billing.paid FROM PUBLIC"
                )
                dsn = on.settings.postgres.model_validate({"dsn": login})
                with pytest.raises(PrivilegeError, match=f"{role_of(login)} may not call billing.paid") as told:
                    await run_to_its_error(on, postgres=dsn)
                await owner.execute(str(told.value).partition("the handler of *: ")[2])
                settings = on.settings.model_copy(update={"postgres": dsn})
                async with on.running(NOBODY, settings=settings):
                    await on.publish([Sent(seq=1)])
                    await on.until(lambda total: total.applied == 1)
                await owner.execute("DROP SCHEMA billing CASCADE")


class TestTheCommand:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "nobody is named who handles the events: give MODULE:OBJECT"),
            (["--consumer", "c"], "or name SQL functions in inbox.functions, or say --store"),
            (["--store"], "the consumer has no name"),
            (["-s", "inbox.functions=T=a.b"], "the consumer has no name"),
            (["--store", "--consumer", "c", "app:inbox"], "leave out app:inbox, or --store"),
            (["-s", "inbox.mode=store", "app:inbox"], "in store mode events are written into relay.inbox"),
            (["--store", "--consumer", "c", "-s", "inbox.functions=T=a.b"], "calls nobody: leave out inbox.functions"),
            (["--consumer", "c", "-s", "inbox.functions=T=b"], "expected schema.function"),
        ],
    )
    def test_refuses_what_contradicts_itself(self, arguments: list[str], message: str) -> None:
        result = CliRunner().invoke(cli, ["inbox", "run", *arguments], env={"RELAY_DAEMON_LOG_LEVEL": "error"})
        said = f"{result.output} {result.exception}"
        assert message in " ".join(said.split())
        assert result.exit_code != 0
