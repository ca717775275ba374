-- The record of what operators did.

-- name: record_act
-- $1 who, $2 side, $3 act, $4 selection (text, JSON), $5 why, $6 rows, arrays: $7 aggregate types, $8 aggregate ids
WITH act AS (
  INSERT INTO relay.audit (who, side, act, selection, why, rows) VALUES ($1, $2, $3, $4::text::jsonb, $5, $6) RETURNING id
), touched AS (
  INSERT INTO relay.audit_aggregate (aggregate_type, aggregate_id, audit_id)
  SELECT a.aggregate_type, a.aggregate_id, act.id
  FROM act, unnest($7::text[], $8::text[]) AS a (aggregate_type, aggregate_id)
)
SELECT id FROM act
