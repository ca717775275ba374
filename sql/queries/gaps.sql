-- What the inbox asks of PostgreSQL about what is missing: finding gaps, closing them, and whose turn it is to ask.
-- Keys come as three arrays (sources, aggregate types, aggregate ids), everywhere in that order.

-- name: note_early
-- Held messages that arrived early and are older than the alert: where the one before is neither applied nor held, there is a gap.
-- Of a type that is not of the policy sequence nothing waits for the one before: what an operator's reset, a seed or another policy
-- has left waiting is made due, and the daemon is told. Without waiting for locks: the next round finds it again.
-- Walks the early ones by age, $5 a call, from where the last call ended. Returns how many were looked at, where the walk
-- got to, how many gaps were noted or grew, and how many messages were made due.
-- $1 consumer, $2 alert (double precision, s), $3 held at (timestamptz) and $4 id to start after, $5 rows, policies: $6 aggregate types,
-- $7 theirs (text[]), $8 of all other types
WITH old AS MATERIALIZED (
  SELECT h.id, h.source, h.aggregate_type, h.aggregate_id, h.seq, h.held_at FROM relay.inbox_held h
  WHERE h.consumer = $1 AND h.reason = 'early' AND h.held_at <= clock_timestamp() - make_interval(secs => $2)
    AND (h.held_at, h.id) > ($3, $4)
  ORDER BY h.held_at, h.id LIMIT $5
), unordered AS (
  SELECT h.id FROM relay.inbox_held h
  WHERE h.id = ANY (ARRAY(SELECT old.id FROM old WHERE coalesce(($7::text[])[array_position($6::text[], old.aggregate_type)], $8) <> 'sequence'))
    AND h.reason = 'early' AND h.state = 'waiting'
  FOR UPDATE SKIP LOCKED
), released AS (
  UPDATE relay.inbox_held h SET reason = 'behind', state = 'retrying', next_attempt_at = clock_timestamp()
  WHERE h.id = ANY (ARRAY(SELECT unordered.id FROM unordered))
  RETURNING h.id
), told AS (
  SELECT pg_notify('relay_inbox_operate', $1) WHERE EXISTS (SELECT FROM released) AND pg_notification_queue_usage() < 0.5  -- a hint
), hole AS (
  SELECT old.source, old.aggregate_type, old.aggregate_id, max(old.seq) - 1 AS to_seq
  FROM old
  LEFT JOIN LATERAL (
    SELECT c.last_seq FROM relay.inbox_aggregate c
    WHERE c.aggregate_id = old.aggregate_id AND c.aggregate_type = old.aggregate_type AND c.source = old.source AND c.consumer = $1
    LIMIT 1
  ) AS cursor ON true
  WHERE old.seq - 1 > coalesce(cursor.last_seq, 0)
    AND coalesce(($7::text[])[array_position($6::text[], old.aggregate_type)], $8) = 'sequence'
    AND NOT EXISTS (SELECT FROM relay.inbox_held b
                    WHERE b.aggregate_id = old.aggregate_id AND b.aggregate_type = old.aggregate_type AND b.source = old.source
                      AND b.consumer = $1 AND b.seq = old.seq - 1)
  GROUP BY old.source, old.aggregate_type, old.aggregate_id
), noted AS (
  INSERT INTO relay.inbox_gap AS g (consumer, source, aggregate_type, aggregate_id, to_seq, found_by, next_ask_at)
  SELECT $1, hole.source, hole.aggregate_type, hole.aggregate_id, hole.to_seq, 'successor', clock_timestamp()
  FROM hole
  WHERE NOT EXISTS (SELECT FROM relay.inbox_gap k
                    WHERE k.aggregate_id = hole.aggregate_id AND k.aggregate_type = hole.aggregate_type AND k.source = hole.source
                      AND k.consumer = $1 AND k.to_seq >= hole.to_seq)
  ORDER BY hole.source, hole.aggregate_type, hole.aggregate_id
  ON CONFLICT (aggregate_id, aggregate_type, source, consumer) DO UPDATE SET to_seq = greatest(g.to_seq, excluded.to_seq)
  RETURNING 1
)
SELECT (SELECT count(*) FROM old) AS looked, (SELECT count(*) FROM noted) AS noted, (SELECT count(*) FROM released) AS released,
       (SELECT count(*) FROM told) AS told, last.held_at, last.id
FROM (SELECT 1) AS always LEFT JOIN LATERAL (SELECT old.held_at, old.id FROM old ORDER BY old.held_at DESC, old.id DESC LIMIT 1) AS last ON true

-- name: note_marks
-- Marks of numbers that are neither applied nor held. They may be on their way still: a gap it is when it is due and still missing.
-- A gap that is known does not grow by a mark: what the mark speaks of has not been missing for as long. When it is closed, the
-- next mark makes another. What is not retained any more is missed only by who has applied something before it: whoever joined
-- later never had it. In the transaction of a batch, after its cursors were written. Returns how many were noted.
-- $1 consumer, keys: $2 sources, $3 aggregate types, $4 aggregate ids (distinct, sorted), $5 newest numbers (bigint[]),
-- $6 alert (double precision, s), $7 whether they are retained (boolean)
WITH noted AS (
  INSERT INTO relay.inbox_gap (consumer, source, aggregate_type, aggregate_id, to_seq, found_by, next_ask_at)
  SELECT $1, m.source, m.aggregate_type, m.aggregate_id, m.seq, 'mark', clock_timestamp() + make_interval(secs => $6)
  FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[]) WITH ORDINALITY AS m (source, aggregate_type, aggregate_id, seq, n)
  LEFT JOIN LATERAL (
    SELECT c.last_seq FROM relay.inbox_aggregate c
    WHERE c.aggregate_id = m.aggregate_id AND c.aggregate_type = m.aggregate_type AND c.source = m.source AND c.consumer = $1
    LIMIT 1
  ) AS cursor ON true
  WHERE m.seq > coalesce(cursor.last_seq, 0) AND ($7::boolean OR cursor.last_seq > 0)
    AND NOT EXISTS (SELECT FROM relay.inbox_held h
                    WHERE h.aggregate_id = m.aggregate_id AND h.aggregate_type = m.aggregate_type AND h.source = m.source
                      AND h.consumer = $1 AND h.seq >= m.seq)
    AND NOT EXISTS (SELECT FROM relay.inbox_gap k
                    WHERE k.aggregate_id = m.aggregate_id AND k.aggregate_type = m.aggregate_type AND k.source = m.source
                      AND k.consumer = $1)
  ORDER BY m.n
  ON CONFLICT (aggregate_id, aggregate_type, source, consumer) DO NOTHING
  RETURNING 1
)
SELECT count(*) FROM noted

-- name: walk_gaps
-- The next gaps in the order of the key, whatever their state.
-- $1 consumer, $2 aggregate id, $3 aggregate type, $4 source (to start after; '' for all), $5 gaps
SELECT g.source, g.aggregate_type, g.aggregate_id FROM relay.inbox_gap g
WHERE g.consumer = $1 AND (g.aggregate_id, g.aggregate_type, g.source) > ($2, $3, $4)
ORDER BY g.aggregate_id, g.aggregate_type, g.source LIMIT $5

-- name: gap_states
-- How gaps are doing: their cursors, and how far there is no hole (`held_to`: up to there everything is applied or held). Looks from
-- the first number that was missing when it was last asked for, however many messages are held: a run is read once.
-- No EXISTS: PostgreSQL 18 would answer it out of a hash of all that is held, whatever enable_seqscan says.
-- $1 consumer, keys: $2 sources, $3 aggregate types, $4 aggregate ids
SELECT g.source, g.aggregate_type, g.aggregate_id, g.to_seq, g.state, g.asks, g.asked_from, g.asked_to, g.dead_letters,
       coalesce(cursor.last_seq, 0) AS last_seq, top.held AS top_is_held, coalesce(run.held_to, start.seq) AS held_to
FROM unnest($2::text[], $3::text[], $4::text[]) AS k (source, aggregate_type, aggregate_id)
CROSS JOIN LATERAL (
  SELECT * FROM relay.inbox_gap i
  WHERE i.aggregate_id = k.aggregate_id AND i.aggregate_type = k.aggregate_type AND i.source = k.source AND i.consumer = $1
  LIMIT 1
) AS g
LEFT JOIN LATERAL (
  SELECT c.last_seq FROM relay.inbox_aggregate c
  WHERE c.aggregate_id = g.aggregate_id AND c.aggregate_type = g.aggregate_type AND c.source = g.source AND c.consumer = $1
  LIMIT 1
) AS cursor ON true
CROSS JOIN LATERAL (
  SELECT least(greatest(coalesce(cursor.last_seq, 0), coalesce(g.asked_from, 1) - 1), 9223372036854775806) AS seq
) AS start
LEFT JOIN LATERAL (
  SELECT h.seq AS held_to
  FROM (
    SELECT i.seq, lead(i.seq) OVER (ORDER BY i.seq) AS next FROM relay.inbox_held i
    WHERE i.aggregate_id = g.aggregate_id AND i.aggregate_type = g.aggregate_type AND i.source = g.source AND i.consumer = $1
      AND i.seq > start.seq AND i.seq <= g.to_seq
  ) AS h
  WHERE h.next IS DISTINCT FROM h.seq + 1
  ORDER BY h.seq LIMIT 1
) AS run ON (
  SELECT true FROM relay.inbox_held f
  WHERE f.aggregate_id = g.aggregate_id AND f.aggregate_type = g.aggregate_type AND f.source = g.source AND f.consumer = $1
    AND f.seq = start.seq + 1 AND start.seq < g.to_seq
  LIMIT 1)
CROSS JOIN LATERAL (
  SELECT coalesce((SELECT true FROM relay.inbox_held h
                   WHERE h.aggregate_id = g.aggregate_id AND h.aggregate_type = g.aggregate_type AND h.source = g.source
                     AND h.consumer = $1 AND h.seq = g.to_seq
                   LIMIT 1), false) AS held
) AS top

-- name: close_gaps
-- Gaps of which nothing is missing any more; one that has grown meanwhile stays. Returns those that people had been told of.
-- $1 consumer, keys: $2 sources, $3 aggregate types, $4 aggregate ids; $5 their last numbers (bigint[])
WITH closed AS (
  DELETE FROM relay.inbox_gap g
  USING unnest($2::text[], $3::text[], $4::text[], $5::bigint[]) AS k (source, aggregate_type, aggregate_id, to_seq)
  WHERE g.aggregate_id = k.aggregate_id AND g.aggregate_type = k.aggregate_type AND g.source = k.source AND g.consumer = $1
    AND g.to_seq <= k.to_seq
  RETURNING g.source, g.aggregate_type, g.aggregate_id, g.to_seq, g.asks, g.alerted_at,
            extract(epoch FROM clock_timestamp() - g.noticed_at)::double precision AS lasted_s
)
SELECT source, aggregate_type, aggregate_id, to_seq, asks, lasted_s FROM closed WHERE alerted_at IS NOT NULL

-- name: make_gaps_due
-- Something of these came: the rest may be asked for at once. What was stuck is not any more.
-- $1 consumer, keys: $2 sources, $3 aggregate types, $4 aggregate ids
UPDATE relay.inbox_gap g
SET state = 'open', asks = 0, next_ask_at = clock_timestamp(), detail = NULL, dead_letters = NULL
FROM unnest($2::text[], $3::text[], $4::text[]) AS k (source, aggregate_type, aggregate_id)
WHERE g.aggregate_id = k.aggregate_id AND g.aggregate_type = k.aggregate_type AND g.source = k.source AND g.consumer = $1

-- name: claim_gaps
-- Whose turn it is to be asked for: ours alone for $3 seconds, however many consumers compete.
-- $1 consumer, $2 gaps, $3 lease (double precision, s)
UPDATE relay.inbox_gap g
SET next_ask_at = clock_timestamp() + make_interval(secs => $3)
FROM (
  SELECT d.aggregate_id, d.aggregate_type, d.source FROM relay.inbox_gap d
  WHERE d.consumer = $1 AND d.state = 'open' AND d.next_ask_at <= clock_timestamp()
  ORDER BY d.next_ask_at LIMIT $2
  FOR UPDATE SKIP LOCKED
) AS due
WHERE g.aggregate_id = due.aggregate_id AND g.aggregate_type = due.aggregate_type AND g.source = due.source AND g.consumer = $1
RETURNING g.source, g.aggregate_type, g.aggregate_id

-- name: gap_numbers
-- What is missing of each of these, in order: the first holes after numbers up to which there is none, between what is held and
-- behind it. Held messages are read until so many holes are found.
-- $1 consumer, keys: $2 sources, $3 aggregate types, $4 aggregate ids; $5 their last numbers, $6 up to where there is no hole
-- (bigint[]), $7 holes of each
SELECT k.n, hole.from_seq, hole.to_seq
FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[]) WITH ORDINALITY
  AS k (source, aggregate_type, aggregate_id, to_seq, held_to, n)
CROSS JOIN LATERAL (
  (SELECT k.held_to + 1 AS from_seq, coalesce(first.seq, k.to_seq + 1) - 1 AS to_seq
   FROM (SELECT min(m.seq) AS seq FROM relay.inbox_held m
         WHERE m.aggregate_id = k.aggregate_id AND m.aggregate_type = k.aggregate_type AND m.source = k.source AND m.consumer = $1
           AND m.seq > k.held_to AND m.seq <= k.to_seq) AS first
   WHERE coalesce(first.seq, k.to_seq + 1) > k.held_to + 1)
  UNION ALL
  (SELECT h.seq + 1, h.next - 1
   FROM (
     SELECT i.seq, lead(i.seq, 1, k.to_seq + 1) OVER (ORDER BY i.seq) AS next FROM relay.inbox_held i
     WHERE i.aggregate_id = k.aggregate_id AND i.aggregate_type = k.aggregate_type AND i.source = k.source AND i.consumer = $1
       AND i.seq > k.held_to AND i.seq <= k.to_seq
   ) AS h
   WHERE h.next > h.seq + 1
   ORDER BY h.seq LIMIT $7)
) AS hole
WHERE k.held_to < k.to_seq
ORDER BY k.n, hole.from_seq

-- name: write_asked
-- Gaps that are still missing, asked for or not: when to look again, and what to say about it. Returns those that nobody had been told of.
-- $1 consumer, keys: $2 sources, $3 aggregate types, $4 aggregate ids; arrays: $5 asks (integer), $6 asked from (bigint),
-- $7 asked to (bigint, null: keep), $8 delay until the next look (double precision, s), $9 detail (text, null: none), $10 dead letters
-- of the queue (bigint, null: not known)
WITH asked AS (
  UPDATE relay.inbox_gap g
  SET asks = k.asks, asked_from = k.asked_from, asked_to = coalesce(k.asked_to, g.asked_to), detail = k.detail, dead_letters = k.dead,
      next_ask_at = clock_timestamp() + make_interval(secs => k.delay), alerted_at = coalesce(g.alerted_at, clock_timestamp())
  FROM (
    SELECT u.*, o.alerted_at IS NULL AS is_new
    FROM unnest($2::text[], $3::text[], $4::text[], $5::integer[], $6::bigint[], $7::bigint[], $8::double precision[], $9::text[],
                $10::bigint[])
      AS u (source, aggregate_type, aggregate_id, asks, asked_from, asked_to, delay, detail, dead)
    CROSS JOIN LATERAL (
      SELECT i.alerted_at FROM relay.inbox_gap i
      WHERE i.aggregate_id = u.aggregate_id AND i.aggregate_type = u.aggregate_type AND i.source = u.source AND i.consumer = $1
      LIMIT 1
    ) AS o
  ) AS k
  WHERE g.aggregate_id = k.aggregate_id AND g.aggregate_type = k.aggregate_type AND g.source = k.source AND g.consumer = $1
    AND g.state = 'open'
  RETURNING g.source, g.aggregate_type, g.aggregate_id, g.to_seq, g.found_by, k.is_new
)
SELECT source, aggregate_type, aggregate_id, to_seq, found_by FROM asked WHERE is_new

-- name: stick_gaps
-- Asking does not help: their producer has these numbers no longer, or what it sends does not arrive. Returns those that were not
-- stuck before.
-- $1 consumer, keys: $2 sources, $3 aggregate types, $4 aggregate ids; $5 first missing number (bigint[]), $6 details (text[])
UPDATE relay.inbox_gap g
SET state = 'stuck', next_ask_at = NULL, asked_from = k.asked_from, detail = k.detail, alerted_at = coalesce(g.alerted_at, clock_timestamp())
FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[]) AS k (source, aggregate_type, aggregate_id, asked_from, detail)
WHERE g.aggregate_id = k.aggregate_id AND g.aggregate_type = k.aggregate_type AND g.source = k.source AND g.consumer = $1
  AND g.state = 'open'
RETURNING g.source, g.aggregate_type, g.aggregate_id, g.detail

-- name: drop_announced
-- Gaps that only a mark speaks of, of numbers that their producer never gave out: nothing is missing. Where something is held
-- behind the hole, the number was given out once. In the transaction of a batch. Returns them.
-- $1 consumer, keys: $2 sources, $3 aggregate types, $4 aggregate ids; $5 first missing numbers (bigint[])
DELETE FROM relay.inbox_gap g
USING unnest($2::text[], $3::text[], $4::text[], $5::bigint[]) AS k (source, aggregate_type, aggregate_id, first)
WHERE g.aggregate_id = k.aggregate_id AND g.aggregate_type = k.aggregate_type AND g.source = k.source AND g.consumer = $1
  AND NOT EXISTS (SELECT FROM relay.inbox_held h
                  WHERE h.aggregate_id = k.aggregate_id AND h.aggregate_type = k.aggregate_type AND h.source = k.source
                    AND h.consumer = $1 AND h.seq > k.first)
RETURNING g.source, g.aggregate_type, g.aggregate_id, g.to_seq

-- name: asked_numbers
-- How many numbers have been asked for, by whomever of the competing consumers, and are still waited for: all of them come through
-- one queue. Without those that were asked for in vain so often that they are hardly on their way. Looks at so many gaps at most.
-- $1 consumer, $2 gaps
SELECT coalesce(sum(a.asked_to - a.asked_from + 1), 0)::double precision
FROM (
  SELECT g.asked_from, g.asked_to FROM relay.inbox_gap g
  WHERE g.consumer = $1 AND g.state = 'open' AND g.next_ask_at > clock_timestamp() AND g.asks BETWEEN 1 AND 2
    AND g.asked_from <= g.asked_to
  ORDER BY g.next_ask_at LIMIT $2
) AS a

-- name: next_gap
-- Seconds until the next gap is due; null if none is open.
-- $1 consumer
SELECT extract(epoch FROM min(g.next_ask_at) - clock_timestamp())::double precision
FROM relay.inbox_gap g WHERE g.consumer = $1 AND g.state = 'open'
