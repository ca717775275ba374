"""What the commands that look tell of databases in which everything is blocked that can be: in words, and as JSON."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.errors import NothingSelected
from relay.operate.replays import try_lock
from relay.sandbox import Postgres
from tests.harness.blocked import block_inbox, block_outbox
from tests.harness.console import Answer, relay
from tests.harness.outbox import connected

EXIT_SCHEMA = 3
EXIT_CONFIG = 2


def run(dsn: str, *steps: Callable[[Any], Any] | str) -> None:
    """Statements, or functions of a connection, one after the other."""

    async def each() -> None:
        async with connected(dsn) as db:
            for step in steps:
                await (db.execute(step) if isinstance(step, str) else step(db))

    asyncio.run(each())


@pytest.fixture(scope="module")
def shop(postgres: Postgres, template_database: str) -> Iterator[str]:
    """A producer's database, only to be read."""
    yield from _made(postgres, template_database, block_outbox)


@pytest.fixture(scope="module")
def billing(postgres: Postgres, template_database: str) -> Iterator[str]:
    """A consumers' database, only to be read."""
    yield from _made(postgres, template_database, block_inbox)


@pytest.fixture(scope="module")
def both(postgres: Postgres, template_database: str) -> Iterator[str]:
    """A database that is both, only to be read."""
    yield from _made(postgres, template_database, block_outbox, block_inbox)


def _made(postgres: Postgres, template: str, *steps: Callable[[Any], Any]) -> Iterator[str]:
    name = f"relay_see_{secrets.token_hex(4)}"
    dsn = postgres.create_database(name, template)
    run(dsn, *steps)
    yield dsn
    postgres.drop_database(name)


class TestStatus:
    def test_the_outbox_in_words(self, shop: str) -> None:
        lines = relay(shop, "status").lines()
        assert "OUTBOX shop" in lines
        assert "backlog 3 rows to be published, the oldest for AGE" in lines
        assert "published 12,345, lately 0.0/s, cursor written AGE" in lines
        assert "owner NOBODY (the last one was host:1)" in lines
        assert "parked 6 rows of 5 aggregates (2 stuck, 2 retrying, 1 paused), the oldest AGE" in lines
        assert "last error AGE: BrokerUnavailable: gone" in lines
        assert any(line.startswith("retained since 20") and line.endswith("KiB with indexes") for line in lines)
        assert not any(line.startswith("INBOX") for line in lines)

    def test_the_inbox_in_words(self, billing: str) -> None:
        lines = relay(billing, "status").lines()
        at = lines.index("INBOX billing")
        assert lines[at + 1 : at + 6] == [
            "applied 777, lately 5.0/s, NOBODY is connected",
            "held 7 messages of 5 aggregates (3 failed, 3 early, 1 behind), 1 stuck, the oldest AGE",
            "gaps 1 open, 1 stuck, the oldest AGE",
            "quarantine 1 conflict, 1 foreign",
            "last error AGE: BrokerUnavailable: closed",
        ]
        assert "stored 3 rows to be taken, the oldest for AGE, 1 given back" in lines
        assert not any(line.startswith("OUTBOX") for line in lines)

    def test_it_ends_with_what_needs_a_person_and_the_next_command(self, both: str) -> None:
        lines = relay(both, "status").lines()
        assert lines[-9:] == [
            "! 2 aggregates stuck in the outbox: relay stuck",
            "! rows wait, and no relay publishes shard 0: relay run",
            "! 1 pause in effect: relay resume order/3",
            "! replay 1 was interrupted at 40 of 100 rows: relay replay --resume 1",
            "! 2 aggregates stuck in the inbox of billing: relay stuck",
            "! messages are held, and no consumer billing is running: relay inbox run",
            "! 2 messages in quarantine at billing: relay inbox quarantine",
            "! 1 event given back by the taker of store: relay stuck",
            "This needs a person. Next: relay stuck",
        ]

    def test_the_next_command_looks_at_the_same_database(self, both: str, tmp_path: Path) -> None:
        file = tmp_path / "a shop.toml"
        file.write_text("", encoding="utf-8")
        given = ("-c", str(file), "--set", "outbox.page_rows=500")
        for command in (("status",), ("stuck",), ("stuck", "--by", "cause"), ("show", "order/1")):
            lines = relay(both, *command, *given).lines()
            told = [line for line in lines if line.startswith(("Next:", "This needs", "! "))]
            assert told
            assert all(f"-c '{file}' --set outbox.page_rows=500" in line for line in told)

    def test_rows_that_wait_are_told_from_parked_ones(self, database: str) -> None:
        run(database, block_outbox, "UPDATE relay.outbox_cursor SET snapshot = pg_current_snapshot()")
        assert "! parked rows wait, and no relay publishes shard 0: relay run" in relay(database, "status").lines()

    def test_a_replay_runs_while_a_process_holds_its_lock(self, database: str) -> None:
        run(database, block_outbox, "UPDATE relay.outbox_replay SET updated_at = now()")
        text = "! replay 1 was interrupted at 40 of 100 rows: relay replay --resume 1"
        assert text in relay(database, "status").lines()

        async def while_it_runs() -> Answer:
            async with connected(database) as db:
                assert await try_lock(db, 1)
                return await asyncio.to_thread(relay, database, "status")

        assert text not in asyncio.run(while_it_runs()).lines()

    def test_a_new_database_needs_nobody(self, database: str) -> None:
        assert relay(database, "status").lines()[-2:] == [
            "Nothing has been published or consumed here yet. (For another database: --config, or RELAY_POSTGRES_DSN.)",
            "Nothing needs a person.",
        ]

    def test_its_json_keys_are_a_contract(self, both: str) -> None:
        told = relay(both, "status", "--json").json
        assert _keys(told) == {"database", "at", "outbox", "inbox", "problems"}
        assert _keys(told["outbox"]) == {"shards", "pauses", "replays", "retained_bytes"}
        (shard,) = told["outbox"]["shards"]
        assert _keys(shard) == {
            *("shard", "source", "owner", "owner_alive", "standbys", "backlog", "published", "rate", "checkpoint_at"),
            *("last_error", "last_error_at", "parked", "retained_since"),
        }
        assert shard["backlog"] | {"oldest": 0, "age_s": 0} == {"rows": 3, "more": False, "oldest": 0, "age_s": 0}
        assert shard["parked"] | {"oldest": 0} == {
            "rows": 6,
            "aggregates": 5,
            "stuck": 2,
            "retrying": 2,
            "paused": 1,
            "oldest": 0,
        }
        assert _keys(told["outbox"]["pauses"][0]) == {"scope", "what", "paused_at", "who", "why"}
        assert _keys(told["outbox"]["replays"][0]) == {
            *("id", "to_queue", "sent", "total", "started_at", "updated_at", "running", "who"),
        }
        assert [c["consumer"] for c in told["inbox"]] == ["archive", "billing", "store"]
        assert _keys(told["inbox"][1]) == {
            *("consumer", "running", "applied", "rate", "owner", "updated_at", "last_error", "last_error_at"),
            *("held", "gaps", "quarantine", "stored", "taker_failed", "stranded"),
        }
        assert _keys(told["inbox"][1]["held"]) == {"rows", "aggregates", "early", "behind", "failed", "stuck", "oldest"}
        assert _keys(told["inbox"][1]["gaps"]) == {"open", "stuck", "oldest"}
        assert _keys(told["inbox"][2]["stored"]) == {"rows", "more", "oldest", "age_s"}
        assert _keys(told["problems"][0]) == {"text", "command"}

    def test_a_backlog_within_a_window_is_what_lies_behind_it_and_what_is_younger_than_it(self, database: str) -> None:
        emit = "SELECT relay.emit('order', '1', 'Changed', '{}')"
        window = "UPDATE relay.outbox_cursor SET window_snapshot = pg_current_snapshot(), after_id = 3"
        run(database, *[emit] * 5, window, *[emit] * 2)
        (shard,) = relay(database, "status", "--json").json["outbox"]["shards"]
        assert shard["backlog"]["rows"] == 4  # 4 and 5 of the window, 6 and 7 after it

    def test_a_transaction_that_was_in_progress_counts_as_backlog_as_soon_as_it_is_committed(
        self, database: str
    ) -> None:
        async def late(db: Any) -> None:
            async with connected(database) as other:
                transaction = other.transaction()
                await transaction.start()
                await other.execute("SELECT relay.emit('order', 'late', 'Changed', '{}')")
                await db.execute("SELECT relay.emit('order', '1', 'Changed', '{}')")
                await db.execute("UPDATE relay.outbox_cursor SET snapshot = pg_current_snapshot()")
                await transaction.commit()

        run(database, late)
        (shard,) = relay(database, "status", "--json").json["outbox"]["shards"]
        assert shard["backlog"]["rows"] == 1
        assert [r["aggregate_id"] for r in relay(database, "list", "--state", "waiting", "--json").json["rows"]] == [
            "late"
        ]

    def test_a_backlog_is_counted_up_to_a_bound_and_its_oldest_row_found_in_whichever_slot(
        self, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("relay.operate.status.COUNTED", 2)
        insert = "INSERT INTO relay.outbox (slot, created_at, event_type, payload) VALUES"
        run(
            database,
            f"{insert} (3, now() - interval '5 days', 'Old', '{{}}')",
            *[f"{insert} (0, now(), 'New', '{{}}')"] * 4,
        )
        (shard,) = relay(database, "status", "--json").json["outbox"]["shards"]
        assert (shard["backlog"]["rows"], shard["backlog"]["more"]) == (2, True)
        assert shard["backlog"]["age_s"] > 4 * 86400
        assert "backlog 2+ rows to be published, the oldest for AGE" in relay(database, "status").lines()


class TestStuck:
    def test_every_blocked_aggregate_is_told_the_oldest_first(self, both: str) -> None:
        told = relay(both, "stuck", "--json").json
        assert [(b["side"], b["aggregate_id"], b["seq"], b["cause"], b["state"], b["behind"]) for b in told["blocked"]] == [
            ("inbox", None, None, "foreign", "stuck", 0),
            ("outbox", None, None, "too_large", "stuck", 0),
            ("outbox", "1", 3, "unroutable", "stuck", 1),
            ("inbox", "1", 3, "failed", "stuck", 1),
            ("inbox", "7", 2, "gap", "stuck", 2),
            ("inbox", "1", 1, "taken", "retrying", 1),
            ("inbox", "1", 2, "conflict", "stuck", 0),
            ("outbox", "2", 1, "nacked", "retrying", 0),
            ("outbox", "3", 1, "paused", "paused", 0),
            ("inbox", "9", 1, "failed", "retrying", 0),
            ("inbox", None, None, "failed", "retrying", 0),
            ("outbox", "5", 1, "tombstone", "retrying", 0),
            ("inbox", "10", 1, "gap", "retrying", 0),
            ("inbox", "8", 6, "early", "waiting", 0),
        ]  # fmt: skip
        assert told["total"] == 14
        assert _keys(told) == {"database", "at", "total", "blocked", "causes", "pauses", "errors_readable"}
        assert _keys(told["blocked"][0]) == {
            *(
                "side",
                "kind",
                "id",
                "consumer",
                "source",
                "aggregate_type",
                "aggregate_id",
                "seq",
                "event_type",
                "cause",
            ),
            *("state", "detail", "since", "age_s", "attempts", "next_attempt_at", "behind"),
        }

    def test_one_line_each_in_words(self, both: str) -> None:
        lines = relay(both, "stuck").lines()
        assert "outbox order/1 3 Changed unroutable stuck AGE 20 1 3 NO_ROUTE to nowhere" in lines
        assert "inbox billing order/1 3 Changed failed stuck AGE 20 1 1 KeyError: amount of payload-held" in lines
        assert "inbox billing order/7 2 gap stuck AGE 4 2 no longer retained" in lines
        assert "aggregate order/3 AGE anna@desk wait for the fix" in lines
        assert lines[-2:] == ["14 blocked.", "Next: relay show order/1"]

    def test_by_cause(self, database: str) -> None:
        run(database, block_outbox, block_inbox)
        run(
            database,
            "UPDATE relay.inbox_held SET error = 'KeyError: ' || aggregate_id WHERE reason = 'failed' AND seq IS NOT NULL",
        )
        told = relay(database, "stuck", "--by", "cause", "--json").json
        by_cause = {(c["side"], c["cause"], (c["detail"] or "")[:8]): c for c in told["causes"]}
        errors = by_cause["inbox", "failed", "KeyError"]
        assert (errors["aggregates"], errors["rows"], errors["stuck"], errors["details"]) == (2, 3, 1, 2)
        refused = by_cause["outbox", "unroutable", "NO_ROUTE"]
        assert (refused["aggregates"], refused["rows"], refused["stuck"]) == (1, 2, 1)
        assert by_cause["inbox", "gap", "no longe"]["rows"] == 2
        assert _keys(told["causes"][0]) == {
            *("side", "consumer", "cause", "detail", "details", "aggregates", "rows", "stuck", "since", "age_s"),
        }
        assert told["total"] == len(told["causes"]) == 13
        lines = relay(database, "stuck", "--by", "cause").lines()
        assert "inbox billing failed 2 3 1 AGE KeyError: 1 (and 1 others)" in lines
        at = lines.index("13 causes.")
        assert lines[at + 1] == "Next: relay stuck --cause CAUSE"
        assert sorted(lines[at + 2 :]) == [
            "conflict: relay inbox quarantine --cause conflict --consumer billing, then relay inbox dismiss --cause conflict --consumer billing",
            "failed: mend it, then relay inbox retry --cause failed --consumer billing",
            "foreign: relay inbox quarantine --cause foreign --consumer billing, then relay inbox dismiss --cause foreign --consumer billing",
            "gap: relay inbox gaps",
            "nacked: mend it, then relay retry --cause nacked",
            "paused: relay resume order/3",
            "taken: mend it, then relay inbox retry --cause taken --consumer store",
            "too_large: mend it, then relay retry --cause too_large",
            "unroutable: mend it, then relay retry --cause unroutable",
        ]

    @pytest.mark.parametrize(
        ("filters", "found"),
        [
            (("order/1",), {"unroutable", "failed", "conflict", "taken"}),
            (("order/1*",), {"unroutable", "failed", "conflict", "taken", "gap"}),
            (("--type", "order", "--state", "stuck"), {"unroutable", "failed", "gap", "conflict"}),
            (("--cause", "nacked"), {"nacked"}),
            (("--cause", "paused"), {"paused"}),
            (("--error", "no_route"), {"unroutable"}),
            (("--error", "and more lines"), {"failed"}),
            (("--error", "such account"), {"taken"}),
            (("--event-type", "Loose"), {"too_large"}),
            (("--older-than", "2h"), {"foreign", "too_large", "unroutable"}),
            (("--since", "20m", "--state", "retrying"), {"nacked", "failed", "tombstone", "gap"}),
            (("--seq", "4-9"), {"early"}),
            (("--consumer", "store"), {"taken"}),
            (("--source", "shop", "--state", "waiting"), {"early"}),
        ],
    )  # fmt: skip
    def test_filters(self, both: str, filters: tuple[str, ...], found: set[str]) -> None:
        told = relay(both, "stuck", *filters, "--json").json
        assert {b["cause"] for b in told["blocked"]} == found
        causes = relay(both, "stuck", "--by", "cause", *filters, "--json").json["causes"]
        assert {c["cause"] for c in causes} == found

    def test_a_limit_tells_how_many_there_are(self, both: str) -> None:
        told = relay(both, "stuck", "--limit", "2", "--json").json
        assert (len(told["blocked"]), told["total"]) == (2, 14)
        assert "14 blocked; the oldest 2 are shown (--limit)." in relay(both, "stuck", "--limit", "2").lines()
        assert "14 blocked; the oldest 1 is shown (--limit)." in relay(both, "stuck", "--limit", "1").lines()

    def test_nothing_blocked_is_said(self, database: str) -> None:
        assert relay(database, "stuck").out.startswith("Nothing is blocked in database relay_test_")

    def test_a_pause_is_told_although_nothing_is_parked_yet(self, database: str) -> None:
        run(
            database,
            "INSERT INTO relay.audit (who, side, act, selection, why, rows) VALUES ('anna', 'outbox', 'pause', '{}', 'because', 0)",
            "INSERT INTO relay.outbox_pause (scope, shard, audit_id) VALUES ('shard', 0, 1)",
        )
        assert "shard 0 AGE anna because" in relay(database, "stuck").lines()


class TestShow:
    def test_the_outbox_side_row_by_row(self, shop: str) -> None:
        lines = relay(shop, "show", "order/1").lines()
        at = lines.index("OUTBOX shop")
        assert lines[at + 1 : at + 7] == [
            "last number 4, all retained, 2 rows parked",
            "seq id event inserted size state why attempts what was said",
            "1 1 Changed AGE 32 B published",
            "2 2 Changed AGE 32 B published",
            "3 3 Changed AGE 32 B stuck unroutable 20 NO_ROUTE to nowhere",
            "4 4 Changed AGE 32 B waiting behind",
        ]
        assert lines[-1] == "Next: mend the cause, then relay retry order/1; or give the event up: relay skip order/1"

    @pytest.mark.parametrize(
        ("aggregate", "state", "last"),
        [
            ("order/2", "1 5 Changed AGE 2 B retrying nacked 3 AGE the broker said no", "Next: mend the cause, then relay retry order/2; or give the event up: relay skip order/2"),
            ("order/3", "1 6 Changed AGE 2 B paused", "Next: relay resume order/3"),
            ("order/4", "1 7 Changed AGE 2 B skipped tombstone (skip)", "Nothing of it needs a person in this database."),
            ("order/5", "1 9 Changed AGE 2 B retrying tombstone (purge) AGE", "Nothing of it needs a person in this database."),
            ("order/6", "1 11 Paid AGE 2 B waiting to be published", "Nothing of it needs a person in this database."),
        ],
    )  # fmt: skip
    def test_every_state_of_a_row(self, shop: str, aggregate: str, state: str, last: str) -> None:
        lines = relay(shop, "show", aggregate).lines()
        assert state in lines
        assert lines[-1] == last

    def test_the_inbox_side(self, billing: str) -> None:
        lines = relay(billing, "show", "order/1").lines()
        at = lines.index("INBOX billing (source shop)")
        assert lines[at + 1 : at + 6] == [
            "applied through 2; the next one is held because its handler failed",
            "2 messages held",
            "seq id event held why state attempts error",
            "3 1 Changed AGE failed stuck 20 KeyError: amount of payload-held",
            "4 2 Changed AGE behind waiting",
        ]
        assert "INBOX archive (source shop)" in lines
        at = lines.index("INBOX store (source shop)")
        assert lines[at + 1 : at + 3] == ["nothing applied yet", "2 events stored, to be taken"]
        assert "1 1 Changed AGE 2 AGE taker: no such account" in lines
        assert "1 billing 2 conflict AGE number 2 was applied with another content" in lines
        assert "4 billing 1 skipped AGE by anna" in lines
        assert lines[-1] == (
            "Next: mend the handler, then relay inbox retry order/1 --consumer billing;"
            " or give the event up: relay inbox skip order/1 --consumer billing"
        )

    def test_a_gap_that_heals_and_one_that_does_not(self, billing: str) -> None:
        lines = relay(billing, "show", "order/7").lines()
        assert (
            "MISSING 2 to 3 (and 2 further on), noticed AGE, the producer has it no longer: no longer retained" in lines
        )
        assert lines[-1] == "Next: give the missing numbers up: relay inbox skip order/7 --consumer billing --through 3"
        lines = relay(billing, "show", "order/10").lines()
        assert any(line.startswith("missing 1 to 2, noticed AGE, asked for 1 time, again") for line in lines)
        assert lines[-1] == (
            "It waits for numbers that are missing; the producer's relay is asked for them: relay inbox gaps order/10"
        )

    def test_what_is_held_back_by_a_pause_of_its_type_given_back_or_in_quarantine_needs_a_person(
        self, database: str
    ) -> None:
        run(
            database,
            block_outbox,
            "UPDATE relay.outbox_pause SET scope = 'aggregate_type', aggregate_type = 'order', aggregate_id = NULL",
        )
        assert relay(database, "show", "order/3").lines()[-1] == "Next: relay resume --type order"
        run(database, block_inbox, "DELETE FROM relay.inbox_held", "DELETE FROM relay.outbox_parked")
        assert relay(database, "show", "order/1").lines()[-1] == (
            "Next: mend the taker, then relay inbox retry order/1 --consumer store;"
            " or give the event up: relay inbox skip order/1 --consumer store"
        )
        run(database, "DELETE FROM relay.inbox", "DELETE FROM relay.outbox_pause")
        assert relay(database, "show", "order/1").lines()[-1] == (
            "Next: relay inbox quarantine order/1, then relay inbox dismiss order/1"
        )

    def test_pauses_and_operators_acts(self, shop: str) -> None:
        lines = relay(shop, "show", "order/3").lines()
        assert any(
            line.startswith("aggregate order/3") and line.endswith("anna@desk wait for the fix") for line in lines
        )
        acts = [line for line in lines if "@desk" in line and "Z" in line]
        assert [act.split("Z ")[1] for act in acts] == [
            "ben@desk retry 2 --all",
            "anna@desk pause 1 order/3 wait for the fix",
        ]

    def test_pauses_of_its_types_and_its_shard_apply_as_well(self, database: str) -> None:
        run(database, block_outbox)
        run(
            database,
            "INSERT INTO relay.outbox_pause (scope, aggregate_type, event_type, shard, audit_id) VALUES ('aggregate_type', 'order', NULL, NULL, 1),"
            " ('event_type', NULL, 'Changed', NULL, 1), ('event_type', NULL, 'Other', NULL, 1), ('shard', NULL, NULL, 0, 1)",
        )
        told = relay(database, "show", "order/2", "--json").json
        assert sorted((p["scope"], p["what"]) for p in told["pauses"]) == [
            ("aggregate_type", "order"),
            ("event_type", "Changed"),
            ("shard", "0"),
        ]

    def test_what_is_no_longer_retained_is_said(self, database: str) -> None:
        run(database, block_outbox)
        run(database, "DELETE FROM relay.outbox WHERE aggregate_id = '1' AND seq <= 2")
        assert (
            "last number 4, retained from 3; 1 to 2 are no longer in the log, 2 rows parked"
            in relay(database, "show", "order/1").lines()
        )
        run(database, "DELETE FROM relay.outbox WHERE aggregate_id = '6'")
        assert "last number 3, none of its rows is retained any more" in relay(database, "show", "order/6").lines()

    def test_a_limit_keeps_the_newest_and_what_is_blocked(self, database: str) -> None:
        run(database, block_outbox)
        run(database, "SELECT relay.emit('order', '1', 'Changed', '{}') FROM generate_series(5, 30)")
        told = relay(database, "show", "order/1", "--limit", "3", "--json").json
        assert [row["seq"] for row in told["outbox"]["rows"]] == [3, 4, 28, 29, 30]
        assert "25 more are retained (--limit)" in relay(database, "show", "order/1", "--limit", "3").lines()

    def test_contents_are_shown_only_when_asked_for(self, both: str) -> None:
        for secret in ("payload-of-order-1", "payload-quarantined", "payload-stored"):
            assert secret not in relay(both, "show", "order/1").out + relay(both, "show", "order/1", "--json").out
        shown = relay(both, "show", "order/1", "--payload").lines()
        assert '#1 id 1: {"secret": "payload-of-order-1"}' in shown
        assert "billing #3 id 1: payload-held" in shown
        assert relay(both, "show", "order/1", "--payload", "--json").json["payloads"]["outbox"]["1"] == {
            "text": '{"secret": "payload-of-order-1"}',
            "hex": None,
            "cut": False,
        }

    def test_its_json_keys_are_a_contract(self, both: str) -> None:
        told = relay(both, "show", "order/1", "--json").json
        assert _keys(told) == {
            *("database", "at", "aggregate_type", "aggregate_id", "outbox", "inbox", "quarantine", "pauses", "acts", "errors_readable"),
        }  # fmt: skip
        assert _keys(told["outbox"]) == {"source", "last_seq", "first_retained", "parked", "rows"}
        assert _keys(told["outbox"]["rows"][0]) == ROW_KEYS
        billing = next(i for i in told["inbox"] if i["consumer"] == "billing")
        assert _keys(billing) == {
            *("consumer", "source", "last_seq", "blocked", "held_total", "held", "stored_total", "stored", "gap"),
        }
        assert _keys(billing["held"][0]) == {
            *(
                "id",
                "seq",
                "event_type",
                "message_id",
                "reason",
                "state",
                "attempts",
                "error",
                "held_at",
                "next_attempt_at",
            ),
        }
        store = next(i for i in told["inbox"] if i["consumer"] == "store")
        assert _keys(store["stored"][0]) == {
            *("id", "seq", "event_type", "message_id", "attempts", "error", "stored_at", "next_take_at"),
        }
        assert _keys(relay(both, "show", "order/7", "--json").json["inbox"][0]["gap"]) == {
            *("to_seq", "missing_from", "missing_to", "missing", "found_by", "noticed_at", "state", "asks", "next_ask_at", "detail"),
        }  # fmt: skip
        assert _keys(told["quarantine"][0]) == {
            *("id", "consumer", "source", "seq", "reason", "detail", "message_id", "received_at", "dismissed_at"),
        }
        assert _keys(told["acts"][0]) == ACT_KEYS

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ("orders/1", "There is order/1"),
            ("order/66", "There is order/6"),
            ("nothing/like-it", "Is it the right database? (--config, or RELAY_POSTGRES_DSN)"),
        ],
    )
    def test_an_unknown_aggregate_is_a_plain_answer_with_a_hint(self, shop: str, asked: str, said: str) -> None:
        answer = relay(shop, "show", asked)
        assert answer.code == NothingSelected.exit_code
        assert f"nothing is known of {asked} in database" in answer.err
        assert said in answer.err

    @pytest.mark.parametrize("asked", ["42", "order/", "/42", "order/\x00"])
    def test_what_names_no_aggregate_is_refused(self, database: str, asked: str) -> None:
        assert relay(database, "show", asked).code == EXIT_CONFIG


class TestList:
    @pytest.mark.parametrize(
        ("filters", "ids"),
        [
            ((), [13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
            (("--oldest-first", "--limit", "2"), [1, 2]),
            (("--state", "waiting"), [13, 12, 11]),
            (("--state", "published"), [8, 2, 1]),
            (("--state", "parked"), [10, 9, 6, 5, 4, 3]),
            (("--state", "retrying"), [9, 5]),
            (("--state", "stuck"), [10, 3]),
            (("--state", "paused"), [6]),
            (("--state", "behind"), [4]),
            (("--state", "skipped"), [7]),
            (("--state", "published", "order/4"), [8]),
            (("--event-type", "Paid"), [13, 12, 11]),
            (("--event-type", "Paid", "--state", "waiting", "--seq", "2-"), [13, 12]),
            (("--event-type", "Changed", "--state", "stuck"), [3]),
            (("order/1",), [4, 3, 2, 1]),
            (("order/1", "--seq", "2-3", "--oldest-first"), [2, 3]),
            (("order/1", "--state", "parked"), [4, 3]),
            (("order/*", "--type", "order", "--seq", "4"), [4]),
            (("ord*/4", "--state", "skipped"), [7]),
            (("--error", "NO_route"), [3]),
            (("--cause", "nacked"), [5]),
            (("--cause", "paused"), [6]),
            (("--older-than", "2h", "--state", "parked"), [10, 3]),
            (("--older-than", "2h"), []),
            (("--since", "1h", "--until", "1m", "--state", "parked"), [9, 6, 5]),
            (("--id", "3", "--id", "12", "--id", "999"), [12, 3]),
            (("--id", "3", "--state", "published"), []),
            (("--after", "3"), [2, 1]),
            (("--after", "11", "--oldest-first"), [12, 13]),
            (("--after", "4", "order/1"), [3, 2, 1]),
            (("--after", "9", "--state", "parked"), [6, 5, 4, 3]),
        ],
    )
    def test_filters(self, shop: str, filters: tuple[str, ...], ids: list[int]) -> None:
        told = relay(shop, "list", *filters, "--json").json
        assert [row["id"] for row in told["rows"]] == ids

    def test_pages_join_without_a_hole(self, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
        run(database, block_outbox)
        monkeypatch.setattr("relay.operate.listing._PIECE", 2)
        run(database, "DELETE FROM relay.outbox WHERE id BETWEEN 4 AND 8 AND aggregate_id <> '1'")
        for order, expected in (
            ((), [13, 12, 11, 10, 9, 4, 3, 2, 1]),
            (("--oldest-first",), [1, 2, 3, 4, 9, 10, 11, 12, 13]),
        ):
            seen: list[int] = []
            after: tuple[str, ...] = ()
            while True:
                told = relay(database, "list", "--limit", "2", *order, *after, "--json").json
                seen += [row["id"] for row in told["rows"]]
                if told["next_after"] is None:
                    break
                after = ("--after", str(told["next_after"]))
            assert seen == expected

    def test_in_words_it_tells_the_command_for_more(self, shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.argv", ["relay", "list", "--state", "parked", "--limit", "2", "--after", "10"])
        lines = relay(shop, "list", "--state", "parked", "--limit", "2", "--after", "10").lines()
        assert lines[1:3] == [
            "9 order/5 1 Changed AGE 2 B retrying tombstone AGE",
            "6 order/3 1 Changed AGE 2 B paused",
        ]
        assert lines[-1] == "2 rows, and there are more: relay list --state parked --limit 2 --after 6"

    def test_contents_are_shown_only_when_asked_for(self, shop: str) -> None:
        assert "payload-of" not in relay(shop, "list").out
        assert '1: {"secret": "payload-of-order-1"}' in relay(shop, "list", "--id", "1", "--payload").lines()

    def test_a_cause_goes_with_parked_rows_only(self, shop: str) -> None:
        answer = relay(shop, "list", "--state", "published", "--cause", "nacked")
        assert answer.code == EXIT_CONFIG
        assert "only parked rows have a cause" in answer.err

    def test_a_parked_row_whose_log_row_is_gone_is_told_from_what_is_left(self, database: str) -> None:
        run(database, block_outbox)
        run(database, "DELETE FROM relay.outbox WHERE id = 3")
        (row,) = relay(database, "list", "--id", "3", "--state", "parked", "--json").json["rows"]
        assert (row["retained"], row["state"], row["aggregate_id"], row["event_type"]) == (False, "stuck", "1", None)
        assert any("(no longer retained)" in line for line in relay(database, "list", "--state", "stuck").lines())

    def test_its_json_keys_are_a_contract(self, shop: str) -> None:
        told = relay(shop, "list", "--json").json
        assert _keys(told) == {"database", "at", "rows", "next_after"}
        assert _keys(told["rows"][0]) == ROW_KEYS


class TestInbox:
    def test_held(self, billing: str) -> None:
        told = relay(billing, "inbox", "held", "--json").json
        assert [(h["aggregate_id"], h["seq"], h["reason"], h["state"]) for h in told["held"]] == [
            ("1", 3, "failed", "stuck"),
            ("1", 4, "behind", "waiting"),
            ("7", 4, "early", "waiting"),
            ("7", 7, "early", "waiting"),
            ("8", 6, "early", "waiting"),
            ("9", 1, "failed", "retrying"),
            (None, None, "failed", "retrying"),
        ]
        assert _keys(told["held"][0]) == {
            *(
                "id",
                "consumer",
                "source",
                "aggregate_type",
                "aggregate_id",
                "seq",
                "event_type",
                "message_id",
                "reason",
            ),
            *("state", "attempts", "error", "held_at", "next_attempt_at"),
        }
        assert [
            h["seq"] for h in relay(billing, "inbox", "held", "order/1", "--cause", "failed", "--json").json["held"]
        ] == [3]
        assert [h["id"] for h in relay(billing, "inbox", "held", "--error", "value", "--json").json["held"]] == [6]
        page = relay(billing, "inbox", "held", "--limit", "2", "--after", "2", "--json").json
        assert ([h["id"] for h in page["held"]], page["next_after"]) == ([3, 4], 4)
        assert "payload-held" not in relay(billing, "inbox", "held", "order/7").out
        assert "3: payload-held" in relay(billing, "inbox", "held", "order/7", "--payload").lines()

    def test_gaps(self, billing: str) -> None:
        told = relay(billing, "inbox", "gaps", "--json").json
        assert told["total"] == 2
        assert [(g["aggregate_id"], g["last_seq"], g["missing_from"], g["missing_to"], g["missing"], g["held"], g["state"]) for g in told["gaps"]] == [
            ("7", 1, 2, 3, 4, 2, "stuck"),
            ("10", 0, 1, 2, 2, 0, "open"),
        ]  # fmt: skip
        assert _keys(told["gaps"][0]) == {
            *(
                "consumer",
                "source",
                "aggregate_type",
                "aggregate_id",
                "last_seq",
                "missing_from",
                "missing_to",
                "missing",
            ),
            *("to_seq", "held", "found_by", "noticed_at", "state", "asks", "next_ask_at", "detail"),
        }
        assert [
            g["aggregate_id"] for g in relay(billing, "inbox", "gaps", "--state", "open", "--json").json["gaps"]
        ] == ["10"]
        lines = relay(billing, "inbox", "gaps").lines()
        assert "billing shop order/7 1 4 2-3 … 2 AGE successor stuck 4 no longer retained" in lines
        assert lines[-1] == "2 gaps."

    def test_a_gap_behind_messages_that_are_held(self, database: str) -> None:
        run(database, block_inbox)
        run(
            database,
            "INSERT INTO relay.inbox_gap (consumer, source, aggregate_type, aggregate_id, to_seq, found_by, state) VALUES"
            " ('billing', 'shop', 'order', '1', 6, 'mark', 'stuck')",
        )
        (gap,) = relay(database, "inbox", "gaps", "order/1", "--json").json["gaps"]
        assert (gap["last_seq"], gap["missing_from"], gap["missing_to"], gap["missing"]) == (
            2,
            5,
            6,
            2,
        )  # 3 and 4 are held

    def test_quarantine(self, billing: str) -> None:
        told = relay(billing, "inbox", "quarantine", "--json").json
        assert [(q["id"], q["reason"]) for q in told["quarantine"]] == [(2, "foreign"), (1, "conflict")]
        assert _keys(told["quarantine"][0]) == {
            *("id", "consumer", "reason", "detail", "message_id", "exchange", "routing_key", "received_at", "source"),
            *("aggregate_type", "aggregate_id", "seq", "dismissed_at"),
        }
        everything = relay(billing, "inbox", "quarantine", "--dismissed", "--json").json["quarantine"]
        assert [q["reason"] for q in everything] == ["skipped", "malformed", "foreign", "conflict"]
        skipped = relay(billing, "inbox", "quarantine", "--cause", "skipped", "--json").json["quarantine"]
        assert [q["detail"] for q in skipped] == ["by anna"]
        conflicts = relay(billing, "inbox", "quarantine", "--cause", "conflict").out
        assert "number 2 was applied with another content" in conflicts
        assert "payload-quarantined" not in conflicts
        assert (
            "1: payload-quarantined"
            in relay(billing, "inbox", "quarantine", "--cause", "conflict", "--payload").lines()
        )

    def test_nothing_is_said_plainly(self, database: str) -> None:
        run(database, "SELECT relay.emit('order', '1', 'Changed', '{}')", "DELETE FROM relay.outbox")
        run(database, "INSERT INTO relay.inbox_progress (consumer, owner) VALUES ('billing', 'host:2')")
        name = database.rpartition("/")[2]
        assert relay(database, "inbox", "held").out == f"Nothing is held in database {name}.\n"
        assert relay(database, "inbox", "gaps").out == f"Nothing is missing in database {name}.\n"
        assert relay(database, "inbox", "quarantine").out == f"Nothing is in quarantine in database {name}.\n"
        assert relay(database, "audit").out == f"No act is recorded in database {name}.\n"
        assert relay(database, "list").out == f"The outbox retains no row in database {name}.\n"
        assert relay(database, "stuck", "--state", "stuck").out == f"Nothing is blocked in database {name}.\n"

    @pytest.mark.parametrize("command", ["held", "gaps", "quarantine"])
    def test_a_producers_database_is_not_taken_for_an_inbox_that_is_well(self, shop: str, command: str) -> None:
        name = shop.rpartition("/")[2]
        assert relay(shop, "inbox", command).out == (
            f"There is no inbox in database {name}: nothing was consumed there. Is postgres.dsn the consumer's?"
            " (--config, or RELAY_POSTGRES_DSN)\n"
        )

    def test_nor_a_consumers_for_an_outbox_that_is_empty(self, billing: str) -> None:
        assert "Is postgres.dsn the producer's?" in relay(billing, "list").out

    @pytest.mark.parametrize(
        ("command", "said"),
        [
            (("stuck", "--older-than", "99d"), "Nothing matches; without the filters 14 are blocked"),
            (("stuck", "--by", "cause", "--consumer", "nosuch"), "Nothing matches; without the filters 14 are blocked"),
            (("inbox", "held", "--consumer", "nosuch"), "Nothing matches; without the filters 7 messages are held"),
            (("inbox", "gaps", "--consumer", "nosuch"), "Nothing matches; without the filters 2 gaps are known"),
            (("inbox", "quarantine", "order/nosuch"), "Nothing matches; without the filters 2 messages are in quarantine"),
            (("audit", "--who", "nosuch"), "Nothing matches; without the filters acts are recorded"),
            (("list", "order/nosuch"), "No row matches the filters"),
        ],
    )  # fmt: skip
    def test_filters_that_match_nothing_are_not_an_all_clear(
        self, both: str, command: tuple[str, ...], said: str
    ) -> None:
        assert relay(both, *command).out.endswith(f"{said} in database {both.rpartition('/')[2]}.\n")


class TestAudit:
    @pytest.mark.parametrize(
        ("filters", "ids"),
        [
            ((), [5, 4, 3, 2, 1]),
            (("--act", "skip"), [2]),
            (("--act", "inbox skip"), []),
            (("--act", "outbox skip"), [2]),
            (("--who", "ANNA"), [2, 1]),
            (("--side", "inbox"), []),
            (("order/4",), [4, 2]),
            (("--until", "1h"), []),
            (("--since", "1h", "--limit", "2"), [5, 4]),
            (("--after", "2"), [1]),
        ],
    )
    def test_what_operators_did(self, shop: str, filters: tuple[str, ...], ids: list[int]) -> None:
        told = relay(shop, "audit", *filters, "--json").json
        assert [a["id"] for a in told["acts"]] == ids
        assert all(_keys(a) == ACT_KEYS for a in told["acts"])

    @pytest.mark.parametrize("more", [("--act", "frob"), ("--act", "inbox skip", "--side", "outbox")])
    def test_an_act_that_there_is_not_is_refused(self, shop: str, more: tuple[str, ...]) -> None:
        assert relay(shop, "audit", *more).code == EXIT_CONFIG

    def test_in_words(self, shop: str) -> None:
        lines = relay(shop, "audit", "order/4").lines()
        assert [line.split("Z ")[-1] for line in lines] == [
            "id at who act rows selection why",
            "ben@desk retry 2 --all",
            "anna@desk skip 1 order/4 poison",
        ]


@pytest.mark.parametrize(
    "command",
    [("status",), ("stuck",), ("show", "order/1"), ("list",), ("audit",), ("inbox", "held"), ("inbox", "gaps"), ("inbox", "quarantine")],
)  # fmt: skip
def test_a_database_without_the_schema_is_told_as_everywhere(empty_database: str, command: tuple[str, ...]) -> None:
    answer = relay(empty_database, *command)
    assert answer.code == EXIT_SCHEMA
    assert "Run `relay migrate`" in answer.err
    assert answer.out == ""


ACT_KEYS = {"id", "at", "who", "login", "side", "act", "selection", "why", "rows"}
ROW_KEYS = {
    *("id", "shard", "aggregate_type", "aggregate_id", "seq", "event_type", "size", "created_at", "retained", "state"),
    *("reason", "detail", "attempts", "parked_at", "next_attempt_at", "tombstone"),
}


def _keys(told: dict[str, Any]) -> set[str]:
    return set(told)


@pytest.mark.parametrize(
    "command", ["status", "stuck", "show", "list", "audit", "inbox held", "inbox gaps", "inbox quarantine"]
)
def test_help_shows_examples_each_on_a_line_of_its_own(command: str) -> None:
    lines = relay("postgresql://nobody@127.0.0.1:1/nowhere", *command.split(), "--help").out.splitlines()
    examples = [line for line in lines if line.startswith(f"  relay {command}")]
    assert len(examples) >= 2
    assert all(line.count("relay") == 1 for line in examples)
