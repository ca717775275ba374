"""The error tree: the drawing in the module is the tree, and the exit codes are the contract."""

from __future__ import annotations

import re

import asyncpg
import pytest

from relay import errors
from relay.errors import (
    BrokerUnavailable,
    ConfigError,
    LeaseLost,
    PoolerError,
    PostgresRefused,
    PostgresUnavailable,
    PrivilegeError,
    RelayError,
    SchemaError,
)
from relay.postgres.errors import postgres_errors, translated

_LINE = re.compile(r"^ {4}(?P<indent> *)(?P<name>[A-Z]\w+)(?P<rest>.*)$", re.MULTILINE)


def drawn() -> dict[str, tuple[str | None, bool, int | None]]:
    """Name -> (name of the parent, retryable, exit code) as the module's docstring has it."""
    found: dict[str, tuple[str | None, bool, int | None]] = {}
    above: list[tuple[int, str]] = []
    for match in _LINE.finditer(errors.__doc__ or ""):
        indent = len(match["indent"])
        above = [(i, name) for i, name in above if i < indent]
        code = re.search(r"exit (\d+)", match["rest"])
        found[match["name"]] = (above[-1][1] if above else None, "retryable" in match["rest"], code and int(code[1]))
        above.append((indent, match["name"]))
    return found


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    real = {n: k for n, k in vars(errors).items() if isinstance(k, type) and issubclass(k, RelayError)}
    tree = drawn()
    assert set(tree) == set(real)
    for name, (parent, retryable, code) in tree.items():
        kind = real[name]
        assert parent is None or kind.__base__ is real[parent], name
        if code is not None:
            assert kind.exit_code == code, name
        if not kind.__subclasses__():
            assert kind.retryable is retryable, name


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConfigError", 2),
        ("PoolerError", 2),
        ("SchemaError", 3),
        ("PrivilegeError", 4),
        ("PostgresRefused", 4),
        ("PostgresUnavailable", 5),
        ("BrokerRefused", 5),
        ("BrokerUnavailable", 5),
        ("LeaseLost", 5),
        ("InputError", 6),
        ("SandboxError", 7),
    ],
)
def test_exit_codes_are_what_scripts_rely_on(name: str, code: int) -> None:
    assert getattr(errors, name).exit_code == code


@pytest.mark.parametrize("kind", [ConfigError, SchemaError, PoolerError])
def test_what_waiting_does_not_heal_is_not_retried(kind: type[RelayError]) -> None:
    assert not kind.retryable


@pytest.mark.parametrize("kind", [PostgresUnavailable, PostgresRefused, PrivilegeError, BrokerUnavailable, LeaseLost])
def test_what_waiting_heals_is_retried(kind: type[RelayError]) -> None:
    assert kind.retryable


@pytest.mark.parametrize(
    ("exc", "kind", "text"),
    [
        (asyncpg.UndefinedTableError('relation "relay.x" does not exist'), SchemaError, "Run `relay migrate`"),
        (asyncpg.InvalidSchemaNameError('schema "relay" does not exist'), SchemaError, "relay migrate"),
        (asyncpg.InsufficientPrivilegeError("permission denied for table outbox"), PrivilegeError, "for table outbox"),
        (asyncpg.InvalidPasswordError('password authentication failed for user "u"'), PostgresRefused, "postgres.dsn"),
        (asyncpg.InvalidCatalogNameError('database "d" does not exist'), PostgresRefused, 'database "d"'),
        (asyncpg.AdminShutdownError("terminating connection"), PostgresUnavailable, "SQLSTATE 57P01"),
        (asyncpg.PostgresError(""), PostgresUnavailable, "PostgresError"),
        (asyncpg.InterfaceError("connection is closed"), PostgresUnavailable, "connection is closed"),
        (asyncpg.InternalClientError("got result for unknown protocol state 3"), PostgresUnavailable, "unknown"),
        (asyncpg.ClientConfigurationError("`sslmode` parameter must be one of: ..."), ConfigError, "sslmode"),
        (TimeoutError(), PostgresUnavailable, "in time"),
        (ConnectionRefusedError(111, "Connection refused"), PostgresUnavailable, "Connection refused"),
        (FileNotFoundError(2, "No such file or directory", "/tmp/ca.pem"), PostgresUnavailable, "/tmp/ca.pem"),  # noqa: S108
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_asyncpg_raises_becomes_an_error_of_ours(exc: Exception, kind: type[RelayError], text: str) -> None:
    error = translated(exc)
    assert type(error) is kind
    assert text in str(error)
    with pytest.raises(kind) as caught, postgres_errors():
        raise exc
    assert caught.value.__cause__ is exc


def test_only_the_first_line_of_what_postgresql_says_is_told() -> None:
    """The others (DETAIL, QUERY) quote values."""
    assert "secret" not in str(translated(asyncpg.UniqueViolationError("duplicate key\nDETAIL: Key (x)=(secret)")))


def test_what_is_neither_ours_nor_theirs_passes() -> None:
    assert translated(KeyError("x")) is None
    with pytest.raises(KeyError), postgres_errors():
        raise KeyError("x")
