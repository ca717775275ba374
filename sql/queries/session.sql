-- What every new connection is asked.

-- name: backend_pid
SELECT pg_backend_pid()

-- name: server_encoding
SELECT current_setting('server_encoding')

-- name: set_session
-- $1 name, $2 value
SELECT set_config($1, $2, false)
