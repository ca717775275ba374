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
  -- False only while a predecessor of its aggregate is in here: then a taker need not look at it, however many there are.
  leads          boolean     NOT NULL DEFAULT true,
  CONSTRAINT inbox_seq_goes_with_an_aggregate CHECK ((seq IS NULL) = (aggregate_id IS NULL)),
  CONSTRAINT inbox_unordered_leads CHECK (leads OR aggregate_id IS NOT NULL),
  CONSTRAINT inbox_attempts_count_up CHECK (attempts >= 0)
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 2000);  -- a queue: what was taken is in the way of what is next
CREATE INDEX inbox_by_aggregate ON relay.inbox (aggregate_id, aggregate_type, source, consumer, seq) WHERE aggregate_id IS NOT NULL;
CREATE INDEX inbox_leading ON relay.inbox (consumer, id) WHERE leads AND next_take_at IS NULL;
CREATE INDEX inbox_put_off ON relay.inbox (consumer, next_take_at, id) WHERE leads AND next_take_at IS NOT NULL;  -- only what is due is read
CREATE INDEX inbox_failed ON relay.inbox (id) WHERE attempts > 0;  -- few: what `relay stuck` looks for

-- Whoever deletes of an aggregate: the first of what is left leads from now on. Two that delete rows of one aggregate at the same
-- time should exclude each other by a lock on its first row, as takers do. Should they not: a row that another has locked may be about
-- to go, so it is the first that nobody has locked, and it stays locked until the commit. So whoever comes after it sees what is left.
CREATE FUNCTION relay.inbox_let_successors_lead() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off AS $$
BEGIN
  UPDATE relay.inbox SET leads = true
  WHERE NOT leads AND id = ANY (ARRAY(
    SELECT first.id
    FROM (SELECT DISTINCT g.aggregate_id, g.aggregate_type, g.source, g.consumer FROM gone g WHERE g.aggregate_id IS NOT NULL) AS a
    CROSS JOIN LATERAL (
      SELECT i.id FROM relay.inbox i
      WHERE i.aggregate_id = a.aggregate_id AND i.aggregate_type = a.aggregate_type AND i.source = a.source AND i.consumer = a.consumer
      ORDER BY i.seq LIMIT 1
      FOR NO KEY UPDATE SKIP LOCKED
    ) AS first
  ));
  RETURN NULL;
END
$$;
CREATE TRIGGER inbox_let_successors_lead AFTER DELETE ON relay.inbox REFERENCING OLD TABLE AS gone
  FOR EACH STATEMENT EXECUTE FUNCTION relay.inbox_let_successors_lead();

-- The body as jsonb; null where it is not JSON, or JSON that jsonb cannot hold (\u0000, a number or a depth beyond its limits).
CREATE FUNCTION relay.json_of(body bytea) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE STRICT SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  RETURN convert_from(body, 'UTF8')::jsonb;
EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
  RETURN NULL;
END
$$;

-- Takes up to n messages (fewer when they are large: 64 MiB, but at least one), oldest first, out of the table and into the caller's
-- transaction: a commit is the receipt, a rollback gives them back. In one aggregate they come as 1, 2, 3 ..., and while a
-- transaction has any of them, no other taker gets any of that aggregate. A message that `relay.inbox_fail` has put off, and what
-- follows it, stays. The consumer null: of any consumer.
-- The lock that keeps two takers from one aggregate is that on its first row. It is found without a lock and then tried: asked to
-- skip what is locked, PostgreSQL would return the second row as the first. What follows it is read by another statement, whose
-- snapshot is younger than the lock: so it shows whatever was committed by the lock's last owner. That is why READ COMMITTED is needed.
-- What was put off and is due comes first, by an index of its own: what is not due yet, or waits for an operator, is not even looked at.
-- The planner settings keep every step on its index, also before the first ANALYZE and whatever the caller's session has set.
CREATE FUNCTION relay.inbox_take(n integer DEFAULT 100, consumer text DEFAULT NULL) RETURNS SETOF relay.event
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_indexscan = on SET jit = off SET max_parallel_workers_per_gather = 0 AS $$
#variable_conflict use_column
DECLARE
  consumers text[] := ARRAY[$2];
  want      integer := n;
  room      bigint := 67108864;  -- bytes
  slice     integer := greatest(n / 4, 1);  -- rows that are looked at: not all at first, for each may have successors to take
  is_due    boolean := true;  -- what was put off and is due; then what was not put off
  now_      timestamptz := clock_timestamp();
  after_due timestamptz := '-infinity';
  after     bigint := 0;
  looked    integer;
  firsts    bigint[];
  part      bigint[];
  bytes     bigint;
  taken     bigint[] := '{}';
BEGIN
  IF n IS NULL OR n < 1 THEN
    RAISE EXCEPTION 'relay.inbox_take: n is %, it must be at least 1', n USING ERRCODE = 'invalid_parameter_value';
  END IF;
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'relay.inbox_take: this transaction is %, it must be READ COMMITTED', upper(current_setting('transaction_isolation'))
      USING ERRCODE = 'invalid_transaction_state', HINT = 'Start it with BEGIN ISOLATION LEVEL READ COMMITTED.';
  END IF;
  IF $2 IS NULL THEN
    WITH RECURSIVE known AS (
      SELECT least(
        (SELECT i.consumer FROM relay.inbox i WHERE i.leads AND i.next_take_at IS NULL ORDER BY i.consumer LIMIT 1),
        (SELECT i.consumer FROM relay.inbox i WHERE i.leads AND i.next_take_at IS NOT NULL ORDER BY i.consumer LIMIT 1)) AS consumer
      UNION ALL
      SELECT least(
        (SELECT i.consumer FROM relay.inbox i WHERE i.leads AND i.next_take_at IS NULL AND i.consumer > known.consumer
         ORDER BY i.consumer LIMIT 1),
        (SELECT i.consumer FROM relay.inbox i WHERE i.leads AND i.next_take_at IS NOT NULL AND i.consumer > known.consumer
         ORDER BY i.consumer LIMIT 1))
      FROM known WHERE known.consumer IS NOT NULL
    )
    SELECT coalesce(array_agg(known.consumer), '{}') FROM known WHERE known.consumer IS NOT NULL INTO consumers;
  END IF;

  WHILE want > 0 AND room > 0 LOOP
    -- Each slice in two statements: lock the first row of its aggregates ...
    WITH leaders AS MATERIALIZED (
      SELECT l.*
      FROM unnest(consumers) AS c (name)
      CROSS JOIN LATERAL (
        (SELECT i.id, i.next_take_at AS due_at, i.consumer, i.source, i.aggregate_type, i.aggregate_id FROM relay.inbox i
         WHERE is_due AND i.leads AND i.consumer = c.name AND i.next_take_at <= now_ AND (i.next_take_at, i.id) > (after_due, after)
         ORDER BY i.next_take_at, i.id LIMIT slice)
        UNION ALL
        (SELECT i.id, NULL, i.consumer, i.source, i.aggregate_type, i.aggregate_id FROM relay.inbox i
         WHERE NOT is_due AND i.leads AND i.next_take_at IS NULL AND i.consumer = c.name AND i.id > after
         ORDER BY i.id LIMIT slice)
      ) AS l
      ORDER BY l.due_at, l.id LIMIT slice
    )
    SELECT (SELECT count(*) FROM leaders), last.id, last.due_at, ARRAY(
      SELECT i.id FROM relay.inbox i
      WHERE i.id = ANY (ARRAY(
          SELECT coalesce(first.id, l.id)
          FROM (
            SELECT min(l.id) AS id, l.consumer, l.source, l.aggregate_type, l.aggregate_id FROM leaders l
            GROUP BY l.consumer, l.source, l.aggregate_type, l.aggregate_id, CASE WHEN l.aggregate_id IS NULL THEN l.id END
          ) AS l
          LEFT JOIN LATERAL (
            SELECT f.id FROM relay.inbox f
            WHERE f.aggregate_id = l.aggregate_id AND f.aggregate_type = l.aggregate_type AND f.source = l.source AND f.consumer = l.consumer
            ORDER BY f.seq LIMIT 1
          ) AS first ON true
        ))
        AND (i.next_take_at IS NULL OR i.next_take_at <= clock_timestamp())
        AND i.id <> ALL (taken)
      ORDER BY i.id LIMIT want
      FOR UPDATE SKIP LOCKED
    )
    FROM (SELECT 1) AS always LEFT JOIN (SELECT l.id, l.due_at FROM leaders l ORDER BY l.due_at DESC, l.id DESC LIMIT 1) AS last ON true
    INTO looked, after, after_due, firsts;
    IF looked = 0 THEN
      EXIT WHEN NOT is_due;
      is_due := false;
      after := 0;
      CONTINUE;
    END IF;

    -- ... then, with a snapshot that is younger than the locks, see how far each can be taken.
    SELECT array_agg(r.id), sum(r.size)
    FROM (
      SELECT run.id, run.size, row_number() OVER w AS place, sum(run.size) OVER w - run.size AS bytes_before
      FROM relay.inbox first
      CROSS JOIN LATERAL (
        SELECT o.id, o.seq, o.size, max(o.id) OVER (ORDER BY o.seq) AS turn, bool_and(o.is_free) OVER (ORDER BY o.seq) AS is_free
        FROM (
          SELECT i.id, i.seq, octet_length(i.body) AS size, i.next_take_at IS NULL OR i.next_take_at <= clock_timestamp() AS is_free
          FROM relay.inbox i
          WHERE i.aggregate_id = first.aggregate_id AND i.aggregate_type = first.aggregate_type
            AND i.source = first.source AND i.consumer = first.consumer
          ORDER BY i.seq LIMIT least(want, 4::bigint * want / greatest(cardinality(firsts), 1) + 1)
        ) AS o
        UNION ALL
        SELECT first.id, NULL, octet_length(first.body), first.id, true WHERE first.aggregate_id IS NULL
      ) AS run
      WHERE first.id = ANY (firsts) AND run.is_free
      WINDOW w AS (ORDER BY run.turn, run.seq)
    ) AS r
    WHERE r.place <= want AND r.bytes_before < room
    INTO part, bytes;
    IF part IS NULL THEN
      slice := least(slice * 4, 10000);
    ELSE
      taken := taken || part;
      want := want - cardinality(part);
      room := room - bytes;
      slice := greatest(slice, want);
    END IF;
  END LOOP;

  RETURN QUERY
  WITH gone AS (DELETE FROM relay.inbox i WHERE i.id = ANY (taken) RETURNING i.*)
  SELECT g.id, g.consumer, g.source, g.aggregate_type, g.aggregate_id, g.seq, g.event_type, g.message_id, g.content_type, g.headers,
         g.occurred_at, relay.json_of(g.body), g.body
  FROM gone g
  ORDER BY max(g.id) OVER (PARTITION BY g.consumer, g.source, g.aggregate_type, g.aggregate_id,
                                        CASE WHEN g.aggregate_id IS NULL THEN g.id END ORDER BY g.seq), g.seq;
END
$$;

-- A taker that could not handle a message rolls back, and says so in a new transaction: the message, and what follows it in its
-- aggregate, is not taken again before `retry_in` has passed (null: not before an operator releases it). False: it is not there any more.
-- What precedes it can be taken: that leads now, in case it was this message that led before it.
CREATE FUNCTION relay.inbox_fail(id bigint, error text, retry_in interval DEFAULT '10 s') RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off AS $$
BEGIN
  UPDATE relay.inbox i SET leads = true
  WHERE NOT i.leads AND i.id = (
    SELECT f.id
    FROM relay.inbox own JOIN LATERAL (
      SELECT o.id FROM relay.inbox o
      WHERE o.aggregate_id = own.aggregate_id AND o.aggregate_type = own.aggregate_type AND o.source = own.source
        AND o.consumer = own.consumer
      ORDER BY o.seq LIMIT 1
    ) AS f ON true
    WHERE own.id = $1);
  UPDATE relay.inbox i
  SET attempts = i.attempts + 1, error = left($2, 2000), next_take_at = coalesce(clock_timestamp() + $3, 'infinity')
  WHERE i.id = $1;
  RETURN FOUND;
END
$$;
