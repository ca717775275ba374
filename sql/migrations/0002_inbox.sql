-- The inbox, in the consumer's own database: permanent cursors, messages that wait, and what could not be understood.

-- The permanent cursor of each aggregate: deduplication for ever in O(aggregates).
-- Led by the selective column, so that every plan finds it by key even before the first ANALYZE.
CREATE TABLE relay.inbox_aggregate (
  consumer       text    NOT NULL,
  source         text    NOT NULL,
  aggregate_type text    NOT NULL,
  aggregate_id   text    NOT NULL,
  last_seq       bigint  NOT NULL,            -- 0: nothing applied yet, something is held
  last_digest    bytea,                       -- content digest of last_seq: the same number with another one is a conflict
  blocked        boolean NOT NULL DEFAULT false,  -- the next message is held because its handler failed
  PRIMARY KEY (aggregate_id, aggregate_type, source, consumer),
  CONSTRAINT inbox_aggregate_last_seq_is_not_negative CHECK (last_seq >= 0)
) WITH (fillfactor = 50);

-- Messages that arrived early, failed, or wait behind one that did. Received durably: they are acknowledged at the broker.
CREATE TABLE relay.inbox_held (
  id              bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  consumer        text        NOT NULL,
  source          text        NOT NULL,
  aggregate_type  text,
  aggregate_id    text,
  seq             bigint,                     -- null: a message without order, held because its handler failed
  message_id      text        NOT NULL,
  event_type      text        NOT NULL,
  content_type    text        NOT NULL,
  headers         jsonb       NOT NULL DEFAULT '{}',
  body            bytea       NOT NULL,
  digest          bytea       NOT NULL,
  occurred_at     timestamptz,
  reason          text        NOT NULL,
  state           text        NOT NULL,
  attempts        integer     NOT NULL DEFAULT 0,
  error           text,
  held_at         timestamptz NOT NULL DEFAULT now(),
  next_attempt_at timestamptz,
  -- early: its predecessor is missing; behind: its predecessor is held, or was until now; failed: its handler raised
  CONSTRAINT inbox_held_reason_is_known CHECK (reason IN ('early', 'behind', 'failed')),
  -- waiting: for its predecessor; retrying: tried (again) at next_attempt_at; stuck: waits for an operator
  CONSTRAINT inbox_held_state_is_known CHECK (state IN ('waiting', 'retrying', 'stuck')),
  CONSTRAINT inbox_held_failed_is_retried_or_stuck
    CHECK (CASE reason WHEN 'early' THEN state = 'waiting' WHEN 'behind' THEN state <> 'stuck' ELSE state <> 'waiting' END),
  CONSTRAINT inbox_held_retrying_has_a_time CHECK ((state = 'retrying') = (next_attempt_at IS NOT NULL)),
  CONSTRAINT inbox_held_seq_goes_with_an_aggregate CHECK ((seq IS NULL) = (aggregate_id IS NULL)),
  CONSTRAINT inbox_held_attempts_count_up CHECK (attempts >= 0)
);
CREATE UNIQUE INDEX inbox_held_by_aggregate ON relay.inbox_held (aggregate_id, aggregate_type, source, consumer, seq) WHERE seq IS NOT NULL;
CREATE UNIQUE INDEX inbox_held_by_message ON relay.inbox_held (message_id, source, consumer) WHERE seq IS NULL;
CREATE INDEX inbox_held_due ON relay.inbox_held (consumer, next_attempt_at) WHERE state = 'retrying';

-- Ids of messages without order, kept for a retention period: their deduplication.
CREATE TABLE relay.inbox_seen (
  consumer   text        NOT NULL,
  source     text        NOT NULL,
  message_id text        NOT NULL,
  seen_at    timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (message_id, source, consumer)
);
CREATE INDEX inbox_seen_by_age ON relay.inbox_seen (seen_at);

-- What arrived and is not an event of ours, or contradicts one that was applied. Kept whole, never applied, never dropped.
CREATE TABLE relay.inbox_quarantine (
  id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  consumer    text        NOT NULL,
  reason      text        NOT NULL,
  detail      text        NOT NULL,
  message_id  text,
  exchange    text        NOT NULL,
  routing_key text        NOT NULL,
  properties  jsonb       NOT NULL,
  body        bytea       NOT NULL,
  received_at timestamptz NOT NULL DEFAULT now(),
  -- foreign: without our headers; malformed: with headers that cannot be; conflict: same number, other content
  CONSTRAINT inbox_quarantine_reason_is_known CHECK (reason IN ('foreign', 'malformed', 'conflict'))
);
