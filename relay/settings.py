"""One frozen settings tree: `relay.toml`, then `RELAY_*` environment variables, then flags; later wins.

Every field is documented with its unit; the README's table is generated from these descriptions and a test keeps them equal.
An unknown key is an error that suggests the nearest one. A secret can also be given as the path of a file (`*_FILE`).
"""

from __future__ import annotations

import difflib
import os
import re
import string
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from relay.errors import ConfigError
from relay.event_loop import EventLoop

_EXCHANGE_BYTES = 249
"""AMQP's 255 less the `.marks` of the exchange beside it."""

_QUEUE_BYTES = 250
"""AMQP's 255 less the `.dead` of the queue for dead letters."""


def _at_most(limit: int) -> Callable[[str], str]:
    """What AMQP can carry as a name: its limit is in bytes."""

    def check(value: str) -> str:
        if len(value.encode()) > limit or not value.isprintable():
            raise ValueError(f"must be printable, and at most {limit} bytes")
        return value

    return check


Policy = Literal["sequence", "latest", "none"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,99}$")]
AmqpName = Annotated[str, AfterValidator(_at_most(255))]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_boolean(cls, value: object, info: ValidationInfo) -> object:
        """Pydantic takes true for the number 1."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("is true or false, but the setting is not a switch")
        return value


class PostgresSettings(_Section):
    """The database: the producer's for `relay run`, the consumer's own for `relay inbox run`."""

    dsn: SecretStr = Field(
        SecretStr("postgresql://127.0.0.1:5432/postgres"),
        description="Where to connect: postgresql://user:password@host:port/database. A direct connection, not through PgBouncer.",
    )
    connect_timeout_s: float = Field(10, gt=0, le=300, description="Give up connecting after this many seconds.")
    command_timeout_s: float = Field(
        60, gt=0, le=3600, description="Give up a statement after this many seconds and reconnect."
    )

    @field_validator("dsn")
    @classmethod
    def _is_a_dsn(cls, value: SecretStr) -> SecretStr:
        return _with_scheme(value, ("postgresql", "postgres"), "postgresql://user:password@host:5432/database")


class RabbitmqSettings(_Section):
    """The broker."""

    url: SecretStr = Field(
        SecretStr("amqp://guest:guest@127.0.0.1:5672/"),
        description="Where to connect: amqp://user:password@host:port/vhost, or amqps:// for TLS.",
    )
    exchange: Annotated[str, AfterValidator(_at_most(_EXCHANGE_BYTES))] = Field(
        "relay.events", min_length=1, description="The topic exchange that events are published to."
    )
    declare_topology: bool = Field(
        True,
        description="Declare the exchange (and the inbox's queue) at start. Off: only check that they exist, for users without the configure permission.",
    )
    connect_timeout_s: float = Field(10, gt=0, le=300, description="Give up connecting after this many seconds.")
    heartbeat_s: int = Field(
        10,
        ge=5,
        le=600,
        description="AMQP heartbeat in seconds; a dead connection is noticed after about three of them.",
    )
    client: Literal["fast", "stock"] = Field(
        "fast",
        description="fast: messages are encoded and read in bulk by relay itself, on aiormq's connection. stock: every message through aio-pika, several times slower; the same guarantees.",
    )

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, value: SecretStr) -> SecretStr:
        return _with_scheme(value, ("amqp", "amqps"), "amqp://user:password@host:5672/vhost", needs_host=True)


_TEMPLATE_FIELDS = ("aggregate_type", "event_type", "aggregate_id")


class OutboxSettings(_Section):
    """`relay run`."""

    page_rows: int = Field(
        1000,
        ge=1,
        le=20000,
        description="Rows read and published as one page. Up to four pages are in flight at the broker, one with order = strict.",
    )
    page_bytes: int = Field(
        8 * 1024 * 1024,
        ge=1024,
        le=1024**3,
        description="A page ends before the row that would exceed this many bytes of payload; none is begun while twice as much is in flight.",
    )
    order: Literal["pipelined", "strict"] = Field(
        "pipelined",
        description="pipelined: several pages in flight at once. strict: at most one unconfirmed message of an aggregate, so that not even a broker's nack can swap two.",
    )
    routing_key: AmqpName = Field(
        "{aggregate_type}.{event_type}",
        description="Template of the routing key; a row's own routing_key overrides it.",
    )
    wakeup: Literal["notify", "poll"] = Field(
        "notify", description="notify: producers wake a sleeping relay. poll: only the poll interval counts."
    )
    poll_interval_s: float = Field(
        5, ge=0.005, le=3600, description="Seconds between two looks while asleep; with notify only a safety net."
    )
    gather_s: float = Field(
        0.02,
        ge=0,
        le=60,
        description="Under load (from about 2 500 events a second) so many seconds are read at once: fewer, larger pages cost PostgreSQL and the broker less. A stop may wait as long, and a crash repeat as much. 0: read on as soon as the last page is confirmed.",
    )
    checkpoint_interval_s: float = Field(
        0.1,
        ge=0,
        le=60,
        description="Least seconds between two writes of the cursor under load; a crash repeats that much.",
    )
    confirm_timeout_s: float = Field(
        30,
        gt=0,
        le=3600,
        description="A page that is not confirmed after this many seconds ends the session. The time of a broker's alarm is not counted (with rabbitmq.client = stock it is); an alarm that lasts as long ends it too (15 s, when more was on its way than the sockets hold), and no message is blamed.",
    )
    standby_interval_s: float = Field(1, gt=0, le=60, description="Seconds between a standby's attempts to take over.")
    retry_first_s: float = Field(
        1, gt=0, le=3600, description="Delay before a parked row is tried again; doubles with each attempt."
    )
    retry_max_s: float = Field(300, gt=0, le=86400, description="Longest delay between two attempts of a parked row.")
    max_attempts: int = Field(
        20,
        ge=1,
        le=1_000_000,
        description="After this many refusals a parked aggregate is stuck and waits for an operator.",
    )
    parked_limit: int = Field(
        100_000,
        ge=1,
        le=1_000_000_000,
        description="With more rows than this refused, or waiting behind a refused one, the shard pauses instead of hiding an outage in a table. What an operator paused does not count.",
    )
    retention_s: float = Field(
        4 * 86400,
        ge=0,
        le=5
        * 86400,  # the ring goes round in eight days, two of them a slot's own: the rest is the time to empty it in
        description="Published rows are kept at least this long, for replay and gap repair; then their slot of two days is emptied as a whole.",
    )
    repair: bool = Field(
        True,
        description="Answer inboxes that ask for what they miss, and publish marks of the newest numbers so that a lost last message is missed at all.",
    )
    repair_rate: int = Field(
        2000, ge=1, le=1_000_000, description="Most rows a second that are sent again to inboxes that ask."
    )

    @field_validator("routing_key")
    @classmethod
    def _is_a_template(cls, value: str) -> str:
        try:
            parts = [part[1:] for part in string.Formatter().parse(value) if part[1] is not None]
        except ValueError:
            parts = [("", "", "")]
        if any(name not in _TEMPLATE_FIELDS or spec or conversion for name, spec, conversion in parts):
            raise ValueError("may hold {aggregate_type}, {event_type} and {aggregate_id}, nothing else in braces")
        return value

    @model_validator(mode="after")
    def _relations(self) -> OutboxSettings:
        if self.retry_first_s > self.retry_max_s:
            raise ValueError("retry_first_s must not exceed retry_max_s")
        return self


class InboxSettings(_Section):
    """`relay inbox run`."""

    consumer: Name | None = Field(
        None, description="Name of this consumer: its cursors are kept under it. Default: the name given to Inbox(...)."
    )
    queue: Annotated[str, AfterValidator(_at_most(_QUEUE_BYTES))] | None = Field(
        None, description="The queue to consume. Default: the consumer's name."
    )
    bindings: tuple[AmqpName, ...] = Field(
        ("#",), description="Routing-key patterns that the queue is bound with; bind whole aggregate types (`order.#`)."
    )
    policy: Policy = Field(
        "sequence",
        description="Order within an aggregate: sequence (1, 2, 3 ...), latest (newest state wins), none (only deduplicated).",
    )
    policies: Mapping[str, Policy] = Field(
        default_factory=dict, description="Policy by aggregate type, where it differs from `policy`."
    )
    batch: int = Field(
        4000,
        ge=1,
        le=20000,
        description="Most messages applied in one transaction, and 32 MiB (each counts its body and 4 KiB); fewer where that would take longer than a second. At most half of the prefetch.",
    )
    prefetch: int = Field(
        8000,
        ge=1,
        le=65535,
        description="Most unacknowledged messages at this consumer: the batch in hand, and the next. Where several consumers share a queue and handlers are slow, fewer leave more to the others. Memory is bounded by 64 MiB of them with rabbitmq.client = fast, by their number alone with stock.",
    )
    appliers: int = Field(
        1,
        ge=1,
        le=16,
        description="Connections that apply a batch at the same time, each its own aggregates: for handlers that wait for their statements one by one, and write no rows that aggregates share.",
    )
    handler_timeout_s: float = Field(30, gt=0, le=86400, description="A handler that takes longer has failed.")
    retry_first_s: float = Field(
        1, gt=0, le=3600, description="Delay before a failed message is tried again; doubles with each attempt."
    )
    retry_max_s: float = Field(
        300, gt=0, le=86400, description="Longest delay between two attempts of a failed message."
    )
    max_attempts: int = Field(
        20, ge=1, le=1_000_000, description="After this many failures a message is stuck and waits for an operator."
    )
    delivery_limit: int = Field(
        100,
        ge=1,
        le=1_000_000,
        description="Deliveries after which the broker dead-letters a message that kills its consumer.",
    )
    seen_retention_s: float = Field(
        7 * 86400, ge=60, le=3650 * 86400, description="How long ids of messages without an aggregate are remembered."
    )
    start_from: Literal["beginning", "now"] = Field(
        "beginning",
        description="Where a new consumer starts: beginning (number 1 of every aggregate) or now (where `relay inbox seed` has put its cursors; it does not start before).",
    )
    gap_alert_after_s: float = Field(
        5,
        ge=0.1,
        le=86400,
        description="A number that is missing for longer than this is a gap: it is shown, logged, and asked for.",
    )
    repair: bool = Field(True, description="Ask the producer's relay for what is missing.")
    mode: Literal["apply", "store"] = Field(
        "apply",
        description="apply: call handlers. store: write events, in order, into relay.inbox, where a service in any language takes them.",
    )
    functions: Mapping[str, str] = Field(
        default_factory=dict,
        description="SQL functions as handlers, by event type (`*`: all others): `OrderPaid=billing.order_paid` is called as `billing.order_paid(event relay.event)`.",
    )

    @field_validator("bindings", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        """A TOML text is read as the environment's is: one pattern, or several with commas."""
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _relations(self) -> InboxSettings:
        if self.retry_first_s > self.retry_max_s:
            raise ValueError("retry_first_s must not exceed retry_max_s")
        return self

    @property
    def most_in_batch(self) -> int:
        """`batch`, or half of the prefetch, so that the next ones come while these are applied."""
        return min(self.batch, max(1, self.prefetch // 2))


class DaemonSettings(_Section):
    """What both daemons share."""

    shutdown_grace_s: float = Field(
        20, gt=0, le=3600, description="Seconds to drain after the first SIGTERM or SIGINT; the second stops at once."
    )
    backoff_first_s: float = Field(
        0.2, gt=0, le=60, description="First delay after a failed session; doubles with jitter."
    )
    backoff_max_s: float = Field(10, gt=0, le=600, description="Longest delay between two sessions.")
    event_loop: EventLoop = Field(
        "uvloop",
        description="uvloop is the faster one; asyncio is Python's own, for where uvloop is not to be had. For `relay run` and `relay inbox run`.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity that is logged."
    )
    log_format: Literal["json", "text"] = Field(
        "json", description="One event a line: json for machines, text for people."
    )


class Settings(_Section):
    """Everything that can be set."""

    source: Name | None = Field(
        None,
        description="Name under which this outbox is published (part of every message id). Required by `relay run`; never change it.",
    )
    postgres: PostgresSettings = PostgresSettings()
    rabbitmq: RabbitmqSettings = RabbitmqSettings()
    outbox: OutboxSettings = OutboxSettings()
    inbox: InboxSettings = InboxSettings()
    daemon: DaemonSettings = DaemonSettings()

    @model_validator(mode="after")
    def _relations(self) -> Settings:
        if self.daemon.backoff_first_s > self.daemon.backoff_max_s:
            raise ValueError("daemon.backoff_first_s must not exceed daemon.backoff_max_s")
        if self.outbox.wakeup == "notify" and self.outbox.poll_interval_s < 0.1:
            raise ValueError(
                'outbox.poll_interval_s under 0.1 s is for outbox.wakeup = "poll"; with notify it would never let the relay sleep'
            )
        return self


def load_settings(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings from a file, the environment and flags (dotted names), later winning over earlier.

    `file` None: `relay.toml` in the working directory, if there is one. Raises ConfigError, which names the key, says
    where it came from, never shows a value, and suggests the nearest name for an unknown one.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, values in (
        _from_file(file),
        _from_environ(os.environ if environ is None else environ),
        ("flags", _from_flags(flags or {})),
    ):
        for key, value in values.items():
            _put(tree, key, value, origin)
            origins[key] = origin
    try:
        return Settings.model_validate(tree)
    except ValidationError as exc:
        raise ConfigError("; ".join(_told(e["loc"], e["msg"], origins) for e in exc.errors())) from None


def _told(place: tuple[int | str, ...], message: str, origins: Mapping[str, str]) -> str:
    name = ".".join(map(str, place))
    origin = (
        origins.get(name) or origins.get(".".join(map(str, place[:2]))) or origins.get(str(place[0]) if place else "")
    )
    message = message.removeprefix("Value error, ").replace("valid tuple", "list").replace("valid dictionary", "table")
    return f"{name or 'settings'}{f' (from {origin})' if origin else ''}: {message}"


def setting_names() -> list[str]:
    """All settings as dotted names, in the order of the tree."""
    return [name for name, _ in walk_settings()]


def walk_settings() -> Iterator[tuple[str, Any]]:
    """All settings: (dotted name, pydantic field)."""
    for name, info in Settings.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            yield from ((f"{name}.{inner}", field) for inner, field in section.model_fields.items())
        else:
            yield name, info


def environment_name(setting: str) -> str:
    """`outbox.page_rows` -> `RELAY_OUTBOX_PAGE_ROWS`."""
    return "RELAY_" + setting.replace(".", "_").upper()


def _from_file(file: Path | None) -> tuple[str, dict[str, Any]]:
    path = file or Path("relay.toml")
    if file is None and not path.is_file():
        return "", {}
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise ConfigError(f"settings file {path}: {exc.strerror}") from exc
    except ValueError as exc:  # TOMLDecodeError, UnicodeDecodeError, a number of thousands of digits
        raise ConfigError(f"settings file {path} is not valid TOML: {exc}") from None
    except RecursionError:
        raise ConfigError(f"settings file {path} is not valid TOML: nested too deep") from None
    return str(path), dict(_flatten(document))


def _flatten(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    sections = {name for name, info in Settings.model_fields.items() if _is_section(info.annotation)}
    for name, value in document.items():
        if name in sections and isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", deep) for inner, deep in value.items())
        else:
            yield name, value


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, _Section)


# Read by other parts of the program (sandbox, tests, `relay inbox seed`), or put there by Kubernetes for Services named relay or relay-...: not settings.
_NOT_SETTINGS = re.compile(
    r"RELAY_((SANDBOX|TEST)_\w+|CONFIG|PRODUCER_DSN(_FILE)?)=.*|RELAY_(\w+_)?SERVICE(_\w+)?=.*"
    r"|RELAY_(\w+_)?PORT(_\d+_\w+=.*|=(tcp|udp|sctp)://.*)",
    re.DOTALL,
)


def _from_environ(environ: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    known = {environment_name(name): (name, info) for name, info in walk_settings()}
    found: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith("RELAY_") or _NOT_SETTINGS.fullmatch(f"{variable}={text}"):
            continue
        if variable.endswith("_FILE") and variable.removesuffix("_FILE") in known:
            name, info = known[variable.removesuffix("_FILE")]
            if variable.removesuffix("_FILE") in environ:
                raise ConfigError(f"{variable.removesuffix('_FILE')} and {variable} are both set: unset one of them")
            found[name] = _parsed(variable, _secret_file(variable, text), info.annotation)
        elif variable in known:
            name, info = known[variable]
            found[name] = _parsed(variable, text, info.annotation)
        else:
            raise ConfigError(f"environment variable {variable} is not a setting{_suggestion(variable, known)}")
    return "the environment", found


def _secret_file(variable: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise ConfigError(f"{variable}: cannot read {path or 'a file without a name'}: {exc.strerror}") from exc
    except ValueError:  # the exception would quote a byte of a secret
        raise ConfigError(f"{variable}: {path} is not a text in UTF-8") from None


def _from_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Texts as in the environment; values of a caller's own as they are."""
    known = dict(walk_settings())
    return {
        name: _parsed(name, value, known[name].annotation) if isinstance(value, str) and name in known else value
        for name, value in flags.items()
    }


def _parsed(variable: str, text: str, annotation: object) -> Any:
    """Lists are comma-separated, mappings `key=value` pairs; numbers and booleans are left to the model."""
    origin = get_origin(annotation)
    if origin is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if origin is Mapping:
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        if any(not sign for _, sign, _ in pairs):
            raise ConfigError(f"{variable}: expected key=value, key=value")
        return {key.strip(): value.strip() for key, _, value in pairs}
    return text


def _put(tree: dict[str, Any], key: str, value: Any, origin: str) -> None:
    names = setting_names()
    if _is_section(getattr(Settings.model_fields.get(key), "annotation", None)):
        raise ConfigError(
            f"{key!r} in {origin} is a group of settings, not a value: write [{key}], and its settings below"
        )
    if key not in names:
        raise ConfigError(f"unknown setting {key!r} in {origin}{_suggestion(key, names)}")
    section, dot, inner = key.partition(".")
    if dot:
        tree.setdefault(section, {})[inner] = value
    else:
        tree[section] = value


def _suggestion(key: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(names[:8])} ..."


def _with_scheme(value: SecretStr, schemes: tuple[str, ...], example: str, *, needs_host: bool = False) -> SecretStr:
    """Refuse what is no URL, before somebody quotes the parts of it that he takes for host and path."""
    url = value.get_secret_value()
    try:
        parts = urlsplit(url)
        valid = (
            parts.scheme in schemes and (parts.port is None or parts.port > 0) and url.isprintable() and " " not in url
        )
    except ValueError:
        valid = False
    if not valid or (needs_host and not parts.hostname):
        raise ValueError(f"is not a URL like {example}")
    if parts.fragment or "@" in parts.path:
        raise ValueError("holds a # / or @ that must be percent-encoded: %23, %2F, %40 (in the password, usually)")
    return value
