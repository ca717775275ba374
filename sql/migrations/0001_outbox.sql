-- The outbox: an append-only log that producers INSERT into and nobody updates.
-- What the relay knows about its own progress is one row a shard (outbox_cursor) and the rows it had to park.

CREATE SCHEMA IF NOT EXISTS relay;
REVOKE ALL ON SCHEMA relay FROM PUBLIC;

CREATE SEQUENCE relay.outbox_id_seq AS bigint;

-- One small row an aggregate, for ever: the number of its latest event. Its row lock, held to the end of the
-- producer's transaction, is what makes order of seq = order of commit. Led by the selective column, so that
-- every plan finds it by key even before the first ANALYZE.
CREATE TABLE relay.outbox_aggregate (
  aggregate_type text   NOT NULL,
  aggregate_id   text   NOT NULL,
  last_seq       bigint NOT NULL CONSTRAINT outbox_aggregate_counts_from_one CHECK (last_seq >= 1),
  PRIMARY KEY (aggregate_id, aggregate_type)
) WITH (fillfactor = 80);

CREATE TABLE relay.outbox (
  id             bigint      NOT NULL,  -- assigned: after the counter's lock, so id order = seq order in an aggregate
  xid            xid8        NOT NULL,  -- assigned: the producer's transaction; a snapshot tells whether it is new
  slot           smallint    NOT NULL DEFAULT (extract(epoch FROM clock_timestamp())::bigint / 172800 % 4),
  shard          smallint    NOT NULL,  -- assigned
  aggregate_type text,
  aggregate_id   text,                  -- null: an event without order, only deduplicated
  seq            bigint,                -- assigned or checked: 1, 2, 3 ... without a hole
  event_type     text        NOT NULL,
  payload        jsonb,
  body           bytea,                 -- instead of payload, for what is not JSON
  content_type   text,                  -- null: application/json for payload, application/octet-stream for body
  headers        jsonb,
  routing_key    text,                  -- null: {aggregate_type}.{event_type}
  size           integer     NOT NULL,  -- assigned: bytes of payload or body, so that a reader can bound its memory
  created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),

  CONSTRAINT outbox_id_is_positive CHECK (id > 0),
  CONSTRAINT outbox_shard_is_not_negative CHECK (shard >= 0),
  CONSTRAINT outbox_aggregate_type_is_a_name CHECK (aggregate_type ~ '^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,99}$'),
  CONSTRAINT outbox_aggregate_id_is_1_to_512_bytes CHECK (octet_length(aggregate_id) BETWEEN 1 AND 512),
  CONSTRAINT outbox_aggregate_id_needs_a_type CHECK (aggregate_id IS NULL OR aggregate_type IS NOT NULL),
  CONSTRAINT outbox_seq_goes_with_an_aggregate CHECK ((seq IS NULL) = (aggregate_id IS NULL)),
  CONSTRAINT outbox_seq_counts_from_one CHECK (seq >= 1),
  CONSTRAINT outbox_event_type_is_a_name CHECK (event_type ~ '^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,99}$'),
  CONSTRAINT outbox_event_type_is_not_reserved CHECK (event_type NOT LIKE 'relay.%'),
  CONSTRAINT outbox_payload_or_body CHECK (num_nonnulls(payload, body) = 1),
  CONSTRAINT outbox_size_is_at_most_16_mib CHECK (size BETWEEN 0 AND 16777216),
  CONSTRAINT outbox_content_type_is_printable CHECK (content_type ~ '^[ -~]{1,100}$'),
  -- What AMQP and every client's calendar can carry; a default or a historical import is in it.
  CONSTRAINT outbox_created_at_is_from_1970_to_9999 CHECK (created_at >= '1970-01-01 00:00Z' AND created_at < '9999-12-31 00:00Z'),
  CONSTRAINT outbox_routing_key_is_1_to_255_bytes CHECK (octet_length(routing_key) BETWEEN 1 AND 255)
) PARTITION BY LIST (slot);

-- The ring: a slot is two days, four slots go round in eight. A slot is emptied by TRUNCATE when all in it is published and old.
CREATE TABLE relay.outbox_0 PARTITION OF relay.outbox FOR VALUES IN (0);
CREATE TABLE relay.outbox_1 PARTITION OF relay.outbox FOR VALUES IN (1);
CREATE TABLE relay.outbox_2 PARTITION OF relay.outbox FOR VALUES IN (2);
CREATE TABLE relay.outbox_3 PARTITION OF relay.outbox FOR VALUES IN (3);

-- A publication FOR ALL TABLES refuses every UPDATE of a table without an identity, and re-basing after a restore is one.
ALTER TABLE relay.outbox_0 REPLICA IDENTITY FULL;
ALTER TABLE relay.outbox_1 REPLICA IDENTITY FULL;
ALTER TABLE relay.outbox_2 REPLICA IDENTITY FULL;
ALTER TABLE relay.outbox_3 REPLICA IDENTITY FULL;

CREATE INDEX outbox_by_xid ON relay.outbox (shard, xid);  -- the first page of a window: what is new
CREATE INDEX outbox_by_id  ON relay.outbox (shard, id);   -- the following pages, and look-ups

-- Headers travel as AMQP headers: a flat object of strings, whole numbers and booleans, at most 16 KiB, no name of ours.
CREATE FUNCTION relay.headers_are_valid(headers jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
  -- The search_path is pinned because the body is parsed at each use, in the session of the producer: its operators could be anybody's.
  SELECT jsonb_typeof(headers) = 'object'
     AND octet_length(headers::text) <= 16384
     AND NOT EXISTS (
       SELECT FROM jsonb_each(headers) AS h (name, value)
       WHERE h.name !~ '^[!-~]{1,128}$'
          OR h.name IN ('x-aggregate-type', 'x-aggregate-id', 'x-sequence', 'x-content-digest', 'x-tag')
          OR h.name LIKE 'x-relay-%'
          OR CASE jsonb_typeof(h.value)
               WHEN 'string' THEN false
               WHEN 'boolean' THEN false
               WHEN 'number' THEN h.value #>> '{}' !~ '^-?[0-9]{1,19}$'  -- 1.0 would travel as a 32-bit float
                               OR (h.value #>> '{}')::numeric NOT BETWEEN -9223372036854775808 AND 9223372036854775807
               ELSE true
             END)
$$;
ALTER TABLE relay.outbox ADD CONSTRAINT outbox_headers_are_flat_small_and_not_ours
  CHECK (headers IS NULL OR relay.headers_are_valid(headers));

-- How many shards the log is divided into. Changed only by a migration step that also adds their cursors.
CREATE FUNCTION relay.outbox_shards() RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE AS 'SELECT 1';

-- Assigns, in exactly this order: size (checked), seq, xid, id, shard; then sees to the wake-up.
-- SECURITY DEFINER, so that a producer needs the INSERT privilege and nothing else.
CREATE FUNCTION relay.outbox_assign() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  next_seq bigint;
BEGIN
  NEW.size := coalesce(octet_length(NEW.body), octet_length(NEW.payload::text), 0);
  IF NEW.size > 16777216 THEN
    RAISE EXCEPTION 'relay.outbox: the payload of % %/% is % bytes, the limit is 16777216 (16 MiB)',
        NEW.event_type, NEW.aggregate_type, NEW.aggregate_id, NEW.size
      USING ERRCODE = 'check_violation', CONSTRAINT = 'outbox_size_is_at_most_16_mib', SCHEMA = 'relay', TABLE = 'outbox',
            HINT = 'Store large content elsewhere and send a reference to it.';
  END IF;

  IF NEW.aggregate_id IS NOT NULL THEN
    IF NEW.aggregate_type IS NULL THEN
      RAISE EXCEPTION 'relay.outbox: aggregate_id % was given without an aggregate_type', left(NEW.aggregate_id, 100)
        USING ERRCODE = 'check_violation', CONSTRAINT = 'outbox_aggregate_id_needs_a_type', SCHEMA = 'relay', TABLE = 'outbox';
    END IF;
    IF octet_length(NEW.aggregate_id) NOT BETWEEN 1 AND 512 THEN
      RAISE EXCEPTION 'relay.outbox: the aggregate_id % is % bytes, it must be 1 to 512',
          left(NEW.aggregate_id, 40), octet_length(NEW.aggregate_id)
        USING ERRCODE = 'check_violation', CONSTRAINT = 'outbox_aggregate_id_is_1_to_512_bytes', SCHEMA = 'relay', TABLE = 'outbox';
    END IF;
    INSERT INTO relay.outbox_aggregate AS a (aggregate_type, aggregate_id, last_seq)
    VALUES (NEW.aggregate_type, NEW.aggregate_id, 1)
    ON CONFLICT (aggregate_id, aggregate_type) DO UPDATE SET last_seq = a.last_seq + 1
    RETURNING a.last_seq INTO next_seq;
    IF NEW.seq IS DISTINCT FROM next_seq AND NEW.seq IS NOT NULL THEN
      RAISE EXCEPTION 'relay.outbox: seq % was given for %/%, but the next one is %',
          NEW.seq, NEW.aggregate_type, NEW.aggregate_id, next_seq
        USING ERRCODE = 'serialization_failure',
              HINT = 'Somebody else wrote to this aggregate since you read it: read it again and retry, or leave seq out.';
    END IF;
    NEW.seq := next_seq;
  END IF;

  NEW.xid := pg_current_xact_id();
  NEW.id := nextval('relay.outbox_id_seq');  -- after the counter's lock, never as a default: a default runs before it
  NEW.shard := CASE relay.outbox_shards()
    WHEN 1 THEN 0
    ELSE abs(hashtextextended(coalesce(NEW.aggregate_type || '/' || NEW.aggregate_id, NEW.id::text), 0) % relay.outbox_shards())
  END;

  -- The barrier: granted, the relay is awake (or down) and cannot fall asleep before this transaction ends.
  -- Refused, it is asleep and wants to be told.
  IF NOT pg_try_advisory_xact_lock_shared(727002, NEW.shard) THEN
    PERFORM pg_notify('relay_outbox', NEW.shard::text);
  END IF;
  RETURN NEW;
END
$$;
CREATE TRIGGER outbox_assign BEFORE INSERT ON relay.outbox FOR EACH ROW EXECUTE FUNCTION relay.outbox_assign();

-- The plain INSERT as a function call; returns the sequence number (null for an event without an aggregate).
CREATE FUNCTION relay.emit(
  aggregate_type text, aggregate_id text, event_type text, payload jsonb,
  headers jsonb DEFAULT NULL, routing_key text DEFAULT NULL, seq bigint DEFAULT NULL
) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload, headers, routing_key, seq)
  VALUES ($1, $2, $3, $4, $5, $6, $7)
  RETURNING seq
$$;

-- How far a shard has been published. `snapshot`: everything visible in it has been. `window_snapshot`: null, or the
-- snapshot whose backlog is being paged through; within it, all up to `after_id` has been.
CREATE TABLE relay.outbox_cursor (
  shard           smallint    PRIMARY KEY CONSTRAINT outbox_cursor_shard_is_not_negative CHECK (shard >= 0),
  snapshot        pg_snapshot NOT NULL DEFAULT '1:1:',
  window_snapshot pg_snapshot,
  after_id        bigint      NOT NULL DEFAULT 0,
  high_id         bigint      NOT NULL DEFAULT 0,  -- no row above it was ever published: what a restore can rely on
  epoch           bigint      NOT NULL DEFAULT 0,  -- the fence: only the owner that set it may move the cursor
  owner           text,                            -- who set it (host, process), for people
  source          text,                            -- the name under which this log is published, fixed by the first run
  cluster_id      bigint,                          -- the PostgreSQL cluster whose transaction ids these are
  updated_at      timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT outbox_cursor_after_id_needs_a_window CHECK (window_snapshot IS NOT NULL OR after_id = 0),
  CONSTRAINT outbox_cursor_counts_up CHECK (after_id >= 0 AND high_id >= 0 AND epoch >= 0)
) WITH (fillfactor = 50);
-- With the cluster's identity from the start, so that a restore is noticed even where no relay ever ran.
INSERT INTO relay.outbox_cursor (shard, cluster_id) SELECT 0, system_identifier FROM pg_control_system();

-- Rows that could not be published, and every later row of their aggregate. The content stays in relay.outbox.
CREATE TABLE relay.outbox_parked (
  id              bigint      PRIMARY KEY,  -- relay.outbox.id
  shard           smallint    NOT NULL,
  aggregate_type  text,
  aggregate_id    text,
  seq             bigint,
  reason          text        NOT NULL,
  detail          text,
  state           text        NOT NULL,
  attempts        integer     NOT NULL DEFAULT 0,
  parked_at       timestamptz NOT NULL DEFAULT now(),
  next_attempt_at timestamptz,
  CONSTRAINT outbox_parked_reason_is_known
    CHECK (reason IN ('unroutable', 'nacked', 'refused', 'too_large', 'unencodable', 'unconfirmed', 'behind')),
  -- waiting: behind another row of its aggregate; retrying: tried again at next_attempt_at; stuck: waits for an operator
  CONSTRAINT outbox_parked_state_is_known CHECK (state IN ('waiting', 'retrying', 'stuck')),
  CONSTRAINT outbox_parked_retrying_has_a_time CHECK ((state = 'retrying') = (next_attempt_at IS NOT NULL)),
  CONSTRAINT outbox_parked_waiting_is_behind CHECK (state <> 'waiting' OR reason = 'behind'),
  CONSTRAINT outbox_parked_seq_goes_with_an_aggregate CHECK ((seq IS NULL) = (aggregate_id IS NULL)),
  CONSTRAINT outbox_parked_attempts_count_up CHECK (attempts >= 0)
);
CREATE UNIQUE INDEX outbox_parked_by_aggregate ON relay.outbox_parked (aggregate_id, aggregate_type, seq) WHERE aggregate_id IS NOT NULL;
CREATE INDEX outbox_parked_due ON relay.outbox_parked (shard, next_attempt_at) WHERE state = 'retrying';
