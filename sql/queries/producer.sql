-- What producers write: the plain INSERT of the contract, once for one event and once for many.
-- Every parameter is used exactly once and in order, and is cast from its plainest type, so that relay.producer can give
-- the same text to any driver (asyncpg and psycopg $n, Django %s, SQLAlchemy :name), whatever codecs the caller has set.
-- Needs no more than the role relay_producer has.

-- name: insert_event
-- $1 aggregate type, $2 aggregate id, $3 event type, $4 payload (JSON text), $5 body (bytea), $6 content type,
-- $7 headers (JSON text), $8 routing key, $9 seq
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload, body, content_type, headers, routing_key, seq)
VALUES ($1::text, $2::text, $3::text, $4::text::jsonb, $5::bytea, $6::text, $7::text::jsonb, $8::text, $9::bigint)
RETURNING seq

-- name: insert_events
-- Arrays, one element an event: $1 aggregate type, $2 aggregate id, $3 event type, $4 payload (JSON text), $5 body (bytea),
-- $6 content type, $7 headers (JSON text), $8 routing key, $9 seq
-- Rows reach the assigning trigger in the order of the arrays, so ids, which it draws, tell that order again.
WITH inserted AS (
  INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload, body, content_type, headers, routing_key, seq)
  SELECT e.aggregate_type, e.aggregate_id, e.event_type, e.payload::jsonb, e.body, e.content_type, e.headers::jsonb,
         e.routing_key, e.seq
  FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[], $7::text[], $8::text[], $9::bigint[])
    WITH ORDINALITY AS e (aggregate_type, aggregate_id, event_type, payload, body, content_type, headers, routing_key, seq, place)
  ORDER BY e.place
  RETURNING id, seq
)
SELECT seq FROM inserted ORDER BY id
