"""Who has written the outbox's cursor, and in which epoch: only the sessions of its last take-over may.

A relay opens the session that writes checkpoints after it has taken the log over. So a session that is older than the take-over
of the epoch that it writes in belongs to an owner before, whether it ever wrote or not, and whichever epoch it claims. Not seen is
only a relay that lost the log and opens a new session to go on as if it had not: sessions do not tell their process.
"""

from __future__ import annotations

from relay.postgres.connect import Connection

TABLES = """
CREATE TABLE cursor_log (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, shard smallint NOT NULL, backend text NOT NULL, since timestamptz NOT NULL,
  old_epoch bigint NOT NULL, epoch bigint NOT NULL, owner text, at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE FUNCTION log_cursor() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  INSERT INTO public.cursor_log (shard, backend, since, old_epoch, epoch, owner)
  SELECT NEW.shard, pg_backend_pid() || ' ' || a.backend_start, a.backend_start, OLD.epoch, NEW.epoch, NEW.owner
  FROM pg_stat_activity a WHERE a.pid = pg_backend_pid();
  RETURN NULL;
END $$;
CREATE TRIGGER lab_log AFTER UPDATE ON relay.outbox_cursor FOR EACH ROW EXECUTE FUNCTION log_cursor();
"""

# A take-over raises the epoch by one; whatever else changes it is stale. Who took the log over goes on in the same session.
_STALE = """
SELECT count(*) FROM cursor_log l
WHERE l.epoch NOT IN (l.old_epoch, l.old_epoch + 1)
   OR l.epoch = l.old_epoch AND EXISTS (
     SELECT FROM cursor_log t
     WHERE t.shard = l.shard AND t.epoch = l.epoch AND t.old_epoch = l.epoch - 1 AND t.id < l.id AND t.backend <> l.backend AND l.since < t.at)
"""


async def stale(producer: Connection) -> int:
    """Writes of the cursor by sessions that had lost the log. Needs TABLES to have been there from the start."""
    await producer.execute(
        "CREATE INDEX IF NOT EXISTS cursor_log_take_over ON cursor_log (shard, epoch) WHERE epoch = old_epoch + 1"
    )
    found = await producer.fetchval(_STALE)
    assert isinstance(found, int)
    return found


async def writes(producer: Connection) -> int:
    """How many were looked at."""
    found = await producer.fetchval("SELECT count(*) FROM cursor_log")
    assert isinstance(found, int)
    return found
