"""What a row is made of, and what is remembered of it for the next."""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.message import content_digest, message_id, to_message
from relay.outbox.reader import to_row, to_rows
from relay.outbox.routing import routing_key
from tests.faults.simulation.outbox_database import Record
from tests.unit.test_parking import TEMPLATE

NAMESPACE = uuid.UUID("5a3c6f0e-64a8-5d5e-9b0c-3b1a7d1e2f40")
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


def record(**changes: Any) -> Any:
    """What a query gives: columns by name, the headers as text, and more columns than a row has."""
    return cast("Any", TEMPLATE._asdict() | {"headers": None, "is_last": True} | changes)


def test_a_record_becomes_the_row_of_its_columns() -> None:
    assert to_row(record()) == TEMPLATE


def record_of_a_page(before: dict[str, Any], columns: dict[str, Any]) -> Any:
    """The same by place as well, behind other columns, and with the time in whole seconds."""
    told = ((n, v) if n != "created_at" else ("created_s", int(v.timestamp())) for n, v in columns.items())
    return cast("Any", Record(before | dict(told)))


@pytest.mark.parametrize("before", [{}, {"is_last": False}, {"snapshot": None, "is_last": False}])
def test_the_records_of_a_page_become_the_same_rows_wherever_their_columns_begin(before: dict[str, Any]) -> None:
    columns = [record(), record(id=9, seq=None, headers='{"tenant": "é"}', is_tombstone=True)]
    for each in columns:
        del each["is_last"]
    rows = [to_row(each)._replace(created_at=each["created_at"].replace(microsecond=0)) for each in columns]
    assert to_rows([record_of_a_page(before, each) for each in columns]) == rows
    assert to_rows([]) == []


def test_columns_in_another_order_are_refused_instead_of_taken_for_each_other() -> None:
    swapped = {"id": 1, "aggregate_id": "1"} | record()
    with pytest.raises(ValueError, match="not those of a row"):
        to_rows([record_of_a_page({}, swapped)])


@pytest.mark.parametrize("filler", ["", "x" * 1000], ids=["short", "too long to be remembered"])
def test_headers_are_parsed_and_those_of_one_row_are_not_changed_by_what_is_done_with_another(filler: str) -> None:
    text = json.dumps({"tenant": "é", "retries": 3, "vip": True, "filler": filler})
    first, second = to_row(record(headers=text)), to_row(record(headers=text))
    message = to_message(first, source="shop", routing_key="a")
    cast("dict[str, Any]", message.headers).clear()
    assert second.headers == json.loads(text)
    with pytest.raises(TypeError):
        cast("dict[str, Any]", first.headers)["tenant"] = "another"


@given(texts, texts, texts, st.integers(1, 2**63 - 1))
def test_message_ids_are_uuids_of_version_5(source: str, kind: str, name: str, seq: int) -> None:
    row = TEMPLATE._replace(aggregate_type=kind, aggregate_id=name, seq=seq)
    assert message_id(row, source, b"") == str(uuid.uuid5(NAMESPACE, f"{source}/{kind}/{name}/{seq}"))


@given(texts, st.integers(1, 2**63 - 1), st.binary(min_size=32, max_size=32))
def test_so_is_that_of_an_event_without_order_and_its_content_goes_in(source: str, row_id: int, digest: bytes) -> None:
    row = TEMPLATE._replace(id=row_id, aggregate_id=None, seq=None)
    assert message_id(row, source, digest) == str(uuid.uuid5(NAMESPACE, f"{source}//{row_id}/{digest.hex()}"))


@pytest.mark.parametrize("size", [0, 4096, 4097, 100_000])
def test_the_digest_of_a_large_body_is_made_in_the_same_way(size: int) -> None:
    assert (
        content_digest("Paid", "text/plain", b"x" * size)
        == hashlib.sha256(b"Paid\0text/plain\0" + b"x" * size).digest()
    )


names = st.one_of(st.none(), st.sampled_from(["order", "bill"]))


@given(st.lists(st.tuples(names, st.sampled_from(["Paid", "Sent"]), st.sampled_from(["1", "2"])), max_size=20))
@pytest.mark.parametrize("template", ["{aggregate_type}.{event_type}", "x.{aggregate_id}.{event_type}", "{event_type}"])
def test_a_remembered_routing_key_is_the_rows_own(template: str, rows: list[tuple[str | None, str, str]]) -> None:
    for kind, event_type, name in rows:
        ordered = kind is not None
        row = TEMPLATE._replace(
            aggregate_type=kind,
            event_type=event_type,
            aggregate_id=name if ordered else None,
            seq=1 if ordered else None,
        )
        key = template.format(aggregate_type=kind or "", event_type=event_type, aggregate_id=name if ordered else "")
        assert routing_key(row, template) == (key if kind else key.strip("."))
