-- The benchmark's own statements.

-- name: bench_insert
-- Events of the same size, spread evenly over aggregates, in one statement.
-- $1 events, $2 aggregates, $3 payload (bytes)
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload)
SELECT 'bench', (i % $2)::text, 'Measured', jsonb_build_object('fill', repeat('x', greatest($3 - 12, 0)))
FROM generate_series(1, $1) AS i

-- name: bench_effects
CREATE TABLE IF NOT EXISTS bench_effect (aggregate_id text NOT NULL, seq bigint NOT NULL)

-- name: bench_effect
-- $1 aggregate id, $2 seq
INSERT INTO bench_effect (aggregate_id, seq) VALUES ($1, $2)
