"""The table of the fault matrix is complete and true: every row is there, and whatever it names exists."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from tests.faults import matrix
from tests.faults.lab import kinds
from tests.faults.lab.fault import CATALOGUE

TESTS = Path(__file__).parents[1]


def test_every_row_of_the_matrix_is_in_the_table_in_its_order() -> None:
    assert list(matrix.rows()) == list(matrix.ROWS)


def test_every_row_says_what_must_hold_what_covers_it_and_how_long_it_takes() -> None:
    for number, row in matrix.rows().items():
        assert row.fault, number
        assert row.must_hold, number
        assert row.tests or row.kinds or row.must_hold.startswith("not covered: "), number
        assert row.recovery.removeprefix("—").strip(" ()"), f"{number}: a time, or the reason why there is none"


def test_every_test_that_a_row_names_exists() -> None:
    named = {(row.number, file, name) for row in matrix.rows().values() for file, name in row.tests}
    assert {(number, file, name) for number, file, name in named if name not in names_in(file)} == set()


def test_a_row_names_exactly_the_faults_of_the_laboratory_that_are_for_it() -> None:
    wrong = {
        number: matrix.laboratory(number)
        for number, row in matrix.rows().items()
        if "<br>".join(f"`{kind}`" for kind in row.kinds) != matrix.laboratory(number).removeprefix("–")
    }
    assert wrong == {}, "what the laboratory's cells of these rows must be"


def test_every_fault_of_the_laboratory_is_for_a_row() -> None:
    kinds.load()
    assert CATALOGUE
    assert [fault.kind for fault in CATALOGUE.values() if not set(fault.rows) & set(matrix.ROWS)] == []
    assert {number for fault in CATALOGUE.values() for number in fault.rows} <= set(matrix.ROWS)


def test_every_test_of_the_matrix_is_in_the_table() -> None:
    named = {(file, name) for row in matrix.rows().values() for file, name in row.tests}
    ours = {
        (f"faults/{path.name}", name)
        for path in sorted(Path(__file__).parent.glob("test_matrix_*.py"))
        if path.name != Path(__file__).name
        for name in names_in(f"faults/{path.name}")
    }
    assert ours - named == set()


@cache
def names_in(file: str) -> frozenset[str]:
    """The names of the tests in a file below tests/, those of classes too; none where there is no such file."""
    path = TESTS / file
    if not path.exists():
        return frozenset()
    return frozenset(
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    )
