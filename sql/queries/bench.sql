-- The benchmark's own statements. Its tables are made in databases of its own.

-- name: bench_tables
-- What producers change beside their events, and what handlers write. `place` tells in which order.
CREATE TABLE bench_account (id bigint PRIMARY KEY, changes bigint NOT NULL) WITH (fillfactor = 50);
CREATE TABLE bench_effect (place bigint GENERATED ALWAYS AS IDENTITY, aggregate_id text NOT NULL, seq bigint NOT NULL);

-- name: bench_accounts
-- $1 how many
INSERT INTO bench_account (id, changes) SELECT n, 0 FROM generate_series(0, $1::bigint - 1) AS n

-- name: bench_insert
-- Events of the same size, spread evenly over aggregates, in one statement.
-- $1 number of the first, $2 events, $3 aggregates, $4 fill (text)
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload)
SELECT 'bench', (i % $3::bigint)::text, 'Measured', jsonb_build_object('fill', $4::text)
FROM generate_series($1::bigint, $1::bigint + $2::bigint - 1) AS i

-- name: bench_produce
-- A business change and its events, all of one aggregate: one transaction in one round trip, so that the producers' own
-- processor time does not decide what a busy machine can do. (In jsonb `at` comes before `fill`, being shorter.)
-- $1 account, $2 events, $3 stamp (bigint), $4 fill (text)
WITH changed AS (UPDATE bench_account SET changes = changes + 1 WHERE id = $1::bigint RETURNING id)
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload)
SELECT 'bench', changed.id::text, 'Measured', jsonb_build_object('at', $3::bigint, 'fill', $4::text)
FROM changed CROSS JOIN generate_series(1, $2::integer)

-- name: bench_effect
-- $1 aggregate id, $2 seq
INSERT INTO bench_effect (aggregate_id, seq) VALUES ($1, $2)

-- name: bench_effects
-- The same for many: $1 aggregate ids (text[]), $2 seqs (bigint[])
INSERT INTO bench_effect (aggregate_id, seq) SELECT * FROM unnest($1::text[], $2::bigint[])

-- name: bench_verify_effects
-- Exactly once and in order: as many effects as events, and none that was not its aggregate's turn.
SELECT count(*) AS effects, count(*) FILTER (WHERE seq <> turn) AS out_of_turn
FROM (SELECT seq, row_number() OVER (PARTITION BY aggregate_id ORDER BY place) AS turn FROM bench_effect) AS e

-- name: bench_verify_inbox
-- What the cursors say was applied, and what is still held or was set aside.
-- $1 consumer
SELECT (SELECT coalesce(sum(last_seq), 0)::bigint FROM relay.inbox_aggregate WHERE consumer = $1) AS applied,
       (SELECT count(*) FROM relay.inbox_held WHERE consumer = $1) AS held,
       (SELECT count(*) FROM relay.inbox_quarantine WHERE consumer = $1) AS quarantined

-- name: bench_verify_outbox
-- What is in the log, and what of it is parked.
SELECT (SELECT count(*) FROM relay.outbox) AS events, (SELECT count(*) FROM relay.outbox_parked) AS parked

-- name: bench_server
-- Where it was measured.
SELECT current_setting('server_version') AS version, current_setting('fsync') AS fsync,
       current_setting('synchronous_commit') AS synchronous_commit, current_setting('shared_buffers') AS shared_buffers

-- name: bench_database
-- Which database this is: a benchmark never migrates one that it did not make.
SELECT current_database()
