"""The consuming side: every event applied once, in order, in one transaction with its effects."""

from relay.inbox.handlers import BatchHandler, Handler, Inbox, load
from relay.inbox.stats import Stats
from relay.message import Event

__all__ = ["BatchHandler", "Event", "Handler", "Inbox", "Stats", "load"]
