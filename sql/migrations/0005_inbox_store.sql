-- Store mode: the sidecar writes what it would hand to a handler into relay.inbox, contiguous and deduplicated; a service in any
-- language takes it from there in its own transaction. And the form in which an SQL function gets an event.

-- One event, as an SQL function handles it and as `relay.inbox_take` returns it.
CREATE TYPE relay.event AS (
  id             bigint,   -- relay.inbox.id; null for an SQL function called by the daemon
  consumer       text,
  source         text,
  aggregate_type text,
  aggregate_id   text,     -- null: an event without order
  seq            bigint,
  event_type     text,
  message_id     text,
  content_type   text,
  headers        jsonb,
  occurred_at    timestamptz,
  payload        jsonb,    -- the body where it is JSON that jsonb can hold, else null
  body           bytea
);

CREATE TABLE relay.inbox (
  id             bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  consumer       text        NOT NULL,
  source         text        NOT NULL,
  aggregate_type text,
  aggregate_id   text,
  seq            bigint,
  event_type     text        NOT NULL,
  message_id     text        NOT NULL,
  content_type   text        NOT NULL,
  headers        jsonb       NOT NULL,
  occurred_at    timestamptz,
  body           bytea       NOT NULL,
  stored_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
  -- What `relay.inbox_fail` writes: how often its taker gave it back, why, and when it may be taken again (null: now).
  attempts       integer     NOT NULL DEFAULT 0,
  error          text,
  next_take_at   timestamptz,
  CONSTRAINT inbox_seq_goes_with_an_aggregate CHECK ((seq IS NULL) = (aggregate_id IS NULL)),
  CONSTRAINT inbox_attempts_count_up CHECK (attempts >= 0)
);
CREATE INDEX inbox_by_aggregate ON relay.inbox (aggregate_id, aggregate_type, source, consumer, seq) WHERE aggregate_id IS NOT NULL;
