"""Settings: what is refused, in which words, and who wins. No secret is ever shown."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from relay.cli.main import cli
from relay.cli.options import settings_from
from relay.errors import ConfigError
from relay.settings import (
    DaemonSettings,
    PostgresSettings,
    RabbitmqSettings,
    Settings,
    environment_name,
    load_settings,
    setting_names,
    walk_settings,
)

CANARY = "canary-6b1f"
DSN = f"postgresql://app:{CANARY}@db:5432/shop"
URL = f"amqp://app:{CANARY}@mq:5672/shop"

Toml = Callable[[str | bytes], Path]


@pytest.fixture
def toml(tmp_path: Path) -> Toml:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "relay.toml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refused(**source: Any) -> str:
    """The text of the ConfigError; it never holds the canary."""
    with pytest.raises(ConfigError) as caught:
        load_settings(**({"environ": {}} | source))
    text = f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
    assert CANARY not in text
    return str(caught.value)


def told_about(**source: Any) -> str:
    """The text of the ConfigError; empty when there is none."""
    try:
        load_settings(**source)
    except ConfigError as exc:
        return str(exc)
    return ""


def refused_toml(toml: Toml, content: str | bytes) -> str:
    return refused(file=toml(content))


# --- names


def test_an_unknown_name_is_refused_with_where_it_stands_and_what_was_meant(toml: Toml) -> None:
    path = toml("[outbox]\npage_row = 5")
    assert refused(file=path) == f"unknown setting 'outbox.page_row' in {path}; did you mean 'outbox.page_rows'?"
    assert "RELAY_OUTBOX_PAGE_ROW is not a setting; did you mean 'RELAY_OUTBOX_PAGE_ROWS'?" in refused(
        environ={"RELAY_OUTBOX_PAGE_ROW": CANARY}
    )
    assert "unknown setting 'inbox.prefech' in flags; did you mean 'inbox.prefetch'?" in refused(
        flags={"inbox.prefech": CANARY}
    )


def test_a_name_that_resembles_none_is_refused_with_some_that_exist() -> None:
    assert "'zzzzzz' in flags; known are source, postgres.dsn" in refused(flags={"zzzzzz": 1})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("pagerows = 1", "'pagerows'"),
        ("[outbux]\npage_rows = 1", "'outbux'"),
        ('[outbox]\n"a.b" = 1', "'outbox.a.b'"),
        ("[postgres]\npassword = 'x'", "'postgres.password'"),
        ("[postgres]\ndsn_file = 'x'", "'postgres.dsn_file'; did you mean 'postgres.dsn'"),
        ('"\\u001b[2J" = 1', r"'\x1b[2J'"),
    ],
)
def test_unknown_names_of_every_kind_are_refused(toml: Toml, content: str, named: str) -> None:
    assert named.split(";")[0] in refused_toml(toml, content)


@given(st.text(min_size=1))
def test_every_name_that_is_no_setting_is_a_config_error(name: str) -> None:
    if name not in setting_names():
        with pytest.raises(ConfigError):
            load_settings(environ={}, flags={name: "1"})


@given(st.from_regex(r"RELAY_[A-Z_]{1,20}", fullmatch=True), st.text(st.characters(exclude_characters="\0")))
def test_every_variable_of_ours_is_a_setting_or_a_config_error_or_a_services(name: str, value: str) -> None:
    known = {environment_name(n) for n in setting_names()}
    try:
        settings = load_settings(environ={name: value})
    except ConfigError:
        return
    assert name in known or settings == Settings()


@pytest.mark.parametrize(
    "variable",
    [
        "RELAY_PORT=tcp://10.0.0.1:80",
        "RELAY_SERVICE_HOST=10.0.0.1",
        "RELAY_POSTGRES_PORT_5432_TCP_ADDR=10.0.0.1",
        "RELAY_POSTGRES_SERVICE_PORT=5432",
        "RELAY_POSTGRES_PORT=tcp://10.0.0.1:5432",
        "RELAY_PORT_80_TCP_PORT=80",
        "RELAY_CONFIG=/etc/relay.toml",
        "RELAY_TEST_POSTGRES_DSN=x",
        "RELAY_SANDBOX_POSTGRES=18",
        "OTHER=1",
        "RELAY=1",
    ],
)
def test_what_kubernetes_and_our_own_tools_put_into_the_environment_is_left_alone(variable: str) -> None:
    name, _, value = variable.partition("=")
    assert load_settings(environ={name: value}) == Settings()


@pytest.mark.parametrize("name", ["RELAY_POSTGRES_PORT", "RELAY_RABBITMQ_PORT"])
def test_a_port_of_ones_own_is_not_silently_ignored(name: str) -> None:
    assert f"{name} is not a setting" in refused(environ={name: "5433"})


# --- shapes and values


def test_a_value_where_a_group_is_expected(toml: Toml) -> None:
    path = toml("outbox = 3")
    assert refused(file=path) == (
        f"'outbox' in {path} is a group of settings, not a value: write [outbox], and its settings below"
    )
    assert "'postgres' in" in refused_toml(toml, f'postgres = "{DSN}"')
    assert "RELAY_POSTGRES is not a setting; did you mean 'RELAY_POSTGRES_DSN'" in refused(
        environ={"RELAY_POSTGRES": DSN}
    )
    assert "'inbox' in flags is a group" in refused(flags={"inbox": "x"})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[source]\nname = 'x'", "source (from {path}): Input should be a valid string"),
        ("[outbox.page_rows]\nx = 1", "outbox.page_rows (from {path}): Input should be a valid integer"),
        (f"[postgres.dsn]\nurl = '{DSN}'", "postgres.dsn (from {path}): Input should be a valid string"),
        (f"[postgres]\ndsn = ['{DSN}']", "postgres.dsn (from {path}): Input should be a valid string"),
        ("[postgres]\ndsn = 1", "postgres.dsn (from {path}): Input should be a valid string"),
        ("[inbox]\nbindings = 1", "inbox.bindings (from {path}): Input should be a list"),
        ("[inbox]\nbindings = [1]", "inbox.bindings.0 (from {path}): Input should be a valid string"),
        ("[inbox]\npolicies = 'latest'", "inbox.policies (from {path}): Input should be a table"),
        (
            "[inbox.policies]\norder = 'latst'",
            "inbox.policies.order (from {path}): Input should be 'sequence', 'latest' or 'none'",
        ),
        ("[inbox.policies.order]\nx = 1", "inbox.policies.order (from {path}): Input should be"),
        ("[outbox]\npage_rows = 'many'", "outbox.page_rows (from {path}): Input should be a valid integer"),
        ("[outbox]\npage_rows = 1.5", "outbox.page_rows (from {path}): Input should be a valid integer"),
        ("[outbox]\npage_rows = true", "outbox.page_rows (from {path}): is true or false, but"),
        ("[outbox]\npoll_interval_s = true", "outbox.poll_interval_s (from {path}): is true or false, but"),
        ("[rabbitmq]\ndeclare_topology = 'maybe'", "rabbitmq.declare_topology (from {path}): Input should be a valid"),
        ("[daemon]\nlog_level = 'loud'", "daemon.log_level (from {path}): Input should be 'debug', 'info'"),
        ("[outbox]\npage_rows = 2026-01-01", "outbox.page_rows (from {path}): Input should be a valid integer"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_where_it_stands(toml: Toml, content: str, named: str) -> None:
    path = toml(content)
    assert named.format(path=path) in refused(file=path)


def test_all_mistakes_are_told_at_once() -> None:
    told = refused(flags={"source": "a b", "outbox.page_rows": 0, "inbox.batch": "x"})
    assert [part.split(" ")[0] for part in told.split("; ")] == ["source", "outbox.page_rows", "inbox.batch"]


_BOUNDED = [
    (name, bound, value)
    for name, info in walk_settings()
    for bound in info.metadata
    for key, value in (
        ("ge", getattr(bound, "ge", None)),
        ("gt", getattr(bound, "gt", None)),
        ("le", getattr(bound, "le", None)),
    )
    if value is not None
    for bound in (key,)
]


@pytest.mark.parametrize(("name", "bound", "value"), _BOUNDED)
def test_every_bound_is_kept(name: str, bound: str, value: float) -> None:
    beyond = {"ge": value - 1, "gt": value, "le": value + 1}[bound]
    assert f"{name} (from flags): Input should be" in refused(flags={name: beyond})


@pytest.mark.parametrize("name", [n for n, info in walk_settings() if info.annotation in (int, float)])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", 10**400, "9" * 5000, "", " ", "0x10", "١x"])
def test_no_number_is_beyond_all_bounds(name: str, value: object) -> None:
    assert name in refused(flags={name: value})


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"outbox.retry_first_s": 400}, "outbox: retry_first_s must not exceed retry_max_s"),
        ({"inbox.retry_first_s": 400}, "inbox: retry_first_s must not exceed retry_max_s"),
        ({"daemon.backoff_first_s": 11}, "settings: daemon.backoff_first_s must not exceed daemon.backoff_max_s"),
        (
            {"outbox.poll_interval_s": 0.05},
            'settings: outbox.poll_interval_s under 0.1 s is for outbox.wakeup = "poll"',
        ),
    ],
)
def test_relations_between_settings_are_checked(flags: dict[str, object], told: str) -> None:
    assert told in refused(flags=flags)


def test_poll_mode_may_look_often() -> None:
    found = load_settings(environ={}, flags={"outbox.poll_interval_s": 0.05, "outbox.wakeup": "poll"})
    assert found.outbox.poll_interval_s == 0.05


@pytest.mark.parametrize("source", ["", " ", "a/b", "a b", "ä", "a\0", "a\n", "-a", "a" * 101, "\udcff", "a\x1b[2J"])
def test_a_source_is_a_name(source: str) -> None:
    assert "source (from the environment)" in refused(environ={"RELAY_SOURCE": source})


@pytest.mark.parametrize(
    "template",
    [
        "{}",
        "{0}",
        "{other}",
        "{aggregate_type",
        "}",
        "{aggregate_type.__class__}",
        "{event_type[0]}",
        "{event_type!r}",
        "{event_type:>99999999}",
        "{aggregate_type:{event_type}}",
        "x" * 256,
        "a\0",
        "a\nb",
    ],
)
def test_a_routing_key_template_holds_the_three_names_and_nothing_else(template: str) -> None:
    assert "outbox.routing_key (from flags)" in refused(flags={"outbox.routing_key": template})


@pytest.mark.parametrize("template", ["", "all", "{event_type}", "{{x}}.{aggregate_type}.{aggregate_id}"])
def test_a_good_template_is_taken(template: str) -> None:
    assert load_settings(environ={}, flags={"outbox.routing_key": template}).outbox.routing_key == template


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inbox.queue", "ä" * 126),
        ("inbox.queue", "q" * 251),
        ("inbox.queue", "a\0b"),
        ("rabbitmq.exchange", "x" * 256),
        ("rabbitmq.exchange", "a\x1bb"),
        ("rabbitmq.exchange", ""),
        ("inbox.bindings", "ö" * 128),
    ],
)
def test_names_at_the_broker_fit_into_amqp(name: str, value: str) -> None:
    assert name in refused(flags={name: value})


# --- addresses


@pytest.mark.parametrize(
    "dsn",
    [
        "",
        "db",
        "host=db password=x",
        "mysql://db/x",
        "http://db",
        "postgresql://db:0/x",
        "postgresql://db:99999/x",
        "postgresql://db:port/x",
        "postgresql://[::1/x",
        "postgresql://d b/x",
        "postgresql://db\n/x",
        "postgresql://db/\0",
        "postgresql://db/\udcff",
        f"postgresql://u:{CANARY}#1@db/x",
        f"postgresql://u:1#{CANARY}@db/x",
        f"postgresql://u:1/{CANARY}@db/x",
        f"postgresql://u:{CANARY}/1@db/x",
    ],
)
def test_what_is_no_postgresql_url_is_refused(dsn: str) -> None:
    assert "postgres.dsn (from flags): " in refused(flags={"postgres.dsn": dsn})


@pytest.mark.parametrize(
    "url",
    [
        "",
        "mq",
        "amqp:",
        "amqp://",
        "amqp:///x",
        "http://mq",
        "amqp://mq:0",
        "amqp://mq:99999",
        "amqp://[::1",
        "amqp://m q/",
        f"amqp://u:1#{CANARY}@mq/",
        f"amqp://u:1/{CANARY}@mq/",
        f"amqp://u:{CANARY}/x@mq/",
        "amqp://mq/\x1b",
    ],
)
def test_what_is_no_amqp_url_is_refused(url: str) -> None:
    assert "rabbitmq.url (from flags): " in refused(flags={"rabbitmq.url": url})


def test_a_password_with_signs_is_told_to_be_encoded() -> None:
    assert "must be percent-encoded: %23, %2F, %40" in refused(flags={"rabbitmq.url": f"amqp://u:1#{CANARY}@mq/"})


@pytest.mark.parametrize(
    "dsn",
    ["postgresql://db/x", "postgres://u:p%40%2F%23@[::1]:5433/x?sslmode=verify-full", "postgresql:///x?host=/run/pg"],
)
def test_a_good_dsn_is_taken(dsn: str) -> None:
    assert load_settings(environ={}, flags={"postgres.dsn": dsn}).postgres.dsn.get_secret_value() == dsn


@given(st.text())
def test_any_text_as_an_address_is_taken_or_refused_without_being_shown(text: str) -> None:
    for name in ("postgres.dsn", "rabbitmq.url"):
        assert CANARY not in told_about(environ={}, flags={name: f"{text}{CANARY}"})


# --- secrets


def test_secrets_are_in_no_representation_of_the_settings() -> None:
    settings = load_settings(environ={"RELAY_POSTGRES_DSN": DSN, "RELAY_RABBITMQ_URL": URL})
    for shown in (settings, settings.postgres, settings.rabbitmq, settings.model_dump(), settings.model_dump_json()):
        assert CANARY not in f"{shown} {shown!r}"
    assert settings.postgres.dsn.get_secret_value() == DSN


@pytest.mark.parametrize("kind", [PostgresSettings, RabbitmqSettings])
def test_secrets_are_not_in_the_errors_of_the_sections_either(kind: type[PostgresSettings | RabbitmqSettings]) -> None:
    field = next(iter(kind.model_fields))
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({field: SecretStr(CANARY)})
    assert CANARY not in f"{caught.value} {caught.value!r}"


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", "\n\n", " \n"])
def test_a_secret_comes_from_a_file_and_loses_its_line_end(tmp_path: Path, ending: str) -> None:
    (tmp_path / "dsn").write_bytes(f"{DSN}{ending}".encode())
    settings = load_settings(environ={"RELAY_POSTGRES_DSN_FILE": str(tmp_path / "dsn")})
    assert settings.postgres.dsn.get_secret_value() == DSN


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "RELAY_POSTGRES_DSN_FILE: cannot read {path}: No such file or directory"),
        (b"", "postgres.dsn (from the environment): is not a URL like"),
        (f"one\n{DSN}".encode(), "postgres.dsn (from the environment): is not a URL like"),
        (DSN.encode() + b"\xff", "RELAY_POSTGRES_DSN_FILE: {path} is not a text in UTF-8"),
        (DSN.encode() + b"\0", "postgres.dsn (from the environment): is not a URL like"),
    ],
)
def test_a_secret_file_that_is_none_is_named(tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "dsn"
    if content is not None:
        path.write_bytes(content)
    assert told.format(path=path) in refused(environ={"RELAY_POSTGRES_DSN_FILE": str(path)})


def test_a_folder_or_nothing_in_place_of_a_secret_file_is_told(tmp_path: Path) -> None:
    for path in (str(tmp_path), ""):
        assert "Is a directory" in refused(environ={"RELAY_RABBITMQ_URL_FILE": path})


@pytest.mark.parametrize("value", [DSN, ""])
def test_a_secret_given_twice_is_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "dsn").write_text(DSN)
    environ = {"RELAY_POSTGRES_DSN": value, "RELAY_POSTGRES_DSN_FILE": str(tmp_path / "dsn")}
    for order in (environ, dict(reversed(environ.items()))):
        assert (
            refused(environ=order) == "RELAY_POSTGRES_DSN and RELAY_POSTGRES_DSN_FILE are both set: unset one of them"
        )


def test_lists_come_from_a_file_as_they_come_from_a_variable(tmp_path: Path) -> None:
    (tmp_path / "bindings").write_text("order.#, invoice.#\n")
    found = load_settings(environ={"RELAY_INBOX_BINDINGS_FILE": str(tmp_path / "bindings")})
    assert found.inbox.bindings == ("order.#", "invoice.#")


@pytest.mark.parametrize("name", ["postgres.dsn", "rabbitmq.url", " postgres.dsn "])
@pytest.mark.parametrize("value", ["", DSN])
def test_a_secret_on_the_command_line_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match="a secret on the command line is visible to every user") as caught:
        settings_from(None, (f"{name}={value}",))
    assert CANARY not in str(caught.value)


# --- where they come from


def test_flags_win_over_the_environment_and_that_over_the_file(toml: Toml) -> None:
    path = toml('source = "file"\n[outbox]\npage_rows = 1\nwakeup = "poll"\n[inbox]\nbatch = 7')
    environ = {"RELAY_SOURCE": "environment", "RELAY_OUTBOX_PAGE_ROWS": "2"}
    found = load_settings(file=path, environ=environ, flags={"source": "flags"})
    assert (found.source, found.outbox.page_rows, found.outbox.wakeup, found.inbox.batch) == ("flags", 2, "poll", 7)


def test_the_origin_that_is_told_is_the_one_that_won(toml: Toml) -> None:
    path = toml("[outbox]\npage_rows = 1")
    assert "outbox.page_rows (from the environment)" in refused(file=path, environ={"RELAY_OUTBOX_PAGE_ROWS": "x"})
    assert "outbox.page_rows (from flags)" in refused(file=path, flags={"outbox.page_rows": "x"})


def test_a_list_may_be_one_text_in_the_file_too(toml: Toml) -> None:
    assert load_settings(file=toml("[inbox]\nbindings = 'order.#'"), environ={}).inbox.bindings == ("order.#",)
    assert load_settings(file=toml("[inbox]\nbindings = 'a.#, b.#'"), environ={}).inbox.bindings == ("a.#", "b.#")


def test_lists_and_tables_are_written_alike_in_the_environment_and_in_flags() -> None:
    environ = {"RELAY_INBOX_BINDINGS": " a.#, b.# ,", "RELAY_INBOX_POLICIES": "order=latest, stock = none"}
    flags = {"inbox.bindings": "a.#,b.#", "inbox.policies": "order=latest,stock=none"}
    for found in (load_settings(environ=environ), load_settings(environ={}, flags=flags)):
        assert found.inbox.bindings == ("a.#", "b.#")
        assert found.inbox.policies == {"order": "latest", "stock": "none"}
    assert "RELAY_INBOX_POLICIES: expected key=value" in refused(environ={"RELAY_INBOX_POLICIES": "order"})


def test_the_file_in_the_folder_is_found_and_a_named_one_must_be_there(
    toml: Toml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings(environ={}).source is None
    toml('source = "here"')
    assert load_settings(environ={}).source == "here"
    assert "no.toml: No such file or directory" in refused(file=Path("no.toml"))
    assert "Is a directory" in refused(file=tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("source", "Expected '=' after a key"),
        ("[outbox\n", "at line 1"),
        ('source = "a"\nsource = "b"', "Cannot overwrite a value"),
        (f'[postgres]\ndsn = "{DSN}', "Unterminated string"),
        (f"[postgres]\ndsn = {DSN}", "at line 2"),
        (b'source = "a\0"', r"\x00"),
        (b'source = "\xff"', "utf-8"),
        ('source = "a"'.encode("utf-16"), "utf-8"),
        (b'source = "\xed\xa0\x80"', "utf-8"),
        ("page_rows = " + "9" * 5000, "4300 digits"),
        ("a = " + "[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_not_toml_is_named_with_its_file(toml: Toml, content: str | bytes, told: str) -> None:
    path = toml(content)
    text = refused(file=path)
    assert text.startswith(f"settings file {path} is not valid TOML: ")
    assert told in text


def test_a_byte_order_mark_is_no_mistake(toml: Toml) -> None:
    assert load_settings(file=toml(b'\xef\xbb\xbfsource = "a"'), environ={}).source == "a"


@given(st.binary(max_size=60))
def test_any_bytes_as_a_settings_file_are_settings_or_a_config_error(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    told = told_about(file=path, environ={})
    assert not told or str(path) in told


# --- the whole tree


def test_every_setting_is_described_and_its_default_is_valid() -> None:
    for name, info in walk_settings():
        assert (info.description or "").endswith("."), name
    assert load_settings(environ={}) == Settings()


def test_every_setting_has_a_variable_of_its_own() -> None:
    variables = [environment_name(name) for name in setting_names()]
    assert len(set(variables)) == len(variables)
    assert not [v for v in variables if v.endswith("_FILE")]


def test_every_setting_can_be_set_by_its_variable() -> None:
    samples = {bool: "false", int: "1000", float: "60", str: "x"}
    special = {
        "rabbitmq.heartbeat_s": "15",
        "inbox.appliers": "4",
        "outbox.page_bytes": "5000",
        "daemon.backoff_first_s": "1",
    }
    for name, info in walk_settings():
        sample = special.get(name) or (samples.get(info.annotation) if isinstance(info.annotation, type) else None)
        if sample is not None:
            load_settings(environ={environment_name(name): sample})


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        ({}, 4000),
        ({"inbox.batch": 7, "inbox.prefetch": 14}, 7),
        ({"inbox.batch": 3000}, 3000),
        ({"inbox.prefetch": 4000}, 2000),
        ({"inbox.prefetch": 1999}, 999),
        ({"inbox.prefetch": 1}, 1),
    ],
)
def test_a_batch_is_as_large_as_set_and_at_most_half_of_what_the_prefetch_lets_come(
    flags: dict[str, object], most: int
) -> None:
    assert load_settings(environ={}, flags=flags).inbox.most_in_batch == most


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        DaemonSettings().log_level = "debug"  # type: ignore[misc]


# --- as a program


@pytest.mark.parametrize(
    ("arguments", "environ", "told"),
    [
        (["run"], {}, "the setting source is missing"),
        (["run", "-s", "outbox.page_row=1"], {}, "did you mean 'outbox.page_rows'?"),
        (["run", "-s", "outbox"], {}, "--set outbox: expected NAME=VALUE"),
        (["check", "--set", f"postgres.dsn={DSN}"], {}, "a secret on the command line"),
        (["migrate"], {"RELAY_POSTGRES_DSN": CANARY}, "postgres.dsn (from the environment): is not a URL"),
        (["migrate", "-c", "/nowhere.toml"], {}, "settings file /nowhere.toml: No such file"),
        (["check"], {"RELAY_CONFIG": "/nowhere.toml"}, "settings file /nowhere.toml: No such file"),
        (["emit"], {"RELAY_\x1b[2J": "1"}, r"RELAY_\x1b[2J is not a setting"),
        (["inbox", "run", "a:b", "--queue", "q" * 300], {}, "inbox.queue (from flags): must be printable"),
        (["inbox", "run", "a"], {}, "expected MODULE:OBJECT"),
        (["inbox", "run", "no_such_module:b"], {}, "there is no module 'no_such_module'"),
        (["inbox", "run", "json:nothing"], {}, "the module json has no 'nothing'"),
        (["inbox", "run", "json:dumps"], {}, "json:dumps is a function, not a relay.inbox.Inbox"),
    ],
)
def test_commands_end_with_2_and_one_line(
    arguments: list[str], environ: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in os.environ if n.startswith("RELAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, arguments, env=environ)
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert CANARY not in result.output
