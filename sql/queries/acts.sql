-- What operators do to the outbox and to an inbox: each act is counted first, then done under the locks that the daemons take.
-- Each block is named; $n are listed with their types, since asyncpg binds by position.

-- name: limit_lock_wait
-- $1 longest wait for a lock, until the end of the transaction (text, ms)
SELECT set_config('lock_timeout', $1, true)

-- name: lock_outbox_cursors
-- An act and the daemon's checkpoints exclude each other.
SELECT FROM relay.outbox_cursor ORDER BY shard FOR UPDATE

-- name: notify_outbox
-- The daemon looks at pauses and parked rows at once, when the act commits. A hint: left out while the notification queue is
-- half full, for with a full one the act could not commit; the daemon looks now and then in any case.
SELECT pg_notify('relay_outbox', 'operate') WHERE pg_notification_queue_usage() < 0.5

-- name: notify_inbox
-- As above. $1 consumer
SELECT pg_notify('relay_inbox_operate', left($1::text, 2000)) WHERE pg_notification_queue_usage() < 0.5

-- name: select_parked
-- The parked rows that an act means. The filters on the cause ($6 to $9) speak of the row that holds its aggregate up (the head), the
-- others of the row itself. With $16, all rows behind a head are meant as well, otherwise heads only; a row without an aggregate is a head.
-- is_marked: its tombstone is on its way already.
-- $1 aggregate type, $2 aggregate id (exactly; text), $3 aggregate type, $4 aggregate id (patterns for LIKE; text), $5 aggregate type,
-- $6 cause, $7 state, $8 text in the detail (pattern for ILIKE), $9 parked longer ago than (float8, s), $10 event type,
-- $11 inserted since, $12 inserted before, $13 from seq, $14 to seq, $15 ids (bigint[]), $16 whole lines (boolean); null: any
WITH head AS (
  (SELECT DISTINCT ON (aggregate_id, aggregate_type) *
   FROM relay.outbox_parked
   WHERE aggregate_id IS NOT NULL
     AND ($1::text IS NULL OR aggregate_type = $1) AND ($2::text IS NULL OR aggregate_id = $2)
     AND ($3::text IS NULL OR aggregate_type LIKE $3) AND ($4::text IS NULL OR aggregate_id LIKE $4)
     AND ($5::text IS NULL OR aggregate_type = $5)
   ORDER BY aggregate_id, aggregate_type, seq)
  UNION ALL
  SELECT * FROM relay.outbox_parked
  WHERE aggregate_id IS NULL AND num_nonnulls($1::text, $2::text, $3::text, $4::text, $5::text) = 0
), chosen AS (
  SELECT p.*, p.id = head.id AS is_head, head.state = 'paused' AS is_paused
  FROM head CROSS JOIN LATERAL (
    SELECT * FROM relay.outbox_parked h WHERE h.id = head.id
    UNION ALL
    SELECT * FROM relay.outbox_parked b
    WHERE $16::boolean AND b.aggregate_id = head.aggregate_id AND b.aggregate_type = head.aggregate_type AND b.seq > head.seq
  ) AS p
  WHERE ($6::text IS NULL OR head.reason = $6) AND ($7::text IS NULL OR head.state = $7)
    AND ($8::text IS NULL OR head.detail ILIKE $8)
    AND ($9::float8 IS NULL OR head.parked_at < now() - make_interval(secs => $9))
)
SELECT c.id, c.aggregate_type, c.aggregate_id, c.reason, c.state, c.is_head, c.is_paused,
       EXISTS (SELECT FROM relay.outbox_tombstone t WHERE t.id = c.id) AS is_marked
FROM chosen c
WHERE ($13::bigint IS NULL OR c.seq >= $13) AND ($14::bigint IS NULL OR c.seq <= $14)
  AND ($15::bigint[] IS NULL OR c.id = ANY ($15))
  AND (num_nonnulls($10::text, $11::timestamptz, $12::timestamptz) = 0 OR EXISTS (
         SELECT FROM relay.outbox o
         WHERE o.shard = c.shard AND o.id = c.id AND ($10 IS NULL OR o.event_type = $10)
           AND ($11 IS NULL OR o.created_at >= $11) AND ($12 IS NULL OR o.created_at < $12)))
ORDER BY c.id

-- name: still_parked
-- Those of the counted rows that are parked still. A row that was published meanwhile is not, and nothing else takes its place.
-- $1 ids (bigint[])
SELECT id, aggregate_type, aggregate_id, state FROM relay.outbox_parked WHERE id = ANY ($1::bigint[]) ORDER BY id

-- name: retry_parked
-- The heads are tried next. The attempts stay: what is stuck and fails once more is stuck again.
-- $1 ids (bigint[])
UPDATE relay.outbox_parked SET state = 'retrying', next_attempt_at = now() WHERE id = ANY ($1::bigint[])

-- name: mark_tombstones
-- From here on whoever publishes these rows publishes tombstones.
-- $1 ids (bigint[]), $2 act, $3 audit id
INSERT INTO relay.outbox_tombstone (id, shard, act, audit_id)
SELECT p.id, p.shard, $2, $3 FROM relay.outbox_parked p WHERE p.id = ANY ($1::bigint[])
ON CONFLICT (id) DO NOTHING

-- name: release_marked
-- Those of the rows that hold their aggregate up are due now, as the tombstones they have become: that has never been refused.
-- (What waits behind another row is let go by the daemon, when its turn comes.)
-- $1 ids (bigint[])
UPDATE relay.outbox_parked p
SET state = 'retrying', next_attempt_at = now(), attempts = 0
WHERE p.id = ANY ($1::bigint[]) AND p.state IN ('retrying', 'stuck') AND p.aggregate_id IS NOT NULL

-- name: drop_unordered
-- Rows without an aggregate: nobody waits for their number, so there is no tombstone on the wire.
-- $1 ids (bigint[])
DELETE FROM relay.outbox_parked WHERE id = ANY ($1::bigint[]) AND aggregate_id IS NULL

-- name: place_in_outbox
-- One number of one aggregate: whether it is retained, published, parked, marked; and which row holds the aggregate up.
-- $1 aggregate type, $2 aggregate id, $3 seq (bigint)
SELECT o.id, o.shard, p.state AS parked_as, t.id IS NOT NULL AS is_marked,
       relay.outbox_is_read(o.xid, o.id, c.snapshot, c.window_snapshot, c.after_id) AS is_read,
       (SELECT min(seq) FROM relay.outbox_parked WHERE aggregate_type = $1 AND aggregate_id = $2) AS head_seq,
       (SELECT last_seq FROM relay.outbox_aggregate WHERE aggregate_type = $1 AND aggregate_id = $2) AS last_seq
FROM (SELECT 1) AS always
LEFT JOIN relay.outbox o ON o.aggregate_type = $1 AND o.aggregate_id = $2 AND o.seq = $3
LEFT JOIN relay.outbox_cursor c ON c.shard = o.shard
LEFT JOIN relay.outbox_parked p ON p.id = o.id
LEFT JOIN relay.outbox_tombstone t ON t.id = o.id

-- name: park_tombstone
-- A row that was published already: it goes out once more, as a tombstone, before anything later of its aggregate.
-- With the shard, because no index begins with the id: without it PostgreSQL 15 to 17 read whole indexes, and the cursor is locked.
-- $1 id, $2 shard
INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state, next_attempt_at)
SELECT id, shard, aggregate_type, aggregate_id, seq, 'tombstone', 'retrying', now() FROM relay.outbox WHERE shard = $2 AND id = $1

-- name: held_by_pause
-- How many of these parked rows a pause keeps from being published: one of their shard, of the row, or of a row before it in its aggregate.
-- $1 ids (bigint[])
WITH line AS (
  SELECT DISTINCT aggregate_type, aggregate_id FROM relay.outbox_parked WHERE id = ANY ($1::bigint[]) AND aggregate_id IS NOT NULL
), row AS (
  SELECT p.id, bool_or(
           EXISTS (SELECT FROM relay.outbox_pause s WHERE s.scope = 'shard' AND s.shard = p.shard)
           OR relay.outbox_is_paused(p.aggregate_type, p.aggregate_id, CASE WHEN by_event_type.any THEN
                (SELECT o.event_type FROM relay.outbox o WHERE o.shard = p.shard AND o.id = p.id) END)
         ) OVER (PARTITION BY p.aggregate_id, p.aggregate_type ORDER BY p.seq) AS held
  FROM (SELECT EXISTS (SELECT FROM relay.outbox_pause WHERE scope = 'event_type') AS any) by_event_type
  CROSS JOIN line JOIN relay.outbox_parked p USING (aggregate_id, aggregate_type)
)
SELECT count(*) FROM row WHERE held AND id = ANY ($1::bigint[])

-- name: outbox_place
-- Which database this is, whether its outbox was ever used, and whether a relay owns a shard of it now (it holds the lock 727003/shard).
SELECT current_database()::text AS database,
       EXISTS (SELECT FROM relay.outbox_cursor WHERE source IS NOT NULL)
         OR EXISTS (SELECT FROM relay.outbox_aggregate) OR EXISTS (SELECT FROM relay.outbox) AS is_used,
       EXISTS (SELECT FROM pg_locks
               WHERE locktype = 'advisory' AND granted AND classid = 727003 AND objsubid = 2
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())) AS is_served

-- name: connected_consumers
-- How many daemons of a consumer are connected.
-- $1 consumer
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = left('relay inbox ' || $1::text, 63)

-- name: describe_parked
-- What one parked or published row is, to be told before it is given up.
-- $1 id
SELECT o.seq, o.event_type, p.reason, p.state, p.attempts
FROM relay.outbox o LEFT JOIN relay.outbox_parked p ON p.shard = o.shard AND p.id = o.id
WHERE o.id = $1 AND o.shard IN (SELECT shard FROM relay.outbox_cursor)

-- name: describe_held
-- The same of one held message.
-- $1 id
SELECT seq, event_type, reason, state, attempts FROM relay.inbox_held WHERE id = $1

-- name: find_pause
-- $1 scope, $2 aggregate type, $3 aggregate id, $4 event type, $5 shard (smallint)
SELECT p.id, p.paused_at, a.who, a.why
FROM relay.outbox_pause p JOIN relay.audit a ON a.id = p.audit_id
WHERE p.scope = $1 AND p.aggregate_type IS NOT DISTINCT FROM $2 AND p.aggregate_id IS NOT DISTINCT FROM $3
  AND p.event_type IS NOT DISTINCT FROM $4 AND p.shard IS NOT DISTINCT FROM $5

-- name: find_pauses
-- All pauses.
SELECT id, scope, aggregate_type, aggregate_id, event_type, shard FROM relay.outbox_pause ORDER BY id

-- name: insert_pause
-- No row: it was paused meanwhile.
-- $1 scope, $2 aggregate type, $3 aggregate id, $4 event type, $5 shard (smallint), $6 audit id
INSERT INTO relay.outbox_pause (scope, aggregate_type, aggregate_id, event_type, shard, audit_id) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT DO NOTHING RETURNING id

-- name: delete_pauses
-- $1 ids (bigint[])
DELETE FROM relay.outbox_pause WHERE id = ANY ($1::bigint[]) RETURNING id

-- name: outbox_knows
-- Whether there is such an aggregate, and such a shard.
-- $1 aggregate type, $2 aggregate id, $3 shard (smallint)
SELECT EXISTS (SELECT FROM relay.outbox_aggregate WHERE aggregate_type = $1 AND aggregate_id = $2) AS aggregate,
       EXISTS (SELECT FROM relay.outbox_cursor WHERE shard = $3) AS shard

-- name: known_consumers
-- The consumers whose inbox this is, as far as they have run lately or have something to show.
SELECT consumer FROM relay.inbox_progress
UNION SELECT consumer FROM relay.inbox_seed
UNION SELECT consumer FROM relay.inbox_gap
UNION SELECT consumer FROM relay.inbox_held
UNION SELECT consumer FROM relay.inbox
UNION SELECT consumer FROM relay.inbox_quarantine WHERE dismissed_at IS NULL
ORDER BY 1

-- name: consumers_with_cursors
-- The same from the cursors: all of them are read.
SELECT DISTINCT consumer FROM relay.inbox_aggregate ORDER BY 1

-- name: select_held
-- The held messages that an act means: those whose handler failed; with $18 instead whole lines, that is all that is held of the
-- aggregates whose first held message (the head) the filters $6 to $9 describe. A head that is early waits behind a gap.
-- $1 to $4 aggregate as for `select_parked`, $5 aggregate type, $6 cause, $7 state, $8 text in the error (pattern for ILIKE), $9 held
-- longer ago than (float8, s), $10 event type, $11 occurred since, $12 before, $13 from seq, $14 to seq, $15 ids (bigint[]), $16 source;
-- null: any; $17 consumer, $18 whole lines (boolean)
WITH mine AS (
  SELECT id, source, aggregate_type, aggregate_id, seq, event_type, occurred_at, reason, state, error, held_at
  FROM relay.inbox_held
  WHERE consumer = $17
    AND ($1::text IS NULL OR aggregate_type = $1) AND ($2::text IS NULL OR aggregate_id = $2)
    AND ($3::text IS NULL OR aggregate_type LIKE $3) AND ($4::text IS NULL OR aggregate_id LIKE $4)
    AND ($5::text IS NULL OR aggregate_type = $5) AND ($16::text IS NULL OR source = $16)
), head AS (
  SELECT DISTINCT ON (aggregate_id, aggregate_type, source) * FROM mine
  WHERE $18::boolean AND seq IS NOT NULL ORDER BY aggregate_id, aggregate_type, source, seq
), chosen AS (
  SELECT m.*, m AS cause FROM mine m WHERE m.reason = 'failed' AND (NOT $18 OR m.seq IS NULL)
  UNION ALL
  SELECT m.*, head AS cause FROM head JOIN mine m USING (aggregate_id, aggregate_type, source) WHERE m.seq IS NOT NULL
)
SELECT c.id, c.aggregate_type, c.aggregate_id, c.event_type, c.id = (c.cause).id AS is_head, (c.cause).reason AS head_reason
FROM chosen c
WHERE ($6::text IS NULL OR (c.cause).reason = $6 OR ($6 = 'gap' AND (c.cause).reason = 'early'))
  AND ($7::text IS NULL OR (c.cause).state = $7) AND ($8::text IS NULL OR (c.cause).error ILIKE $8)
  AND ($9::float8 IS NULL OR (c.cause).held_at < now() - make_interval(secs => $9))
  AND ($10::text IS NULL OR c.event_type = $10)
  AND ($11::timestamptz IS NULL OR c.occurred_at >= $11) AND ($12::timestamptz IS NULL OR c.occurred_at < $12)
  AND ($13::bigint IS NULL OR c.seq >= $13) AND ($14::bigint IS NULL OR c.seq <= $14)
  AND ($15::bigint[] IS NULL OR c.id = ANY ($15))
ORDER BY c.id

-- name: select_given_back
-- Store mode: the stored messages that their taker gave back; with $18 also all that waits behind them. The filters $6 to $9 speak of
-- what was given back, the others of the row itself.
-- Filters as for `select_held`
WITH given_back AS (
  SELECT id, source, aggregate_type, aggregate_id, seq FROM relay.inbox
  WHERE consumer = $17 AND attempts > 0 AND ($6::text IS NULL OR $6 = 'taken')
    AND ($1::text IS NULL OR aggregate_type = $1) AND ($2::text IS NULL OR aggregate_id = $2)
    AND ($3::text IS NULL OR aggregate_type LIKE $3) AND ($4::text IS NULL OR aggregate_id LIKE $4)
    AND ($5::text IS NULL OR aggregate_type = $5) AND ($16::text IS NULL OR source = $16)
    AND ($7::text IS NULL OR $7 = CASE WHEN next_take_at = 'infinity' THEN 'stuck' ELSE 'retrying' END)
    AND ($8::text IS NULL OR error ILIKE $8) AND ($9::float8 IS NULL OR stored_at < now() - make_interval(secs => $9))
), chosen AS (
  SELECT id FROM given_back
  UNION
  SELECT i.id
  FROM (SELECT source, aggregate_type, aggregate_id, min(seq) AS seq FROM given_back
        WHERE $18::boolean AND seq IS NOT NULL GROUP BY source, aggregate_type, aggregate_id) AS head
  CROSS JOIN LATERAL (
    SELECT b.id FROM relay.inbox b
    WHERE b.aggregate_id = head.aggregate_id AND b.aggregate_type = head.aggregate_type AND b.source = head.source AND b.consumer = $17
      AND b.seq > head.seq
  ) AS i
)
SELECT i.id, i.aggregate_type, i.aggregate_id FROM relay.inbox i
WHERE i.id = ANY (ARRAY(SELECT c.id FROM chosen c))
  AND ($10::text IS NULL OR i.event_type = $10)
  AND ($11::timestamptz IS NULL OR i.occurred_at >= $11) AND ($12::timestamptz IS NULL OR i.occurred_at < $12)
  AND ($13::bigint IS NULL OR i.seq >= $13) AND ($14::bigint IS NULL OR i.seq <= $14)
  AND ($15::bigint[] IS NULL OR i.id = ANY ($15))
ORDER BY i.id

-- name: lock_cursors_of_held
-- The cursors of these held messages, one by one in the order in which the daemons lock theirs.
-- $1 consumer, $2 ids (bigint[])
SELECT count(*) FROM (
  SELECT locked.last_seq
  FROM (
    SELECT DISTINCT source COLLATE "C" AS source, aggregate_type COLLATE "C" AS aggregate_type, aggregate_id COLLATE "C" AS aggregate_id
    FROM relay.inbox_held WHERE id = ANY ($2::bigint[]) AND consumer = $1 AND seq IS NOT NULL
    ORDER BY 1, 2, 3
  ) AS k
  CROSS JOIN LATERAL (
    SELECT a.last_seq FROM relay.inbox_aggregate a
    WHERE a.aggregate_id = k.aggregate_id COLLATE "default" AND a.aggregate_type = k.aggregate_type COLLATE "default"
      AND a.source = k.source COLLATE "default" AND a.consumer = $1
    FOR UPDATE
  ) AS locked
) AS all_of_them

-- name: retry_held
-- $1 consumer, $2 ids (bigint[])
UPDATE relay.inbox_held SET state = 'retrying', next_attempt_at = clock_timestamp()
WHERE consumer = $1 AND id = ANY ($2::bigint[]) AND reason = 'failed'
RETURNING aggregate_type, aggregate_id

-- name: select_stuck_gaps
-- $1 to $4 aggregate as for `select_parked`, $5 aggregate type, $6 source, $7 text in the detail (pattern for ILIKE), $8 noticed longer ago
-- than (float8, s); null: any; $9 consumer
SELECT source, aggregate_type, aggregate_id FROM relay.inbox_gap
WHERE consumer = $9 AND state = 'stuck'
  AND ($1::text IS NULL OR aggregate_type = $1) AND ($2::text IS NULL OR aggregate_id = $2)
  AND ($3::text IS NULL OR aggregate_type LIKE $3) AND ($4::text IS NULL OR aggregate_id LIKE $4)
  AND ($5::text IS NULL OR aggregate_type = $5) AND ($6::text IS NULL OR source = $6)
  AND ($7::text IS NULL OR detail ILIKE $7) AND ($8::float8 IS NULL OR noticed_at < now() - make_interval(secs => $8))
ORDER BY source, aggregate_type, aggregate_id

-- name: reopen_gaps
-- Gaps that are stuck are asked for again, at once.
-- $1 consumer, keys: $2 sources, $3 aggregate types, $4 aggregate ids
UPDATE relay.inbox_gap g
SET state = 'open', asks = 0, next_ask_at = clock_timestamp(), detail = NULL, dead_letters = NULL
FROM unnest($2::text[], $3::text[], $4::text[]) AS k (source, aggregate_type, aggregate_id)
WHERE g.aggregate_id = k.aggregate_id AND g.aggregate_type = k.aggregate_type AND g.source = k.source AND g.consumer = $1
  AND g.state = 'stuck'
RETURNING g.aggregate_type, g.aggregate_id

-- name: retry_given_back
-- Stored messages that may be taken again now.
-- $1 consumer, $2 ids (bigint[])
UPDATE relay.inbox SET next_take_at = NULL WHERE consumer = $1 AND id = ANY ($2::bigint[]) AND attempts > 0
RETURNING aggregate_type, aggregate_id

-- name: bury_held
-- The content of held messages goes to the quarantine, and tombstones take their places: the cursor passes over those when their turn
-- comes. A message without order has no place: it is only set aside. Bodies do not leave the server.
-- $1 consumer, $2 ids (bigint[]), $3 whole lines (boolean; false: only what failed), $4 skipped or purged, $5 detail,
-- of a tombstone: $6 event type, $7 content type, $8 digest (bytea)
WITH doomed AS MATERIALIZED (
  SELECT * FROM relay.inbox_held WHERE consumer = $1 AND id = ANY ($2::bigint[]) AND ($3::boolean OR reason = 'failed')
  ORDER BY id FOR UPDATE
), kept AS (  -- with the properties that relay.inbox.storable.properties_of_event writes
  INSERT INTO relay.inbox_quarantine (consumer, reason, detail, message_id, exchange, routing_key, properties, body, dismissed_at)
  SELECT consumer, $4, $5, message_id, '', '',
         jsonb_build_object('message_id', message_id, 'type', event_type, 'app_id', source, 'content_type', content_type,
                            'timestamp', occurred_at, 'aggregate_type', aggregate_type, 'aggregate_id', aggregate_id,
                            'sequence', seq, 'digest', encode(digest, 'hex'), 'headers', headers),
         body, now()
  FROM doomed WHERE event_type <> $6
), gone AS (
  DELETE FROM relay.inbox_held h USING doomed d WHERE h.id = d.id AND d.seq IS NULL
), buried AS (
  UPDATE relay.inbox_held h
  SET event_type = $6, content_type = $7, headers = '{}', body = '', digest = $8, attempts = 0, error = NULL,
      state = CASE WHEN h.reason = 'failed' THEN 'retrying' ELSE h.state END,
      next_attempt_at = CASE WHEN h.reason = 'failed' THEN clock_timestamp() ELSE h.next_attempt_at END
  FROM doomed d WHERE h.id = d.id AND d.seq IS NOT NULL
)
SELECT aggregate_type, aggregate_id FROM doomed

-- name: lock_first_stored
-- The first rows of the aggregates of these stored messages: the lock that takers, and whoever deletes, exclude each other by.
-- Waits for a taker. What it took is gone then, and another row is the first: see `first_stored`, and ask again.
-- $1 consumer, $2 ids (bigint[])
SELECT i.id FROM relay.inbox i
WHERE i.id = ANY (ARRAY(
  SELECT first.id
  FROM (SELECT DISTINCT source, aggregate_type, aggregate_id FROM relay.inbox
        WHERE id = ANY ($2::bigint[]) AND consumer = $1 AND aggregate_id IS NOT NULL) AS a
  CROSS JOIN LATERAL (
    SELECT f.id FROM relay.inbox f
    WHERE f.aggregate_id = a.aggregate_id AND f.aggregate_type = a.aggregate_type AND f.source = a.source AND f.consumer = $1
    ORDER BY f.seq LIMIT 1
  ) AS first))
ORDER BY i.id FOR UPDATE

-- name: first_stored
-- Which rows are the first ones now, for a look after `lock_first_stored` has waited.
-- $1 consumer, $2 ids (bigint[])
SELECT first.id
FROM (SELECT DISTINCT source, aggregate_type, aggregate_id FROM relay.inbox
      WHERE id = ANY ($2::bigint[]) AND consumer = $1 AND aggregate_id IS NOT NULL) AS a
CROSS JOIN LATERAL (
  SELECT f.id FROM relay.inbox f
  WHERE f.aggregate_id = a.aggregate_id AND f.aggregate_type = a.aggregate_type AND f.source = a.source AND f.consumer = $1
  ORDER BY f.seq LIMIT 1
) AS first

-- name: set_given_back_aside
-- Store mode: what its taker gave back goes to the quarantine; its successors can be taken then.
-- $1 consumer, $2 ids (bigint[]), $3 skipped or purged, $4 detail, $5 whole lines (boolean; false: only what was given back)
WITH gone AS (
  DELETE FROM relay.inbox WHERE consumer = $1 AND id = ANY ($2::bigint[]) AND ($5::boolean OR attempts > 0) RETURNING *
), kept AS (
  INSERT INTO relay.inbox_quarantine (consumer, reason, detail, message_id, exchange, routing_key, properties, body, dismissed_at)
  SELECT consumer, $3, $4, message_id, '', '',
         jsonb_build_object('message_id', message_id, 'type', event_type, 'app_id', source, 'content_type', content_type,
                            'timestamp', occurred_at, 'aggregate_type', aggregate_type, 'aggregate_id', aggregate_id,
                            'sequence', seq, 'headers', headers),
         body, now()
  FROM gone
)
SELECT aggregate_type, aggregate_id FROM gone

-- name: places_in_inbox
-- How far an aggregate has come at one consumer, by source, and the highest number that is known to exist.
-- $1 consumer, $2 aggregate type, $3 aggregate id, $4 source (null: any)
SELECT k.source, coalesce(a.last_seq, 0) AS last_seq, greatest(held.highest, g.to_seq) AS known_seq, held.lowest AS held_seq,
       held.lowest_failed AS failed_seq, g.to_seq AS gap_seq
FROM (
  SELECT source FROM relay.inbox_aggregate WHERE consumer = $1 AND aggregate_type = $2 AND aggregate_id = $3
  UNION
  SELECT source FROM relay.inbox_gap WHERE consumer = $1 AND aggregate_type = $2 AND aggregate_id = $3
) AS k
LEFT JOIN relay.inbox_aggregate a
  ON a.consumer = $1 AND a.aggregate_type = $2 AND a.aggregate_id = $3 AND a.source = k.source
LEFT JOIN relay.inbox_gap g
  ON g.consumer = $1 AND g.aggregate_type = $2 AND g.aggregate_id = $3 AND g.source = k.source
LEFT JOIN LATERAL (
  SELECT max(seq) AS highest, min(seq) AS lowest, min(seq) FILTER (WHERE reason = 'failed') AS lowest_failed FROM relay.inbox_held h
  WHERE h.consumer = $1 AND h.aggregate_type = $2 AND h.aggregate_id = $3 AND h.source = k.source
) AS held ON true
WHERE $4::text IS NULL OR k.source = $4
ORDER BY k.source

-- name: held_through
-- $1 consumer, $2 source, $3 aggregate type, $4 aggregate id, $5 seq
SELECT count(*) FROM relay.inbox_held
WHERE consumer = $1 AND source = $2 AND aggregate_type = $3 AND aggregate_id = $4 AND seq <= $5

-- name: skip_through
-- Moves a cursor, which must be locked, over numbers that will not come. What is held of them goes to the quarantine. What is
-- missing after them is asked for again. Blocked: the successor is in the table, see `make_successors_due`. Returns the held ones.
-- $1 consumer, $2 source, $3 aggregate type, $4 aggregate id, $5 seq, $6 detail, $7 the event type of tombstones
WITH passed AS (
  DELETE FROM relay.inbox_held
  WHERE consumer = $1 AND source = $2 AND aggregate_type = $3 AND aggregate_id = $4 AND seq <= $5
  RETURNING *
), kept AS (
  INSERT INTO relay.inbox_quarantine (consumer, reason, detail, message_id, exchange, routing_key, properties, body, dismissed_at)
  SELECT consumer, 'skipped', $6, message_id, '', '',
         jsonb_build_object('message_id', message_id, 'type', event_type, 'app_id', source, 'content_type', content_type,
                            'timestamp', occurred_at, 'aggregate_type', aggregate_type, 'aggregate_id', aggregate_id,
                            'sequence', seq, 'digest', encode(digest, 'hex'), 'headers', headers),
         body, now()
  FROM passed WHERE event_type <> $7
), moved AS (
  UPDATE relay.inbox_aggregate a
  SET last_seq = $5, last_digest = NULL, blocked = EXISTS (
    SELECT FROM relay.inbox_held h
    WHERE h.consumer = $1 AND h.source = $2 AND h.aggregate_type = $3 AND h.aggregate_id = $4 AND h.seq = $5 + 1)
  WHERE a.consumer = $1 AND a.source = $2 AND a.aggregate_type = $3 AND a.aggregate_id = $4
), closed AS (
  DELETE FROM relay.inbox_gap
  WHERE consumer = $1 AND source = $2 AND aggregate_type = $3 AND aggregate_id = $4 AND to_seq <= $5
), left_over AS (
  UPDATE relay.inbox_gap SET state = 'open', next_ask_at = clock_timestamp(), detail = NULL
  WHERE consumer = $1 AND source = $2 AND aggregate_type = $3 AND aggregate_id = $4 AND to_seq > $5
)
SELECT count(*) FROM passed

-- name: count_cursors
-- What a reset would move back: cursors beyond a number, and the messages that have been stored after it and not taken.
-- $1 to $4 aggregate as for `select_parked`, $5 aggregate type, $6 source; null: any; $7 consumer, $8 seq, $9 of the sample (rows)
WITH chosen AS (
  SELECT source, aggregate_type, aggregate_id, last_seq FROM relay.inbox_aggregate
  WHERE consumer = $7 AND last_seq > $8
    AND ($1::text IS NULL OR aggregate_type = $1) AND ($2::text IS NULL OR aggregate_id = $2)
    AND ($3::text IS NULL OR aggregate_type LIKE $3) AND ($4::text IS NULL OR aggregate_id LIKE $4)
    AND ($5::text IS NULL OR aggregate_type = $5) AND ($6::text IS NULL OR source = $6)
)
SELECT (SELECT count(*) FROM chosen) AS cursors,
       (SELECT count(*) FROM (SELECT FROM chosen GROUP BY aggregate_type, aggregate_id) AS g) AS aggregates,
       ARRAY(SELECT aggregate_type FROM chosen ORDER BY aggregate_type, aggregate_id, source LIMIT $9) AS types,
       ARRAY(SELECT aggregate_id FROM chosen ORDER BY aggregate_type, aggregate_id, source LIMIT $9) AS names

-- name: reset_cursors
-- Moves cursors back, one lock after the other in the order in which the daemons take theirs. What is held waits again as early;
-- a gap is found again.
-- $1 to $4 aggregate as for `select_parked`, $5 aggregate type, $6 source; null: any; $7 consumer, $8 seq
WITH chosen AS MATERIALIZED (
  SELECT source, aggregate_type, aggregate_id FROM relay.inbox_aggregate
  WHERE consumer = $7 AND last_seq > $8
    AND ($1::text IS NULL OR aggregate_type = $1) AND ($2::text IS NULL OR aggregate_id = $2)
    AND ($3::text IS NULL OR aggregate_type LIKE $3) AND ($4::text IS NULL OR aggregate_id LIKE $4)
    AND ($5::text IS NULL OR aggregate_type = $5) AND ($6::text IS NULL OR source = $6)
  ORDER BY source COLLATE "C", aggregate_type COLLATE "C", aggregate_id COLLATE "C"
  FOR UPDATE
), moved AS (
  UPDATE relay.inbox_aggregate a SET last_seq = $8, last_digest = NULL, blocked = false
  FROM chosen c
  WHERE a.aggregate_id = c.aggregate_id AND a.aggregate_type = c.aggregate_type AND a.source = c.source AND a.consumer = $7
), waiting AS (
  UPDATE relay.inbox_held h SET reason = 'early', state = 'waiting', next_attempt_at = NULL, attempts = 0, error = NULL
  FROM chosen c
  WHERE h.aggregate_id = c.aggregate_id AND h.aggregate_type = c.aggregate_type AND h.source = c.source AND h.consumer = $7
    AND h.seq IS NOT NULL
), gaps AS (
  DELETE FROM relay.inbox_gap g USING chosen c
  WHERE g.aggregate_id = c.aggregate_id AND g.aggregate_type = c.aggregate_type AND g.source = c.source AND g.consumer = $7
)
SELECT aggregate_type, aggregate_id FROM chosen

-- name: select_stored_again
-- What was stored, has not been taken, and is beyond its cursor after a reset: it will be stored again. Only of what was reset: what
-- another aggregate has beyond its cursor came without order, and nobody forgets that it came.
-- $1 to $4 aggregate as for `select_parked`, $5 aggregate type, $6 source; null: any; $7 consumer
SELECT i.id FROM relay.inbox i
CROSS JOIN LATERAL (
  SELECT FROM relay.inbox_aggregate a
  WHERE a.aggregate_id = i.aggregate_id AND a.aggregate_type = i.aggregate_type AND a.source = i.source AND a.consumer = $7
    AND a.last_seq < i.seq
) AS beyond
WHERE i.consumer = $7
  AND ($1::text IS NULL OR i.aggregate_type = $1) AND ($2::text IS NULL OR i.aggregate_id = $2)
  AND ($3::text IS NULL OR i.aggregate_type LIKE $3) AND ($4::text IS NULL OR i.aggregate_id LIKE $4)
  AND ($5::text IS NULL OR i.aggregate_type = $5) AND ($6::text IS NULL OR i.source = $6)

-- name: drop_stored
-- $1 consumer, $2 ids (bigint[])
DELETE FROM relay.inbox WHERE consumer = $1 AND id = ANY ($2::bigint[]) RETURNING id

-- name: count_seen
-- What `forget_seen` would forget.
-- $1 consumer, $2 source (null: any)
SELECT count(*) FROM relay.inbox_seen s
WHERE s.consumer = $1 AND ($2::text IS NULL OR s.source = $2)
  AND NOT EXISTS (SELECT FROM relay.inbox_held h WHERE h.message_id = s.message_id AND h.source = s.source AND h.consumer = s.consumer)

-- name: forget_seen
-- Messages that come without order (no aggregate, or policy none) are applied again when they come again; never one that is still held.
-- Returns how many there were.
-- $1 consumer, $2 source (null: any)
WITH gone AS (
  DELETE FROM relay.inbox_seen s
  WHERE s.consumer = $1 AND ($2::text IS NULL OR s.source = $2)
    AND NOT EXISTS (SELECT FROM relay.inbox_held h WHERE h.message_id = s.message_id AND h.source = s.source AND h.consumer = s.consumer)
  RETURNING 1
)
SELECT count(*) FROM gone

-- name: select_stored_unordered
-- The same for those that were stored and not taken: they are stored again. What comes without order has no cursor.
-- $1 consumer, $2 source (null: any)
SELECT i.id FROM relay.inbox i
WHERE i.consumer = $1 AND ($2::text IS NULL OR i.source = $2) AND (i.seq IS NULL OR NOT EXISTS (
  SELECT FROM relay.inbox_aggregate a
  WHERE a.aggregate_id = i.aggregate_id AND a.aggregate_type = i.aggregate_type AND a.source = i.source AND a.consumer = $1))

-- name: select_quarantined
-- Entries that nobody has dismissed.
-- $1 to $4 aggregate as for `select_parked`, $5 aggregate type, $6 cause (reason), $7 text in the detail (pattern for ILIKE), $8 received
-- longer ago than (float8, s), $9 event type, $10 received since, $11 before, $12 from seq, $13 to seq, $14 ids (bigint[]), $15 source;
-- null: any; $16 consumer
SELECT id, aggregate_type, aggregate_id FROM relay.inbox_quarantine
WHERE consumer = $16 AND dismissed_at IS NULL
  AND ($1::text IS NULL OR aggregate_type = $1) AND ($2::text IS NULL OR aggregate_id = $2)
  AND ($3::text IS NULL OR aggregate_type LIKE $3) AND ($4::text IS NULL OR aggregate_id LIKE $4)
  AND ($5::text IS NULL OR aggregate_type = $5) AND ($6::text IS NULL OR reason = $6)
  AND ($7::text IS NULL OR detail ILIKE $7) AND ($8::float8 IS NULL OR received_at < now() - make_interval(secs => $8))
  AND ($9::text IS NULL OR properties ->> 'type' = $9)
  AND ($10::timestamptz IS NULL OR received_at >= $10) AND ($11::timestamptz IS NULL OR received_at < $11)
  AND ($12::bigint IS NULL OR seq >= $12) AND ($13::bigint IS NULL OR seq <= $13)
  AND ($14::bigint[] IS NULL OR id = ANY ($14)) AND ($15::text IS NULL OR source = $15)
ORDER BY id

-- name: dismiss_quarantined
-- $1 consumer, $2 ids (bigint[])
UPDATE relay.inbox_quarantine SET dismissed_at = now() WHERE consumer = $1 AND id = ANY ($2::bigint[]) AND dismissed_at IS NULL
RETURNING aggregate_type, aggregate_id
