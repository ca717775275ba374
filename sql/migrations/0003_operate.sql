-- Operating both sides: who did what (audit), and on the outbox's side pauses, tombstones, replays, figures for `relay status`.

-- What operators did. Only ever inserted into; written in the transaction of the act itself, so neither is there without the other.
CREATE TABLE relay.audit (
  id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  at         timestamptz NOT NULL DEFAULT now(),
  who        text        NOT NULL,                       -- the person: user@host of the terminal, or what --who said
  login      text        NOT NULL DEFAULT session_user,  -- the database role that did it
  side       text        NOT NULL CONSTRAINT audit_side_is_known CHECK (side IN ('outbox', 'inbox')),
  act        text        NOT NULL,                       -- retry, skip, purge, pause, resume, replay, abandon, reset, seed, dismiss
  selection  jsonb       NOT NULL,                       -- what was asked for: the filters as given
  why        text        NOT NULL DEFAULT '',
  rows       bigint      NOT NULL CONSTRAINT audit_rows_count_up CHECK (rows >= 0)
);
CREATE INDEX audit_by_time ON relay.audit (at);

-- Which aggregates an act touched, so that the story of one can be told. An act on everything has selection.all = true and no rows here.
CREATE TABLE relay.audit_aggregate (
  aggregate_type text   NOT NULL,
  aggregate_id   text   NOT NULL,
  audit_id       bigint NOT NULL REFERENCES relay.audit (id),
  PRIMARY KEY (aggregate_id, aggregate_type, audit_id)
);

-- Look-ups by aggregate: show, replay, gap repair. What it costs producers is measured, see the README. Producers wait
-- while it is built: a migration is one transaction, so CREATE INDEX CONCURRENTLY is not to be had.
CREATE INDEX outbox_by_aggregate ON relay.outbox (aggregate_id, aggregate_type, seq);

-- Figures that the owner writes with its checkpoints, for `relay status`.
ALTER TABLE relay.outbox_cursor
  ADD COLUMN published     bigint NOT NULL DEFAULT 0,  -- messages confirmed since the first run; what was published again counts again
  ADD COLUMN rate          real   NOT NULL DEFAULT 0,  -- of them per second, over the last seconds before updated_at
  ADD COLUMN last_error    text,                       -- what ended the last session that failed
  ADD COLUMN last_error_at timestamptz,
  ADD CONSTRAINT outbox_cursor_published_counts_up CHECK (published >= 0 AND rate >= 0);

-- True when a row has been published as far as the persisted cursor of its shard knows (or has been parked: look there too).
CREATE FUNCTION relay.outbox_is_read(xid xid8, id bigint, snapshot pg_snapshot, window_snapshot pg_snapshot, after_id bigint) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT pg_visible_in_snapshot($1, $3) OR ($2 <= $5 AND $4 IS NOT NULL AND pg_visible_in_snapshot($1, $4))
$$;

-- Rows that an operator took out of the sequence: whoever publishes them (again) publishes a tombstone with the same number.
CREATE TABLE relay.outbox_tombstone (
  id       bigint   PRIMARY KEY,  -- relay.outbox.id; the content stays in the log until its slot is emptied
  shard    smallint NOT NULL,
  act      text     NOT NULL CONSTRAINT outbox_tombstone_act_is_known CHECK (act IN ('skip', 'purge')),
  audit_id bigint   NOT NULL REFERENCES relay.audit (id)
);

-- What must not be published for now: one aggregate, a type of aggregates, a type of events, or a whole shard.
CREATE TABLE relay.outbox_pause (
  id             bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  scope          text        NOT NULL,
  aggregate_type text,
  aggregate_id   text,
  event_type     text,
  shard          smallint,
  paused_at      timestamptz NOT NULL DEFAULT now(),
  audit_id       bigint      NOT NULL REFERENCES relay.audit (id),
  CONSTRAINT outbox_pause_scope_says_what CHECK (
    CASE scope
      WHEN 'aggregate'      THEN num_nonnulls(aggregate_type, aggregate_id) = 2 AND num_nonnulls(event_type, shard) = 0
      WHEN 'aggregate_type' THEN aggregate_type IS NOT NULL AND num_nonnulls(aggregate_id, event_type, shard) = 0
      WHEN 'event_type'     THEN event_type IS NOT NULL AND num_nonnulls(aggregate_type, aggregate_id, shard) = 0
      WHEN 'shard'          THEN shard IS NOT NULL AND num_nonnulls(aggregate_type, aggregate_id, event_type) = 0
      ELSE false
    END)
);
CREATE UNIQUE INDEX outbox_pause_once ON relay.outbox_pause
  (scope, coalesce(aggregate_type, ''), coalesce(aggregate_id, ''), coalesce(event_type, ''), coalesce(shard, 0));

-- True when a pause holds a row like this one. (A paused shard is another matter: nothing of it is even read.)
CREATE FUNCTION relay.outbox_is_paused(aggregate_type text, aggregate_id text, event_type text) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE AS $$
  SELECT EXISTS (
    SELECT FROM relay.outbox_pause p
    WHERE CASE p.scope
            WHEN 'aggregate'      THEN p.aggregate_id = $2 AND p.aggregate_type = $1
            WHEN 'aggregate_type' THEN p.aggregate_type = $1
            WHEN 'event_type'     THEN p.event_type = $3
            ELSE false
          END)
$$;

-- A parked row can also be one that is paused (state paused: until resumed), and a tombstone of what was published before.
ALTER TABLE relay.outbox_parked
  DROP CONSTRAINT outbox_parked_reason_is_known,
  DROP CONSTRAINT outbox_parked_state_is_known,
  ADD CONSTRAINT outbox_parked_reason_is_known
    CHECK (reason IN ('unroutable', 'nacked', 'refused', 'too_large', 'unencodable', 'unconfirmed', 'behind', 'paused', 'tombstone')),
  -- waiting: behind another row of its aggregate; retrying: tried again at next_attempt_at; stuck: waits for an operator;
  -- paused: an operator's pause holds it, whatever its reason
  ADD CONSTRAINT outbox_parked_state_is_known CHECK (state IN ('waiting', 'retrying', 'stuck', 'paused'));
CREATE INDEX outbox_parked_paused ON relay.outbox_parked (shard) WHERE state = 'paused';
-- What is tried alone and everything else, each with a queue of its own: however long one is, the other does not wait for it.
CREATE INDEX outbox_parked_together ON relay.outbox_parked (shard, next_attempt_at)
  WHERE state = 'retrying' AND reason NOT IN ('refused', 'unconfirmed');
CREATE INDEX outbox_parked_alone ON relay.outbox_parked (shard, next_attempt_at)
  WHERE state = 'retrying' AND reason IN ('refused', 'unconfirmed');

-- A replay from the retained log: where it got to, so that it can be resumed.
CREATE TABLE relay.outbox_replay (
  id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  audit_id   bigint      NOT NULL REFERENCES relay.audit (id),
  selection  jsonb       NOT NULL,
  to_queue   text,                            -- null: to everyone, through the exchange
  after_id   bigint      NOT NULL DEFAULT 0,  -- all of the selection up to here has been sent and confirmed
  last_id    bigint      NOT NULL,            -- nothing above it belongs to this replay: it was published later
  total      bigint      NOT NULL,            -- rows of the selection when it began
  sent       bigint      NOT NULL DEFAULT 0,
  state      text        NOT NULL DEFAULT 'unfinished',
  started_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT outbox_replay_state_is_known CHECK (state IN ('unfinished', 'done', 'abandoned'))
);

-- Why a slot of the ring must be kept, whatever the age of its rows; null: for no reason. Looks only at indexes.
CREATE FUNCTION relay.outbox_slot_is_needed(slot smallint) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
  WITH bounds AS MATERIALIZED (
    SELECT min(first_id) AS first_id, max(last_id) AS last_id
    FROM relay.outbox_cursor c CROSS JOIN LATERAL (
      SELECT (SELECT o.id FROM relay.outbox o WHERE o.slot = $1 AND o.shard = c.shard ORDER BY o.id LIMIT 1) AS first_id,
             (SELECT o.id FROM relay.outbox o WHERE o.slot = $1 AND o.shard = c.shard ORDER BY o.id DESC LIMIT 1) AS last_id
    ) s
  )
  SELECT CASE
    WHEN $1 = extract(epoch FROM clock_timestamp())::bigint / 172800 % 4 THEN 'current'
    WHEN EXISTS (
      SELECT FROM relay.outbox_cursor c
      WHERE EXISTS (SELECT FROM relay.outbox o WHERE o.slot = $1 AND o.shard = c.shard AND o.xid >= pg_snapshot_xmax(c.snapshot))
         OR EXISTS (SELECT FROM pg_snapshot_xip(c.snapshot) AS x
                    WHERE EXISTS (SELECT FROM relay.outbox o WHERE o.slot = $1 AND o.shard = c.shard AND o.xid = x OFFSET 0))
    ) THEN 'unpublished'
    WHEN EXISTS (
      SELECT FROM bounds b JOIN relay.outbox_parked p ON p.id BETWEEN b.first_id AND b.last_id
      WHERE EXISTS (SELECT FROM relay.outbox o WHERE o.slot = $1 AND o.shard = p.shard AND o.id = p.id OFFSET 0)
    ) THEN 'parked'
    WHEN EXISTS (
      SELECT FROM bounds b JOIN relay.outbox_replay r ON r.after_id < b.last_id AND r.last_id >= b.first_id
      WHERE r.state = 'unfinished'
    ) THEN 'replay'
  END
$$;

-- Empties a slot and returns null, or returns why it cannot. `seen`: in this snapshot all rows of the slot were read and found old.
-- One statement, so that the lock that keeps everybody from reading the log never waits for a client; and a short wait for it.
CREATE FUNCTION relay.outbox_empty_slot(slot smallint, seen pg_snapshot) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET lock_timeout = '200ms' AS $$
DECLARE
  leaf constant text := format('relay.outbox_%s', slot);
  reason text;
BEGIN
  IF current_setting('transaction_isolation') <> 'read committed' THEN  -- else no statement sees what the lock waited for
    RAISE EXCEPTION 'relay.outbox_empty_slot: this transaction is %, it must be READ COMMITTED', upper(current_setting('transaction_isolation'))
      USING ERRCODE = 'invalid_transaction_state', HINT = 'Start it with BEGIN ISOLATION LEVEL READ COMMITTED.';
  END IF;
  BEGIN
    EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', leaf);
  EXCEPTION WHEN lock_not_available THEN
    RETURN 'locked';  -- by a producer that has written into it and not ended, or by somebody who reads for long
  END;
  -- Every row that is in it now is committed, and each statement from here on sees all of them.
  reason := relay.outbox_slot_is_needed(slot);
  IF reason IS NULL AND EXISTS (
    SELECT FROM relay.outbox_cursor c
    WHERE EXISTS (SELECT FROM relay.outbox o WHERE o.slot = outbox_empty_slot.slot AND o.shard = c.shard AND o.xid >= pg_snapshot_xmax(seen))
       OR EXISTS (SELECT FROM pg_snapshot_xip(seen) AS x
                  WHERE EXISTS (SELECT FROM relay.outbox o WHERE o.slot = outbox_empty_slot.slot AND o.shard = c.shard AND o.xid = x OFFSET 0))
  ) THEN
    reason := 'arriving';  -- rows that the scan has not seen
  END IF;
  IF reason IS NULL THEN
    EXECUTE format('TRUNCATE ONLY %s', leaf);
  END IF;
  RETURN reason;
END
$$;
