-- SQL functions as handlers.

-- name: find_function
-- What there is under a name, and what we may do with it. Always one row.
-- $1 schema, $2 name
SELECT
  current_user::text AS login,
  n.oid IS NOT NULL AS has_schema,
  coalesce(has_schema_privilege(n.oid, 'USAGE'), false) AS may_use_schema,
  p.oid IS NOT NULL AS exists,
  coalesce(has_function_privilege(p.oid, 'EXECUTE'), false) AS may_execute,
  ARRAY(
    SELECT format('%s(%s)', o.proname, pg_get_function_identity_arguments(o.oid)) FROM pg_proc o
    WHERE o.pronamespace = n.oid AND o.proname = $2 ORDER BY o.oid
  ) AS namesakes
FROM (SELECT) AS always
LEFT JOIN pg_namespace n ON n.nspname = $1
LEFT JOIN pg_proc p ON p.pronamespace = n.oid AND p.proname = $2 AND p.prokind = 'f' AND p.provariadic = 0
  AND p.proargtypes[0] = 'relay.event'::regtype AND p.pronargs - p.pronargdefaults <= 1
LIMIT 1

-- name: function_call
-- The statement that calls a function with one event, quoted by PostgreSQL itself. Its parameters: $1 consumer, $2 source, $3 aggregate
-- type, $4 aggregate id, $5 seq, $6 event type, $7 message id, $8 content type, $9 headers (text, JSON), $10 occurred at, $11 body.
-- $1 schema, $2 name
SELECT format(
  'SELECT %I.%I(ROW(NULL::bigint, $1::text, $2::text, $3::text, $4::text, $5::bigint, $6::text, $7::text, $8::text,'
  ' $9::text::jsonb, $10::timestamptz, relay.json_of($11::bytea), $11::bytea)::relay.event)',
  $1::text, $2::text
)
