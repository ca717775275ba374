"""Who has written the outbox's cursor, in which epoch: a session that wrote in one must never write in a later one."""

from __future__ import annotations

from relay.postgres.connect import Connection

TABLES = """
CREATE TABLE cursor_log (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, backend text NOT NULL, epoch bigint NOT NULL, moved boolean NOT NULL);
CREATE FUNCTION log_cursor() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  INSERT INTO public.cursor_log (backend, epoch, moved)
  SELECT pg_backend_pid() || ' ' || a.backend_start, NEW.epoch, NEW.epoch = OLD.epoch FROM pg_stat_activity a WHERE a.pid = pg_backend_pid();
  RETURN NULL;
END $$;
CREATE TRIGGER lab_log AFTER UPDATE ON relay.outbox_cursor FOR EACH ROW EXECUTE FUNCTION log_cursor();
"""
_STALE = """
SELECT count(*) FROM cursor_log l
WHERE l.moved AND EXISTS (SELECT FROM cursor_log e WHERE e.backend = l.backend AND e.moved AND e.id < l.id AND e.epoch < l.epoch)
"""


async def stale(producer: Connection) -> int:
    """Writes of the cursor by sessions whose epoch was over. Needs TABLES to have been there from the start."""
    await producer.execute("CREATE INDEX ON cursor_log (backend, id)")
    found = await producer.fetchval(_STALE)
    assert isinstance(found, int)
    return found
