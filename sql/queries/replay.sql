-- Replay: counts a selection of the retained log, reads it in pages, and remembers how far it got.
-- Sent again is what has been published as far as the cursor knows, is not parked, and is still in the log. Sessions plan with
-- `plan_cache_mode = force_custom_plan`: a filter that is null is not there, a branch that is not asked for is not run.

-- name: replay_source
-- Under which name the log is published (null: never yet), and whether its cursor is of this cluster: after a restore it is not, until a relay ran.
SELECT max(source) AS source,
       bool_and(cluster_id IS NOT DISTINCT FROM (SELECT system_identifier FROM pg_control_system())) AS is_of_this_cluster
FROM relay.outbox_cursor

-- name: count_replay
-- What a selection holds, by event type: rows, first and last.
-- $1 aggregate type, $2 aggregate id, patterns: $3 aggregate type, $4 aggregate id; $5 aggregate type (another filter),
-- $6 event type, $7 since, $8 until, $9 from seq, $10 to seq, $11 ids (bigint[]); null: any
SELECT o.event_type, count(*) AS rows, min(o.id) AS first_id, max(o.id) AS last_id, min(o.created_at) AS first_at, max(o.created_at) AS last_at
FROM relay.outbox_cursor c JOIN relay.outbox o ON o.shard = c.shard
WHERE relay.outbox_is_read(o.xid, o.id, c.snapshot, c.window_snapshot, c.after_id)
  AND ($1::text IS NULL OR o.aggregate_type = $1) AND ($2::text IS NULL OR o.aggregate_id = $2)
  AND ($3::text IS NULL OR o.aggregate_type LIKE $3) AND ($4::text IS NULL OR o.aggregate_id LIKE $4)
  AND ($5::text IS NULL OR o.aggregate_type = $5) AND ($6::text IS NULL OR o.event_type = $6)
  AND ($7::timestamptz IS NULL OR o.created_at >= $7) AND ($8::timestamptz IS NULL OR o.created_at < $8)
  AND ($9::bigint IS NULL OR o.seq >= $9) AND ($10::bigint IS NULL OR o.seq <= $10)
  AND ($11::bigint[] IS NULL OR o.id = ANY ($11))
  AND NOT EXISTS (SELECT FROM relay.outbox_parked p WHERE p.id = o.id)
  AND (o.aggregate_id IS NOT NULL OR NOT EXISTS (SELECT FROM relay.outbox_tombstone t WHERE t.id = o.id))
GROUP BY o.event_type
ORDER BY rows DESC, o.event_type

-- name: replay_page
-- The next rows of a selection, by id, and how far was looked: $5 rows of the log at most, so that a page is quick however few are selected.
-- One row at least: with a null id, none of those that were looked at is selected. A page ends at $6 rows, or before the row
-- that exceeds $7 bytes (never before its first row). Three ways to look: along the log, along one aggregate, at single ids.
-- $1 way (log, aggregate, ids), $2 after id, $3 last id, $4 after seq (aggregate), $5 rows to look at, $6 page (rows), $7 page (bytes),
-- and the filters: $8 aggregate type, $9 aggregate id, patterns: $10 aggregate type, $11 aggregate id; $12 aggregate type,
-- $13 event type, $14 since, $15 until, $16 from seq, $17 to seq, $18 ids (bigint[]); null: any
WITH looked AS MATERIALIZED (
  (SELECT l.* FROM relay.outbox_cursor c CROSS JOIN LATERAL (
     SELECT o.slot, o.shard, o.id, o.seq FROM relay.outbox o
     WHERE o.shard = c.shard AND o.id > $2 AND o.id <= $3 ORDER BY o.id LIMIT $5
   ) l WHERE $1 = 'log' ORDER BY l.id LIMIT $5)
  UNION ALL
  (SELECT o.slot, o.shard, o.id, o.seq FROM relay.outbox o
   WHERE $1 = 'aggregate' AND o.aggregate_id = $9 AND o.aggregate_type = $8 AND o.seq > $4 AND o.seq <= coalesce($17, 9223372036854775807)
     AND o.id > $2 AND o.id <= $3
   ORDER BY o.seq LIMIT $5)
  UNION ALL
  (SELECT l.* FROM unnest($18::bigint[]) AS i (id) CROSS JOIN relay.outbox_cursor c CROSS JOIN LATERAL (
     SELECT o.slot, o.shard, o.id, o.seq FROM relay.outbox o WHERE o.shard = c.shard AND o.id = i.id OFFSET 0
   ) l WHERE $1 = 'ids' AND i.id > $2 AND i.id <= $3 ORDER BY l.id LIMIT $5)
), reached AS (
  SELECT count(*) AS looked, max(id) AS id, max(seq) AS seq FROM looked
), page AS (
  SELECT p.*, sum(p.size) OVER (ORDER BY p.id) - p.size AS bytes_before, count(*) OVER () AS page_rows FROM (
    SELECT o.*, t.id IS NOT NULL AS is_tombstone
    FROM (SELECT * FROM looked ORDER BY id OFFSET 0) l
    CROSS JOIN LATERAL (
      SELECT id, shard, xid, aggregate_type, aggregate_id, seq, event_type, size, content_type, headers, routing_key,
             created_at, payload, body
      FROM relay.outbox o WHERE o.slot = l.slot AND o.shard = l.shard AND o.id = l.id OFFSET 0
    ) o
    CROSS JOIN LATERAL (SELECT snapshot, window_snapshot, after_id FROM relay.outbox_cursor c WHERE c.shard = o.shard OFFSET 0) c
    LEFT JOIN LATERAL (SELECT t.id FROM relay.outbox_tombstone t WHERE t.id = o.id OFFSET 0) t ON true
    WHERE relay.outbox_is_read(o.xid, o.id, c.snapshot, c.window_snapshot, c.after_id)
      AND ($8::text IS NULL OR o.aggregate_type = $8) AND ($9::text IS NULL OR o.aggregate_id = $9)
      AND ($10::text IS NULL OR o.aggregate_type LIKE $10) AND ($11::text IS NULL OR o.aggregate_id LIKE $11)
      AND ($12::text IS NULL OR o.aggregate_type = $12) AND ($13::text IS NULL OR o.event_type = $13)
      AND ($14::timestamptz IS NULL OR o.created_at >= $14) AND ($15::timestamptz IS NULL OR o.created_at < $15)
      AND ($16::bigint IS NULL OR o.seq >= $16) AND ($17::bigint IS NULL OR o.seq <= $17)
      AND (SELECT p.id FROM relay.outbox_parked p WHERE p.id = o.id) IS NULL
      AND (o.aggregate_id IS NOT NULL OR t.id IS NULL)
    ORDER BY l.id LIMIT $6  -- the order of `looked`, so that only the rows of the page are fetched
  ) p
)
SELECT reached.looked, reached.id AS reached_id, reached.seq AS reached_seq, page.page_rows,
       page.id, page.aggregate_type, page.aggregate_id, page.seq, page.event_type,
       coalesce(page.content_type, CASE WHEN page.payload IS NULL THEN 'application/octet-stream' ELSE 'application/json' END) AS content_type,
       page.headers::text AS headers, page.routing_key, page.created_at,
       coalesce(page.body, convert_to(page.payload::text, 'UTF8')) AS body, page.is_tombstone
FROM reached LEFT JOIN page ON page.bytes_before < $7
ORDER BY page.id

-- name: missing_numbers
-- Numbers of one aggregate that were given out and are not in the log any more: ranges, $5 at most.
-- $1 aggregate type, $2 aggregate id, $3 from seq (null: 1), $4 to seq (null: the newest), $5 ranges
WITH wanted AS (
  SELECT greatest(coalesce($3::bigint, 1), 1) AS low, least(coalesce($4::bigint, last_seq), last_seq) AS high
  FROM relay.outbox_aggregate WHERE aggregate_id = $2 AND aggregate_type = $1
), points AS (
  SELECT low - 1 AS seq FROM wanted WHERE low <= high
  UNION ALL
  SELECT o.seq FROM wanted, relay.outbox o
  WHERE o.aggregate_id = $2 AND o.aggregate_type = $1 AND o.seq BETWEEN wanted.low AND wanted.high
  UNION ALL
  SELECT high + 1 FROM wanted WHERE low <= high
), steps AS (
  SELECT seq, lead(seq) OVER (ORDER BY seq) AS next FROM points
)
SELECT seq + 1 AS from_seq, next - 1 AS to_seq FROM steps WHERE next > seq + 1 ORDER BY seq LIMIT $5

-- name: missing_ids
-- $1 ids (bigint[])
SELECT i.id FROM unnest($1::bigint[]) AS i (id)
WHERE NOT EXISTS (SELECT FROM relay.outbox_cursor c JOIN relay.outbox o ON o.shard = c.shard AND o.id = i.id)
ORDER BY i.id

-- name: log_begins
-- When the oldest row that is still in the log was inserted; null: there is none.
SELECT min(first.created_at) FROM relay.outbox_cursor c CROSS JOIN LATERAL (
  SELECT o.created_at FROM relay.outbox o WHERE o.shard = c.shard ORDER BY o.id LIMIT 1
) first

-- name: live_backlog
-- How old the oldest row is that waits to be published the first time, as far as the cursor knows (s; null: none waits). A bounded look:
-- at $1 rows that are new since the cursor's snapshot and, inside a window, at $1 rows behind its position.
-- $1 rows
SELECT extract(epoch FROM clock_timestamp() - min(new.created_at))::float8
FROM relay.outbox_cursor c CROSS JOIN LATERAL (
  (SELECT o.id, o.xid, o.created_at FROM relay.outbox o
   WHERE o.shard + 0 = c.shard AND o.xid >= pg_snapshot_xmax(c.snapshot) ORDER BY o.xid LIMIT $1)
  UNION ALL
  (SELECT o.id, o.xid, o.created_at FROM relay.outbox o
   WHERE c.window_snapshot IS NOT NULL AND o.shard = c.shard AND o.id > c.after_id ORDER BY o.id LIMIT $1)
) new
WHERE NOT relay.outbox_is_read(new.xid, new.id, c.snapshot, c.window_snapshot, c.after_id)

-- name: begin_replay
-- $1 audit id, $2 selection (text, JSON), $3 to queue (null: everyone), $4 after id, $5 last id, $6 total
INSERT INTO relay.outbox_replay (audit_id, selection, to_queue, after_id, last_id, total)
VALUES ($1, $2::text::jsonb, $3, $4, $5, $6)
RETURNING id

-- name: replay_got_to
-- All of the selection up to $2 has been sent and confirmed. No row: the replay was abandoned meanwhile, or is further already.
-- $1 replay, $2 after id, $3 rows sent with this page, $4 state
UPDATE relay.outbox_replay SET after_id = $2, sent = sent + $3, state = $4, updated_at = now()
WHERE id = $1 AND state = 'unfinished' AND after_id <= $2
RETURNING sent

-- name: abandon_replay
-- $1 replay
UPDATE relay.outbox_replay SET state = 'abandoned', updated_at = now() WHERE id = $1 AND state = 'unfinished' RETURNING id

-- name: get_replay
-- $1 replay (null: the newest that is unfinished)
SELECT id, selection::text AS selection, to_queue, after_id, last_id, total, sent, state, started_at, updated_at
FROM relay.outbox_replay
WHERE CASE WHEN $1::bigint IS NULL THEN state = 'unfinished' ELSE id = $1 END
ORDER BY id DESC LIMIT 1

-- name: list_replays
-- The newest first. Somebody is at it: the lock of its session is taken.
-- $1 rows, $2 class of the lock
SELECT r.id, r.selection::text AS selection, r.to_queue, r.after_id, r.last_id, r.total, r.sent, r.state, r.started_at, r.updated_at,
       a.who, a.why,
       EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = $2::integer::oid AND l.objid = (r.id % 2147483648)::oid
                 AND l.objsubid = 2 AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())) AS is_running
FROM relay.outbox_replay r JOIN relay.audit a ON a.id = r.audit_id
ORDER BY r.id DESC LIMIT $1

-- name: try_replay_lock
-- One process at a time sends a replay. Held by the session.
-- $1 class, $2 replay
SELECT pg_try_advisory_lock($1::integer, ($2::bigint % 2147483648)::integer)
