"""The named SQL blocks: each is used, each use names one, and what asyncpg binds by position is explained."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.errors import ConfigError
from relay.postgres import queries
from relay.postgres.queries import all_queries, query, sql_root

PACKAGE = Path(queries.__file__).parents[1]
BLOCKS = sorted(all_queries())

_COMMENT = re.compile(r"^\s*--.*$", re.MULTILINE)
_PARAMETER = re.compile(r"\$(\d+)")
_RANGE = re.compile(r"\$(\d+) to \$(\d+)")
_AS_FOR = re.compile(r"as (?:for|in) `(\w+)`")


def test_a_name_that_is_in_no_file_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        query("no_such_block")


def test_sql_that_is_not_there_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a server that cannot be reached, which is what a missing file is to asyncpg's callers."""
    monkeypatch.setattr(queries, "__file__", str(tmp_path / "relay" / "postgres" / "queries.py"))
    monkeypatch.setattr("relay.postgres.queries.resources.files", lambda _: tmp_path)
    with pytest.raises(ConfigError, match=r"relay's own SQL is missing: .* Install relay again"):
        sql_root()


def test_every_query_that_the_program_asks_for_exists() -> None:
    asked = {name for file in _sources() for name in _asked(file)}
    assert asked, "the scan finds no call of query() at all"
    assert asked <= set(BLOCKS)


def test_every_block_is_used_by_the_program() -> None:
    # Some are named where the driver's spelling is chosen (relay.producer.statement): any literal of the name counts.
    literals = {text for file in _sources() for text in _literals(file)}
    assert set(BLOCKS) - literals == set()


def test_names_are_unique_over_all_files() -> None:
    names = [name for text in _files() for name in re.findall(r"^-- name: (\w+)$", text, re.MULTILINE)]
    assert sorted(names) == BLOCKS


def test_nothing_in_the_files_is_outside_a_block() -> None:
    for text in _files():
        head = text.split("-- name: ", 1)[0]
        assert _COMMENT.sub("", head).strip() == ""


@pytest.mark.parametrize("name", BLOCKS)
def test_every_parameter_is_explained_above_the_block(name: str) -> None:
    text = query(name)
    assert set(_PARAMETER.findall(_COMMENT.sub("", text))) <= _explained(text)


def _explained(text: str) -> set[str]:
    """Those that a comment names: one, a range, or all of another block (`Filters as for ...`)."""
    comments = "\n".join(_COMMENT.findall(text))
    explained = set(_PARAMETER.findall(comments))
    for first, last in _RANGE.findall(comments):
        explained |= {str(number) for number in range(int(first), int(last) + 1)}
    for other in _AS_FOR.findall(comments):
        explained |= _explained(query(other))
    return explained


@pytest.mark.parametrize("name", BLOCKS)
def test_parameters_are_numbered_without_a_hole(name: str) -> None:
    used = {int(number) for number in _PARAMETER.findall(_COMMENT.sub("", query(name)))}
    assert used == set(range(1, len(used) + 1))


def _sources() -> Iterator[Path]:
    return (file for file in PACKAGE.rglob("*.py") if PACKAGE / "sandbox" not in file.parents)


def _files() -> list[str]:
    return [
        file.read_text(encoding="utf-8") for file in (sql_root() / "queries").iterdir() if file.name.endswith(".sql")
    ]


def _asked(file: Path) -> Iterator[str]:
    """The literal names given to query(...) in a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "query" and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value


def _literals(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
