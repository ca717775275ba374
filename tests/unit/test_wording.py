"""How a selection is written for people."""

from __future__ import annotations

import pytest

from relay.operate.selection import Selection
from relay.operate.wording import as_options


@pytest.mark.parametrize(
    ("selection", "written"),
    [
        (Selection(everything=True), "--all"),
        (Selection(aggregate="order/42", from_seq=2, to_seq=3), "order/42 --seq 2-3"),
        (Selection(aggregate="order/42", from_seq=7, to_seq=7), "order/42 --seq 7"),
        (Selection(from_seq=2), "--seq 2-"),
        (Selection(to_seq=9), "--seq -9"),
        (Selection(ids=(1, 2)), "--id 1 --id 2"),
        (Selection(aggregate_type="order", older_than_s=600.0), "--type order --older-than 600s"),
        (Selection(error="connection refused", consumer="billing"), '--error "connection refused" --consumer billing'),
    ],
)
def test_a_selection_reads_as_the_options_that_make_it(selection: Selection, written: str) -> None:
    assert as_options(selection.as_json()) == written


def test_what_was_asked_for_beside_it_reads_so_too() -> None:
    assert as_options({"aggregate": "order/1", "through": 7}) == "order/1 --through 7"
    assert as_options({"all": True, "resumes": 3}) == "--all --resume 3"
    assert as_options({"shard": 0, "force": True, "source": None}) == "--shard 0 --force"
