-- The result backend's tables.  Run again safely.  @schema@ is the library's schema, quoted.
--
-- Work that belongs to no tenant has the organization '' (no TenantContext can have it), so that a connection without
-- a tenant sees that work and no other.  The tables are not FORCEd: their owner does the maintenance across tenants,
-- and applications connect as another role.

CREATE TABLE IF NOT EXISTS @schema@.task_record (
    organization_id text NOT NULL DEFAULT '',
    task_id         text NOT NULL,
    user_id         text,
    name            text,
    state           text NOT NULL,
    custom_state    text,
    retries         integer NOT NULL DEFAULT 0,
    root_id         text,
    parent_id       text,
    queue           text,
    worker          text,
    result          bytea,
    children        bytea,
    error_type      text,
    error_message   text,
    traceback       text,
    launched_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at      timestamptz,
    finished_at     timestamptz,
    PRIMARY KEY (organization_id, task_id)
);
-- Since version 3.
ALTER TABLE @schema@.task_record
    ADD COLUMN IF NOT EXISTS progress_done      bigint,
    ADD COLUMN IF NOT EXISTS progress_total     bigint,
    ADD COLUMN IF NOT EXISTS progress_message   text,
    ADD COLUMN IF NOT EXISTS abort_requested_at timestamptz,
    ADD COLUMN IF NOT EXISTS abort_requested_by text,
    ADD COLUMN IF NOT EXISTS eta                timestamptz,
    ADD COLUMN IF NOT EXISTS args               bytea,        -- if they are wanted (result_extended)
    ADD COLUMN IF NOT EXISTS kwargs             bytea,
    ADD COLUMN IF NOT EXISTS wanted_until       timestamptz;  -- so long somebody waits for its end
-- Since version 4.
ALTER TABLE @schema@.task_record
    ADD COLUMN IF NOT EXISTS last_started_at timestamptz,  -- of the last attempt
    ADD COLUMN IF NOT EXISTS failure_reason  text;         -- why there is no other attempt
-- What changes in the life of a task is in no index, so that it is written into the page where the record is, with room
-- for it there, and into nothing else (a HOT update).  Old rows go before they are a fifth of the table.
ALTER TABLE @schema@.task_record SET (
    fillfactor = 60, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_insert_scale_factor = 0.1, autovacuum_analyze_scale_factor = 0.05,
    autovacuum_vacuum_cost_delay = 0);
DROP INDEX IF EXISTS @schema@.task_record_finished_at, @schema@.task_record_unfinished;
CREATE INDEX IF NOT EXISTS task_record_age ON @schema@.task_record (launched_at);
CREATE INDEX IF NOT EXISTS task_record_launched_at
    ON @schema@.task_record (organization_id, launched_at DESC, task_id DESC);
-- Not the other way round: until a new table is analyzed, the planner would take it for as good as the primary key
-- where one task is looked up, and read all of an organization's.
DROP INDEX IF EXISTS @schema@.task_record_root_id;
CREATE INDEX IF NOT EXISTS task_record_root ON @schema@.task_record (root_id, organization_id);

CREATE TABLE IF NOT EXISTS @schema@.group_record (
    organization_id text NOT NULL DEFAULT '',
    group_id        text NOT NULL,
    result          bytea,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (organization_id, group_id)
);
ALTER TABLE @schema@.group_record
    ADD COLUMN IF NOT EXISTS chord_size    integer,  -- how many parts have to end; NULL while that is not known
    ADD COLUMN IF NOT EXISTS chord_added   integer NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS chord_done_at timestamptz;
CREATE INDEX IF NOT EXISTS group_record_created_at ON @schema@.group_record (created_at);

ALTER TABLE @schema@.task_record ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS tenant ON @schema@.task_record;
CREATE POLICY tenant ON @schema@.task_record FOR ALL TO PUBLIC
  USING (organization_id = (SELECT coalesce(current_setting('@setting@', true), '')))
  WITH CHECK (organization_id = (SELECT coalesce(current_setting('@setting@', true), '')));

ALTER TABLE @schema@.group_record ENABLE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS tenant ON @schema@.group_record;
CREATE POLICY tenant ON @schema@.group_record FOR ALL TO PUBLIC
  USING (organization_id = (SELECT coalesce(current_setting('@setting@', true), '')))
  WITH CHECK (organization_id = (SELECT coalesce(current_setting('@setting@', true), '')));

-- What the parts of a chord have returned, until its body is launched.  The owner's alone: parts may be of several
-- tenants.
CREATE TABLE IF NOT EXISTS @schema@.chord_part (
    organization_id text NOT NULL DEFAULT '',  -- the chord's
    group_id        text NOT NULL,
    task_id         text NOT NULL,
    position        integer,
    state           text NOT NULL,
    result          bytea,
    PRIMARY KEY (organization_id, group_id, task_id)
);
