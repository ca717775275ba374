-- Counters that stay cheap while an old transaction keeps every version of a row alive (a forgotten session, a long report, a dump).
-- A counter was one row, updated by each event; whoever looks for its newest version then walks through all the older ones: after
-- 800 events of each of 1 000 aggregates 1 281 pages for one number, a millisecond and more. Now a counter moves on to another key
-- after every 32 events (relay.outbox_assign has that 32), so that no more versions than those are walked through, of each of its rows.
-- Producers wait for this migration: as it does for transactions that have written to the log, at most this long (then it fails, and
-- nothing of it was done), and then while the counters are written and indexed again, a few seconds for a million aggregates.
SET LOCAL lock_timeout = '10s';
-- They wait before their trigger runs: one that waited in it, for the counters, would go on with its old text, and fail.
DO 'BEGIN LOCK TABLE relay.outbox IN SHARE MODE; END';

-- Two rows an aggregate at most, for ever. The one with part 0 is there from the first event on, so that there is only one first; it
-- counts up to the first multiple of 32 and is null from then on. The other then has the number, and last_seq / 32 for its part: the
-- newest version is found by the greatest, and the index passes over the dead ones of earlier parts. The lock of the row with part 0,
-- held to the end of the producer's transaction, is what makes order of seq = order of commit.
-- The table is written anew, which the USING is for: an index over its old versions could not be used by a statement that runs beside any
-- older transaction which has written something, and each insert would read all counters until that ends.
-- A view that somebody else has on last_seq makes it fail: it would show both rows. Dropped before and made again after, it is right.
ALTER TABLE relay.outbox_aggregate RENAME TO outbox_counter;
ALTER TABLE relay.outbox_counter
  ADD COLUMN part bigint NOT NULL DEFAULT 0,
  ALTER COLUMN last_seq DROP NOT NULL,
  ALTER COLUMN last_seq TYPE bigint USING last_seq + 0,
  DROP CONSTRAINT outbox_aggregate_pkey,
  ADD PRIMARY KEY (aggregate_id, aggregate_type, part);

-- What readers see: one row an aggregate, with the number of its latest event.
CREATE VIEW relay.outbox_aggregate AS
SELECT aggregate_type, aggregate_id, last_seq FROM relay.outbox_counter WHERE last_seq IS NOT NULL;

-- Who could read the table, or columns of it, can read the view instead, so that a daemon and a monitor that are running go on.
DO $$
DECLARE
  reader record;
BEGIN
  FOR reader IN
    WITH held AS (
      SELECT c.relowner AS owner, 'SELECT' AS what, c.relacl AS acl FROM pg_class c WHERE c.oid = 'relay.outbox_counter'::regclass
      UNION ALL
      SELECT c.relowner, format('SELECT (%I)', t.attname), t.attacl
      FROM pg_class c JOIN pg_attribute t ON t.attrelid = c.oid WHERE c.oid = 'relay.outbox_counter'::regclass
    )
    SELECT held.what, a.grantee::regrole AS name, a.is_grantable
    FROM held, aclexplode(held.acl) AS a
    WHERE a.privilege_type = 'SELECT' AND a.grantee NOT IN (0, held.owner)
  LOOP
    EXECUTE format('GRANT %s ON relay.outbox_aggregate TO %s', reader.what, reader.name)
      || CASE WHEN reader.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END;
    EXECUTE format('REVOKE %s ON relay.outbox_counter FROM %s CASCADE', reader.what, reader.name);
  END LOOP;
  EXECUTE format('ALTER VIEW relay.outbox_aggregate OWNER TO %s',  -- also when somebody else than the table's owner migrates
    (SELECT c.relowner::regrole FROM pg_class c WHERE c.oid = 'relay.outbox_counter'::regclass));
END
$$;

-- As it was but for the counter. No sequential scans: a plan that was made while the counters were few is kept while they become many.
-- No bitmaps: with statistics that say two rows, all dead versions would be read and sorted. The index also in a session that forbids it:
-- with everything forbidden any plan seems dear enough to be compiled, 100 ms an insert.
CREATE OR REPLACE FUNCTION relay.outbox_assign() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_indexscan = on AS $$
DECLARE
  next_seq bigint;
  at_part  bigint;
BEGIN
  NEW.size := coalesce(octet_length(NEW.body), octet_length(NEW.payload::text), 0);
  IF NEW.size > 16777216 THEN
    RAISE EXCEPTION 'relay.outbox: the payload of % %/% is % bytes, the limit is 16777216 (16 MiB)',
        NEW.event_type, NEW.aggregate_type, NEW.aggregate_id, NEW.size
      USING ERRCODE = 'check_violation', CONSTRAINT = 'outbox_size_is_at_most_16_mib', SCHEMA = 'relay', TABLE = 'outbox',
            HINT = 'Store large content elsewhere and send a reference to it.';
  END IF;

  IF NEW.aggregate_id IS NOT NULL THEN
    IF NEW.aggregate_type IS NULL THEN
      RAISE EXCEPTION 'relay.outbox: aggregate_id % was given without an aggregate_type', left(NEW.aggregate_id, 100)
        USING ERRCODE = 'check_violation', CONSTRAINT = 'outbox_aggregate_id_needs_a_type', SCHEMA = 'relay', TABLE = 'outbox';
    END IF;
    IF octet_length(NEW.aggregate_id) NOT BETWEEN 1 AND 512 THEN
      RAISE EXCEPTION 'relay.outbox: the aggregate_id % is % bytes, it must be 1 to 512',
          left(NEW.aggregate_id, 40), octet_length(NEW.aggregate_id)
        USING ERRCODE = 'check_violation', CONSTRAINT = 'outbox_aggregate_id_is_1_to_512_bytes', SCHEMA = 'relay', TABLE = 'outbox';
    END IF;
    -- Counts an aggregate that is new or in its first part. It waits for, and keeps, the lock of that row also where it does not count
    -- any more: who goes on from here is alone. By the constraint and not by a look at the index first: under SERIALIZABLE such a
    -- look fails when others write other aggregates to the same page, which those that are new at the same time mostly are.
    INSERT INTO relay.outbox_counter AS c (aggregate_type, aggregate_id, part, last_seq)
    VALUES (NEW.aggregate_type, NEW.aggregate_id, 0, 1)
    ON CONFLICT (aggregate_id, aggregate_type, part) DO UPDATE SET last_seq = c.last_seq + 1 WHERE c.last_seq IS NOT NULL
    RETURNING c.last_seq, c.part INTO next_seq, at_part;
    IF NOT FOUND THEN
      -- Under READ COMMITTED this statement sees all that was committed before the lock was given; under REPEATABLE READ what is newer
      -- than the snapshot is an error, as it must be.
      UPDATE relay.outbox_counter AS c
      SET last_seq = c.last_seq + 1, part = greatest(c.part, (c.last_seq + 1) / 32)
      WHERE c.aggregate_id = NEW.aggregate_id AND c.aggregate_type = NEW.aggregate_type AND c.last_seq IS NOT NULL AND c.part >= (
        SELECT n.part FROM relay.outbox_counter n
        WHERE n.aggregate_id = NEW.aggregate_id AND n.aggregate_type = NEW.aggregate_type
        ORDER BY n.part DESC LIMIT 1)
      RETURNING c.last_seq, c.part INTO next_seq, at_part;
    END IF;
    IF next_seq IS NULL THEN
      RAISE EXCEPTION 'relay.outbox: the counter of %/% is lost: relay.outbox_counter has only its first row, which does not count any more',
          NEW.aggregate_type, NEW.aggregate_id
        USING ERRCODE = 'data_corrupted', SCHEMA = 'relay', TABLE = 'outbox_counter',
              HINT = 'Set last_seq of that row to the number of the latest event that any consumer may have seen.';
    END IF;
    IF at_part = 0 AND next_seq % 32 = 0 THEN
      UPDATE relay.outbox_counter AS c SET last_seq = NULL
      WHERE c.aggregate_id = NEW.aggregate_id AND c.aggregate_type = NEW.aggregate_type AND c.part = 0;
      INSERT INTO relay.outbox_counter (aggregate_type, aggregate_id, part, last_seq)
      VALUES (NEW.aggregate_type, NEW.aggregate_id, next_seq / 32, next_seq);
    END IF;
    IF NEW.seq IS DISTINCT FROM next_seq AND NEW.seq IS NOT NULL THEN
      RAISE EXCEPTION 'relay.outbox: seq % was given for %/%, but the next one is %',
          NEW.seq, NEW.aggregate_type, NEW.aggregate_id, next_seq
        USING ERRCODE = 'serialization_failure',
              HINT = 'Somebody else wrote to this aggregate since you read it: read it again and retry, or leave seq out.';
    END IF;
    NEW.seq := next_seq;
  END IF;

  NEW.xid := pg_current_xact_id();
  NEW.id := nextval('relay.outbox_id_seq');  -- after the counter's lock, never as a default: a default runs before it
  NEW.shard := CASE relay.outbox_shards()
    WHEN 1 THEN 0
    ELSE abs(hashtextextended(coalesce(NEW.aggregate_type || '/' || NEW.aggregate_id, NEW.id::text), 0) % relay.outbox_shards())
  END;

  -- The barrier: granted, the relay is awake (or down) and cannot fall asleep before this transaction ends.
  -- Refused, it is asleep and wants to be told.
  IF NOT pg_try_advisory_xact_lock_shared(727002, NEW.shard) THEN
    PERFORM pg_notify('relay_outbox', NEW.shard::text);
  END IF;
  RETURN NEW;
END
$$;

SET LOCAL lock_timeout TO DEFAULT;
