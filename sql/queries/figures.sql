-- What a consumer says about itself, and what it is told at its start.

-- name: write_figures
-- Competing consumers add up: `applied` in any case, and `rate` as an average that fades over 5 seconds, to which each adds its own.
-- $1 consumer, $2 events applied since the last time (bigint), $3 owner, $4 error that ended the last session (null: none did)
INSERT INTO relay.inbox_progress AS p (consumer, applied, rate, owner, last_error, last_error_at, updated_at)
VALUES ($1, $2::bigint, ($2::bigint / 5.0)::real, $3, $4::text, CASE WHEN $4::text IS NOT NULL THEN clock_timestamp() END, clock_timestamp())
ON CONFLICT (consumer) DO UPDATE SET
  applied = p.applied + excluded.applied,
  rate = (5.0 * p.rate + $2::bigint) / (5.0 + greatest(extract(epoch FROM clock_timestamp() - p.updated_at)::double precision, 0)),
  owner = excluded.owner,
  last_error = coalesce(excluded.last_error, p.last_error),
  last_error_at = coalesce(excluded.last_error_at, p.last_error_at),
  updated_at = clock_timestamp()

-- name: has_seed
-- $1 consumer
SELECT EXISTS (SELECT FROM relay.inbox_seed WHERE consumer = $1)
