-- What an insert costs its producer, measured part by part by tests/bench/producer_cost.py, which also has the figures.
-- Every statement here is quick whatever the size of the log. Producers wait for the first, as it does for transactions that have
-- written to the log, at most this long: then the migration fails, and nothing of it was done.
SET LOCAL lock_timeout = '10s';

-- One constraint instead of fifteen: PostgreSQL reads the text of each again in every statement, which was a third of the CPU of a
-- single row's INSERT; a function's plan stays in the session. And regular expressions without {0,99}, whose automata are built in each use.
-- The function tells which rule is broken, under the name that the rule's own constraint had. It never shows a payload.
CREATE FUNCTION relay.outbox_is_valid(
  id bigint, shard smallint, aggregate_type text, aggregate_id text, seq bigint, event_type text, contents integer,
  content_type text, headers jsonb, routing_key text, size integer, created_at timestamptz
) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  broken text;
BEGIN
  -- Null is as good as true, as in any CHECK.
  IF (id > 0 AND shard >= 0 AND seq >= 1 AND size BETWEEN 0 AND 16777216
      AND (seq IS NULL) = (aggregate_id IS NULL) AND (aggregate_id IS NULL OR aggregate_type IS NOT NULL)
      AND octet_length(aggregate_id) BETWEEN 1 AND 512
      AND aggregate_type ~ '^[A-Za-z0-9_][A-Za-z0-9_.:-]*$' AND octet_length(aggregate_type) <= 100
      AND event_type ~ '^[A-Za-z0-9_][A-Za-z0-9_.:-]*$' AND octet_length(event_type) <= 100
      AND NOT starts_with(event_type, 'relay.')
      AND contents = 1
      AND created_at >= '1970-01-01 00:00Z' AND created_at < '9999-12-31 00:00Z'
      AND (content_type IS NULL OR content_type ~ '^[ -~]+$' AND octet_length(content_type) <= 100)
      AND octet_length(routing_key) BETWEEN 1 AND 255
      AND (headers IS NULL OR relay.headers_are_valid(headers))) IS NOT FALSE THEN
    RETURN true;
  END IF;
  broken := CASE
    WHEN id <= 0 THEN 'outbox_id_is_positive'
    WHEN shard < 0 THEN 'outbox_shard_is_not_negative'
    WHEN aggregate_id IS NOT NULL AND aggregate_type IS NULL THEN 'outbox_aggregate_id_needs_a_type'
    WHEN octet_length(aggregate_id) NOT BETWEEN 1 AND 512 THEN 'outbox_aggregate_id_is_1_to_512_bytes'
    WHEN aggregate_type !~ '^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,99}$' THEN 'outbox_aggregate_type_is_a_name'
    WHEN (seq IS NULL) <> (aggregate_id IS NULL) THEN 'outbox_seq_goes_with_an_aggregate'
    WHEN seq < 1 THEN 'outbox_seq_counts_from_one'
    WHEN event_type !~ '^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,99}$' THEN 'outbox_event_type_is_a_name'
    WHEN starts_with(event_type, 'relay.') THEN 'outbox_event_type_is_not_reserved'
    WHEN contents <> 1 THEN 'outbox_payload_or_body'
    WHEN size NOT BETWEEN 0 AND 16777216 THEN 'outbox_size_is_at_most_16_mib'
    WHEN content_type !~ '^[ -~]{1,100}$' THEN 'outbox_content_type_is_printable'
    WHEN created_at < '1970-01-01 00:00Z' OR created_at >= '9999-12-31 00:00Z' THEN 'outbox_created_at_is_from_1970_to_9999'
    WHEN octet_length(routing_key) NOT BETWEEN 1 AND 255 THEN 'outbox_routing_key_is_1_to_255_bytes'
    ELSE 'outbox_headers_are_flat_small_and_not_ours'
  END;
  RAISE EXCEPTION 'new row for relation "outbox" violates check constraint "%"', broken
    USING ERRCODE = 'check_violation', CONSTRAINT = broken, SCHEMA = 'relay', TABLE = 'outbox';
END
$$;

-- NOT VALID: the rows that are there have passed the same rules, one by one; reading them again would keep producers waiting.
ALTER TABLE relay.outbox
  DROP CONSTRAINT outbox_id_is_positive,
  DROP CONSTRAINT outbox_shard_is_not_negative,
  DROP CONSTRAINT outbox_aggregate_type_is_a_name,
  DROP CONSTRAINT outbox_aggregate_id_is_1_to_512_bytes,
  DROP CONSTRAINT outbox_aggregate_id_needs_a_type,
  DROP CONSTRAINT outbox_seq_goes_with_an_aggregate,
  DROP CONSTRAINT outbox_seq_counts_from_one,
  DROP CONSTRAINT outbox_event_type_is_a_name,
  DROP CONSTRAINT outbox_event_type_is_not_reserved,
  DROP CONSTRAINT outbox_payload_or_body,
  DROP CONSTRAINT outbox_size_is_at_most_16_mib,
  DROP CONSTRAINT outbox_content_type_is_printable,
  DROP CONSTRAINT outbox_created_at_is_from_1970_to_9999,
  DROP CONSTRAINT outbox_routing_key_is_1_to_255_bytes,
  DROP CONSTRAINT outbox_headers_are_flat_small_and_not_ours,
  ADD CONSTRAINT outbox_is_valid CHECK (relay.outbox_is_valid(id, shard, aggregate_type, aggregate_id, seq, event_type,
    num_nonnulls(payload, body), content_type, headers, routing_key, size, created_at)) NOT VALID;

-- The same rules in plpgsql: a function in SQL was parsed and planned again in every statement, some 200 us.
CREATE OR REPLACE FUNCTION relay.headers_are_valid(headers jsonb) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  RETURN jsonb_typeof(headers) = 'object'
     AND octet_length(headers::text) <= 16384
     AND NOT EXISTS (
       SELECT FROM jsonb_each(headers) AS h (name, value)
       WHERE h.name !~ '^[!-~]+$'
          OR octet_length(h.name) > 128
          OR h.name IN ('x-aggregate-type', 'x-aggregate-id', 'x-sequence', 'x-content-digest', 'x-tag')
          OR starts_with(h.name, 'x-relay-')
          OR CASE jsonb_typeof(h.value)
               WHEN 'string' THEN false
               WHEN 'boolean' THEN false
               WHEN 'number' THEN h.value #>> '{}' !~ '^-?[0-9]{1,19}$'  -- 1.0 would travel as a 32-bit float
                               OR (h.value #>> '{}')::numeric NOT BETWEEN -9223372036854775808 AND 9223372036854775807
               ELSE true
             END);
END
$$;

-- Only the trigger writes counters, from 1 upwards, and what it takes from one is checked as the event's seq.
ALTER TABLE relay.outbox_aggregate DROP CONSTRAINT outbox_aggregate_counts_from_one;

SET LOCAL lock_timeout TO DEFAULT;
