-- Everything the outbox daemon asks of PostgreSQL, in the order a row meets it.
-- Each block is named; $n are listed with their types, since asyncpg binds by position.

-- name: probe_outbox
-- Fails if this role may not do what the daemon does, or the server only reads: found out at the start. Changes nothing.
WITH c AS (UPDATE relay.outbox_cursor SET epoch = epoch WHERE false),
     i AS (INSERT INTO relay.outbox_parked (id, shard, reason, state) SELECT 0, 0, 'behind', 'waiting' WHERE false),
     u AS (UPDATE relay.outbox_parked SET attempts = attempts WHERE false),
     d AS (DELETE FROM relay.outbox_parked WHERE false),
     p AS (SELECT FROM relay.outbox_pause WHERE false),
     t AS (SELECT FROM relay.outbox_tombstone WHERE false)
SELECT FROM relay.outbox, p, t WHERE false

-- name: list_shards
-- The shards of this log.
SELECT shard FROM relay.outbox_cursor ORDER BY shard

-- name: lock_cursor
-- Before `take_ownership`, so that its snapshot is younger than the last checkpoint of the owner before us.
-- $1 shard
SELECT FROM relay.outbox_cursor WHERE shard = $1 FOR UPDATE

-- name: take_ownership
-- Raises the fence: from now on only this epoch may move the shard's cursor.
-- from_the_future: the cursor, or a row of the log, has a transaction id that this cluster has not come to. Such a row would be new for ever.
-- $1 shard, $2 owner (text, for people)
-- updated_at stays that of the last checkpoint: no row that is younger has been published, which is what a restore relies on.
UPDATE relay.outbox_cursor SET epoch = epoch + 1, owner = $2
WHERE shard = $1
RETURNING epoch, source, cluster_id, high_id, after_id,
  snapshot::text AS snapshot, window_snapshot::text AS window_snapshot,
  pg_snapshot_xmax(snapshot) > pg_snapshot_xmax(pg_current_snapshot())
    OR EXISTS (SELECT FROM relay.outbox o WHERE o.shard + 0 = $1 AND o.xid >= pg_snapshot_xmax(pg_current_snapshot())) AS from_the_future,
  (SELECT system_identifier FROM pg_control_system()) AS current_cluster_id

-- name: name_source
-- Fixes the name under which the log is published, at the first run.
-- $1 shard, $2 epoch, $3 source, $4 cluster id
UPDATE relay.outbox_cursor SET source = $3, cluster_id = $4 WHERE shard = $1 AND epoch = $2

-- name: open_window
-- The first page of what is new since a snapshot, and the snapshot it was read with. One row at least: with a null id, nothing is new.
-- A page ends at $3 rows, or behind the row that reaches $4 bytes; is_last: nothing that the limit of rows gave is behind this row.
-- One window for both: each further one copies every row once more, 0.3 us of PostgreSQL a row; so does a frame without ROWS.
-- `shard + 0` leaves the index on xid as the only one (see relay.postgres.planning); `id + 0` keeps the planner, where it plans for the
-- values, from walking that on id through all of history in search of the page.
-- The columns of a row are those of relay.message.Row, as in all queries that rows are made of; what must be computed of them is, for the
-- page alone, at the end. created_s: in whole seconds since 1970 (exact: a message says no more, and it is decoded in a tenth of the
-- time that a timestamptz takes). The snapshot is told once: its list of transactions in progress can be long.
-- $1 shard, $2 xmax of the cursor's snapshot (text), $3 page (rows), $4 page (bytes)
WITH me AS MATERIALIZED (SELECT pg_current_snapshot()::text AS snapshot)
SELECT CASE WHEN coalesce(o.bytes_before, 0) = 0 THEN me.snapshot END AS snapshot, o.is_last,
       o.id, o.aggregate_type, o.aggregate_id, o.seq, o.event_type,
       coalesce(o.content_type, CASE WHEN o.payload IS NULL THEN 'application/octet-stream' ELSE 'application/json' END) AS content_type,
       o.headers::text AS headers, o.routing_key, date_part('epoch', date_trunc('second', o.created_at))::bigint AS created_s,
       coalesce(o.body, convert_to(o.payload::text, 'UTF8')) AS body, false AS is_tombstone
FROM me LEFT JOIN LATERAL (
  SELECT p.*, lead(p.id) OVER page IS NULL AS is_last, sum(p.size) OVER page - p.size AS bytes_before FROM (
    SELECT id, aggregate_type, aggregate_id, seq, event_type, size, content_type, headers, routing_key, created_at, payload, body
    FROM relay.outbox WHERE shard + 0 = $1 AND xid >= $2::text::xid8
    ORDER BY id + 0 LIMIT $3
  ) p WINDOW page AS (ORDER BY p.id ROWS UNBOUNDED PRECEDING)
) o ON o.bytes_before < $4
ORDER BY o.id

-- name: open_window_with_late
-- The same, when transactions were in progress at the cursor's snapshot: their rows are new as well.
-- Each is looked up on its own: `= ANY (list)` with a long list reads all of a log that was never analysed (PostgreSQL 15).
-- $1 shard, $2 xmax of the cursor's snapshot (text), $3 page (rows), $4 page (bytes), $5 its transactions in progress (text[])
WITH me AS MATERIALIZED (SELECT pg_current_snapshot()::text AS snapshot)
SELECT CASE WHEN coalesce(o.bytes_before, 0) = 0 THEN me.snapshot END AS snapshot, o.is_last,
       o.id, o.aggregate_type, o.aggregate_id, o.seq, o.event_type,
       coalesce(o.content_type, CASE WHEN o.payload IS NULL THEN 'application/octet-stream' ELSE 'application/json' END) AS content_type,
       o.headers::text AS headers, o.routing_key, date_part('epoch', date_trunc('second', o.created_at))::bigint AS created_s,
       coalesce(o.body, convert_to(o.payload::text, 'UTF8')) AS body, false AS is_tombstone
FROM me LEFT JOIN LATERAL (
  SELECT p.*, lead(p.id) OVER page IS NULL AS is_last, sum(p.size) OVER page - p.size AS bytes_before FROM (
    SELECT * FROM (
      SELECT id, aggregate_type, aggregate_id, seq, event_type, size, content_type, headers, routing_key, created_at, payload, body
      FROM relay.outbox WHERE shard + 0 = $1 AND xid >= $2::text::xid8
      UNION ALL
      SELECT late.* FROM unnest($5::text[]::xid8[]) AS t (xid) CROSS JOIN LATERAL (
        SELECT id, aggregate_type, aggregate_id, seq, event_type, size, content_type, headers, routing_key, created_at, payload, body
        FROM relay.outbox o WHERE o.shard + 0 = $1 AND o.xid = t.xid OFFSET 0
      ) late
    ) u ORDER BY id + 0 LIMIT $3
  ) p WINDOW page AS (ORDER BY p.id ROWS UNBOUNDED PRECEDING)
) o ON o.bytes_before < $4
ORDER BY o.id

-- name: next_page
-- The following pages of a window: by id, new since the cursor's snapshot, visible in the window's.
-- $1 shard, $2 xmax of the cursor's snapshot (text), $3 page (rows), $4 page (bytes), $5 its transactions in progress (text[]),
-- $6 after id, $7 window's snapshot (text)
SELECT o.is_last, o.id, o.aggregate_type, o.aggregate_id, o.seq, o.event_type,
       coalesce(o.content_type, CASE WHEN o.payload IS NULL THEN 'application/octet-stream' ELSE 'application/json' END) AS content_type,
       o.headers::text AS headers, o.routing_key, date_part('epoch', date_trunc('second', o.created_at))::bigint AS created_s,
       coalesce(o.body, convert_to(o.payload::text, 'UTF8')) AS body, false AS is_tombstone
FROM (
  SELECT p.*, lead(p.id) OVER page IS NULL AS is_last, sum(p.size) OVER page - p.size AS bytes_before FROM (
    SELECT id, aggregate_type, aggregate_id, seq, event_type, size, content_type, headers, routing_key, created_at, payload, body
    FROM relay.outbox
    WHERE shard = $1 AND id > $6
      AND (xid >= $2::text::xid8 OR xid = ANY ($5::text[]::xid8[]))
      AND pg_visible_in_snapshot(xid, $7::text::pg_snapshot)
    ORDER BY id LIMIT $3
  ) p WINDOW page AS (ORDER BY p.id ROWS UNBOUNDED PRECEDING)
) o
WHERE o.bytes_before < $4
ORDER BY o.id

-- name: checkpoint
-- Moves the cursor. No row: another owner has raised the epoch.
-- $1 shard, $2 epoch, $3 snapshot (text), $4 window's snapshot (text or null), $5 after id, $6 highest id published,
-- $7 messages confirmed since the last time, $8 of them per second lately
UPDATE relay.outbox_cursor
SET snapshot = $3::text::pg_snapshot, window_snapshot = $4::text::pg_snapshot, after_id = $5,
    high_id = greatest(high_id, $6), published = published + $7, rate = $8, updated_at = now()
WHERE shard = $1 AND epoch = $2
RETURNING shard

-- name: note_failure
-- What ended the last session, for `relay status`. updated_at stays that of the last checkpoint, as in `take_ownership`.
-- $1 shard, $2 epoch, $3 error, $4 seconds ago
UPDATE relay.outbox_cursor SET last_error = left($3, 1000), last_error_at = now() - make_interval(secs => $4)
WHERE shard = $1 AND epoch = $2

-- name: list_pauses
-- What operators have paused.
SELECT scope, aggregate_type, aggregate_id, event_type, shard FROM relay.outbox_pause

-- name: blocked_aggregates
-- The aggregates of a shard that have parked rows, and how many; an event without an aggregate counts under nulls.
-- refused: how many of them were refused or wait behind a row that was. The others are paused, or on their way out: since a
-- resume, since what held them up went out, or as the tombstone of what was published before.
-- $1 shard
SELECT aggregate_type, aggregate_id, parked,
       CASE WHEN aggregate_id IS NULL THEN refused WHEN paused = 0 AND refused > 0 THEN parked ELSE 0 END AS refused
FROM (
  SELECT aggregate_type, aggregate_id, count(*) AS parked, count(*) FILTER (WHERE state = 'paused') AS paused,
         count(*) FILTER (WHERE state <> 'paused' AND reason NOT IN ('paused', 'behind', 'tombstone')) AS refused
  FROM relay.outbox_parked WHERE shard = $1 GROUP BY 1, 2
) a

-- name: park
-- Parks rows: the head of an aggregate is tried again after a delay, what is behind it waits. Parking a parked row again changes nothing.
-- $1 shard; arrays, one element a row: $2 id, $3 aggregate type, $4 aggregate id, $5 seq, $6 reason, $7 detail,
-- $8 state, $9 attempts, $10 delay until the next attempt (s, null unless retrying)
INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, detail, state, attempts, next_attempt_at)
SELECT p.id, $1, p.aggregate_type, p.aggregate_id, p.seq, p.reason, p.detail, p.state, p.attempts, now() + make_interval(secs => p.delay_s)
FROM unnest($2::bigint[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[], $9::integer[], $10::float8[])
  AS p (id, aggregate_type, aggregate_id, seq, reason, detail, state, attempts, delay_s)
ON CONFLICT (id) DO NOTHING

-- name: due_parked
-- The parked rows that may be tried now: of up to $2 due aggregates, their first rows in order, up to $3 rows each, and no
-- further than the next row that has a fate of its own (it is tried at its own time, is stuck or paused).
-- What is tried alone is not among them, see `due_alone`: else it would be all there is, for as long as that takes.
-- Of a row that an operator took out of the sequence, the place and not the content: it goes out as a tombstone.
-- Ends before the row that exceeds $4 bytes, never before its first row.
-- $1 shard, $2 aggregates, $3 rows of each, $4 bytes, $5 suspects (bigint[])
SELECT page.id, page.aggregate_type, page.aggregate_id, page.seq, page.event_type,
       coalesce(page.content_type, CASE WHEN page.payload IS NULL THEN 'application/octet-stream' ELSE 'application/json' END) AS content_type,
       page.headers::text AS headers, page.routing_key, page.created_at,
       CASE WHEN page.is_tombstone THEN ''::bytea ELSE coalesce(page.body, convert_to(page.payload::text, 'UTF8')) END AS body,
       page.is_tombstone, page.attempts, page.next_attempt_at
FROM (
  SELECT coalesce(sum(CASE WHEN t.id IS NULL THEN o.size END) OVER (ORDER BY o.id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS bytes_before,
         o.id, o.aggregate_type, o.aggregate_id, o.seq, o.event_type, o.content_type, o.routing_key, o.created_at,
         CASE WHEN t.id IS NULL THEN o.headers END AS headers, CASE WHEN t.id IS NULL THEN o.payload END AS payload,
         CASE WHEN t.id IS NULL THEN o.body END AS body, t.id IS NOT NULL AS is_tombstone, r.attempts, r.next_attempt_at
  FROM (
    SELECT id, aggregate_type, aggregate_id, seq FROM relay.outbox_parked
    WHERE shard = $1 AND state = 'retrying' AND reason NOT IN ('refused', 'unconfirmed') AND next_attempt_at <= now()
      AND id <> ALL ($5::bigint[])
    ORDER BY next_attempt_at LIMIT $2
  ) due
  CROSS JOIN LATERAL (
    SELECT id, attempts, next_attempt_at FROM relay.outbox_parked WHERE id = due.id
    UNION ALL
    SELECT b.id, 0, NULL FROM (
      SELECT n.id, bool_and(n.state = 'waiting' AND n.id <> ALL ($5::bigint[])) OVER (ORDER BY n.seq) AS waiting FROM (
        SELECT p.id, p.seq, p.state FROM relay.outbox_parked p
        WHERE p.aggregate_id = due.aggregate_id AND p.aggregate_type = due.aggregate_type AND p.seq > due.seq
        ORDER BY p.seq LIMIT $3 - 1
      ) n
    ) b WHERE b.waiting
  ) r
  JOIN relay.outbox o ON o.shard = $1 AND o.id = r.id
  LEFT JOIN relay.outbox_tombstone t ON t.id = o.id
) page
WHERE page.bytes_before < $4
ORDER BY page.id

-- name: due_alone
-- The row to be tried alone next: of those that closed the channel or were not confirmed in time, and of the suspects, the one that
-- is due longest, is the first of its aggregate, and is not paused. A tombstone as in `due_parked`. No row: there is none now.
-- OFFSET 0: each is looked up on its own, and no more of them than it takes.
-- $1 shard, $2 suspects (bigint[])
SELECT o.id, o.aggregate_type, o.aggregate_id, o.seq, o.event_type,
       coalesce(o.content_type, CASE WHEN o.payload IS NULL THEN 'application/octet-stream' ELSE 'application/json' END) AS content_type,
       CASE WHEN t.id IS NULL THEN o.headers::text END AS headers, o.routing_key, o.created_at,
       CASE WHEN t.id IS NULL THEN coalesce(o.body, convert_to(o.payload::text, 'UTF8')) ELSE ''::bytea END AS body,
       t.id IS NOT NULL AS is_tombstone, due.attempts, due.next_attempt_at
FROM (
  (SELECT p.id, p.attempts, p.next_attempt_at FROM relay.outbox_parked p
   WHERE p.shard = $1 AND p.state = 'retrying' AND p.reason IN ('refused', 'unconfirmed') AND p.next_attempt_at <= now()
     AND NOT EXISTS (SELECT FROM relay.outbox_parked e
                     WHERE e.aggregate_id = p.aggregate_id AND e.aggregate_type = p.aggregate_type AND e.seq < p.seq OFFSET 0)
     AND (SELECT NOT relay.outbox_is_paused(o.aggregate_type, o.aggregate_id, o.event_type)
          FROM relay.outbox o WHERE o.shard = $1 AND o.id = p.id)
   ORDER BY p.next_attempt_at LIMIT 1)
  UNION ALL
  (SELECT p.id, p.attempts, p.next_attempt_at FROM (
     SELECT q.* FROM unnest($2::bigint[]) AS s (id)
     CROSS JOIN LATERAL (SELECT * FROM relay.outbox_parked WHERE id = s.id OFFSET 0) q
     WHERE q.state = 'retrying' AND q.next_attempt_at <= now()
     ORDER BY q.next_attempt_at OFFSET 0
   ) p
   WHERE NOT EXISTS (SELECT FROM relay.outbox_parked e
                     WHERE e.aggregate_id = p.aggregate_id AND e.aggregate_type = p.aggregate_type AND e.seq < p.seq OFFSET 0)
     AND (SELECT NOT relay.outbox_is_paused(o.aggregate_type, o.aggregate_id, o.event_type)
          FROM relay.outbox o WHERE o.shard = $1 AND o.id = p.id)
   LIMIT 1)
  ORDER BY next_attempt_at LIMIT 1
) due
JOIN relay.outbox o ON o.shard = $1 AND o.id = due.id
LEFT JOIN relay.outbox_tombstone t ON t.id = o.id

-- name: next_parked_attempt
-- Seconds until the next parked row is due, and until the next that is tried alone; null if none will be.
-- $1 shard, $2 suspects (bigint[])
SELECT extract(epoch FROM (
         SELECT min(next_attempt_at) FROM relay.outbox_parked
         WHERE shard = $1 AND state = 'retrying' AND reason NOT IN ('refused', 'unconfirmed') AND id <> ALL ($2::bigint[])
       ) - now())::float8 AS together_s,
       extract(epoch FROM least(
         (SELECT min(next_attempt_at) FROM relay.outbox_parked
          WHERE shard = $1 AND state = 'retrying' AND reason IN ('refused', 'unconfirmed')),
         (SELECT min(q.next_attempt_at) FROM unnest($2::bigint[]) AS s (id)
          CROSS JOIN LATERAL (SELECT next_attempt_at, state FROM relay.outbox_parked WHERE id = s.id OFFSET 0) q
          WHERE q.state = 'retrying')
       ) - now())::float8 AS alone_s

-- name: unpark
-- Removes rows that were published after all. One that went out as it was, and was taken out of the sequence meanwhile, stays:
-- its tombstone is still to go out. Call `fence` first: operators' acts hold the cursor's lock. Returns what was removed, and
-- whether it counted as refused (see `blocked_aggregates`).
-- $1 ids (bigint[]), $2 those of them that went out as a tombstone (bigint[])
DELETE FROM relay.outbox_parked p
WHERE p.id = ANY ($1::bigint[]) AND (p.id = ANY ($2::bigint[]) OR NOT EXISTS (SELECT FROM relay.outbox_tombstone t WHERE t.id = p.id))
RETURNING p.id, p.reason NOT IN ('paused', 'behind', 'tombstone') AS refused

-- name: fence
-- Whether we are still the owner; locks the cursor, so that the answer holds until the end of the transaction. No row: we are not.
-- $1 shard, $2 epoch, $3 highest id published now, $4 messages confirmed now
UPDATE relay.outbox_cursor SET high_id = greatest(high_id, $3), published = published + $4 WHERE shard = $1 AND epoch = $2 RETURNING shard

-- name: delay_parked
-- A parked row was tried and refused again. What was paused meanwhile stays paused, and what an operator made due meanwhile stays
-- due; what was taken out of the sequence meanwhile is due at once, since what was refused is not what will be sent.
-- Arrays: $1 id, $2 reason, $3 detail, $4 state, $5 attempts, $6 delay until the next attempt (s, null when stuck), $7 as a tombstone,
-- $8 when it was due, as it was read (null: it waited behind another)
UPDATE relay.outbox_parked AS p
SET reason = d.reason, detail = d.detail, attempts = d.attempts,
    state = CASE WHEN p.state = 'paused' OR p.next_attempt_at IS DISTINCT FROM d.due_at THEN p.state ELSE d.state END,
    next_attempt_at = CASE WHEN p.state = 'paused' OR p.next_attempt_at IS DISTINCT FROM d.due_at THEN p.next_attempt_at
                           ELSE now() + make_interval(secs => d.delay_s) END
FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::integer[], $6::float8[], $7::boolean[], $8::timestamptz[])
  AS d (id, reason, detail, state, attempts, delay_s, is_tombstone, due_at)
WHERE p.id = d.id AND (d.is_tombstone OR NOT EXISTS (SELECT FROM relay.outbox_tombstone t WHERE t.id = p.id))

-- name: promote_parked
-- After the head of an aggregate went out: the first row that is still parked becomes the head, due at once unless it is paused.
-- Returns the aggregates that are still blocked, and whether by a row that was refused (see `blocked_aggregates`).
-- $1 shard; arrays: $2 aggregate type, $3 aggregate id
WITH head AS (
  SELECT p.*, p.state = 'waiting' AS is_new, relay.outbox_is_paused(p.aggregate_type, p.aggregate_id, p.event_type) AS paused
  FROM unnest($2::text[], $3::text[]) AS a (aggregate_type, aggregate_id)
  CROSS JOIN LATERAL (
    SELECT p.id, p.aggregate_type, p.aggregate_id, p.state, p.reason,
           (SELECT o.event_type FROM relay.outbox o WHERE o.shard = $1 AND o.id = p.id) AS event_type
    FROM relay.outbox_parked p WHERE p.aggregate_id = a.aggregate_id AND p.aggregate_type = a.aggregate_type
    ORDER BY p.seq LIMIT 1
  ) p
), promoted AS (
  UPDATE relay.outbox_parked p
  SET state = CASE WHEN head.paused THEN 'paused' ELSE 'retrying' END, next_attempt_at = CASE WHEN head.paused THEN NULL ELSE now() END,
      reason = CASE WHEN head.paused THEN 'paused' ELSE p.reason END
  FROM head WHERE p.id = head.id AND head.is_new
)
SELECT aggregate_type, aggregate_id, state <> 'paused' AND reason NOT IN ('paused', 'behind', 'tombstone') AS refused FROM head

-- name: promote_headless
-- The first parked row of an aggregate that waits, though nothing is parked before it: an operator took the head away.
-- If a pause holds it, `hold_paused` follows.
-- $1 shard
WITH first AS (
  SELECT DISTINCT ON (aggregate_id, aggregate_type) id, state FROM relay.outbox_parked
  WHERE shard = $1 AND aggregate_id IS NOT NULL
  ORDER BY aggregate_id, aggregate_type, seq
)
UPDATE relay.outbox_parked p SET state = 'retrying', next_attempt_at = now()
FROM first WHERE p.id = first.id AND first.state = 'waiting'

-- name: hold_paused
-- Rows that would be tried, and that an operator has paused since: they wait for the resume, whatever they were parked for.
-- The log knows the aggregate type also of an event without an aggregate id; relay.outbox_parked does not.
-- $1 shard
UPDATE relay.outbox_parked p
SET state = 'paused', next_attempt_at = NULL, reason = CASE p.reason WHEN 'behind' THEN 'paused' ELSE p.reason END
FROM relay.outbox o
WHERE p.shard = $1 AND p.state = 'retrying' AND o.shard = $1 AND o.id = p.id
  AND relay.outbox_is_paused(o.aggregate_type, o.aggregate_id, o.event_type)

-- name: hold_due
-- Rows that were found due, and that a pause holds: so they do not stand in the way of what is due behind them.
-- Call `fence` first.
-- $1 ids (bigint[])
UPDATE relay.outbox_parked
SET state = 'paused', next_attempt_at = NULL, reason = CASE reason WHEN 'behind' THEN 'paused' ELSE reason END
WHERE id = ANY ($1::bigint[]) AND state = 'retrying'

-- name: release_paused
-- Rows that no pause holds any more are due at once.
-- $1 shard
UPDATE relay.outbox_parked p SET state = 'retrying', next_attempt_at = now()
FROM relay.outbox o
WHERE p.shard = $1 AND p.state = 'paused' AND o.shard = $1 AND o.id = p.id
  AND NOT relay.outbox_is_paused(o.aggregate_type, o.aggregate_id, o.event_type)

-- name: lock_log
-- Keeps every writer out of the log until the end of the transaction: for re-basing after a restore.
LOCK TABLE relay.outbox IN SHARE ROW EXCLUSIVE MODE

-- name: rebase
-- After a restore into another cluster: what was not published gets a transaction id of this one. What was, or is parked, or was taken
-- out of the sequence (and is parked no more: it is done, though nothing may have been published), an id no reader looks at.
-- Published is: visible in the cursor (its snapshot, or its window up to after_id), not above high_id, and older than the last
-- checkpoint: a row that was inserted here before the first run has a small xid too, and a small id if the sequence was not restored.
-- $1 shard
UPDATE relay.outbox o
SET xid = CASE WHEN o.id <= c.high_id AND o.created_at <= c.updated_at AND (
                      pg_visible_in_snapshot(o.xid, c.snapshot)
                      OR (c.window_snapshot IS NOT NULL AND o.id <= c.after_id AND pg_visible_in_snapshot(o.xid, c.window_snapshot)))
                 OR (o.created_at <= c.updated_at
                     AND o.id IN (SELECT p.id FROM relay.outbox_parked p UNION ALL SELECT t.id FROM relay.outbox_tombstone t))
               THEN '3'::xid8 ELSE pg_current_xact_id() END
FROM relay.outbox_cursor c
WHERE c.shard = $1 AND o.shard = $1
  AND NOT (o.xid < pg_snapshot_xmin(pg_current_snapshot()) AND o.created_at <= c.updated_at AND (
             o.id <= c.high_id AND pg_visible_in_snapshot(o.xid, c.snapshot)
             OR o.id IN (SELECT p.id FROM relay.outbox_parked p UNION ALL SELECT t.id FROM relay.outbox_tombstone t)))

-- name: renumber
-- Where the sequence did not come along, ids were given out again. Then what is unpublished (it has this transaction's id now) gets new
-- ones above all others: by the time of its creation, but never before an earlier event of its aggregate. Otherwise nothing happens.
-- The id of an old row that was taken out of the sequence is no new row's either: it would go out as a tombstone.
-- $1 shard
WITH cursor AS (
  SELECT high_id, updated_at FROM relay.outbox_cursor WHERE shard = $1
), top AS MATERIALIZED (  -- once, not for each row that gets a new id
  SELECT greatest(max(o.id), (SELECT max(high_id) FROM relay.outbox_cursor), (SELECT max(t.id) FROM relay.outbox_tombstone t)) AS id
  FROM relay.outbox o
), needed AS (
  SELECT EXISTS (SELECT FROM relay.outbox o, cursor c WHERE o.created_at > c.updated_at
                   AND (o.id <= c.high_id OR o.id IN (SELECT t.id FROM relay.outbox_tombstone t)))
      OR EXISTS (SELECT FROM relay.outbox o GROUP BY o.id HAVING count(*) > 1) AS so
), unpublished AS (
  SELECT o.tableoid, o.ctid, o.id, o.seq,
         max(o.created_at) OVER (PARTITION BY o.aggregate_id, o.aggregate_type, o.seq IS NULL ORDER BY o.seq, o.id) AS since
  FROM relay.outbox o
  WHERE o.shard + 0 = $1 AND o.xid = pg_current_xact_id() AND (SELECT so FROM needed)
), numbered AS (
  SELECT u.tableoid, u.ctid, row_number() OVER (ORDER BY u.since, u.seq, u.id) AS n FROM unpublished u
)
UPDATE relay.outbox o SET id = top.id + numbered.n
FROM numbered, top
WHERE o.tableoid = numbered.tableoid AND o.ctid = numbered.ctid

-- name: rebase_cursor
-- The cursor of a re-based shard: a snapshot of this cluster in which this transaction is still in progress.
-- $1 shard, $2 epoch, $3 cluster id
UPDATE relay.outbox_cursor
SET cluster_id = $3, window_snapshot = NULL, after_id = 0, updated_at = now(), snapshot = (
  SELECT (least(pg_snapshot_xmin(s)::text::numeric, x::text::numeric)::text || ':'
       || greatest(pg_snapshot_xmax(s)::text::numeric, x::text::numeric + 1)::text || ':'
       || (SELECT string_agg(t::text, ',' ORDER BY t) FROM (
             SELECT xip::text::numeric AS t FROM pg_snapshot_xip(s) AS xip
             UNION SELECT x::text::numeric
             UNION SELECT generate_series(pg_snapshot_xmax(s)::text::numeric, x::text::numeric)
           ) AS in_progress))::pg_snapshot
  FROM (SELECT pg_current_snapshot() AS s, pg_current_xact_id() AS x) AS now
)
WHERE shard = $1 AND epoch = $2
RETURNING snapshot::text AS snapshot

-- name: advance_ids
-- After a restore that did not bring the sequence along: new ids must follow the old ones.
SELECT setval('relay.outbox_id_seq', greatest((SELECT max(id) FROM relay.outbox), (SELECT max(high_id) FROM relay.outbox_cursor),
                                              (SELECT max(id) FROM relay.outbox_tombstone),
                                              (SELECT last_value FROM relay.outbox_id_seq)), true)

-- name: try_owner_lock
-- $1 class, $2 shard
SELECT pg_try_advisory_lock($1, $2)

-- name: try_wake_lock
-- $1 class, $2 shard. Not granted while the notification queue is half full: a listener of somebody else is stuck in a transaction,
-- and once the queue is full a producer that has to notify cannot commit. Whoever stays awake is not notified.
SELECT CASE WHEN pg_notification_queue_usage() < 0.5 THEN pg_try_advisory_lock($1, $2) ELSE false END

-- name: release_wake_lock
-- $1 class, $2 shard
SELECT pg_advisory_unlock($1, $2)
