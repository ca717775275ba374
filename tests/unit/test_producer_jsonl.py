from __future__ import annotations

import io
import json
from typing import Any

import pytest

from relay.errors import InputError
from relay.postgres.queries import query
from relay.producer import jsonl
from relay.producer.jsonl import BadLine, parse, read_lines
from relay.producer.statement import statement

GOOD = b'{"event_type": "Paid", "payload": {"n": 1}}\n'


def read(content: bytes, **options: Any) -> list[tuple[int, str | None]]:
    return [(line.number, line.event.payload_json) for line in read_lines(io.BytesIO(content), **options)]


def test_every_key_reaches_its_field() -> None:
    made = parse(
        '{"aggregate_type": "order", "aggregate_id": "42", "event_type": "Paid", "headers": {"a": 1}, "routing_key": "k",'
        ' "seq": 3, "body_base64": "AAE=", "content_type": "image/png"}'
    )
    assert (made.aggregate_type, made.aggregate_id, made.event_type) == ("order", "42", "Paid")
    assert (made.headers, made.routing_key, made.seq) == ({"a": 1}, "k", 3)
    assert (made.body, made.content_type, made.payload_json) == (b"\x00\x01", "image/png", None)


def test_a_payload_is_the_text_of_the_line_to_the_digit() -> None:
    assert parse('{ "payload" : {"n": 0.10000000000000000000001} , "event_type":"Paid" }').payload_json == (
        '{"n": 0.10000000000000000000001}'
    )
    assert parse('{"payload": null, "event_type": "Paid"}').payload_json == "null"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "Expecting '{'"),
        (b'{"event_type": "Paid", "payload": 1} x', "Extra data"),
        (b'{"event_type": "Paid", "payload": 1,}', "not valid JSON"),
        (b'{"event_type": "Paid" "payload": 1}', "Expecting ','"),
        (b'{"event_type" "Paid"}', "Expecting ':'"),
        (b'{1: "Paid"}', "key in double quotes"),
        (b'{"event_type": "Pa\xffid", "payload": 1}', "not valid UTF-8 at byte 19"),
        (b'{"event_type": "Pa\x00id", "payload": 1}', "Invalid control character"),
        (b'{"event_type": "Pa\\u0000id", "payload": 1}', "event_type: contains NUL"),
        (b'{"event_type": "Paid", "payload": "\\u0000"}', "payload: .*NUL"),
        (b'{"event_type": "Paid", "payload": "\\ud800"}', "payload: .*lone surrogate"),
        (b'{"event_type": "Paid", "payload": NaN}', "payload: holds NaN"),
        (b'{"event_type": "Paid", "seq": 1e999, "payload": 1}', "seq: holds a number beyond"),
        (b'{"event_typ": "Paid", "payload": 1}', "unknown key 'event_typ'; did you mean 'event_type'"),
        (b'{"zzz": "Paid", "payload": 1}', "unknown key 'zzz'; known are"),
        (b'{"payload": 1}', "event_type: is missing"),
        (b'{"event_type": "Paid"}', "neither was given"),
        (b'{"event_type": "Paid", "event_type": "Paid", "payload": 1}', "stands twice"),
        (b'{"event_type": "Paid", "body_base64": "?"}', "body_base64: is not valid base64"),
        (b'{"event_type": "Paid", "body_base64": 5}', "body_base64: is of type int"),
        (b'{"event_type": "Paid", "payload": ' + b"[" * 100_000, "nested too deep"),
        (b'{"event_type": "Paid", "payload": ' + b"9" * 10_000 + b"}", "payload: .*4200 digits"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: bytes, says: str) -> None:
    with pytest.raises(BadLine, match=says) as caught:
        read(GOOD + b"\n" + line + b"\n" + GOOD)
    assert caught.value.line == 3
    assert str(caught.value).startswith("line 3: ")


def test_blank_lines_windows_line_ends_a_bom_and_a_missing_last_newline_are_no_errors() -> None:
    content = b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\n  \n" + GOOD.rstrip()
    assert [number for number, _ in read(content)] == [1, 4]


def test_a_line_separator_of_unicode_does_not_end_a_line() -> None:
    line = '{"event_type": "Paid", "payload": "a\u2028b\u0085"}\n'.encode()
    assert len(read(line + line)) == 2


def test_reading_starts_at_a_line_whatever_stands_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    content = b"x" * 1000 + b"\n" + GOOD
    assert read(content, first=2) == [(2, '{"n": 1}')]
    assert read(content, first=3) == []
    with pytest.raises(InputError, match="has only 2 lines"):
        read(content, first=4)


def test_an_endless_line_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
    source = io.BytesIO(GOOD + b"x" * 10_000)
    with pytest.raises(BadLine, match="line 2: is longer than 100 bytes"):
        list(read_lines(source))
    assert source.tell() <= len(GOOD) + 101


def test_every_byte_is_told_for_the_progress() -> None:
    told: list[int] = []
    read(GOOD + b"\n" + GOOD, first=2, seen=told.append)
    assert sum(told) == 2 * len(GOOD) + 1


@pytest.mark.parametrize("name", ["insert_event", "insert_events"])
def test_each_style_has_every_parameter_once_and_in_order(name: Any) -> None:
    code = "\n".join(line for line in query(name).splitlines() if not line.startswith("--"))
    assert [part.split(":")[0] for part in code.split("$")[1:]] == [str(place) for place in range(1, 10)]
    assert statement(name, "%s").count("%s") == 9
    assert "$" not in statement(name, "%s") + statement(name, ":p1")


def test_the_keys_of_a_line_are_the_documented_ones() -> None:
    line = {key: None for key in jsonl.KEYS if key not in ("payload", "event_type")}
    assert parse(json.dumps({**line, "event_type": "Paid", "payload": 1})).event_type == "Paid"
