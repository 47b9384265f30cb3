-- What a schedule that runs a task for each tenant asks.  They run as the owner, since they look at all tenants.
--
-- A tick is decided once for each tenant: launched or skipped.  Later messages of the same tick, or of an older one,
-- change nothing; unless the tick on record is in the future: then some beat's clock was wrong, and time goes on.
-- Where they forgo sequential scans it is for tables that are sometimes empty and sometimes huge.

-- Whether a tick was decided, by what is on record.
CREATE OR REPLACE FUNCTION @schema@.schedule_decided(recorded timestamptz, due timestamptz) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT recorded IS NOT NULL AND (recorded = due OR (recorded > due AND recorded <= clock_timestamp()))
$$;

-- Whether all tenants of a tick were.  Index: the primary key.
CREATE OR REPLACE FUNCTION @schema@.schedule_finished(its_name text, due timestamptz) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce((SELECT @schema@.schedule_decided(s.due_at, due) FROM @schema@.schedule_run s
                     WHERE s.schedule = its_name AND s.organization_id = ''), false)
$$;

-- What is to be done for some tenants at a tick.  Until the end of the transaction nobody else decides about this
-- schedule.  Returns for each tenant one of:
--     decided    it was, before
--     launched   this run is on its way: whoever launched it did not come to say so
--     running    its last run has not ended; it is skipped at this tick
--     free       the caller launches it, and says so by schedule_launched()
--
-- A run has ended when its record says so, or is gone.  With has_messages the broker is in this schema, and a run whose
-- message is gone has ended too, or was lost; without, one that began longer ago than lost_after seconds.
-- Index: the primary keys; message_task_id, message_held.
CREATE OR REPLACE FUNCTION @schema@.schedule_begin(
    its_name text, due timestamptz, organizations text[], task_ids text[], unfinished text[], has_messages boolean,
    lost_after double precision
) RETURNS TABLE (organization_id text, verdict text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    tenant     record;
    last_run   @schema@.schedule_run;
    is_running boolean;
BEGIN
    PERFORM pg_advisory_xact_lock('@schema@.schedule_run'::regclass::oid::integer, hashtext(its_name));
    FOR tenant IN SELECT o, t FROM unnest(organizations, task_ids) given (o, t) LOOP
        organization_id := tenant.o;
        SELECT * INTO last_run FROM @schema@.schedule_run s WHERE s.schedule = its_name AND s.organization_id = tenant.o;
        IF @schema@.schedule_decided(last_run.due_at, due) THEN
            verdict := 'decided';
            RETURN NEXT;
            CONTINUE;
        END IF;
        IF EXISTS (SELECT FROM @schema@.task_record r WHERE r.organization_id = tenant.o AND r.task_id = tenant.t)
           OR (has_messages AND @schema@.has_message(tenant.o, tenant.t)) THEN
            verdict := 'launched';
            PERFORM @schema@.schedule_launched(its_name, due, ARRAY[tenant.o], ARRAY[tenant.t]);
            RETURN NEXT;
            CONTINUE;
        END IF;
        is_running := false;
        IF last_run.task_id IS NOT NULL THEN
            SELECT r.state = ANY (unfinished) INTO is_running FROM @schema@.task_record r
            WHERE r.organization_id = tenant.o AND r.task_id = last_run.task_id;
            IF has_messages THEN  -- without a record the message alone tells
                is_running := coalesce(is_running, true) AND @schema@.has_message(tenant.o, last_run.task_id);
            ELSE
                is_running := coalesce(is_running, false)
                    AND last_run.launched_at > clock_timestamp() - make_interval(secs => lost_after);
            END IF;
        END IF;
        IF is_running THEN
            verdict := 'running';
            UPDATE @schema@.schedule_run s SET due_at = due, skipped = s.skipped + 1
            WHERE s.schedule = its_name AND s.organization_id = tenant.o;
        ELSE
            verdict := 'free';
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Whether the message of a tenant's task waits, or a worker has it.  For schedule_begin() alone, as whom it runs.
-- Index: message_task_id and transient_message_task_id for what waits, message_held for what a worker has.
CREATE OR REPLACE FUNCTION @schema@.has_message(its_organization text, its_id text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
    SELECT EXISTS (SELECT FROM @schema@.message m
                   WHERE m.task_id = its_id AND m.tenant = its_organization AND m.claim_token IS NULL
                     AND m.due_at IS DISTINCT FROM 'infinity')
        OR EXISTS (SELECT FROM @schema@.message m
                   WHERE m.holder IS NOT NULL AND m.task_id = its_id AND m.tenant = its_organization)
$$;

-- Runs were launched; '' says that nothing is left to do at this tick.
CREATE OR REPLACE FUNCTION @schema@.schedule_launched(
    its_name text, due timestamptz, organizations text[], task_ids text[]
) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO @schema@.schedule_run (schedule, organization_id, due_at, task_id, launched_at)
    SELECT its_name, o, due, t, clock_timestamp() FROM unnest(organizations, task_ids) given (o, t)
    ON CONFLICT (schedule, organization_id) DO UPDATE SET
        due_at = excluded.due_at, task_id = excluded.task_id, launched_at = excluded.launched_at, skipped = 0
$$;

-- Forget a tenant that has left.  Returns of how many schedules it was.
CREATE OR REPLACE FUNCTION @schema@.schedule_forget(its_organization text) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH gone AS (DELETE FROM @schema@.schedule_run WHERE organization_id = its_organization RETURNING 1)
    SELECT count(*) FROM gone
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA @schema@ FROM PUBLIC;
