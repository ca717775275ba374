"""All that a run leaves behind, as plain values: what the checker compares and the report draws. No clock, no I/O.

Times are seconds since the epoch, of this machine's clock, which no fault touches (a clock fault lies to one process).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Key = tuple[str, str]
"""(aggregate type, aggregate id)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """One event, as the producer's own table txn_log tells of it, written in the same transaction; relay never touches it."""

    token: str  # names this event, for ever; also in the event's payload
    key: Key
    seq: int  # that the outbox gave it
    sha: str  # hex SHA-256 of the token, the amount and the padding: what the consumer computes from what it got
    amount: int  # added to the aggregate's balance
    at: float  # when the transaction was about to commit


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One application of an event, written by the handler in the inbox's transaction."""

    token: str
    key: Key
    seq: int
    position: (
        int  # 1, 2, 3 ... within the aggregate, taken under its row lock: the order in which effects were committed
    )
    message_id: str
    sha: str
    amount: int
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Witnessed:
    """One message as the audit queue got it: what the broker really accepted, in its order, copies included."""

    message_id: str
    key: Key
    seq: int
    token: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """One fault that was injected: its history, and how it was seen to have bitten."""

    kind: str
    begun: float
    healed: float
    bites: int  # 0: injected, but nothing shows that it did anything
    confined_to: str | None = None  # the aggregate type that alone may wait because of it; None: everybody may
    broken: str | None = None  # a promise that the fault itself has seen broken
    failure: str | None = None  # the injector itself failed: the run proves nothing
    note: str = ""  # for the reader of the report


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at everything, every few seconds."""

    at: float
    committed: int  # events so far
    applied: int
    processes: Mapping[str, Process] = field(default_factory=dict)  # daemons that were running, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What a daemon used, seen from outside; `tasks` it tells itself."""

    pid: int
    rss: int  # bytes
    descriptors: int
    connections: int
    tasks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """What was not done when the run was over and had had time to recover: everything must be zero or expected."""

    parked: int = 0  # rows in relay.outbox_parked
    held: int = 0  # messages in relay.inbox_held
    gaps: int = 0
    unread: int = 0  # rows of the log that the cursor has not passed
    queued: int = 0  # messages in the consumer's queue
    dead: int = 0  # messages in its queue for dead letters
    conflicts: int = 0  # in the quarantine: same number, other content
    strangers: int = 0  # in the quarantine: no events at all


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything."""

    seed: int
    profile: str
    began: float
    ended: float  # of the load; recovery follows
    settled: float | None  # when everything was applied; None: not within the time that recovery may take
    committed: Sequence[Committed]
    undone: frozenset[str]  # tokens of transactions that were rolled back: surely by the client, or as txn_log tells
    effects: Sequence[Effect]
    balances: Mapping[Key, tuple[int, int]]  # (applied, balance): not idempotent, kept by the handler
    witnessed: Sequence[Witnessed]
    unwitnessed_types: frozenset[str] = frozenset()  # aggregate types that the audit queue is not bound for
    struck: Sequence[Struck] = ()
    samples: Sequence[Sample] = ()
    leftovers: Leftovers = field(default_factory=Leftovers)
    expected_conflicts: int = 0  # forged messages with other content that a fault sent
    expected_strangers: int = 0
    strict: bool = False  # relays with order = "strict": first publications are in order, whatever the broker refuses
    transactions: Mapping[str, int] = field(default_factory=dict)  # of the producers: ok, undone, unknown, failed
    exits: Sequence[str] = ()  # ends of daemons that no fault and no stop explains
    mistaken: Sequence[
        str
    ] = ()  # tokens whose transaction the producer knows to be rolled back and txn_log has, or the reverse
    cursor_writes: int = 0  # that were looked at for the next
    log_lines: int = 0  # that were looked at for complaints
    stale_checkpoints: int = 0  # writes of the cursor by a session that had lost the log to another owner
    complaints: Sequence[str] = ()  # lines of the daemons' logs that no daemon should write, such as tracebacks
