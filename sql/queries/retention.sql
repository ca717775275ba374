-- Emptying the slots of the ring whose rows are all published and old. The rule itself: relay.outbox_empty_slot.

-- name: old_slots
-- The slots with rows that no producer has filled for $1 seconds, by the clock that fills them: why they are needed (null: for no
-- reason), and seconds until their newest row by id is older than $1. Looks only at indexes.
-- $1 seconds that a row is kept
SELECT s.slot, relay.outbox_slot_is_needed(s.slot) AS needed, newest.young_for_s,
       pg_total_relation_size('relay.outbox_' || s.slot) AS bytes
FROM (
  SELECT n::smallint AS slot, c.s AS now_s, c.s::bigint / 172800 AS period, (c.s::bigint / 172800 - n) % 4 AS periods_ago
  FROM (SELECT floor(extract(epoch FROM clock_timestamp())) AS s) c, generate_series(0, 3) AS n
) s
CROSS JOIN LATERAL (
  SELECT extract(epoch FROM o.created_at - now())::float8 + $1::float8 AS young_for_s
  FROM relay.outbox o WHERE o.slot = s.slot ORDER BY o.shard DESC, o.id DESC LIMIT 1
) newest
WHERE s.periods_ago > 0 AND s.now_s - (s.period - s.periods_ago + 1) * 172800 >= $1
ORDER BY s.slot

-- name: scan_slot
-- Reads a slot from end to end. What is true of the rows that the snapshot sees stays true of them: they are published, and they get older.
-- $1 slot, $2 seconds that a row is kept
SELECT pg_current_snapshot()::text AS seen, count(*) AS rows,
       coalesce(bool_and(coalesce(pg_visible_in_snapshot(o.xid, c.snapshot), false)), true) AS published,
       coalesce(extract(epoch FROM max(o.created_at) - now())::float8, 0) + $2::float8 AS young_for_s
FROM relay.outbox o LEFT JOIN relay.outbox_cursor c ON c.shard = o.shard
WHERE o.slot = $1

-- name: empty_slot
-- $1 slot, $2 the snapshot of its scan (text)
SELECT relay.outbox_empty_slot($1::smallint, $2::text::pg_snapshot)

-- name: forget_tombstones
-- Marks of rows that went with their slot.
DELETE FROM relay.outbox_tombstone t
WHERE NOT EXISTS (SELECT FROM relay.outbox o WHERE o.shard = t.shard AND o.id = t.id OFFSET 0)
