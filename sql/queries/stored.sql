-- Store mode: what the sidecar writes into relay.inbox, in the transaction that moves the cursors.

-- name: store_events
-- In the order of the arrays: the first of each aggregate in this transaction leads, and what comes with it follows. It need not lead
-- where the aggregate has rows before it whose first one no taker has at this moment: that one is locked by us until the commit, so
-- whoever takes it later sees what was added, and lets it lead in its turn. So nothing that waits is in the way of other aggregates,
-- and the first row of an aggregate always leads.
-- $1 consumer, arrays: $2 sources (text[]), $3 aggregate types (text[]), $4 aggregate ids (text[]), $5 seqs (bigint[]),
-- $6 event types (text[]), $7 message ids (text[]), $8 content types (text[]), $9 headers (text[], JSON),
-- $10 occurred at (timestamptz[]), $11 bodies (bytea[]), $12 whether no lower number of its aggregate precedes it (boolean[])
WITH fresh AS MATERIALIZED (
  SELECT f.*
  FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[], $9::text[], $10::timestamptz[],
              $11::bytea[], $12::boolean[]) WITH ORDINALITY
    AS f (source, aggregate_type, aggregate_id, seq, event_type, message_id, content_type, headers, occurred_at, body, is_first, place)
), before AS MATERIALIZED (
  SELECT first.id, f.place
  FROM (SELECT place, source, aggregate_type, aggregate_id, seq FROM fresh WHERE is_first AND aggregate_id IS NOT NULL) AS f
  CROSS JOIN LATERAL (
    SELECT i.id, i.seq FROM relay.inbox i
    WHERE i.aggregate_id = f.aggregate_id AND i.aggregate_type = f.aggregate_type AND i.source = f.source AND i.consumer = $1
    ORDER BY i.seq LIMIT 1
  ) AS first
  WHERE first.seq < f.seq
), locked AS MATERIALIZED (
  SELECT i.id FROM relay.inbox i WHERE i.id = ANY (ARRAY(SELECT before.id FROM before)) FOR NO KEY UPDATE SKIP LOCKED
), behind AS (
  SELECT before.place FROM before JOIN locked USING (id)
)
INSERT INTO relay.inbox (consumer, source, aggregate_type, aggregate_id, seq, event_type, message_id, content_type, headers,
                         occurred_at, body, leads)
SELECT $1, f.source, f.aggregate_type, f.aggregate_id, f.seq, f.event_type, f.message_id, f.content_type, f.headers::jsonb,
       f.occurred_at, f.body, f.is_first AND behind.place IS NULL
FROM fresh f LEFT JOIN behind USING (place)
ORDER BY f.place

-- name: let_first_lead
-- Lets the first stored row of an aggregate lead where it does not: no transaction of ours leaves such a row, but who deletes rows by
-- hand may, and no taker ever looks at it. One that somebody has locked is left alone. Skips through the index from one aggregate to the
-- next, $6 at most, from where the last walk ended. Returns which (id, aggregate), and where the walk ended (id null; ids null: no more).
-- $1 consumer (whose rows are mended), to start after ('' for all): $2 aggregate id, $3 aggregate type, $4 source, $5 consumer;
-- $6 aggregates (integer)
WITH RECURSIVE walk AS (
  SELECT $2::text AS aggregate_id, $3::text AS aggregate_type, $4::text AS source, $5::text AS consumer, NULL::bigint AS id, true AS leads, 0 AS n
  UNION ALL
  SELECT later.aggregate_id, later.aggregate_type, later.source, later.consumer, later.id, later.leads, walk.n + 1
  FROM walk CROSS JOIN LATERAL (
    SELECT i.aggregate_id, i.aggregate_type, i.source, i.consumer, i.id, i.leads FROM relay.inbox i
    WHERE i.aggregate_id IS NOT NULL
      AND (i.aggregate_id, i.aggregate_type, i.source, i.consumer) > (walk.aggregate_id, walk.aggregate_type, walk.source, walk.consumer)
    ORDER BY i.aggregate_id, i.aggregate_type, i.source, i.consumer, i.seq LIMIT 1
  ) AS later
  WHERE walk.n < $6::integer
), free AS MATERIALIZED (
  SELECT i.id FROM relay.inbox i
  WHERE i.id = ANY (ARRAY(SELECT w.id FROM walk w WHERE NOT w.leads AND w.consumer = $1)) AND NOT i.leads
  FOR NO KEY UPDATE SKIP LOCKED
), mended AS (
  UPDATE relay.inbox i SET leads = true WHERE i.id = ANY (ARRAY(SELECT free.id FROM free))
  RETURNING i.id, i.aggregate_id, i.aggregate_type, i.source, i.consumer
)
SELECT id, aggregate_id, aggregate_type, source, consumer FROM mended
UNION ALL
SELECT NULL, aggregate_id, aggregate_type, source, consumer FROM walk WHERE n = $6::integer AND n > 0

-- name: notify_stored
-- Only a hint, and one for a whole batch: a taker that sleeps looks. So it is left out where somebody else's listener lets the
-- notification queue fill up: a transaction that notifies cannot commit once it is full.
-- $1 consumer
SELECT pg_notify('relay_inbox', $1) WHERE pg_notification_queue_usage() < 0.5
