-- Store mode: what the sidecar writes into relay.inbox, in the transaction that moves the cursors.

-- name: store_events
-- In the order of the arrays: the first of each aggregate in this transaction leads, and what comes with it follows. It need not lead
-- where the aggregate has rows whose first one no taker has at this moment: that one is locked by us until the commit, so
-- whoever takes it later sees what was added, and lets it lead in its turn. So nothing that waits is in the way of other aggregates.
-- $1 consumer, arrays: $2 sources (text[]), $3 aggregate types (text[]), $4 aggregate ids (text[]), $5 seqs (bigint[]),
-- $6 event types (text[]), $7 message ids (text[]), $8 content types (text[]), $9 headers (text[], JSON),
-- $10 occurred at (timestamptz[]), $11 bodies (bytea[]), $12 whether it is the first of its aggregate (boolean[])
WITH fresh AS MATERIALIZED (
  SELECT f.*
  FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[], $9::text[], $10::timestamptz[],
              $11::bytea[], $12::boolean[]) WITH ORDINALITY
    AS f (source, aggregate_type, aggregate_id, seq, event_type, message_id, content_type, headers, occurred_at, body, is_first, place)
), before AS MATERIALIZED (
  SELECT first.id, f.place
  FROM (SELECT place, source, aggregate_type, aggregate_id FROM fresh WHERE is_first AND aggregate_id IS NOT NULL) AS f
  CROSS JOIN LATERAL (
    SELECT i.id FROM relay.inbox i
    WHERE i.aggregate_id = f.aggregate_id AND i.aggregate_type = f.aggregate_type AND i.source = f.source AND i.consumer = $1
    ORDER BY i.seq LIMIT 1
  ) AS first
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

-- name: notify_stored
-- Only a hint, and one for a whole batch: a taker that sleeps looks.
-- $1 consumer
SELECT pg_notify('relay_inbox', $1)
