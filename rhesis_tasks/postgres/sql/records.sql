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
    ADD COLUMN IF NOT EXISTS abort_requested_by text;
CREATE INDEX IF NOT EXISTS task_record_finished_at ON @schema@.task_record (finished_at);
CREATE INDEX IF NOT EXISTS task_record_unfinished ON @schema@.task_record (launched_at) WHERE finished_at IS NULL;

CREATE TABLE IF NOT EXISTS @schema@.group_record (
    organization_id text NOT NULL DEFAULT '',
    group_id        text NOT NULL,
    result          bytea,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (organization_id, group_id)
);
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

-- Expiry reaches across tenants, so it is the owner's, lent to the roles that run workers; it lets nobody delete what
-- has just ended.  What never ended (its message or its worker was lost) goes thirty days later.
CREATE OR REPLACE FUNCTION @schema@.expire_records(before timestamptz, batch integer DEFAULT 10000) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH old_tasks AS (
        DELETE FROM @schema@.task_record WHERE (organization_id, task_id) IN (
            SELECT organization_id, task_id FROM @schema@.task_record
            WHERE finished_at < least(before, now() - interval '1 minute')
               OR (finished_at IS NULL AND launched_at < least(before, now()) - interval '30 days')
            LIMIT batch FOR UPDATE SKIP LOCKED)
        RETURNING 1),
    old_groups AS (
        DELETE FROM @schema@.group_record WHERE (organization_id, group_id) IN (
            SELECT organization_id, group_id FROM @schema@.group_record
            WHERE created_at < least(before, now() - interval '1 minute')
            LIMIT batch FOR UPDATE SKIP LOCKED)
        RETURNING 1)
    SELECT (SELECT count(*) FROM old_tasks) + (SELECT count(*) FROM old_groups)
$$;
