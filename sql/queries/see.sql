-- What operators see: `relay status`, `stuck`, `show`, `list`, `relay inbox held|gaps|quarantine`, `relay audit`.
-- Only reads, and only what relay_monitor may read, but for the blocks that say otherwise. Every block is bounded, or walks
-- tables that hold what is blocked and nothing else; none scans the log.

-- name: see_sides
-- Which sides this database has, and whether this role may read what handlers' errors say (they can quote a payload).
SELECT current_database() AS database, current_user AS role, now() AS now,
  EXISTS (SELECT FROM relay.outbox_cursor WHERE source IS NOT NULL)
    OR EXISTS (SELECT FROM relay.outbox_aggregate) OR EXISTS (SELECT FROM relay.outbox) AS outbox,
  EXISTS (SELECT FROM relay.inbox_progress) OR EXISTS (SELECT FROM relay.inbox_aggregate) OR EXISTS (SELECT FROM relay.inbox_held)
    OR EXISTS (SELECT FROM relay.inbox_gap) OR EXISTS (SELECT FROM relay.inbox_quarantine) OR EXISTS (SELECT FROM relay.inbox)
    OR EXISTS (SELECT FROM relay.inbox_seed) AS inbox,
  has_column_privilege('relay.inbox_held', 'error', 'SELECT') AND has_column_privilege('relay.inbox', 'error', 'SELECT') AS errors

-- name: see_inboxes
-- Whose inboxes are here, as far as they ran or something of them is blocked: an act has to name one when there are several. Stored events
-- are looked at as far as they were given back: there can be millions, and who stores them has run.
SELECT consumer FROM relay.inbox_progress UNION SELECT consumer FROM relay.inbox_seed UNION SELECT consumer FROM relay.inbox_gap
UNION SELECT consumer FROM relay.inbox_held UNION SELECT consumer FROM relay.inbox_quarantine WHERE dismissed_at IS NULL
UNION SELECT consumer FROM relay.inbox WHERE leads AND attempts > 0

-- --- relay status: the outbox

-- name: see_shards
-- Each shard's cursor, its owner's session (it holds the lock 727003/shard), and how many relays stand by.
-- A rate is written with a checkpoint; when nothing was published for a while, nobody corrects it.
SELECT c.shard, c.source, c.owner, c.published, c.updated_at, c.last_error, c.last_error_at,
  CASE WHEN c.updated_at > now() - interval '15 seconds' THEN c.rate ELSE 0 END AS rate,
  c.snapshot::text AS snapshot, c.window_snapshot::text AS window_snapshot, c.after_id, o.pid AS owner_pid,
  (SELECT count(*) FROM pg_stat_activity s WHERE s.datname = current_database()
     AND s.application_name = 'relay lease ' || c.shard AND s.pid IS DISTINCT FROM o.pid) AS standbys
FROM relay.outbox_cursor c
LEFT JOIN LATERAL (
  SELECT a.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
  WHERE l.locktype = 'advisory' AND l.granted AND l.classid = 727003 AND l.objid = c.shard::int::oid AND l.objsubid = 2
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  LIMIT 1
) o ON true
ORDER BY c.shard

-- name: see_backlog
-- Rows that are committed and not published yet, counted up to a bound, and when the oldest of them was inserted.
-- Without a window: what the cursor's snapshot does not see. Within one: what is behind after_id, and before it what is younger
-- than the window. `ORDER BY` names the index to walk, so that a bounded count is a bounded walk.
-- $1 shard, $2 xmax of the cursor's snapshot (text), $3 its transactions in progress (text[]), $4 window's snapshot (text or null),
-- $5 after id, $6 most rows to count
SELECT count(*) AS rows, min(created_at) AS oldest FROM (
  SELECT created_at FROM (
    (SELECT o.created_at FROM relay.outbox o
     WHERE $4::text IS NULL AND o.shard + 0 = $1 AND o.xid >= $2::text::xid8 ORDER BY o.xid LIMIT $6)
    UNION ALL
    (SELECT o.created_at FROM relay.outbox o
     WHERE $4::text IS NOT NULL AND o.shard = $1 AND o.id > $5 AND o.xid >= $2::text::xid8 ORDER BY o.id LIMIT $6)
    UNION ALL
    (SELECT young.created_at FROM (
       SELECT o.created_at, o.id FROM relay.outbox o
       WHERE $4::text IS NOT NULL AND o.shard + 0 = $1 AND o.xid >= pg_snapshot_xmax($4::text::pg_snapshot) ORDER BY o.xid LIMIT $6
     ) young WHERE young.id <= $5)
    UNION ALL
    (SELECT late.created_at FROM unnest($3::text[]::xid8[]) AS t (xid) CROSS JOIN LATERAL (
       SELECT o.created_at, o.id FROM relay.outbox o WHERE o.shard + 0 = $1 AND o.xid = t.xid OFFSET 0
     ) late
     WHERE $4::text IS NULL OR late.id > $5 OR NOT pg_visible_in_snapshot(t.xid, $4::text::pg_snapshot) LIMIT $6)
    UNION ALL
    (SELECT late.created_at FROM pg_snapshot_xip($4::text::pg_snapshot) AS t (xid) CROSS JOIN LATERAL (
       SELECT o.created_at FROM relay.outbox o WHERE o.shard + 0 = $1 AND o.xid = t.xid AND o.id <= $5 OFFSET 0
     ) late
     WHERE t.xid >= $2::text::xid8 LIMIT $6)
  ) branches
  LIMIT $6
) unpublished

-- name: see_parked
-- Parked rows by shard. A row without an aggregate counts as an aggregate of its own. Materialized, so that the planner, which takes
-- reading all of a table for forbidden here, does not take sorting it for as good as hashing (measured: twice as slow).
WITH p AS MATERIALIZED (SELECT shard, aggregate_id, aggregate_type, state, parked_at FROM relay.outbox_parked)
SELECT shard, sum(rows)::bigint AS rows, sum(aggregates)::bigint AS aggregates, sum(stuck)::bigint AS stuck,
  sum(retrying)::bigint AS retrying, sum(paused)::bigint AS paused, min(oldest) AS oldest
FROM (
  SELECT shard, count(*) AS rows, CASE WHEN aggregate_id IS NULL THEN count(*) ELSE 1 END AS aggregates,
    count(*) FILTER (WHERE state = 'stuck') AS stuck, count(*) FILTER (WHERE state = 'retrying') AS retrying,
    count(*) FILTER (WHERE state = 'paused') AS paused, min(parked_at) AS oldest
  FROM p GROUP BY shard, aggregate_id, aggregate_type
) each
GROUP BY shard

-- name: see_pauses
-- What is paused, by whom and why.
SELECT p.id, p.scope, p.aggregate_type, p.aggregate_id, p.event_type, p.shard, p.paused_at, a.who, a.why
FROM relay.outbox_pause p JOIN relay.audit a ON a.id = p.audit_id
ORDER BY p.paused_at, p.id

-- name: see_replays
-- Replays that were begun and not finished: running now (a session holds the lock 727011/id), or interrupted.
SELECT r.id, r.to_queue, r.total, r.sent, r.started_at, r.updated_at, a.who, a.why, EXISTS (
  SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.granted AND l.classid = 727011 AND l.objid = (r.id % 2147483648)::int::oid AND l.objsubid = 2
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())) AS running
FROM relay.outbox_replay r JOIN relay.audit a ON a.id = r.audit_id
WHERE r.state = 'unfinished'
ORDER BY r.id

-- name: see_retained
-- The retained log: how much room it takes (all shards), and of each shard the oldest row.
SELECT c.shard, oldest.id, oldest.created_at,
  (SELECT sum(pg_total_relation_size(i.inhrelid))::bigint FROM pg_inherits i WHERE i.inhparent = 'relay.outbox'::regclass) AS bytes
FROM relay.outbox_cursor c
LEFT JOIN LATERAL (SELECT o.id, o.created_at FROM relay.outbox o WHERE o.shard = c.shard ORDER BY o.id LIMIT 1) oldest ON true
ORDER BY c.shard

-- --- relay status: the inbox, each by consumer

-- name: see_consumers
-- Figures that the consumers wrote, and how many of them are connected now. The last branch finds one that never wrote any.
SELECT c.consumer, p.applied, p.owner, p.last_error, p.last_error_at, p.updated_at,
  CASE WHEN p.updated_at > now() - interval '15 seconds' THEN p.rate ELSE 0 END AS rate,
  (SELECT count(*) FROM pg_stat_activity s WHERE s.datname = current_database()
     AND s.application_name = left('relay inbox ' || c.consumer, 63)) AS running
FROM (
  SELECT consumer FROM relay.inbox_progress UNION (SELECT consumer FROM relay.inbox_aggregate LIMIT 1) UNION SELECT consumer FROM relay.inbox_seed
) c LEFT JOIN relay.inbox_progress p USING (consumer)
ORDER BY c.consumer

-- name: see_held_counts
-- Held messages. One without an aggregate counts as an aggregate of its own. Materialized as in `see_parked`.
WITH h AS MATERIALIZED (SELECT consumer, source, aggregate_id, aggregate_type, reason, state, held_at FROM relay.inbox_held)
SELECT consumer, sum(rows)::bigint AS rows, sum(aggregates)::bigint AS aggregates, sum(early)::bigint AS early,
  sum(behind)::bigint AS behind, sum(failed)::bigint AS failed, sum(stuck)::bigint AS stuck, min(oldest) AS oldest
FROM (
  SELECT consumer, count(*) AS rows, CASE WHEN aggregate_id IS NULL THEN count(*) ELSE 1 END AS aggregates,
    count(*) FILTER (WHERE reason = 'early') AS early, count(*) FILTER (WHERE reason = 'behind') AS behind,
    count(*) FILTER (WHERE reason = 'failed') AS failed, count(*) FILTER (WHERE state = 'stuck') AS stuck, min(held_at) AS oldest
  FROM h GROUP BY consumer, source, aggregate_id, aggregate_type
) each
GROUP BY consumer

-- name: see_gap_counts
SELECT consumer, count(*) FILTER (WHERE state = 'open') AS open, count(*) FILTER (WHERE state = 'stuck') AS stuck, min(noticed_at) AS oldest
FROM relay.inbox_gap WHERE alerted_at IS NOT NULL OR state = 'stuck' GROUP BY consumer  -- before it, what is late may only be on its way

-- name: see_quarantine_counts
-- Messages in quarantine that nobody has dismissed. What an operator skipped or purged is kept there too, and is no problem.
SELECT consumer, reason, count(*) AS messages, min(received_at) AS oldest
FROM relay.inbox_quarantine WHERE dismissed_at IS NULL AND reason NOT IN ('skipped', 'purged')
GROUP BY consumer, reason ORDER BY consumer, reason

-- name: see_stored_counts
-- Stored events that wait for their taker: counted up to a bound over all consumers, oldest first.
-- $1 most rows to count
SELECT consumer, count(*) AS rows, min(stored_at) AS oldest
FROM (SELECT consumer, stored_at FROM relay.inbox ORDER BY id LIMIT $1) bounded
GROUP BY consumer

-- name: see_given_back
-- Stored events that their taker has given back and that hold their aggregates up.
SELECT consumer, count(*) AS rows FROM relay.inbox WHERE leads AND attempts > 0 GROUP BY consumer

-- name: see_stranded
-- Stored events that no taker looks at: first of their aggregate, and they do not lead. A running inbox in store mode lets them lead when
-- its sweep comes by. Skips from one aggregate to the next; at most so many are looked at.
-- $1 aggregates to look at
WITH RECURSIVE walk AS (
  SELECT '' AS aggregate_id, '' AS aggregate_type, '' AS source, '' AS consumer, NULL::bigint AS id, true AS leads, 0 AS n
  UNION ALL
  SELECT later.aggregate_id, later.aggregate_type, later.source, later.consumer, later.id, later.leads, walk.n + 1
  FROM walk CROSS JOIN LATERAL (
    SELECT i.aggregate_id, i.aggregate_type, i.source, i.consumer, i.id, i.leads FROM relay.inbox i
    WHERE i.aggregate_id IS NOT NULL
      AND (i.aggregate_id, i.aggregate_type, i.source, i.consumer) > (walk.aggregate_id, walk.aggregate_type, walk.source, walk.consumer)
    ORDER BY i.aggregate_id, i.aggregate_type, i.source, i.consumer, i.seq LIMIT 1
  ) AS later
  WHERE walk.n < $1::integer
)
SELECT consumer, id FROM walk WHERE NOT leads

-- --- relay stuck

-- name: see_errors
-- What handlers and takers said of the messages that failed: the first line, cut. Needs a role that may read errors.
-- $1 text that the whole error contains (pattern of ILIKE, null for any)
SELECT 'held' AS kind, id, left(split_part(error, E'\n', 1), 300) AS error FROM relay.inbox_held
WHERE reason = 'failed' AND error IS NOT NULL AND ($1::text IS NULL OR error ILIKE $1)
UNION ALL
SELECT 'stored', id, left(split_part(error, E'\n', 1), 300) FROM relay.inbox
WHERE leads AND attempts > 0 AND error IS NOT NULL AND ($1::text IS NULL OR error ILIKE $1)

-- name: see_stuck
-- Whatever is blocked, on both sides, oldest first: of each aggregate the row that blocks it, and how many rows wait behind it.
-- Or, by cause: how many aggregates and rows each cause (with what was said) holds up, the oldest first.
-- `total` counts all that the filters select. kind and id name the row: parked, held, stored, quarantine; a gap has no row.
-- Filters, null for any: $1 aggregate type and $2 aggregate id (patterns of LIKE), $3 aggregate type, $4 event type, $5 cause, $6 state,
-- $7 error (pattern of ILIKE), $8 for longer than (s), $9 since, $10 until, $11 from seq, $12 to seq, $13 row ids (bigint[]),
-- $14 source, $15 consumer. $16 what `see_errors` found for the inbox (text, JSON: {"held/7": error}): looked up by name, since a join of
-- so many with so few as the planner expects would be a nested loop. $17 by cause (boolean), $18 limit, $19 what `see_stranded` found
-- (bigint[])
WITH parked AS (
  SELECT p.*, behind.rows FROM (
    SELECT aggregate_id, aggregate_type, min(seq) AS seq, count(*) - 1 AS rows FROM relay.outbox_parked
    WHERE aggregate_id IS NOT NULL GROUP BY aggregate_id, aggregate_type
  ) behind JOIN relay.outbox_parked p USING (aggregate_id, aggregate_type, seq)
  UNION ALL
  SELECT p.*, 0
  FROM relay.outbox_parked p WHERE p.aggregate_id IS NULL
), held AS (
  SELECT h.id, h.consumer, h.source, h.aggregate_type, h.aggregate_id, h.seq, h.event_type, h.reason, h.state, h.attempts, h.held_at,
    h.next_attempt_at, behind.rows
  FROM (
    SELECT aggregate_id, aggregate_type, source, consumer, min(seq) AS seq, count(*) - 1 AS rows FROM relay.inbox_held
    WHERE seq IS NOT NULL GROUP BY aggregate_id, aggregate_type, source, consumer
  ) behind JOIN relay.inbox_held h USING (aggregate_id, aggregate_type, source, consumer, seq)
  UNION ALL
  SELECT h.id, h.consumer, h.source, h.aggregate_type, h.aggregate_id, h.seq, h.event_type, h.reason, h.state, h.attempts, h.held_at,
    h.next_attempt_at, 0
  FROM relay.inbox_held h WHERE h.seq IS NULL
), blocked AS (
  SELECT 'outbox' AS side, 'parked' AS kind, p.id, NULL::text AS consumer, NULL::text AS source, p.aggregate_type, p.aggregate_id, p.seq,
    NULL::text AS event_type, CASE WHEN p.state = 'paused' THEN 'paused' ELSE p.reason END AS cause, p.state, p.detail,
    p.parked_at AS since, p.attempts, p.next_attempt_at, p.rows AS behind, p.shard
  FROM parked p
  UNION ALL
  -- What is only early is told as a gap as soon as it is known to be one.
  SELECT 'inbox', 'held', h.id, h.consumer, h.source, h.aggregate_type, h.aggregate_id, h.seq, h.event_type, h.reason, h.state,
    $16::text::jsonb ->> ('held/' || h.id),
    h.held_at, h.attempts, h.next_attempt_at, h.rows, NULL
  FROM held h
  WHERE h.reason <> 'early' OR NOT EXISTS (
    SELECT FROM relay.inbox_gap g WHERE g.consumer = h.consumer AND g.source = h.source
      AND g.aggregate_type = h.aggregate_type AND g.aggregate_id = h.aggregate_id AND (g.alerted_at IS NOT NULL OR g.state = 'stuck'))
  UNION ALL
  SELECT 'inbox', 'gap', NULL, g.consumer, g.source, g.aggregate_type, g.aggregate_id, coalesce(c.last_seq, 0) + 1, NULL, 'gap',
    CASE g.state WHEN 'open' THEN 'retrying' ELSE g.state END, g.detail, g.noticed_at, g.asks, g.next_ask_at,
    (SELECT count(*) FROM relay.inbox_held h WHERE h.aggregate_id = g.aggregate_id AND h.aggregate_type = g.aggregate_type
       AND h.source = g.source AND h.consumer = g.consumer AND h.seq IS NOT NULL), NULL
  FROM relay.inbox_gap g LEFT JOIN relay.inbox_aggregate c USING (aggregate_id, aggregate_type, source, consumer)
  WHERE (g.alerted_at IS NOT NULL OR g.state = 'stuck')
  UNION ALL
  SELECT 'inbox', 'quarantine', q.id, q.consumer, q.source, q.aggregate_type, q.aggregate_id, q.seq, NULL, q.reason, 'stuck', q.detail,
    q.received_at, 0, NULL, 0, NULL
  FROM relay.inbox_quarantine q WHERE q.dismissed_at IS NULL AND q.reason NOT IN ('skipped', 'purged')
  UNION ALL
  SELECT 'inbox', 'stored', i.id, i.consumer, i.source, i.aggregate_type, i.aggregate_id, i.seq, i.event_type, 'taken', 'retrying',
    $16::text::jsonb ->> ('stored/' || i.id),
    i.stored_at, i.attempts, i.next_take_at,
    (SELECT count(*) FROM relay.inbox b WHERE b.aggregate_id = i.aggregate_id AND b.aggregate_type = i.aggregate_type
       AND b.source = i.source AND b.consumer = i.consumer AND b.seq > i.seq), NULL
  FROM relay.inbox i
  WHERE i.leads AND i.attempts > 0  -- only the first of an aggregate blocks it; those have an index
  UNION ALL
  SELECT 'inbox', 'stored', i.id, i.consumer, i.source, i.aggregate_type, i.aggregate_id, i.seq, i.event_type, 'stranded', 'retrying',
    'no taker looks at it, since it does not lead its aggregate: relay inbox run in store mode mends this when its sweep comes by',
    i.stored_at, i.attempts, NULL,
    (SELECT count(*) FROM relay.inbox b WHERE b.aggregate_id = i.aggregate_id AND b.aggregate_type = i.aggregate_type
       AND b.source = i.source AND b.consumer = i.consumer AND b.seq > i.seq), NULL
  FROM relay.inbox i WHERE i.id = ANY ($19::bigint[])
), chosen AS (
  SELECT b.* FROM blocked b
  WHERE ($1::text IS NULL OR b.aggregate_type LIKE $1) AND ($2::text IS NULL OR b.aggregate_id LIKE $2)
    AND ($3::text IS NULL OR b.aggregate_type = $3)
    AND ($4::text IS NULL OR b.event_type = $4
         OR b.kind = 'parked' AND EXISTS (SELECT FROM relay.outbox o WHERE o.shard = b.shard AND o.id = b.id AND o.event_type = $4))
    AND ($5::text IS NULL OR b.cause = $5) AND ($6::text IS NULL OR b.state = $6) AND ($7::text IS NULL OR b.detail ILIKE $7 OR
         $16::text::jsonb ? (b.kind || '/' || b.id))  -- see_errors has looked through the whole of these
    AND ($8::float8 IS NULL OR b.since <= now() - make_interval(secs => $8))
    AND ($9::timestamptz IS NULL OR b.since >= $9) AND ($10::timestamptz IS NULL OR b.since < $10)
    AND ($11::bigint IS NULL OR b.seq >= $11) AND ($12::bigint IS NULL OR b.seq <= $12)
    AND ($13::bigint[] IS NULL OR b.id = ANY ($13))
    AND ($14::text IS NULL OR b.source = $14) AND ($15::text IS NULL OR b.consumer = $15)
), entries AS (
  SELECT e.*, o.event_type AS parked_event_type FROM (
    SELECT c.*, count(*) OVER () AS total FROM chosen c WHERE NOT $17::boolean ORDER BY c.since, c.side, c.id LIMIT $18
  ) e LEFT JOIN LATERAL (
    SELECT o.event_type FROM relay.outbox o WHERE o.shard = e.shard AND o.id = e.id OFFSET 0
  ) o ON e.kind = 'parked'
), causes AS (
  -- What handlers say differs from message to message: their errors are one cause when the class is the same.
  SELECT g.*, count(*) OVER () AS total FROM (
    SELECT c.side, c.consumer, c.cause, min(c.line) AS detail, count(DISTINCT c.line) AS details, count(*) AS aggregates,
      sum(c.behind + CASE WHEN c.kind = 'gap' THEN 0 ELSE 1 END)::bigint AS rows, count(*) FILTER (WHERE c.state = 'stuck') AS stuck,
      min(c.since) AS since
    FROM (SELECT c.*, left(split_part(c.detail, E'\n', 1), 300) AS line FROM chosen c WHERE $17::boolean) c
    GROUP BY c.side, c.consumer, c.cause, CASE WHEN c.kind IN ('held', 'stored') THEN split_part(c.line, ':', 1) ELSE c.line END
  ) g ORDER BY g.since, g.side, g.cause LIMIT $18
)
SELECT e.side, e.kind, e.id, e.consumer, e.source, e.aggregate_type, e.aggregate_id, e.seq, coalesce(e.event_type, e.parked_event_type) AS event_type,
  e.cause, e.state, e.detail, e.since, e.attempts, e.next_attempt_at, e.behind, NULL::bigint AS aggregates, NULL::bigint AS rows, NULL::bigint AS stuck, NULL::bigint AS details,
  e.total
FROM entries e
UNION ALL
SELECT c.side, NULL, NULL, c.consumer, NULL, NULL, NULL, NULL, NULL, c.cause, NULL, c.detail, c.since, NULL, NULL, NULL, c.aggregates, c.rows, c.stuck, c.details,
  c.total
FROM causes c
ORDER BY since, side, id

-- --- relay show: one aggregate

-- name: see_counter
-- The aggregate's counter, and the first and last of its rows that are still retained.
-- $1 aggregate type, $2 aggregate id
SELECT a.last_seq,
  (SELECT o.seq FROM relay.outbox o WHERE o.aggregate_id = $2 AND o.aggregate_type = $1 ORDER BY o.seq LIMIT 1) AS first_retained,
  (SELECT o.seq FROM relay.outbox o WHERE o.aggregate_id = $2 AND o.aggregate_type = $1 ORDER BY o.seq DESC LIMIT 1) AS last_retained,
  (SELECT count(*) FROM relay.outbox_parked p WHERE p.aggregate_id = $2 AND p.aggregate_type = $1) AS parked
FROM relay.outbox_aggregate a WHERE a.aggregate_id = $2 AND a.aggregate_type = $1

-- name: see_rows_of
-- The ids of the newest rows of an aggregate, and of the first of its parked ones: those block.
-- $1 aggregate type, $2 aggregate id, $3 limit of the newest, $4 limit of the parked
(SELECT o.shard, o.id FROM relay.outbox o WHERE o.aggregate_id = $2 AND o.aggregate_type = $1 ORDER BY o.seq DESC LIMIT $3)
UNION
(SELECT p.shard, p.id FROM relay.outbox_parked p WHERE p.aggregate_id = $2 AND p.aggregate_type = $1 ORDER BY p.seq LIMIT $4)

-- name: see_cursors
-- How far each consumer has applied it.
-- $1 aggregate type, $2 aggregate id
SELECT c.consumer, c.source, c.last_seq, c.blocked FROM relay.inbox_aggregate c WHERE c.aggregate_id = $2 AND c.aggregate_type = $1
ORDER BY c.consumer, c.source

-- name: see_held_of
-- Held messages of one aggregate: of each consumer and source the first ones, because they block.
-- $1 aggregate type, $2 aggregate id, $3 limit of each
SELECT * FROM (
  SELECT h.id, h.consumer, h.source, h.seq, h.event_type, h.message_id, h.reason, h.state, h.attempts, h.held_at, h.next_attempt_at,
    row_number() OVER (PARTITION BY h.source, h.consumer ORDER BY h.seq) AS place,
    count(*) OVER (PARTITION BY h.source, h.consumer) AS total
  FROM relay.inbox_held h WHERE h.aggregate_id = $2 AND h.aggregate_type = $1 AND h.seq IS NOT NULL
) h WHERE h.place <= $3
ORDER BY h.consumer, h.source, h.seq

-- name: see_stored_of
-- Stored events of one aggregate that wait for their taker: of each consumer and source the first ones.
-- $1 aggregate type, $2 aggregate id, $3 limit of each
SELECT * FROM (
  SELECT i.id, i.consumer, i.source, i.seq, i.event_type, i.message_id, i.attempts, i.stored_at, i.next_take_at,
    row_number() OVER (PARTITION BY i.source, i.consumer ORDER BY i.seq) AS place,
    count(*) OVER (PARTITION BY i.source, i.consumer) AS total
  FROM relay.inbox i WHERE i.aggregate_id = $2 AND i.aggregate_type = $1
) i WHERE i.place <= $3
ORDER BY i.consumer, i.source, i.seq

-- name: see_gaps_of
-- What each consumer misses of one aggregate, told as `see_gaps` does.
-- $1 aggregate type, $2 aggregate id
SELECT g.consumer, g.source, g.aggregate_type, g.aggregate_id, g.to_seq, g.found_by, g.noticed_at, g.state, g.asks, g.next_ask_at, g.detail,
  g.last_seq, g.last_seq + run.length + 1 AS missing_from,
  coalesce((SELECT min(h.seq) - 1 FROM relay.inbox_held h WHERE h.aggregate_id = g.aggregate_id AND h.aggregate_type = g.aggregate_type
     AND h.source = g.source AND h.consumer = g.consumer AND h.seq > g.last_seq + run.length), g.to_seq) AS missing_to,
  greatest(0, g.to_seq - g.last_seq - run.held_below) AS missing, run.held
FROM (
  SELECT g.*, coalesce(c.last_seq, 0) AS last_seq
  FROM relay.inbox_gap g LEFT JOIN relay.inbox_aggregate c USING (aggregate_id, aggregate_type, source, consumer)
  WHERE g.aggregate_id = $2 AND g.aggregate_type = $1 AND (g.alerted_at IS NOT NULL OR g.state = 'stuck')
) g
CROSS JOIN LATERAL (
  SELECT count(*) AS held, count(*) FILTER (WHERE h.seq <= g.to_seq) AS held_below, count(*) FILTER (WHERE h.seq = g.last_seq + h.place) AS length
  FROM (
    SELECT h.seq, row_number() OVER (ORDER BY h.seq) AS place FROM relay.inbox_held h
    WHERE h.aggregate_id = g.aggregate_id AND h.aggregate_type = g.aggregate_type AND h.source = g.source AND h.consumer = g.consumer
      AND h.seq > g.last_seq
  ) h
) run
ORDER BY g.consumer, g.source

-- name: see_quarantine_of
-- Messages of one aggregate in quarantine, the newest first: conflicts, and what operators skipped or purged.
-- $1 aggregate type, $2 aggregate id, $3 limit
SELECT q.id, q.consumer, q.source, q.seq, q.reason, q.detail, q.message_id, q.received_at, q.dismissed_at
FROM relay.inbox_quarantine q WHERE q.aggregate_id = $2 AND q.aggregate_type = $1
ORDER BY q.id DESC LIMIT $3

-- name: see_acts_on
-- What operators did to one aggregate, and to everything; the newest first.
-- $1 aggregate type, $2 aggregate id, $3 limit
SELECT a.id, a.at, a.who, a.login, a.side, a.act, a.selection::text AS selection, a.why, a.rows FROM (
  SELECT t.audit_id AS id FROM relay.audit_aggregate t WHERE t.aggregate_id = $2 AND t.aggregate_type = $1
  UNION
  (SELECT w.id FROM relay.audit w WHERE w.selection @> '{"all": true}' ORDER BY w.id DESC LIMIT $3)
) touched JOIN relay.audit a USING (id)
ORDER BY a.id DESC LIMIT $3

-- name: see_similar
-- Aggregates that are named alike: the same id under another type, or an id that begins so (as bytes; found by the index).
-- $1 aggregate type, $2 aggregate id, $3 what another id begins with, $4 limit
SELECT DISTINCT aggregate_type, aggregate_id FROM (
  (SELECT aggregate_type, aggregate_id FROM relay.outbox_aggregate WHERE aggregate_id = $2 LIMIT $4)
  UNION ALL
  (SELECT aggregate_type, aggregate_id FROM relay.inbox_aggregate WHERE aggregate_id = $2 LIMIT $4)
  UNION ALL
  (SELECT * FROM (SELECT aggregate_type, aggregate_id FROM relay.outbox_aggregate WHERE aggregate_id >= $3 ORDER BY aggregate_id, aggregate_type LIMIT 100) near
   WHERE starts_with(near.aggregate_id, $3) LIMIT $4)
  UNION ALL
  (SELECT * FROM (SELECT aggregate_type, aggregate_id FROM relay.inbox_aggregate WHERE aggregate_id >= $3 ORDER BY aggregate_id, aggregate_type LIMIT 100) near
   WHERE starts_with(near.aggregate_id, $3) LIMIT $4)
) alike
WHERE (aggregate_type, aggregate_id) <> ($1, $2)
ORDER BY aggregate_id, aggregate_type LIMIT $4

-- --- relay list: first the ids, found in the way that suits the filters, then the rows

-- name: see_listed
-- Rows by id with what became of each: waiting (to be published), published, skipped (a tombstone took its place), or parked:
-- retrying, stuck, paused, behind (another row of its aggregate). What is parked or marked and not retained is told without its log row.
-- $1 shard, $2 ids (bigint[])
SELECT w.id, $1::smallint AS shard, coalesce(o.aggregate_type, p.aggregate_type) AS aggregate_type, coalesce(o.aggregate_id, p.aggregate_id) AS aggregate_id,
  coalesce(o.seq, p.seq) AS seq, o.event_type, o.size, o.created_at, o.id IS NOT NULL AS retained,
  CASE WHEN p.state = 'waiting' THEN 'behind' WHEN p.id IS NOT NULL THEN p.state
       WHEN o.id IS NOT NULL AND NOT relay.outbox_is_read(o.xid, o.id, c.snapshot, c.window_snapshot, c.after_id) THEN 'waiting'
       WHEN t.id IS NOT NULL THEN 'skipped' ELSE 'published' END AS state,
  p.reason, p.detail, p.attempts, p.parked_at, p.next_attempt_at, t.act AS tombstone
FROM unnest($2::bigint[]) AS w (id)
CROSS JOIN (SELECT * FROM relay.outbox_cursor WHERE shard = $1) c
LEFT JOIN LATERAL (
  SELECT o.id, o.xid, o.aggregate_type, o.aggregate_id, o.seq, o.event_type, o.size, o.created_at FROM relay.outbox o
  WHERE o.shard = $1 AND o.id = w.id OFFSET 0
) o ON true
LEFT JOIN LATERAL (SELECT * FROM relay.outbox_parked p WHERE p.id = w.id OFFSET 0) p ON true
LEFT JOIN LATERAL (SELECT * FROM relay.outbox_tombstone t WHERE t.id = w.id OFFSET 0) t ON true
WHERE o.id IS NOT NULL OR p.id IS NOT NULL OR t.id IS NOT NULL
ORDER BY w.id

-- name: see_contents
-- What rows contain, cut to a length: for people. Needs a role that may read payloads.
-- $1 shard, $2 ids (bigint[]), $3 bytes of each
SELECT o.id, substr(coalesce(o.body, convert_to(o.payload::text, 'UTF8')), 1, $3) AS body FROM relay.outbox o
WHERE o.shard = $1 AND o.id = ANY ($2::bigint[])

-- name: see_next_id
-- The first id of a shard that is at least this.
-- $1 shard, $2 id
SELECT o.id FROM relay.outbox o WHERE o.shard = $1 AND o.id >= $2 ORDER BY o.id LIMIT 1

-- name: see_previous_id
-- The last id of a shard that is at most this.
-- $1 shard, $2 id
SELECT o.id FROM relay.outbox o WHERE o.shard = $1 AND o.id <= $2 ORDER BY o.id DESC LIMIT 1

-- The blocks that find ids begin with the same parameters; filters are null for any.
-- $1 shard, $2 above this id, $3 up to this id, $4 newest first (boolean), $5 limit,
-- $6 aggregate type and $7 aggregate id (patterns of LIKE), $8 aggregate type, $9 event type, $10 inserted longer ago than (s),
-- $11 inserted since, $12 inserted before, $13 from seq, $14 to seq, $15 ids (bigint[])

-- name: see_ids_in_log
-- Filters, $1 to $15: listed above `see_ids_in_log`.
-- In a piece of the log that the caller keeps short. $16 only what is published (boolean)
SELECT o.id FROM relay.outbox o
WHERE o.shard = $1 AND o.id > $2 AND o.id <= $3
  AND ($6::text IS NULL OR o.aggregate_type LIKE $6) AND ($7::text IS NULL OR o.aggregate_id LIKE $7)
  AND ($8::text IS NULL OR o.aggregate_type = $8) AND ($9::text IS NULL OR o.event_type = $9)
  AND ($10::float8 IS NULL OR o.created_at <= now() - make_interval(secs => $10))
  AND ($11::timestamptz IS NULL OR o.created_at >= $11) AND ($12::timestamptz IS NULL OR o.created_at < $12)
  AND ($13::bigint IS NULL OR o.seq >= $13) AND ($14::bigint IS NULL OR o.seq <= $14)
  AND ($15::bigint[] IS NULL OR o.id = ANY ($15))
  AND (NOT $16::boolean OR (
    EXISTS (SELECT FROM relay.outbox_cursor c WHERE c.shard = $1 AND relay.outbox_is_read(o.xid, o.id, c.snapshot, c.window_snapshot, c.after_id))
    AND NOT EXISTS (SELECT FROM relay.outbox_parked p WHERE p.id = o.id) AND NOT EXISTS (SELECT FROM relay.outbox_tombstone t WHERE t.id = o.id)))
ORDER BY CASE WHEN $4::boolean THEN -o.id ELSE o.id END LIMIT $5

-- name: see_ids_of_aggregate
-- Filters, $1 to $15: listed above `see_ids_in_log`.
-- Of one aggregate: $6 and $7 are its names, not patterns. $16 only what is published (boolean)
SELECT o.id FROM relay.outbox o
WHERE o.aggregate_type = $6 AND o.aggregate_id = $7
  AND ($13::bigint IS NULL OR o.seq >= $13) AND ($14::bigint IS NULL OR o.seq <= $14)
  AND o.shard = $1 AND o.id + 0 > $2 AND o.id + 0 <= $3  -- + 0: by the aggregate's index, not by that of the ids
  AND ($8::text IS NULL OR o.aggregate_type = $8) AND ($9::text IS NULL OR o.event_type = $9)
  AND ($10::float8 IS NULL OR o.created_at <= now() - make_interval(secs => $10))
  AND ($11::timestamptz IS NULL OR o.created_at >= $11) AND ($12::timestamptz IS NULL OR o.created_at < $12)
  AND ($15::bigint[] IS NULL OR o.id + 0 = ANY ($15))
  AND (NOT $16::boolean OR (
    EXISTS (SELECT FROM relay.outbox_cursor c WHERE c.shard = $1 AND relay.outbox_is_read(o.xid, o.id, c.snapshot, c.window_snapshot, c.after_id))
    AND NOT EXISTS (SELECT FROM relay.outbox_parked p WHERE p.id = o.id) AND NOT EXISTS (SELECT FROM relay.outbox_tombstone t WHERE t.id = o.id)))
ORDER BY CASE WHEN $4::boolean THEN -o.id ELSE o.id END LIMIT $5

-- name: see_ids_waiting
-- Filters, $1 to $15: listed above `see_ids_in_log`.
-- Among what is committed and not published yet: of those behind the cursor, the first $16 by transaction (see `see_backlog`).
-- $16 most rows to look at, $17 xmax of the cursor's snapshot (text), $18 its transactions in progress (text[])
SELECT o.id FROM (
  (SELECT o.id, o.xid, o.aggregate_type, o.aggregate_id, o.seq, o.event_type, o.created_at FROM relay.outbox o
   WHERE o.shard + 0 = $1 AND o.xid >= $17::text::xid8 ORDER BY o.xid LIMIT $16)
  UNION ALL
  SELECT late.* FROM unnest($18::text[]::xid8[]) AS t (xid) CROSS JOIN LATERAL (
    SELECT o.id, o.xid, o.aggregate_type, o.aggregate_id, o.seq, o.event_type, o.created_at FROM relay.outbox o
    WHERE o.shard + 0 = $1 AND o.xid = t.xid OFFSET 0
  ) late
) o JOIN relay.outbox_cursor c ON c.shard = $1
WHERE NOT relay.outbox_is_read(o.xid, o.id, c.snapshot, c.window_snapshot, c.after_id)
  AND NOT EXISTS (SELECT FROM relay.outbox_parked p WHERE p.id = o.id)
  AND o.id > $2 AND o.id <= $3
  AND ($6::text IS NULL OR o.aggregate_type LIKE $6) AND ($7::text IS NULL OR o.aggregate_id LIKE $7)
  AND ($8::text IS NULL OR o.aggregate_type = $8) AND ($9::text IS NULL OR o.event_type = $9)
  AND ($10::float8 IS NULL OR o.created_at <= now() - make_interval(secs => $10))
  AND ($11::timestamptz IS NULL OR o.created_at >= $11) AND ($12::timestamptz IS NULL OR o.created_at < $12)
  AND ($13::bigint IS NULL OR o.seq >= $13) AND ($14::bigint IS NULL OR o.seq <= $14)
  AND ($15::bigint[] IS NULL OR o.id = ANY ($15))
ORDER BY CASE WHEN $4::boolean THEN -o.id ELSE o.id END LIMIT $5

-- name: see_ids_parked
-- Filters, $1 to $15: listed above `see_ids_in_log`.
-- Among the parked rows; the times are those of parking. $16 cause, $17 states (text[]), $18 detail (pattern of ILIKE)
SELECT p.id FROM relay.outbox_parked p
WHERE p.shard = $1 AND p.id > $2 AND p.id <= $3
  AND ($6::text IS NULL OR p.aggregate_type LIKE $6) AND ($7::text IS NULL OR p.aggregate_id LIKE $7)
  AND ($8::text IS NULL OR p.aggregate_type = $8)
  AND ($9::text IS NULL OR EXISTS (SELECT FROM relay.outbox o WHERE o.shard = $1 AND o.id = p.id AND o.event_type = $9))
  AND ($10::float8 IS NULL OR p.parked_at <= now() - make_interval(secs => $10))
  AND ($11::timestamptz IS NULL OR p.parked_at >= $11) AND ($12::timestamptz IS NULL OR p.parked_at < $12)
  AND ($13::bigint IS NULL OR p.seq >= $13) AND ($14::bigint IS NULL OR p.seq <= $14)
  AND ($15::bigint[] IS NULL OR p.id = ANY ($15))
  AND ($16::text IS NULL OR CASE WHEN p.state = 'paused' THEN 'paused' ELSE p.reason END = $16)
  AND p.state = ANY ($17::text[]) AND ($18::text IS NULL OR p.detail ILIKE $18)
ORDER BY CASE WHEN $4::boolean THEN -p.id ELSE p.id END LIMIT $5

-- name: see_ids_skipped
-- Among the rows that an operator took out of the sequence, and whose tombstone has been published.
SELECT t.id FROM relay.outbox_tombstone t LEFT JOIN LATERAL (
  SELECT o.aggregate_type, o.aggregate_id, o.event_type, o.seq, o.created_at FROM relay.outbox o WHERE o.shard = $1 AND o.id = t.id OFFSET 0
) o ON true
WHERE t.shard = $1 AND t.id > $2 AND t.id <= $3 AND NOT EXISTS (SELECT FROM relay.outbox_parked p WHERE p.id = t.id)
  AND ($6::text IS NULL OR o.aggregate_type LIKE $6) AND ($7::text IS NULL OR o.aggregate_id LIKE $7)
  AND ($8::text IS NULL OR o.aggregate_type = $8) AND ($9::text IS NULL OR o.event_type = $9)
  AND ($10::float8 IS NULL OR o.created_at <= now() - make_interval(secs => $10))
  AND ($11::timestamptz IS NULL OR o.created_at >= $11) AND ($12::timestamptz IS NULL OR o.created_at < $12)
  AND ($13::bigint IS NULL OR o.seq >= $13) AND ($14::bigint IS NULL OR o.seq <= $14)
  AND ($15::bigint[] IS NULL OR t.id = ANY ($15))
ORDER BY CASE WHEN $4::boolean THEN -t.id ELSE t.id END LIMIT $5

-- --- relay inbox held, gaps, quarantine; relay audit
-- The first three begin with the filters: $1 aggregate type and $2 aggregate id (patterns), $3 aggregate type, $4 event type, $5 cause,
-- $6 state, $7 for longer than (s), $8 since, $9 until, $10 from seq, $11 to seq, $12 ids, $13 source, $14 consumer, $15 after id, $16 limit

-- name: see_held
-- Filters, $1 to $16: listed above `see_held`.
-- Held messages by id, which is the order in which they were held. $17 only these (bigint[], what `see_errors` found; null: all)
SELECT h.id, h.consumer, h.source, h.aggregate_type, h.aggregate_id, h.seq, h.event_type, h.message_id, h.reason, h.state, h.attempts,
  h.held_at, h.next_attempt_at
FROM relay.inbox_held h
WHERE ($1::text IS NULL OR h.aggregate_type LIKE $1) AND ($2::text IS NULL OR h.aggregate_id LIKE $2)
  AND ($3::text IS NULL OR h.aggregate_type = $3) AND ($4::text IS NULL OR h.event_type = $4)
  AND ($5::text IS NULL OR h.reason = $5) AND ($6::text IS NULL OR h.state = $6)
  AND ($7::float8 IS NULL OR h.held_at <= now() - make_interval(secs => $7))
  AND ($8::timestamptz IS NULL OR h.held_at >= $8) AND ($9::timestamptz IS NULL OR h.held_at < $9)
  AND ($10::bigint IS NULL OR h.seq >= $10) AND ($11::bigint IS NULL OR h.seq <= $11)
  AND ($12::bigint[] IS NULL OR h.id = ANY ($12))
  AND ($13::text IS NULL OR h.source = $13) AND ($14::text IS NULL OR h.consumer = $14)
  AND h.id > $15 AND ($17::bigint[] IS NULL OR h.id = ANY ($17))
ORDER BY h.id LIMIT $16

-- name: see_held_errors
-- What was said of held messages. Needs a role that may read errors.
-- $1 ids (bigint[])
SELECT id, error FROM relay.inbox_held WHERE id = ANY ($1::bigint[]) AND error IS NOT NULL

-- name: see_stored_errors
-- What takers said of stored events. Needs a role that may read errors.
-- $1 ids (bigint[])
SELECT id, error FROM relay.inbox WHERE id = ANY ($1::bigint[]) AND error IS NOT NULL

-- name: see_held_contents
-- Needs a role that may read payloads.
-- $1 ids (bigint[]), $2 bytes of each
SELECT id, substr(body, 1, $2) AS body FROM relay.inbox_held WHERE id = ANY ($1::bigint[])

-- name: see_gaps
-- Filters, $1 to $16: listed above `see_held`.
-- Aggregates of which something is missing, the oldest first: the first missing number, the number held that follows it, how many
-- are missing in all. $4, $12 and $15 are not for gaps, $5 is found_by; `total` counts all that the filters select.
SELECT g.consumer, g.source, g.aggregate_type, g.aggregate_id, g.to_seq, g.found_by, g.noticed_at, g.state, g.asks, g.next_ask_at, g.detail,
  g.last_seq, g.last_seq + run.length + 1 AS missing_from,
  coalesce((SELECT min(h.seq) - 1 FROM relay.inbox_held h WHERE h.aggregate_id = g.aggregate_id AND h.aggregate_type = g.aggregate_type
     AND h.source = g.source AND h.consumer = g.consumer AND h.seq > g.last_seq + run.length), g.to_seq) AS missing_to,
  greatest(0, g.to_seq - g.last_seq - run.held_below) AS missing, run.held, g.total
FROM (
  SELECT g.*, coalesce(c.last_seq, 0) AS last_seq, count(*) OVER () AS total
  FROM relay.inbox_gap g LEFT JOIN relay.inbox_aggregate c USING (aggregate_id, aggregate_type, source, consumer)
  WHERE (g.alerted_at IS NOT NULL OR g.state = 'stuck') AND ($1::text IS NULL OR g.aggregate_type LIKE $1) AND ($2::text IS NULL OR g.aggregate_id LIKE $2)
    AND ($3::text IS NULL OR g.aggregate_type = $3) AND $4::text IS NULL
    AND ($5::text IS NULL OR g.found_by = $5) AND ($6::text IS NULL OR g.state = $6)
    AND ($7::float8 IS NULL OR g.noticed_at <= now() - make_interval(secs => $7))
    AND ($8::timestamptz IS NULL OR g.noticed_at >= $8) AND ($9::timestamptz IS NULL OR g.noticed_at < $9)
    AND ($10::bigint IS NULL OR g.to_seq >= $10) AND ($11::bigint IS NULL OR coalesce(c.last_seq, 0) < $11)
    AND $12::bigint[] IS NULL AND ($13::text IS NULL OR g.source = $13) AND ($14::text IS NULL OR g.consumer = $14) AND $15::bigint IS NOT NULL
  ORDER BY g.noticed_at, g.aggregate_id LIMIT $16
) g
CROSS JOIN LATERAL (
  SELECT count(*) AS held, count(*) FILTER (WHERE h.seq <= g.to_seq) AS held_below, count(*) FILTER (WHERE h.seq = g.last_seq + h.place) AS length
  FROM (
    SELECT h.seq, row_number() OVER (ORDER BY h.seq) AS place FROM relay.inbox_held h
    WHERE h.aggregate_id = g.aggregate_id AND h.aggregate_type = g.aggregate_type AND h.source = g.source AND h.consumer = g.consumer
      AND h.seq > g.last_seq
  ) h
) run
ORDER BY g.noticed_at, g.aggregate_id

-- name: see_quarantine
-- Filters, $1 to $16: listed above `see_held`.
-- Quarantined messages by id, newest first. $4 is not for quarantine, $6 is open or dismissed. $15: before this id. $17 detail (pattern of ILIKE)
SELECT q.id, q.consumer, q.reason, q.detail, q.message_id, q.exchange, q.routing_key, q.received_at, q.source, q.aggregate_type, q.aggregate_id,
  q.seq, q.dismissed_at
FROM relay.inbox_quarantine q
WHERE ($1::text IS NULL OR q.aggregate_type LIKE $1) AND ($2::text IS NULL OR q.aggregate_id LIKE $2)
  AND ($3::text IS NULL OR q.aggregate_type = $3) AND $4::text IS NULL
  AND ($5::text IS NULL OR q.reason = $5)
  AND ($6::text IS NULL OR CASE WHEN q.dismissed_at IS NULL AND q.reason NOT IN ('skipped', 'purged') THEN 'open' ELSE 'dismissed' END = $6)
  AND ($7::float8 IS NULL OR q.received_at <= now() - make_interval(secs => $7))
  AND ($8::timestamptz IS NULL OR q.received_at >= $8) AND ($9::timestamptz IS NULL OR q.received_at < $9)
  AND ($10::bigint IS NULL OR q.seq >= $10) AND ($11::bigint IS NULL OR q.seq <= $11)
  AND ($12::bigint[] IS NULL OR q.id = ANY ($12))
  AND ($13::text IS NULL OR q.source = $13) AND ($14::text IS NULL OR q.consumer = $14)
  AND q.id < $15 AND ($17::text IS NULL OR q.detail ILIKE $17)
ORDER BY q.id DESC LIMIT $16

-- name: see_quarantine_contents
-- Needs a role that may read payloads.
-- $1 ids (bigint[]), $2 bytes of each
SELECT id, substr(body, 1, $2) AS body, properties::text AS properties FROM relay.inbox_quarantine WHERE id = ANY ($1::bigint[])

-- name: see_acts
-- What operators did, the newest first. Null for any: $1 aggregate type, $2 aggregate id, $3 side, $4 act, $5 who (pattern of ILIKE),
-- $6 since, $7 until; $8 before this id, $9 limit
SELECT a.id, a.at, a.who, a.login, a.side, a.act, a.selection::text AS selection, a.why, a.rows
FROM relay.audit a
WHERE ($2::text IS NULL OR a.selection @> '{"all": true}' OR a.id IN (
        SELECT t.audit_id FROM relay.audit_aggregate t WHERE t.aggregate_id = $2 AND t.aggregate_type = $1))
  AND ($3::text IS NULL OR a.side = $3) AND ($4::text IS NULL OR a.act = $4) AND ($5::text IS NULL OR a.who ILIKE $5)
  AND ($6::timestamptz IS NULL OR a.at >= $6) AND ($7::timestamptz IS NULL OR a.at < $7)
  AND a.id < $8
ORDER BY a.id DESC LIMIT $9
