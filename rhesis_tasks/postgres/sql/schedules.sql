-- What schedules that run a task for each tenant have launched.  Run again safely.  @schema@ is the library's schema,
-- quoted.  Since version 5.
--
-- Nobody but the owner reads or writes it: it says which tenants there are.
CREATE TABLE IF NOT EXISTS @schema@.schedule_run (
    schedule        text NOT NULL,
    organization_id text NOT NULL,         -- '': all tenants of the tick
    due_at          timestamptz NOT NULL,  -- the last tick that was decided: launched, or skipped
    task_id         text,                  -- the last run that was launched
    launched_at     timestamptz,
    skipped         integer NOT NULL DEFAULT 0,  -- ticks in a row, since that run has not ended
    PRIMARY KEY (schedule, organization_id)
) WITH (fillfactor = 80);
