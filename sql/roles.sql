-- The roles of relay and what each may do. Safe to run again; needs CREATEROLE for the roles that are missing.
-- Grant them to your own login roles:  GRANT relay_producer TO shop_app;

DO $$
DECLARE
  role text;
BEGIN
  FOREACH role IN ARRAY ARRAY['relay_producer', 'relay_daemon', 'relay_consumer', 'relay_taker', 'relay_operator', 'relay_monitor'] LOOP
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = role) THEN
      BEGIN
        EXECUTE pg_catalog.format('CREATE ROLE %I NOLOGIN', role);
      EXCEPTION WHEN duplicate_object OR unique_violation THEN
        RAISE NOTICE 'role % was created by another session meanwhile', role;
      END;
    END IF;
  END LOOP;
END
$$;

REVOKE ALL ON ALL TABLES IN SCHEMA relay FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA relay FROM PUBLIC;
GRANT USAGE ON SCHEMA relay TO relay_producer, relay_daemon, relay_consumer, relay_taker, relay_operator, relay_monitor;

-- A producer inserts events, and may read back the number its event got. It can neither read nor change anybody's events.
GRANT INSERT (aggregate_type, aggregate_id, seq, event_type, payload, body, content_type, headers, routing_key)
  ON relay.outbox TO relay_producer;
GRANT SELECT (id, seq) ON relay.outbox TO relay_producer;
GRANT EXECUTE ON FUNCTION relay.emit(text, text, text, jsonb, jsonb, text, bigint) TO relay_producer;
GRANT EXECUTE ON FUNCTION relay.headers_are_valid(jsonb),
  relay.outbox_is_valid(bigint, smallint, text, text, bigint, text, integer, text, jsonb, text, integer, timestamptz)
  TO relay_producer, relay_daemon;  -- re-basing: an UPDATE evaluates the CHECK constraint, too

-- The outbox daemon reads the log, moves its cursor, parks and un-parks. It cannot write events.
GRANT SELECT ON relay.migration, relay.outbox, relay.outbox_aggregate, relay.outbox_cursor, relay.outbox_parked TO relay_daemon;
GRANT UPDATE ON relay.outbox_cursor TO relay_daemon;
GRANT UPDATE (xid, id), TRUNCATE ON relay.outbox TO relay_daemon;  -- xid: re-basing after a restore; TRUNCATE: its lock, and retention
GRANT SELECT, UPDATE ON SEQUENCE relay.outbox_id_seq TO relay_daemon;  -- re-basing: new ids must follow the restored ones
GRANT INSERT, UPDATE, DELETE ON relay.outbox_parked TO relay_daemon;
GRANT SELECT ON relay.outbox_pause, relay.outbox_tombstone TO relay_daemon;
GRANT DELETE ON relay.outbox_tombstone TO relay_daemon;  -- of rows whose slot was emptied
GRANT TRUNCATE ON relay.outbox_0, relay.outbox_1, relay.outbox_2, relay.outbox_3 TO relay_daemon;  -- retention empties one of them
GRANT SELECT ON relay.outbox_replay TO relay_daemon;  -- an unfinished one keeps the slots that it is still to read
GRANT EXECUTE ON FUNCTION relay.outbox_slot_is_needed(smallint), relay.outbox_empty_slot(smallint, pg_snapshot) TO relay_daemon;
GRANT EXECUTE ON FUNCTION relay.outbox_is_paused(text, text, text) TO relay_daemon, relay_operator, relay_monitor;
GRANT EXECUTE ON FUNCTION relay.outbox_is_read(xid8, bigint, pg_snapshot, pg_snapshot, bigint) TO relay_daemon, relay_operator, relay_monitor;

-- A consumer's inbox.
GRANT SELECT ON relay.migration TO relay_consumer;
GRANT SELECT, INSERT, UPDATE ON relay.inbox_aggregate TO relay_consumer;
GRANT SELECT, INSERT, UPDATE, DELETE ON relay.inbox_held TO relay_consumer;
GRANT SELECT, INSERT, DELETE ON relay.inbox_seen TO relay_consumer;
GRANT INSERT ON relay.inbox_quarantine TO relay_consumer;
GRANT SELECT, INSERT, UPDATE, DELETE ON relay.inbox_gap TO relay_consumer;
GRANT SELECT, INSERT, UPDATE ON relay.inbox_progress TO relay_consumer;
GRANT SELECT ON relay.inbox_seed TO relay_consumer;
GRANT INSERT, SELECT (id, consumer, source, aggregate_type, aggregate_id, seq, leads), UPDATE (leads) ON relay.inbox TO relay_consumer;
GRANT EXECUTE ON FUNCTION relay.json_of(bytea) TO relay_consumer;  -- SQL functions get the body as jsonb as well

-- The service behind an inbox in store mode: it takes what the sidecar has stored, and can give it back.
GRANT SELECT, DELETE, UPDATE (attempts, error, next_take_at, leads) ON relay.inbox TO relay_taker;
GRANT EXECUTE ON FUNCTION relay.inbox_take(integer, text), relay.inbox_fail(bigint, text, interval), relay.json_of(bytea) TO relay_taker;

-- Operators see everything and may do the acts of `relay`; every one of them is recorded, and no record can be changed.
GRANT SELECT ON ALL TABLES IN SCHEMA relay TO relay_operator;
GRANT INSERT (who, side, act, selection, why, rows) ON relay.audit TO relay_operator;  -- never login or at: those are not for the asking
GRANT INSERT ON relay.audit_aggregate TO relay_operator;
GRANT UPDATE (rate) ON relay.outbox_cursor TO relay_operator;  -- for the row's lock: an act and a checkpoint exclude each other
GRANT INSERT, UPDATE (state, next_attempt_at, attempts), DELETE ON relay.outbox_parked TO relay_operator;
GRANT INSERT, DELETE ON relay.outbox_pause TO relay_operator;
GRANT INSERT ON relay.outbox_tombstone TO relay_operator;
GRANT INSERT (audit_id, selection, to_queue, after_id, last_id, total), UPDATE (after_id, sent, state, updated_at)
  ON relay.outbox_replay TO relay_operator;
GRANT INSERT, UPDATE (last_seq, last_digest, blocked) ON relay.inbox_aggregate TO relay_operator;
GRANT INSERT, UPDATE ON relay.inbox_seed TO relay_operator;
GRANT UPDATE (event_type, content_type, headers, body, digest, reason, state, attempts, error, next_attempt_at), DELETE
  ON relay.inbox_held TO relay_operator;  -- a tombstone takes the place of a message
GRANT UPDATE (state, next_ask_at, detail, asks, dead_letters), DELETE ON relay.inbox_gap TO relay_operator;
GRANT UPDATE (next_take_at, leads), DELETE ON relay.inbox TO relay_operator;
GRANT DELETE ON relay.inbox_seen TO relay_operator;
GRANT INSERT, UPDATE (dismissed_at) ON relay.inbox_quarantine TO relay_operator;

-- Monitors see everything but payloads.
GRANT SELECT ON relay.migration, relay.audit, relay.audit_aggregate, relay.outbox_aggregate, relay.outbox_cursor, relay.outbox_parked,
  relay.outbox_pause, relay.outbox_tombstone, relay.outbox_replay, relay.inbox_aggregate, relay.inbox_gap, relay.inbox_progress,
  relay.inbox_seed TO relay_monitor;
GRANT SELECT (id, xid, slot, shard, aggregate_type, aggregate_id, seq, event_type, size, created_at) ON relay.outbox TO relay_monitor;
GRANT SELECT (id, consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, reason, state, attempts, held_at, next_attempt_at)
  ON relay.inbox_held TO relay_monitor;
GRANT SELECT (id, consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, stored_at, attempts, next_take_at, leads)
  ON relay.inbox TO relay_monitor;
GRANT SELECT (id, consumer, reason, detail, message_id, exchange, routing_key, received_at, source, aggregate_type, aggregate_id, seq, dismissed_at)
  ON relay.inbox_quarantine TO relay_monitor;
