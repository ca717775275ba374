-- The index by transaction is not led by the shard any more. What the relay asks for each page then has one index that it can be found
-- by: by transaction for the first, by id for the following ones. With both led by the shard each could be planned with either, which
-- cost the same on an empty partition: so they had to be planned anew for each page, a third of the time that an event needs from its
-- commit to the relay when nothing else goes on. Planned once they would have read all of a partition, had it been empty on that day.
-- An entry takes 16 bytes instead of 24. With one shard the column told nothing; with several the first page of a window would pass
-- over what is new of the others.
-- Producers wait for this migration: as it does for transactions that have written to the log, at most this long (then it fails, and
-- nothing of it was done), and then while the index is built: 0.6 s for a million events that are still in the log.
SET LOCAL lock_timeout = '10s';
DROP INDEX relay.outbox_by_xid;
CREATE INDEX outbox_by_xid ON relay.outbox (xid);  -- the first page of a window: what is new
SET LOCAL lock_timeout TO DEFAULT;

-- As they were, but by that index.
CREATE OR REPLACE FUNCTION relay.outbox_slot_is_needed(slot smallint) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
  WITH bounds AS MATERIALIZED (
    SELECT min(first_id) AS first_id, max(last_id) AS last_id
    FROM relay.outbox_cursor c CROSS JOIN LATERAL (
      SELECT (SELECT o.id FROM relay.outbox o WHERE o.slot = $1 AND o.shard = c.shard ORDER BY o.id LIMIT 1) AS first_id,
             (SELECT o.id FROM relay.outbox o WHERE o.slot = $1 AND o.shard = c.shard ORDER BY o.id DESC LIMIT 1) AS last_id
    ) s
  )
  SELECT CASE
    WHEN $1 = extract(epoch FROM clock_timestamp())::bigint / 172800 % 4 THEN 'current'
    WHEN EXISTS (
      SELECT FROM relay.outbox_cursor c
      WHERE EXISTS (SELECT FROM relay.outbox o WHERE o.slot = $1 AND o.shard + 0 = c.shard AND o.xid >= pg_snapshot_xmax(c.snapshot))
         OR EXISTS (SELECT FROM pg_snapshot_xip(c.snapshot) AS x
                    WHERE EXISTS (SELECT FROM relay.outbox o WHERE o.slot = $1 AND o.shard + 0 = c.shard AND o.xid = x OFFSET 0))
    ) THEN 'unpublished'
    WHEN EXISTS (
      SELECT FROM bounds b JOIN relay.outbox_parked p ON p.id BETWEEN b.first_id AND b.last_id
      WHERE EXISTS (SELECT FROM relay.outbox o WHERE o.slot = $1 AND o.shard = p.shard AND o.id = p.id OFFSET 0)
    ) THEN 'parked'
    WHEN EXISTS (
      SELECT FROM bounds b JOIN relay.outbox_replay r ON r.after_id < b.last_id AND r.last_id >= b.first_id
      WHERE r.state = 'unfinished'
    ) THEN 'replay'
  END
$$;

-- Empties a slot and returns null, or returns why it cannot. `seen`: in this snapshot all rows of the slot were read and found old.
-- One statement, so that the lock that keeps everybody from reading the log never waits for a client; and a short wait for it.
CREATE OR REPLACE FUNCTION relay.outbox_empty_slot(slot smallint, seen pg_snapshot) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET lock_timeout = '200ms' AS $$
DECLARE
  leaf constant text := format('relay.outbox_%s', slot);
  reason text;
BEGIN
  IF current_setting('transaction_isolation') <> 'read committed' THEN  -- else no statement sees what the lock waited for
    RAISE EXCEPTION 'relay.outbox_empty_slot: this transaction is %, it must be READ COMMITTED', upper(current_setting('transaction_isolation'))
      USING ERRCODE = 'invalid_transaction_state', HINT = 'Start it with BEGIN ISOLATION LEVEL READ COMMITTED.';
  END IF;
  BEGIN
    EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', leaf);
  EXCEPTION WHEN lock_not_available THEN
    RETURN 'locked';  -- by a producer that has written into it and not ended, or by somebody who reads for long
  END;
  -- Every row that is in it now is committed, and each statement from here on sees all of them.
  reason := relay.outbox_slot_is_needed(slot);
  IF reason IS NULL AND EXISTS (
    SELECT FROM relay.outbox_cursor c
    WHERE EXISTS (SELECT FROM relay.outbox o WHERE o.slot = outbox_empty_slot.slot AND o.shard + 0 = c.shard AND o.xid >= pg_snapshot_xmax(seen))
       OR EXISTS (SELECT FROM pg_snapshot_xip(seen) AS x
                  WHERE EXISTS (SELECT FROM relay.outbox o WHERE o.slot = outbox_empty_slot.slot AND o.shard + 0 = c.shard AND o.xid = x OFFSET 0))
  ) THEN
    reason := 'arriving';  -- rows that the scan has not seen
  END IF;
  IF reason IS NULL THEN
    EXECUTE format('TRUNCATE ONLY %s', leaf);
  END IF;
  RETURN reason;
END
$$;
