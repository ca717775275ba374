-- Late joiners: what the producer has counted so far (its database), and the consumer's cursors put there (the consumer's database).

-- name: counters_source
-- The name under which the log is published; null: no relay has run yet.
SELECT max(source) FROM relay.outbox_cursor

-- name: count_counters
-- $1 aggregate types (text[], null: all)
SELECT aggregate_type, count(*) AS aggregates FROM relay.outbox_aggregate
WHERE $1::text[] IS NULL OR aggregate_type = ANY ($1) GROUP BY aggregate_type ORDER BY aggregate_type

-- name: read_counters
-- The number of the newest event of each aggregate, by bytes: the order in which everybody locks cursors.
-- What a producer has not committed yet is not in it, and comes after it; what is committed is, published or not.
-- $1 aggregate types (text[], null: all)
SELECT aggregate_type, aggregate_id, last_seq FROM relay.outbox_aggregate
WHERE $1::text[] IS NULL OR aggregate_type = ANY ($1)
ORDER BY aggregate_type COLLATE "C", aggregate_id COLLATE "C"

-- name: compare_seed
-- What seeding would do: cursors that are missing, still at 0, at the number already, elsewhere.
-- $1 consumer, $2 source, arrays: $3 aggregate type, $4 aggregate id, $5 last seq
SELECT count(*) FILTER (WHERE c.last_seq IS NULL) AS missing, count(*) FILTER (WHERE c.last_seq = 0) AS at_zero,
       count(*) FILTER (WHERE c.last_seq = g.last_seq) AS same, count(*) FILTER (WHERE c.last_seq NOT IN (0, g.last_seq)) AS elsewhere
FROM unnest($3::text[], $4::text[], $5::bigint[]) AS g (aggregate_type, aggregate_id, last_seq)
LEFT JOIN LATERAL (
  SELECT c.last_seq FROM relay.inbox_aggregate c
  WHERE c.aggregate_id = g.aggregate_id AND c.aggregate_type = g.aggregate_type AND c.source = $2 AND c.consumer = $1
  LIMIT 1  -- one look-up each: joined, all cursors would be read for each portion
) c ON true

-- name: seed_cursors
-- Puts cursors at the producer's counters: those that are missing or still at 0; with $6, every one of them. All are locked now.
-- Returns how many were created (nulls), and each that existed and was moved: something may be held for it.
-- $1 consumer, $2 source, arrays: $3 aggregate type, $4 aggregate id, $5 last seq; $6 also those that count already
WITH moved AS (
  INSERT INTO relay.inbox_aggregate AS c (consumer, source, aggregate_type, aggregate_id, last_seq)
  SELECT $1, $2, g.* FROM unnest($3::text[], $4::text[], $5::bigint[]) AS g (aggregate_type, aggregate_id, last_seq)
  ON CONFLICT (aggregate_id, aggregate_type, source, consumer)
  DO UPDATE SET last_seq = excluded.last_seq, last_digest = NULL, blocked = false
  WHERE c.last_seq <> excluded.last_seq AND (c.last_seq = 0 OR $6::boolean)
  RETURNING c.aggregate_type, c.aggregate_id, c.last_seq, c.xmax <> 0 AS existed
)
SELECT aggregate_type, aggregate_id, last_seq FROM moved WHERE existed
UNION ALL SELECT NULL, NULL, count(*) FROM moved WHERE NOT existed

-- name: seed_held
-- After cursors that existed were moved, under their locks: what is held up to them belongs to the time before, and goes to the
-- quarantine whole (reason skipped, dismissed); what is held right after them is due, what is held later waits again. Gaps up to them
-- are none any more. (What was stored after them: `seed_stored`.)
-- $1 consumer, $2 source, arrays: $3 aggregate type, $4 aggregate id, $5 last seq; $6 the event type of tombstones
WITH moved AS (
  SELECT * FROM unnest($3::text[], $4::text[], $5::bigint[]) AS g (aggregate_type, aggregate_id, last_seq)
), gone AS (
  DELETE FROM relay.inbox_held h USING moved m
  WHERE h.aggregate_id = m.aggregate_id AND h.aggregate_type = m.aggregate_type AND h.source = $2 AND h.consumer = $1
    AND h.seq <= m.last_seq
  RETURNING h.*
), kept AS (  -- with the properties that relay.inbox.storable.properties_of_event writes
  INSERT INTO relay.inbox_quarantine (consumer, reason, detail, message_id, exchange, routing_key, properties, body, dismissed_at)
  SELECT $1, 'skipped', format('%s/%s seq %s was held when relay inbox seed put the cursor behind it', aggregate_type, aggregate_id, seq),
         message_id, '', '',
         jsonb_build_object('message_id', message_id, 'type', event_type, 'app_id', source, 'content_type', content_type,
                            'timestamp', occurred_at, 'aggregate_type', aggregate_type, 'aggregate_id', aggregate_id,
                            'sequence', seq, 'digest', encode(digest, 'hex'), 'headers', headers),
         body, now()
  FROM gone WHERE event_type <> $6
), later AS (
  UPDATE relay.inbox_held h
  SET reason = CASE WHEN h.seq = m.last_seq + 1 THEN 'behind' ELSE 'early' END,
      state = CASE WHEN h.seq = m.last_seq + 1 THEN 'retrying' ELSE 'waiting' END,
      next_attempt_at = CASE WHEN h.seq = m.last_seq + 1 THEN clock_timestamp() END,
      attempts = 0, error = NULL
  FROM moved m
  WHERE h.aggregate_id = m.aggregate_id AND h.aggregate_type = m.aggregate_type AND h.source = $2 AND h.consumer = $1
    AND h.seq > m.last_seq
  RETURNING h.aggregate_type, h.aggregate_id, h.state
), blocked AS (
  UPDATE relay.inbox_aggregate a SET blocked = true
  FROM later l
  WHERE l.state = 'retrying' AND a.aggregate_id = l.aggregate_id AND a.aggregate_type = l.aggregate_type
    AND a.source = $2 AND a.consumer = $1
), gaps AS (
  DELETE FROM relay.inbox_gap g USING moved m
  WHERE g.aggregate_id = m.aggregate_id AND g.aggregate_type = m.aggregate_type AND g.source = $2 AND g.consumer = $1
    AND g.to_seq <= m.last_seq
)
SELECT count(*) FROM gone

-- name: seed_stored
-- Store mode, after cursors that existed were moved back: what was stored after them and not taken will be stored again.
-- $1 consumer, $2 source, arrays: $3 aggregate type, $4 aggregate id, $5 last seq
SELECT i.id FROM unnest($3::text[], $4::text[], $5::bigint[]) AS g (aggregate_type, aggregate_id, last_seq)
CROSS JOIN LATERAL (
  SELECT i.id FROM relay.inbox i
  WHERE i.aggregate_id = g.aggregate_id AND i.aggregate_type = g.aggregate_type AND i.source = $2 AND i.consumer = $1
    AND i.seq > g.last_seq
) AS i

-- name: record_seed
-- $1 consumer, $2 source, $3 aggregates
INSERT INTO relay.inbox_seed (consumer, source, aggregates) VALUES ($1, $2, $3)
ON CONFLICT (consumer, source) DO UPDATE SET aggregates = excluded.aggregates, seeded_at = now()

-- name: seeded_sources
-- Whose events a consumer knows: seeded from, or applied to this aggregate.
-- $1 consumer, $2 aggregate type, $3 aggregate id
SELECT source FROM relay.inbox_seed WHERE consumer = $1
UNION SELECT source FROM relay.inbox_aggregate WHERE aggregate_id = $3 AND aggregate_type = $2 AND consumer = $1
ORDER BY 1
