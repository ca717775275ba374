-- The inbox's side of operating and healing: gaps that are asked for, conflicts and skipped messages that are kept, figures for `relay status`.

-- Aggregates of which something is missing: it exists (a held successor or the producer's mark says so) and has not come.
-- A row is a gap that people should know of once `alerted_at` is set; until then its events may simply be on their way.
CREATE TABLE relay.inbox_gap (
  consumer       text        NOT NULL,
  source         text        NOT NULL,
  aggregate_type text        NOT NULL,
  aggregate_id   text        NOT NULL,
  to_seq         bigint      NOT NULL,  -- everything after the cursor up to here exists; what of it is not held, is missing
  found_by       text        NOT NULL,
  noticed_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
  alerted_at     timestamptz,           -- when it was older than gap_alert_after_s and still missing, and was logged
  state          text        NOT NULL DEFAULT 'open',
  asks           integer     NOT NULL DEFAULT 0,  -- how often its producer was asked since something of it last came
  asked_from     bigint,                -- the first missing number when it was last asked for, or when it got stuck; up to there all is applied or held
  asked_to       bigint,                -- the last number that was asked for: long gaps are asked for in portions
  next_ask_at    timestamptz,
  dead_letters   bigint,                -- of the consumer's queue when it was first asked for, as far as that was to be seen
  detail         text,
  PRIMARY KEY (aggregate_id, aggregate_type, source, consumer),
  CONSTRAINT inbox_gap_found_by_is_known CHECK (found_by IN ('successor', 'mark')),
  -- open: the producer is asked for it at next_ask_at, again and again; stuck: it answered that it has it no longer, or what it
  -- sends ends among the dead letters again and again
  CONSTRAINT inbox_gap_state_is_known CHECK (state IN ('open', 'stuck')),
  CONSTRAINT inbox_gap_open_is_asked_for CHECK ((state = 'open') = (next_ask_at IS NOT NULL)),
  CONSTRAINT inbox_gap_counts_up CHECK (to_seq >= 1 AND asks >= 0)
);
CREATE INDEX inbox_gap_due ON relay.inbox_gap (consumer, next_ask_at) WHERE state = 'open';
CREATE INDEX inbox_held_early ON relay.inbox_held (consumer, held_at, id) WHERE reason = 'early';

-- What an operator skipped or purged is kept here as well; the place in the sequence can be looked up.
ALTER TABLE relay.inbox_quarantine
  DROP CONSTRAINT inbox_quarantine_reason_is_known,
  ADD CONSTRAINT inbox_quarantine_reason_is_known CHECK (reason IN ('foreign', 'malformed', 'conflict', 'skipped', 'purged')),
  ADD COLUMN source         text   GENERATED ALWAYS AS (properties ->> 'app_id') STORED,
  ADD COLUMN aggregate_type text   GENERATED ALWAYS AS (properties ->> 'aggregate_type') STORED,
  ADD COLUMN aggregate_id   text   GENERATED ALWAYS AS (properties ->> 'aggregate_id') STORED,
  ADD COLUMN seq            bigint GENERATED ALWAYS AS ((properties ->> 'sequence')::bigint) STORED,
  ADD COLUMN dismissed_at   timestamptz;  -- an operator has looked at it: it does not count as a problem any more
CREATE INDEX inbox_quarantine_by_aggregate ON relay.inbox_quarantine (aggregate_id, aggregate_type) WHERE aggregate_id IS NOT NULL;
CREATE INDEX inbox_quarantine_open ON relay.inbox_quarantine (consumer, received_at) WHERE dismissed_at IS NULL;

-- Figures that a consumer writes now and then, for `relay status`.
CREATE TABLE relay.inbox_progress (
  consumer      text        PRIMARY KEY,
  applied       bigint      NOT NULL DEFAULT 0,  -- events applied since the first run
  rate          real        NOT NULL DEFAULT 0,  -- of them per second, over the last seconds before updated_at
  owner         text        NOT NULL,            -- which of the competing consumers wrote last (host, process)
  last_error    text,                            -- what ended the last session that failed
  last_error_at timestamptz,
  updated_at    timestamptz NOT NULL DEFAULT now()
);

-- Consumers that start at a given state instead of at number 1 (`relay inbox seed`).
CREATE TABLE relay.inbox_seed (
  consumer   text        NOT NULL,
  source     text        NOT NULL,
  aggregates bigint      NOT NULL,
  seeded_at  timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (consumer, source)
);
