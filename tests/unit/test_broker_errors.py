"""What leaves a RabbitMQ session is one of relay's errors, which the supervisor knows, or a mistake of ours, which it must not hide."""

from __future__ import annotations

import pytest

from relay.errors import BrokerUnavailable
from relay.rabbitmq.session import broker_errors


def test_aiormqs_bare_exception_for_a_connection_that_was_cut_is_retried_like_any_other() -> None:
    """Seen when the line is cut while a channel is being opened: `raise Exception`, without a word."""
    with (
        pytest.raises(BrokerUnavailable, match="opening a channel: the connection to RabbitMQ has ended"),
        broker_errors("opening a channel"),
    ):
        raise Exception  # noqa: TRY002 - that is what aiormq raises


def test_a_mistake_of_ours_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError), broker_errors("counting"):
        1 / 0  # noqa: B018
    with pytest.raises(Exception, match="told"), broker_errors("counting"):
        raise Exception("told")  # noqa: TRY002
