-- What `relay migrate` and `relay check` ask.

-- name: lock_migrations
-- $1 key
SELECT pg_advisory_xact_lock($1)

-- name: create_migration_table
CREATE SCHEMA IF NOT EXISTS relay;
CREATE TABLE IF NOT EXISTS relay.migration (
  version    integer     PRIMARY KEY,
  name       text        NOT NULL,
  checksum   text        NOT NULL,
  applied_at timestamptz NOT NULL DEFAULT now()
)

-- name: has_migration_table
SELECT to_regclass('relay.migration') IS NOT NULL

-- name: applied_migrations
SELECT version, name, checksum FROM relay.migration ORDER BY version

-- name: record_migration
-- $1 version, $2 name, $3 checksum
INSERT INTO relay.migration (version, name, checksum) VALUES ($1, $2, $3)

-- name: missing_roles
SELECT rolname FROM unnest(ARRAY['relay_producer', 'relay_daemon', 'relay_consumer', 'relay_taker', 'relay_operator', 'relay_monitor']) AS rolname
WHERE NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = rolname.rolname)
ORDER BY rolname

-- name: schema_manifest
-- One line an object. Only what PostgreSQL 14 to 18 describe alike: not-null constraints are told as part of the column.
SELECT line FROM (
  SELECT 'table relay.' || c.relname || CASE c.relpersistence WHEN 'p' THEN '' ELSE ' UNLOGGED' END
      || coalesce(' partition of relay.' || p.relname || ' ' || pg_get_expr(c.relpartbound, c.oid), '') AS line
  FROM pg_class c LEFT JOIN pg_inherits i ON i.inhrelid = c.oid LEFT JOIN pg_class p ON p.oid = i.inhparent
  WHERE c.relnamespace = to_regnamespace('relay') AND c.relkind IN ('r', 'p')
  UNION ALL
  SELECT 'view relay.' || c.relname FROM pg_class c WHERE c.relnamespace = to_regnamespace('relay') AND c.relkind = 'v'
  UNION ALL
  SELECT 'column relay.' || c.relname || '.' || a.attname || ' ' || format_type(a.atttypid, a.atttypmod)
      || CASE WHEN a.attnotnull THEN ' not null' ELSE '' END
      || CASE WHEN a.attidentity <> '' THEN ' identity' WHEN a.atthasdef THEN ' default' ELSE '' END
  FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
  WHERE c.relnamespace = to_regnamespace('relay') AND c.relkind IN ('r', 'p', 'c', 'v') AND a.attnum > 0 AND NOT a.attisdropped
  UNION ALL
  SELECT 'constraint relay.' || c.relname || '.' || k.conname
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
  WHERE k.connamespace = to_regnamespace('relay') AND k.contype IN ('c', 'p', 'u', 'f')
  UNION ALL
  SELECT CASE WHEN i.indisunique THEN 'unique ' ELSE '' END || 'index relay.' || c.relname || ' on ' || t.relname || ' ('
      || (SELECT string_agg(pg_get_indexdef(c.oid, n, false), ', ' ORDER BY n) FROM generate_series(1, i.indnkeyatts) AS n) || ')'
      || CASE WHEN i.indpred IS NULL THEN '' ELSE ' where' END
  FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid
  WHERE c.relnamespace = to_regnamespace('relay') AND i.indisvalid
  UNION ALL
  SELECT 'trigger ' || g.tgname || ' on relay.' || c.relname || CASE g.tgenabled WHEN 'D' THEN ' DISABLED' ELSE '' END
  FROM pg_trigger g JOIN pg_class c ON c.oid = g.tgrelid
  WHERE c.relnamespace = to_regnamespace('relay') AND NOT g.tgisinternal
  UNION ALL
  SELECT 'function relay.' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ') ' || md5(p.prosrc)
      || CASE WHEN p.prosecdef THEN ' security definer' ELSE '' END
      || coalesce(' set ' || array_to_string(p.proconfig, ' '), '')
  FROM pg_proc p WHERE p.pronamespace = to_regnamespace('relay')
  UNION ALL
  SELECT 'sequence relay.' || c.relname FROM pg_class c WHERE c.relnamespace = to_regnamespace('relay') AND c.relkind = 'S'
) AS lines
ORDER BY line COLLATE "C"
