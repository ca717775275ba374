-- What a relay asks of its log to send rows again, and to tell how far each aggregate has been published.

-- name: last_numbers
-- The newest number of each of these aggregates, published or not; none for an aggregate that nobody ever wrote to.
-- Asked before `retained_numbers`: what that does not find up to here is not in the log any more.
-- $1 aggregate types (text[]), $2 aggregate ids (text[])
SELECT k.aggregate_type, k.aggregate_id, a.last_seq
FROM unnest($1::text[], $2::text[]) AS k (aggregate_type, aggregate_id)
CROSS JOIN LATERAL (
  SELECT c.last_seq FROM relay.outbox_aggregate c
  WHERE c.aggregate_id = k.aggregate_id AND c.aggregate_type = k.aggregate_type
  LIMIT 1  -- keeps the planner from joining the other way round
) AS a

-- name: retained_numbers
-- Which numbers of these ranges the log still has, and which of them have been published and are not parked.
-- Narrow on purpose: the caller fetches contents by `retained_rows`, as many bytes at a time as it likes.
-- $1 aggregate types (text[]), $2 aggregate ids (text[]), $3 first numbers (bigint[]), $4 last numbers (bigint[])
SELECT r.n, o.seq, o.id, o.shard, o.size,
       relay.outbox_is_read(o.xid, o.id, c.snapshot, c.window_snapshot, c.after_id)
         AND NOT EXISTS (SELECT FROM relay.outbox_parked p WHERE p.id = o.id) AS published
FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[]) WITH ORDINALITY AS r (aggregate_type, aggregate_id, from_seq, to_seq, n)
CROSS JOIN LATERAL (
  SELECT l.seq, l.id, l.shard, l.size, l.xid FROM relay.outbox l
  WHERE l.aggregate_id = r.aggregate_id AND l.aggregate_type = r.aggregate_type AND l.seq BETWEEN r.from_seq AND r.to_seq
  OFFSET 0
) AS o
JOIN relay.outbox_cursor c ON c.shard = o.shard
ORDER BY r.n, o.seq

-- name: retained_rows
-- Rows by shard and id, in the order given, as the reader sees them; is_tombstone: an operator took it out of the sequence.
-- $1 shards (smallint[]), $2 ids (bigint[])
SELECT o.id, o.aggregate_type, o.aggregate_id, o.seq, o.event_type,
       coalesce(o.content_type, CASE WHEN o.payload IS NULL THEN 'application/octet-stream' ELSE 'application/json' END) AS content_type,
       o.headers::text AS headers, o.routing_key, o.created_at, coalesce(o.body, convert_to(o.payload::text, 'UTF8')) AS body,
       EXISTS (SELECT FROM relay.outbox_tombstone t WHERE t.id = o.id) AS is_tombstone
FROM unnest($1::smallint[], $2::bigint[]) WITH ORDINALITY AS w (shard, id, n)
CROSS JOIN LATERAL (
  SELECT l.id, l.aggregate_type, l.aggregate_id, l.seq, l.event_type, l.content_type, l.headers, l.routing_key,
         l.created_at, l.payload, l.body
  FROM relay.outbox l WHERE l.shard = w.shard AND l.id = w.id
  OFFSET 0
) AS o
ORDER BY w.n

-- name: sweep_aggregates
-- The newest retained row of the next aggregates, where it has been published and nothing of the aggregate is parked; for the
-- others the number is null. Where nothing is retained and nothing parked, all has been published: `last_seq` is the last number then
-- (null for the others), which the first shard tells. One probe of each index for an aggregate, whatever the length of its history.
-- $1 shard, $2 aggregate type, $3 aggregate id (to start after; '' for all), $4 aggregates
SELECT walk.aggregate_type, walk.aggregate_id, newest.seq, newest.event_type, newest.routing_key,
       CASE WHEN $1 = 0 AND newest.seq IS NULL AND remains.of IS NULL THEN walk.last_seq END AS last_seq
FROM (
  SELECT a.aggregate_id, a.aggregate_type, a.last_seq FROM relay.outbox_aggregate a
  WHERE (a.aggregate_id, a.aggregate_type) > ($3::text, $2::text)
  ORDER BY a.aggregate_id, a.aggregate_type LIMIT $4
) AS walk
LEFT JOIN LATERAL (
  SELECT last.seq, last.event_type, last.routing_key
  FROM (
    SELECT o.seq, o.id, o.xid, o.shard, o.event_type, o.routing_key FROM relay.outbox o
    WHERE o.aggregate_id = walk.aggregate_id AND o.aggregate_type = walk.aggregate_type
    ORDER BY o.seq DESC LIMIT 1
  ) AS last
  JOIN relay.outbox_cursor c ON c.shard = last.shard
  WHERE last.shard = $1 AND relay.outbox_is_read(last.xid, last.id, c.snapshot, c.window_snapshot, c.after_id)
    AND NOT EXISTS (SELECT FROM relay.outbox_parked p
                    WHERE p.aggregate_id = walk.aggregate_id AND p.aggregate_type = walk.aggregate_type)
) AS newest ON true
LEFT JOIN LATERAL (
  (SELECT o.aggregate_id AS of FROM relay.outbox o
   WHERE newest.seq IS NULL AND o.aggregate_id = walk.aggregate_id AND o.aggregate_type = walk.aggregate_type LIMIT 1)
  UNION ALL
  (SELECT p.aggregate_id FROM relay.outbox_parked p
   WHERE newest.seq IS NULL AND p.aggregate_id = walk.aggregate_id AND p.aggregate_type = walk.aggregate_type LIMIT 1)
  LIMIT 1
) AS remains ON true
ORDER BY walk.aggregate_id, walk.aggregate_type
