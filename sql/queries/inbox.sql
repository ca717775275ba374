-- Everything the inbox asks of PostgreSQL, in the order a batch meets it.
-- Each block is named; $n are listed with their types, since asyncpg binds by position.
-- Aggregates are given as ids, and the pairs of source and aggregate type that occur, once each: which pair is an id's, unless there is one
-- pair only. Almost always there is, and every element of an array costs the client as much as the server's look into the index.
-- `(SELECT $4)` keeps from the planner how many there are: a plan for one aggregate looks cheaper than one for any number, by more than
-- planning is said to cost, and so a batch of one message would be planned anew each time, for longer than it takes.

-- name: probe_inbox
-- Fails if this role may not write, or the server only reads: found out before any message is taken. Rolled back by the caller.
-- $1 consumer
WITH a AS (INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq) VALUES ($1, '', '', '', 0)
           ON CONFLICT (aggregate_id, aggregate_type, source, consumer) DO UPDATE SET last_seq = excluded.last_seq),
     s AS (INSERT INTO relay.inbox_seen (consumer, source, message_id) VALUES ($1, '', '') ON CONFLICT DO NOTHING),
     d AS (DELETE FROM relay.inbox_seen WHERE false),
     h AS (INSERT INTO relay.inbox_held (consumer, source, message_id, event_type, content_type, body, digest, reason, state)
           SELECT $1, '', '', '', '', '', '', 'early', 'waiting' WHERE false),
     q AS (INSERT INTO relay.inbox_quarantine (consumer, reason, detail, exchange, routing_key, properties, body)
           SELECT $1, 'foreign', '', '', '', '{}', '' WHERE false)
DELETE FROM relay.inbox_held WHERE false

-- name: is_at_work
-- Whether a session is in the middle of a statement: waiting for a lock is that as well, waiting for its client is not. Its state does
-- not tell: without track_activities there is none, and it is "active" also between the parsing of a statement and the order to run it.
-- What this role may not see, having been set after the login, counts as work: who only waits its turn must not be cut.
-- $1 process id
SELECT wait_event_type IS DISTINCT FROM 'Client' FROM pg_stat_activity WHERE pid = $1

-- name: end_backend
-- Ends a session of ours that we cut off, and waits for its end. The name guards against a process id that was given out again.
-- $1 process id, $2 application name, $3 time-out (bigint, ms)
SELECT pg_terminate_backend(pid, $3) FROM pg_stat_activity
WHERE pid = $1 AND application_name = left($2, 63) AND datname = current_database() AND usename = current_user

-- name: transaction_id
-- The transaction we are in: a handler that ended it leaves another one, or none.
SELECT pg_current_xact_id()::text

-- name: lock_cursors
-- The cursors of a batch, locked in one order by everybody: as given. Every decision about an aggregate is made under this lock.
-- Each is looked for by its key: a subquery that locks is never joined in another way.
-- $1 consumer, pairs: $2 sources (text[]), $3 aggregate types (text[]); $4 aggregate ids (a text[] as text, as relay.postgres.arrays
-- writes it), $5 their pairs (integer[], from 1; empty: all are of the first), sorted by source, type, id as bytes
-- With the first of them comes the transaction that they are locked in; with each, where its row is and stays while it is locked (tid, as text).
SELECT k.place, c.last_seq, c.last_digest, c.blocked, c.tid, CASE k.place WHEN 1 THEN pg_current_xact_id()::text END AS transaction_id
FROM unnest((SELECT $4::text)::text[], $5::integer[]) WITH ORDINALITY AS k (aggregate_id, pair, place)
CROSS JOIN LATERAL (
  SELECT a.last_seq, a.last_digest, a.blocked, a.ctid::text AS tid FROM relay.inbox_aggregate a
  WHERE a.aggregate_id = k.aggregate_id AND a.aggregate_type = ($3::text[])[coalesce(k.pair, 1)]
    AND a.source = ($2::text[])[coalesce(k.pair, 1)] AND a.consumer = $1
  FOR UPDATE
) AS c

-- name: create_cursors
-- Cursors of aggregates never seen before: two consumers must not apply number 1 both, nor one hold number 2 unseen while
-- the other applies number 1. Returns those that are ours now, where their rows are (text), and the transaction we are in; waits for a
-- consumer that is creating the same one.
-- $1 to $5 as in lock_cursors, in the same order
INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq)
SELECT $1, ($2::text[])[coalesce(k.pair, 1)], ($3::text[])[coalesce(k.pair, 1)], k.aggregate_id, 0
FROM unnest($4::text::text[], $5::integer[]) AS k (aggregate_id, pair)
ON CONFLICT (aggregate_id, aggregate_type, source, consumer) DO NOTHING
RETURNING source, aggregate_type, aggregate_id, ctid::text AS tid, pg_current_xact_id()::text AS transaction_id

-- name: lines_with_held
-- Which of these aggregates have anything in the table of held messages: their places in the arrays.
-- To be asked once their cursors are locked: then nobody adds anything. Most have nothing, and need not be asked about it again.
-- $1 to $5 as in lock_cursors
SELECT k.place
FROM unnest((SELECT $4::text)::text[], $5::integer[]) WITH ORDINALITY AS k (aggregate_id, pair, place)
CROSS JOIN LATERAL (
  SELECT FROM relay.inbox_held h
  WHERE h.aggregate_id = k.aggregate_id AND h.aggregate_type = ($3::text[])[coalesce(k.pair, 1)]
    AND h.source = ($2::text[])[coalesce(k.pair, 1)] AND h.consumer = $1 AND h.seq IS NOT NULL
  LIMIT 1
) AS any_held

-- name: insert_seen
-- Returns the ids that were not seen before: theirs are the messages to apply.
-- $1 consumer, $2 sources (text[]), $3 message ids (text[], sorted with their sources)
INSERT INTO relay.inbox_seen (consumer, source, message_id)
SELECT $1, s.source, s.message_id FROM unnest($2::text[], $3::text[]) AS s (source, message_id)
ON CONFLICT (message_id, source, consumer) DO NOTHING
RETURNING source, message_id

-- name: held_successors
-- What is held without a gap after each of these aggregates' cursors: at most $6 of each, and a bounded number of bytes in all.
-- $1 consumer, $2 source, $3 aggregate type, $4 aggregate ids (text[]), $5 their last seq (bigint[]), $6 rows, $7 bytes
SELECT id, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, headers::text AS headers, body,
       digest, occurred_at, attempts
FROM (
  SELECT run.*, sum(octet_length(run.body)) OVER (ORDER BY run.aggregate_id, run.seq) - octet_length(run.body) AS bytes_before
  FROM unnest($4::text[], $5::bigint[]) AS c (aggregate_id, last_seq)
  CROSS JOIN LATERAL (
    SELECT h.*, h.seq - row_number() OVER (ORDER BY h.seq) AS base FROM relay.inbox_held h
    WHERE h.aggregate_id = c.aggregate_id AND h.aggregate_type = $3 AND h.source = $2 AND h.consumer = $1
      AND h.seq > c.last_seq AND h.seq <= c.last_seq + $6::integer
  ) AS run
  WHERE run.base = c.last_seq
) AS runs
WHERE bytes_before < $7
ORDER BY aggregate_id, seq

-- name: make_successors_due
-- The held message right after each of these cursors is to be tried next, in another transaction. However many and large they
-- are: a line that is left out here would wait for ever. Returns the aggregates that have one.
-- $1 consumer, $2 source, $3 aggregate type, $4 aggregate ids (text[]), $5 their last seq (bigint[])
UPDATE relay.inbox_held h
SET reason = 'behind', state = 'retrying', next_attempt_at = clock_timestamp()
FROM unnest($4::text[], $5::bigint[]) AS c (aggregate_id, last_seq)
WHERE h.aggregate_id = c.aggregate_id AND h.aggregate_type = $3 AND h.source = $2 AND h.consumer = $1 AND h.seq = c.last_seq + 1
RETURNING h.aggregate_id

-- name: release_waiting
-- Makes due what waits although its turn has come: `state = 'waiting'` right after the cursor. No transaction of ours leaves such
-- a row, so there is no need for a lock to find it; it heals what an older version, or a hand, has left.
-- Skips through the index from one aggregate to the next, $5 at most, from where the last walk ended: what it costs does
-- not grow with the number of messages that an aggregate has waiting. Returns how many were made due, and where the walk
-- ended (null: there are no more).
-- $1 consumer, $2 aggregate id, $3 aggregate type, $4 source (to start after; '' for all), $5 aggregates (integer)
WITH RECURSIVE walk AS (
  SELECT $2::text AS aggregate_id, $3::text AS aggregate_type, $4::text AS source, 0 AS n
  UNION ALL
  SELECT later.aggregate_id, later.aggregate_type, later.source, walk.n + 1
  FROM walk CROSS JOIN LATERAL (
    SELECT h.aggregate_id, h.aggregate_type, h.source FROM relay.inbox_held h
    WHERE h.seq IS NOT NULL AND h.consumer = $1
      AND (h.aggregate_id, h.aggregate_type, h.source) > (walk.aggregate_id, walk.aggregate_type, walk.source)
    ORDER BY h.aggregate_id, h.aggregate_type, h.source LIMIT 1
  ) AS later
  WHERE walk.n < $5::integer
), waiting AS (
  SELECT turn.id
  FROM walk
  CROSS JOIN LATERAL (
    SELECT c.last_seq FROM relay.inbox_aggregate c
    WHERE c.aggregate_id = walk.aggregate_id AND c.aggregate_type = walk.aggregate_type AND c.source = walk.source AND c.consumer = $1
    LIMIT 1  -- keeps the planner from joining the other way round
  ) AS cursor
  CROSS JOIN LATERAL (
    SELECT h.id FROM relay.inbox_held h
    WHERE h.aggregate_id = walk.aggregate_id AND h.aggregate_type = walk.aggregate_type AND h.source = walk.source
      AND h.consumer = $1 AND h.seq = cursor.last_seq + 1 AND h.state = 'waiting'
    LIMIT 1
  ) AS turn
), released AS (
  UPDATE relay.inbox_held h
  SET reason = 'behind', state = 'retrying', next_attempt_at = clock_timestamp()
  WHERE h.id = ANY (ARRAY(SELECT id FROM waiting)) AND h.state = 'waiting'
  RETURNING h.id
)
SELECT (SELECT count(*) FROM released) AS released, ended.aggregate_id, ended.aggregate_type, ended.source
FROM (SELECT 1) AS always LEFT JOIN walk AS ended ON ended.n = $5::integer

-- name: due_held
-- Which held messages are to be tried now. Not locked: `lock_due_held` looks again, under the cursors' locks.
-- $1 consumer, $2 rows, $3 bytes
SELECT id, source, aggregate_type, aggregate_id, seq, message_id
FROM (
  SELECT d.*, sum(octet_length(d.body)) OVER (ORDER BY d.next_attempt_at, d.id) - octet_length(d.body) AS bytes_before
  FROM (
    SELECT * FROM relay.inbox_held
    WHERE consumer = $1 AND state = 'retrying' AND next_attempt_at <= clock_timestamp()
    ORDER BY next_attempt_at LIMIT $2
  ) AS d
) AS due
WHERE bytes_before < $3
ORDER BY next_attempt_at, id

-- name: lock_due_held
-- By id, and not through the index of what is due, which may be long: that `coalesce` is not the predicate of that index.
-- $1 consumer, $2 ids (bigint[])
SELECT id, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, headers::text AS headers, body,
       digest, occurred_at, attempts
FROM relay.inbox_held
WHERE consumer = $1 AND id = ANY ($2::bigint[]) AND coalesce(state = 'retrying', false) AND next_attempt_at <= clock_timestamp()
ORDER BY id
FOR UPDATE SKIP LOCKED

-- name: next_due
-- Seconds until the next held message is to be tried; null if none is waiting for its time.
-- $1 consumer
SELECT extract(epoch FROM min(next_attempt_at) - clock_timestamp())::double precision
FROM relay.inbox_held WHERE consumer = $1 AND state = 'retrying'

-- name: write_cursors
-- Unless anything is held of them, if that is to be looked for: then nothing is written, and the places are returned that lines_with_held
-- would; the usual batch finds none, and is spared a round trip for the look. And how many were written, and the transaction we are in.
-- By where the rows are, which no other transaction can change while they are locked: an upsert by key takes half as long again. Our own
-- can: a row that a handler or a trigger has moved, or whose place is another aggregate's now, is not written. (Whether it is still the
-- transaction that locked them, the caller compares.)
-- $1 to $5 as in lock_cursors, $6 their rows (a tid[] as text), $7 last seqs (a bigint[] as text), $8 last digests (a bytea[] as text),
-- $9 the places of those that are blocked (bigint[]), $10 whether to look for what is held
WITH held AS MATERIALIZED (
  SELECT k.place
  FROM unnest((SELECT $4::text)::text[], $5::integer[]) WITH ORDINALITY AS k (aggregate_id, pair, place)
  CROSS JOIN LATERAL (
    SELECT FROM relay.inbox_held h
    WHERE h.aggregate_id = k.aggregate_id AND h.aggregate_type = ($3::text[])[coalesce(k.pair, 1)]
      AND h.source = ($2::text[])[coalesce(k.pair, 1)] AND h.consumer = $1 AND h.seq IS NOT NULL
    LIMIT 1
  ) AS any_held
  WHERE $10::boolean
), written AS (
  UPDATE relay.inbox_aggregate a
  SET last_seq = c.last_seq, last_digest = c.last_digest, blocked = c.place = ANY ($9::bigint[])
  FROM unnest((SELECT $6::text)::tid[], $4::text::text[], $5::integer[], $7::text::bigint[], $8::text::bytea[]) WITH ORDINALITY
    AS c (tid, aggregate_id, pair, last_seq, last_digest, place)
  WHERE a.ctid = c.tid AND a.aggregate_id = c.aggregate_id AND a.aggregate_type = ($3::text[])[coalesce(c.pair, 1)]
    AND a.source = ($2::text[])[coalesce(c.pair, 1)] AND a.consumer = $1 AND NOT EXISTS (SELECT FROM held)
  RETURNING 1
)
SELECT pg_current_xact_id()::text AS transaction_id, ARRAY(SELECT place FROM held) AS held, (SELECT count(*) FROM written) AS written

-- name: delete_held_through
-- Held messages that have been applied, or were overtaken. What was applied under the same number came from the broker, and
-- may be something else than what was held: then the held one is a conflict, and goes to the quarantine whole.
-- Returns those, their bodies do not leave the server; and tombstones whose number was applied although it had been given up.
-- $1 consumer, $2 source, $3 aggregate type, $4 aggregate ids (text[]), $5 their last seq (bigint[]),
-- what was applied: $6 aggregate ids (text[]), $7 seqs (bigint[]), $8 digests (bytea[]); $9 the event type of tombstones
WITH gone AS (
  DELETE FROM relay.inbox_held h
  USING unnest($4::text[], $5::bigint[]) AS c (aggregate_id, last_seq)
  WHERE h.aggregate_id = c.aggregate_id AND h.aggregate_type = $3 AND h.source = $2 AND h.consumer = $1 AND h.seq <= c.last_seq
  RETURNING h.*
), given_up AS (
  SELECT gone.* FROM gone JOIN unnest($6::text[], $7::bigint[]) AS applied (aggregate_id, seq) USING (aggregate_id, seq)
  WHERE gone.event_type = $9
), conflict AS (
  SELECT gone.*
  FROM gone JOIN unnest($6::text[], $7::bigint[], $8::bytea[]) AS applied (aggregate_id, seq, digest) USING (aggregate_id, seq)
  WHERE gone.digest <> applied.digest AND gone.event_type <> $9
), kept AS (  -- with the properties that relay.inbox.storable.properties_of_event writes
  INSERT INTO relay.inbox_quarantine (consumer, reason, detail, message_id, exchange, routing_key, properties, body)
  SELECT $1, 'conflict', format('%s/%s seq %s was held, and applied with other content', aggregate_type, aggregate_id, seq),
         message_id, '', '',
         jsonb_build_object('message_id', message_id, 'type', event_type, 'app_id', source, 'content_type', content_type,
                            'timestamp', occurred_at, 'aggregate_type', aggregate_type, 'aggregate_id', aggregate_id,
                            'sequence', seq, 'digest', encode(digest, 'hex'), 'headers', headers),
         body
  FROM conflict
)
SELECT id, source, aggregate_type, aggregate_id, seq, message_id, false AS given_up FROM conflict
UNION ALL SELECT id, source, aggregate_type, aggregate_id, seq, message_id, true FROM given_up

-- name: held_by_id
-- Held messages, whatever their state. Their cursors must be locked.
-- $1 consumer, $2 ids (bigint[])
SELECT id, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, headers::text AS headers, body,
       digest, occurred_at, attempts
FROM relay.inbox_held WHERE consumer = $1 AND id = ANY ($2::bigint[])
ORDER BY seq

-- name: delete_held
-- $1 ids (bigint[])
DELETE FROM relay.inbox_held WHERE id = ANY ($1::bigint[])

-- name: insert_held
-- Returns what was not held before. The delay runs from now by the database's clock.
-- $1 consumer, $2 sources (text[]), $3 aggregate types (text[]), $4 aggregate ids (text[]), $5 seqs (bigint[]),
-- $6 message ids (text[]), $7 event types (text[]), $8 content types (text[]), $9 headers (text[], JSON), $10 bodies (bytea[]),
-- $11 digests (bytea[]), $12 occurred at (timestamptz[]), $13 reasons (text[]), $14 states (text[]), $15 attempts (integer[]),
-- $16 errors (text[]), $17 delays (double precision[], seconds; null: no next attempt)
INSERT INTO relay.inbox_held (consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, headers,
                              body, digest, occurred_at, reason, state, attempts, error, next_attempt_at)
SELECT $1, h.source, h.aggregate_type, h.aggregate_id, h.seq, h.message_id, h.event_type, h.content_type, h.headers::jsonb,
       h.body, h.digest, h.occurred_at,
       -- behind: its predecessor is held, here or already; one that is behind a hole is early, or the hole would not be missed
       CASE WHEN h.reason = 'behind' AND h.state = 'waiting' AND h.before IS DISTINCT FROM h.seq - 1
             AND NOT EXISTS (SELECT FROM relay.inbox_held b
                             WHERE b.aggregate_id = h.aggregate_id AND b.aggregate_type = h.aggregate_type AND b.source = h.source
                               AND b.consumer = $1 AND b.seq = h.seq - 1)
            THEN 'early' ELSE h.reason END,
       h.state, h.attempts, h.error,
       clock_timestamp() + make_interval(secs => h.delay)
FROM (
  SELECT u.*, lag(u.seq) OVER (PARTITION BY u.aggregate_id, u.aggregate_type, u.source ORDER BY u.seq) AS before
  FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[], $9::text[], $10::bytea[],
              $11::bytea[], $12::timestamptz[], $13::text[], $14::text[], $15::integer[], $16::text[], $17::double precision[])
    AS u (source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, headers, body, digest, occurred_at,
          reason, state, attempts, error, delay)
) AS h
ON CONFLICT DO NOTHING
RETURNING source, aggregate_type, aggregate_id, seq, message_id

-- name: held_digest
-- What is held already under a number.
-- $1 consumer, $2 source, $3 aggregate type, $4 aggregate id, $5 seq
SELECT id, digest, event_type FROM relay.inbox_held
WHERE consumer = $1 AND source = $2 AND aggregate_type = $3 AND aggregate_id = $4 AND seq = $5

-- name: replace_held
-- A tombstone takes the place of a held message, which its producer's operator skipped or purged.
-- $1 id, $2 message id, $3 event type, $4 content type, $5 headers (text, JSON), $6 body, $7 digest
UPDATE relay.inbox_held
SET message_id = $2, event_type = $3, content_type = $4, headers = $5::text::jsonb, body = $6, digest = $7
WHERE id = $1

-- name: update_held
-- How a message that was held already fared.
-- $1 ids (bigint[]), $2 reasons (text[]), $3 states (text[]), $4 attempts (integer[]), $5 errors (text[]; null: keep),
-- $6 delays (double precision[], seconds; null: no next attempt)
UPDATE relay.inbox_held h
SET reason = u.reason, state = u.state, attempts = u.attempts, error = coalesce(u.error, h.error),
    next_attempt_at = clock_timestamp() + make_interval(secs => u.delay)
FROM unnest($1::bigint[], $2::text[], $3::text[], $4::integer[], $5::text[], $6::double precision[])
  AS u (id, reason, state, attempts, error, delay)
WHERE h.id = u.id AND h.id = ANY ($1::bigint[])  -- said twice: however they are joined, only these are read

-- name: insert_quarantine
-- $1 consumer, $2 reasons (text[]), $3 details (text[]), $4 message ids (text[]), $5 exchanges (text[]), $6 routing keys (text[]),
-- $7 properties (text[], JSON), $8 bodies (bytea[])
INSERT INTO relay.inbox_quarantine (consumer, reason, detail, message_id, exchange, routing_key, properties, body)
SELECT $1, q.reason, q.detail, q.message_id, q.exchange, q.routing_key, q.properties::jsonb, q.body
FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bytea[])
  AS q (reason, detail, message_id, exchange, routing_key, properties, body)

-- name: purge_seen
-- Forgets ids that are older than the retention, a bounded number at a time; never the id of a message that is still held, which has
-- a number where the policy is `none`.
-- $1 consumer, $2 retention (double precision, seconds), $3 rows
DELETE FROM relay.inbox_seen s
USING (
  SELECT o.message_id, o.source, o.consumer FROM relay.inbox_seen o
  WHERE o.consumer = $1 AND o.seen_at < now() - make_interval(secs => $2)
    AND NOT EXISTS (SELECT FROM relay.inbox_held h
                    WHERE h.message_id = o.message_id AND h.source = o.source AND h.consumer = o.consumer)
  ORDER BY o.seen_at LIMIT $3
) AS old
WHERE s.message_id = old.message_id AND s.source = old.source AND s.consumer = old.consumer
