"""Every error that relay raises on purpose, in one tree.

    RelayError
      ConfigError            a setting is missing, unknown, or contradicts another         exit 2
      InputError             an event that a caller handed over cannot be accepted         exit 6
      PostgresError
        SchemaError          relay's tables are missing, older or newer than this program  exit 3
        PrivilegeError       the role may not do what relay needs               retryable  exit 4
        PostgresRefused      wrong user, password or database                   retryable  exit 4
        PoolerError          a connection pooler stands where a session is needed          exit 2
        PostgresUnavailable  cannot connect, or the connection broke            retryable  exit 5
        LeaseLost            another relay owns the shard now                   retryable  exit 5
      BrokerError
        BrokerRefused        wrong credentials, missing exchange, no permission retryable  exit 5
        BrokerUnavailable    cannot connect, or the connection broke            retryable  exit 5
          UnreadableMessage  a delivery broke it: too large, or not decoded by aiormq      retryable  exit 5
      InboxError
        HandlerError         a handler broke its contract (committed, lost its transaction)
      SandboxError           a throwaway server could not be started                       exit 7
      NothingSelected        an operator's command found nothing that its filters select   exit 11
      Declined               the person at the terminal said no                            exit 12

A *retryable* error ends a session; the supervisor starts the next one after a back-off. What exits with 4 is retried
only by a daemon that was running already (rights revoked, password rotated): at its start it ends the program.
The exit codes are a contract, listed in the README.
"""

from __future__ import annotations

from typing import ClassVar


class RelayError(Exception):
    """Root of all errors that relay raises on purpose. The message says what happened, to what, and what to do."""

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False


class ConfigError(RelayError):
    """A setting is missing, unknown, malformed, or contradicts another. Raised before any socket is opened."""

    exit_code = 2


class InputError(RelayError):
    """An event handed over by a caller cannot be accepted; nothing of it was written."""

    exit_code = 6


class PostgresError(RelayError):
    """PostgreSQL refused or failed. `sqlstate` is PostgreSQL's own code, if there was one."""

    exit_code = 5

    def __init__(self, message: str, *, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class SchemaError(PostgresError):
    """relay's schema is missing, incomplete, older or newer than this program: `relay migrate` or upgrade."""

    exit_code = 3


class PrivilegeError(PostgresError):
    """The database role lacks a privilege that relay needs."""

    exit_code = 4
    retryable = True


class PostgresRefused(PostgresError):
    """PostgreSQL answered and did not let us in: wrong user, password or database."""

    exit_code = 4
    retryable = True


class PoolerError(PostgresError):
    """A connection pooler (PgBouncer) stands between relay and PostgreSQL: session locks and LISTEN do not work there."""

    exit_code = 2


class PostgresUnavailable(PostgresError):
    """PostgreSQL cannot be reached, or the connection broke, or a statement timed out."""

    retryable = True


class LeaseLost(PostgresError):
    """Another relay owns this shard now: whatever this one still does is void."""

    retryable = True


class BrokerError(RelayError):
    """RabbitMQ refused or failed. `reply_code` is the AMQP reply code, if there was one."""

    exit_code = 5
    retryable = True

    def __init__(self, message: str, *, reply_code: int | None = None) -> None:
        super().__init__(message)
        self.reply_code = reply_code


class BrokerRefused(BrokerError):
    """RabbitMQ answered and said no: credentials, virtual host, missing exchange or queue, permission."""


class BrokerUnavailable(BrokerError):
    """RabbitMQ cannot be reached, or the connection or channel broke, or it did not answer in time."""


class UnreadableMessage(BrokerUnavailable):
    """A message in the queue ends the connection that it is delivered on: it is too large for memory, or on stock aiormq cannot decode it.

    It cannot be acknowledged either. Every delivery brings it nearer to the queue's delivery limit, where the broker sets
    it aside, and the same is true for whatever is delivered together with it.
    """


class InboxError(RelayError):
    """The consuming side cannot go on."""


class HandlerError(InboxError):
    """A handler broke its contract, for example by ending the transaction that belongs to the inbox."""


class SandboxError(RelayError):
    """A throwaway server could not be found, started or stopped."""

    exit_code = 7


class NothingSelected(RelayError):
    """An operator's command found nothing that its filters select: nothing was changed."""

    exit_code = 11


class Declined(RelayError):
    """The person at the terminal was asked and said no: nothing was changed."""

    exit_code = 12
