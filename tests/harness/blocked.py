"""Databases in which everything is blocked that can be, written by SQL: what the commands that look are tried on."""

from __future__ import annotations

from typing import Any

OUTBOX = """
UPDATE relay.outbox_cursor SET source = 'shop', owner = 'host:1', published = 12345, rate = 10, last_error = 'BrokerUnavailable: gone',
  last_error_at = now() - interval '5 minutes', updated_at = now() - interval '1 minute';
-- order/1: 1 and 2 published, 3 refused and stuck, 4 behind it
SELECT relay.emit('order', '1', 'Changed', '{"secret": "payload-of-order-1"}') FROM generate_series(1, 4);
-- order/2: refused, tried again; order/3: paused; order/4: 1 skipped and gone out, 2 published; order/5: a tombstone on its way
SELECT relay.emit('order', '2', 'Changed', '{}');
SELECT relay.emit('order', '3', 'Changed', '{}');
SELECT relay.emit('order', '4', 'Changed', '{}') FROM generate_series(1, 2);
SELECT relay.emit('order', '5', 'Changed', '{}');
-- an event without an aggregate, refused
SELECT relay.emit(NULL, NULL, 'Loose', '{}');
"""
PUBLISHED = "UPDATE relay.outbox_cursor SET snapshot = pg_current_snapshot()"
# In a transaction of their own: not published yet.
WAITING = "SELECT relay.emit('order', '6', 'Paid', '{}') FROM generate_series(1, 3)"
PARKED = """
INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, detail, state, attempts, parked_at, next_attempt_at)
SELECT o.id, 0, CASE WHEN o.aggregate_id IS NOT NULL THEN o.aggregate_type END, o.aggregate_id, o.seq, p.reason, p.detail, p.state, p.attempts,
  now() - p.age, CASE WHEN p.state = 'retrying' THEN now() + interval '30 seconds' END
FROM (VALUES ('1', 3, 'unroutable', 'NO_ROUTE to nowhere', 'stuck', 20, interval '2 hours'),
             ('1', 4, 'behind', NULL, 'waiting', 0, interval '1 hour'),
             ('2', 1, 'nacked', 'the broker said no', 'retrying', 3, interval '10 minutes'),
             ('3', 1, 'paused', NULL, 'paused', 0, interval '5 minutes'),
             ('5', 1, 'tombstone', NULL, 'retrying', 0, interval '1 minute'),
             (NULL, NULL, 'too_large', 'PRECONDITION_FAILED', 'stuck', 20, interval '3 hours'))
  AS p (aggregate_id, seq, reason, detail, state, attempts, age)
JOIN relay.outbox o ON o.aggregate_id IS NOT DISTINCT FROM p.aggregate_id AND o.seq IS NOT DISTINCT FROM p.seq;
INSERT INTO relay.audit (who, side, act, selection, why, rows) VALUES
  ('anna@desk', 'outbox', 'pause', '{"aggregate": "order/3"}', 'wait for the fix', 1),
  ('anna@desk', 'outbox', 'skip', '{"aggregate": "order/4"}', 'poison', 1),
  ('ben@desk', 'outbox', 'purge', '{"aggregate": "order/5"}', 'poison', 1),
  ('ben@desk', 'outbox', 'retry', '{"all": true}', '', 2),
  ('ben@desk', 'outbox', 'replay', '{"aggregate_type": "order"}', 'rebuild', 100);
INSERT INTO relay.audit_aggregate (aggregate_type, aggregate_id, audit_id) VALUES ('order', '3', 1), ('order', '4', 2), ('order', '5', 3);
INSERT INTO relay.outbox_pause (scope, aggregate_type, aggregate_id, audit_id) VALUES ('aggregate', 'order', '3', 1);
INSERT INTO relay.outbox_tombstone (id, shard, act, audit_id)
  SELECT id, 0, CASE aggregate_id WHEN '4' THEN 'skip' ELSE 'purge' END, aggregate_id::int - 2 FROM relay.outbox WHERE aggregate_id IN ('4', '5') AND seq = 1;
INSERT INTO relay.outbox_replay (audit_id, selection, to_queue, last_id, total, sent, updated_at)
  VALUES (5, '{}', 'billing', 9, 100, 40, now() - interval '10 minutes');
"""
INBOX = """
INSERT INTO relay.inbox_progress (consumer, applied, rate, owner, last_error, last_error_at, updated_at)
  VALUES ('billing', 777, 5, 'host:2', 'BrokerUnavailable: closed', now() - interval '3 minutes', now() + interval '1 hour');  -- so that the rate is a fresh one for a while
INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq, blocked) VALUES
  ('billing', 'shop', 'order', '1', 2, true), ('billing', 'shop', 'order', '7', 1, false), ('billing', 'shop', 'order', '8', 4, false),
  ('billing', 'shop', 'order', '9', 0, false), ('archive', 'shop', 'order', '1', 2, false);
INSERT INTO relay.inbox_held (consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, body, digest, reason, state,
                              attempts, error, held_at, next_attempt_at)
SELECT 'billing', 'shop', CASE WHEN h.id IS NOT NULL THEN 'order' END, h.id, h.seq, 'm-' || coalesce(h.id, '') || '-' || coalesce(h.seq, 0), 'Changed', 'application/json',
       'payload-held', '', h.reason, h.state, h.attempts, h.error, now() - h.age, CASE WHEN h.state = 'retrying' THEN now() + interval '1 minute' END
FROM (VALUES ('1', 3, 'failed', 'stuck', 20, 'KeyError: amount of payload-held', interval '90 minutes'),
             ('1', 4, 'behind', 'waiting', 0, NULL, interval '80 minutes'),
             ('7', 4, 'early', 'waiting', 0, NULL, interval '70 minutes'),
             ('7', 7, 'early', 'waiting', 0, NULL, interval '70 minutes'),
             ('8', 6, 'early', 'waiting', 0, NULL, interval '1 second'),
             ('9', 1, 'failed', 'retrying', 2, 'ValueError: bad', interval '4 minutes'),
             (NULL, NULL, 'failed', 'retrying', 1, E'RuntimeError: one\nand more lines', interval '2 minutes'))
  AS h (id, seq, reason, state, attempts, error, age);
INSERT INTO relay.inbox_gap (consumer, source, aggregate_type, aggregate_id, to_seq, found_by, noticed_at, alerted_at, state, asks, next_ask_at, detail) VALUES
  ('billing', 'shop', 'order', '7', 7, 'successor', now() - interval '69 minutes', now() - interval '69 minutes', 'stuck', 4, NULL, 'no longer retained'),
  ('billing', 'shop', 'order', '10', 2, 'mark', now() - interval '20 seconds', now() - interval '15 seconds', 'open', 1, now() + interval '5 seconds', NULL);
INSERT INTO relay.inbox_quarantine (consumer, reason, detail, message_id, exchange, routing_key, properties, body, received_at, dismissed_at) VALUES
  ('billing', 'conflict', 'number 2 was applied with another content', 'm-1-2', 'relay.events', 'order.Changed',
   '{"app_id": "shop", "aggregate_type": "order", "aggregate_id": "1", "sequence": 2}', 'payload-quarantined', now() - interval '15 minutes', NULL),
  ('billing', 'foreign', 'without x-sequence', NULL, '', 'billing', '{}', 'hello', now() - interval '1 day', NULL),
  ('billing', 'malformed', 'x-sequence is no number', NULL, '', 'billing', '{}', 'hello', now() - interval '2 days', now()),
  ('billing', 'skipped', 'by anna', 'm-1-1', 'relay.events', 'order.Changed',
   '{"app_id": "shop", "aggregate_type": "order", "aggregate_id": "1", "sequence": 1}', 'x', now() - interval '3 days', NULL);
INSERT INTO relay.inbox (consumer, source, aggregate_type, aggregate_id, seq, event_type, message_id, content_type, headers, body, stored_at,
                         attempts, error, next_take_at, leads)
SELECT 'store', 'shop', 'order', s.id, s.seq, 'Changed', 's', 'application/json', '{}', 'payload-stored', now() - interval '30 minutes',
       s.attempts, s.error, CASE WHEN s.attempts > 0 THEN now() + interval '9 seconds' END, s.seq = 1
FROM (VALUES ('1', 1, 2, 'taker: no such account'), ('1', 2, 0, NULL), ('2', 1, 0, NULL)) AS s (id, seq, attempts, error);
"""


async def block_outbox(connection: Any) -> None:
    """A producer's side with rows in every state."""
    for statements in (OUTBOX, PUBLISHED, WAITING, PARKED):
        await connection.execute(statements)


async def block_inbox(connection: Any) -> None:
    """Three consumers' sides with everything that can be kept aside."""
    await connection.execute(INBOX)
