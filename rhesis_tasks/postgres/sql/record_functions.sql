-- What is done with records.  Those that say INVOKER (the default) run as the caller, whom row-level security binds to
-- the organization that they set for their transaction; those that reach further run as the owner.
--
-- A state's sources come from the caller, who has the one table of states.  Settings are made in declarations and
-- assignments: PERFORM would make a statement of each.

-- The channel on which those who wait for results are notified, and the key that stands for one task there: everybody
-- can listen, and shall learn nothing.
CREATE OR REPLACE FUNCTION @schema@.result_channel() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT 'rhesis_tasks_results_' || '@schema@.task_record'::regclass::oid
$$;

CREATE OR REPLACE FUNCTION @schema@.result_key(of_organization text, of_task text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT md5(length(of_organization) || ':' || of_organization || of_task)
$$;

-- A task was launched.  Returns whether it is new.  Its commit is not waited for: the message is committed after it, and
-- whatever has the one after a crash has the other.  Index: the primary key.
CREATE OR REPLACE FUNCTION @schema@.record_launch(
    its_organization text, its_id text, its_user text, its_name text, its_root text, its_parent text, its_state text,
    its_eta timestamptz, sources text[], lazily boolean
) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tenant text := set_config('@setting@', its_organization, true);
    flush  text;
    is_new boolean;
BEGIN
    IF lazily THEN
        flush := set_config('synchronous_commit', 'off', true);
    END IF;
    INSERT INTO @schema@.task_record AS r (organization_id, task_id, user_id, name, state, root_id, parent_id, eta)
    VALUES (its_organization, its_id, its_user, its_name, its_state, its_root, its_parent, its_eta)
    ON CONFLICT (organization_id, task_id) DO UPDATE SET
        name = coalesce(excluded.name, r.name),
        root_id = excluded.root_id,
        parent_id = coalesce(excluded.parent_id, r.parent_id),
        eta = coalesce(excluded.eta, r.eta),
        state = excluded.state
    WHERE r.state = ANY (sources)
    RETURNING xmax = 0 INTO is_new;
    RETURN coalesce(is_new, false);
END
$$;

-- The launch failed: take its record back, unless a worker has the message all the same.
CREATE OR REPLACE FUNCTION @schema@.record_discard(its_organization text, its_id text, states text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tenant text := set_config('@setting@', its_organization, true);
BEGIN
    DELETE FROM @schema@.task_record
    WHERE organization_id = its_organization AND task_id = its_id AND state = ANY (states);
END
$$;

-- A task moves to a state, if it may from where it is; an attempt that is not the last one any more only ends it.
-- Returns NULL, or the state that it stays in.  Notifies if somebody waits for its end.  Index: the primary key.
-- (After an upgrade that of version 3, without a reason, is there too, for workers that run on.)
CREATE OR REPLACE FUNCTION @schema@.record_state(
    its_organization text, its_id text, its_user text, its_name text, its_state text, its_custom_state text,
    its_retries integer, its_root text, its_parent text, its_queue text, its_worker text, its_result bytea,
    its_children bytea, its_args bytea, its_kwargs bytea, its_error_type text, its_error_message text,
    its_traceback text, its_reason text,
    its_progress_done bigint, its_progress_total bigint, its_progress_message text, is_started boolean,
    is_finished boolean, sources text[]
) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tenant text := set_config('@setting@', its_organization, true);
    flush  text;
    at     timestamptz := clock_timestamp();
    wanted timestamptz;
    stays  text;
BEGIN
    IF NOT is_finished THEN  -- lost in a crash, it is written again by the next run
        flush := set_config('synchronous_commit', 'off', true);
    END IF;  -- (How a task has ended is not to be lost, though its message came again: somebody may have read it.)
    INSERT INTO @schema@.task_record AS r
        (organization_id, task_id, user_id, name, state, custom_state, retries, root_id, parent_id, queue, worker,
         result, children, args, kwargs, error_type, error_message, traceback, failure_reason,
         progress_done, progress_total, progress_message, started_at, last_started_at, finished_at)
    VALUES
        (its_organization, its_id, its_user, its_name, its_state, its_custom_state, its_retries, its_root, its_parent,
         its_queue, its_worker, its_result, its_children, its_args, its_kwargs, its_error_type, its_error_message,
         its_traceback, its_reason, its_progress_done, its_progress_total, its_progress_message,
         CASE WHEN is_started THEN at END, CASE WHEN is_started THEN at END, CASE WHEN is_finished THEN at END)
    ON CONFLICT (organization_id, task_id) DO UPDATE SET
        name = coalesce(excluded.name, r.name),
        state = excluded.state,
        custom_state = excluded.custom_state,
        retries = greatest(excluded.retries, r.retries),
        root_id = coalesce(excluded.root_id, r.root_id),
        parent_id = coalesce(excluded.parent_id, r.parent_id),
        queue = coalesce(excluded.queue, r.queue),
        worker = coalesce(excluded.worker, r.worker),
        result = excluded.result,
        children = excluded.children,
        args = coalesce(excluded.args, r.args),
        kwargs = coalesce(excluded.kwargs, r.kwargs),
        error_type = excluded.error_type,
        error_message = excluded.error_message,
        traceback = excluded.traceback,
        failure_reason = excluded.failure_reason,
        progress_done = coalesce(excluded.progress_done, r.progress_done),
        progress_total = CASE WHEN excluded.progress_done IS NULL THEN r.progress_total
                              ELSE excluded.progress_total END,
        progress_message = CASE WHEN excluded.progress_done IS NULL THEN r.progress_message
                                ELSE excluded.progress_message END,
        started_at = coalesce(r.started_at, excluded.started_at),
        last_started_at = coalesce(excluded.last_started_at, r.last_started_at),
        finished_at = excluded.finished_at
    WHERE r.state = ANY (sources) AND (is_finished OR excluded.retries >= r.retries)
    RETURNING wanted_until INTO wanted;
    IF NOT FOUND THEN
        SELECT state INTO stays FROM @schema@.task_record
        WHERE organization_id = its_organization AND task_id = its_id;
        RETURN coalesce(stays, 'gone');
    END IF;
    IF is_finished AND wanted > clock_timestamp() THEN
        PERFORM pg_notify(@schema@.result_channel(), @schema@.result_key(its_organization, its_id));
    END IF;
    RETURN NULL;
END
$$;

-- A running task says how far it is.  Returns whether somebody has asked it to stop.
CREATE OR REPLACE FUNCTION @schema@.record_progress(
    its_organization text, its_id text, its_done bigint, its_total bigint, its_message text, unfinished text[]
) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tenant text := set_config('@setting@', its_organization, true);
    flush  text := set_config('synchronous_commit', 'off', true);
    is_asked boolean;
BEGIN
    IF its_done IS NULL THEN
        SELECT abort_requested_at IS NOT NULL INTO is_asked FROM @schema@.task_record
        WHERE organization_id = its_organization AND task_id = its_id;
    ELSE
        UPDATE @schema@.task_record
        SET progress_done = its_done, progress_total = its_total, progress_message = its_message
        WHERE organization_id = its_organization AND task_id = its_id AND state = ANY (unfinished)
        RETURNING abort_requested_at IS NOT NULL INTO is_asked;
    END IF;
    RETURN coalesce(is_asked, false);
END
$$;

-- Somebody waits for a task's end, for so many seconds.  Returns the task's key on the channel.
CREATE OR REPLACE FUNCTION @schema@.record_wanted(its_organization text, its_id text, seconds double precision)
RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tenant text := set_config('@setting@', its_organization, true);
    flush  text := set_config('synchronous_commit', 'off', true);
BEGIN
    UPDATE @schema@.task_record
    SET wanted_until = greatest(wanted_until, clock_timestamp() + make_interval(secs => seconds))
    WHERE organization_id = its_organization AND task_id = its_id AND finished_at IS NULL;
    RETURN @schema@.result_key(its_organization, its_id);
END
$$;

-- One task of an organization.
CREATE OR REPLACE FUNCTION @schema@.record_of(its_organization text, its_id text) RETURNS SETOF @schema@.task_record
LANGUAGE plpgsql ROWS 1 SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tenant text := set_config('@setting@', its_organization, true);
BEGIN
    RETURN QUERY SELECT * FROM @schema@.task_record WHERE organization_id = its_organization AND task_id = its_id;
END
$$;

-- Tasks of an organization, the latest first, from a place on: that of the last one seen.
-- Index: task_record_launched_at, or task_record_root.
CREATE OR REPLACE FUNCTION @schema@.records_of(
    its_organization text, its_states text[], its_name text, its_root text, launched_from timestamptz,
    launched_before timestamptz, after_time timestamptz, after_id text, up_to integer
) RETURNS SETOF @schema@.task_record
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tenant text := set_config('@setting@', its_organization, true);
BEGIN
    RETURN QUERY
        SELECT * FROM @schema@.task_record r
        WHERE r.organization_id = its_organization
          AND (its_states IS NULL OR r.state = ANY (its_states))
          AND (its_name IS NULL OR r.name = its_name)
          AND (its_root IS NULL OR r.root_id = its_root)
          AND (launched_from IS NULL OR r.launched_at >= launched_from)
          AND (launched_before IS NULL OR r.launched_at < launched_before)
          AND (after_time IS NULL OR (r.launched_at, r.task_id) < (after_time, after_id))
        ORDER BY r.launched_at DESC, r.task_id DESC
        LIMIT up_to;
END
$$;

-- A record goes.  Who waits for the task's end is told that nothing will be said of it.
CREATE OR REPLACE FUNCTION @schema@.record_forget(its_organization text, its_id text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tenant text := set_config('@setting@', its_organization, true);
    wanted timestamptz;
BEGIN
    DELETE FROM @schema@.task_record WHERE organization_id = its_organization AND task_id = its_id
    RETURNING wanted_until INTO wanted;
    IF wanted > clock_timestamp() THEN
        PERFORM pg_notify(@schema@.result_channel(), @schema@.result_key(its_organization, its_id));
    END IF;
END
$$;

-- Ask a task that runs to stop early.  Returns whether there is such a task.
CREATE OR REPLACE FUNCTION @schema@.record_abort(its_organization text, its_id text, by_user text, states text[])
RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tenant text := set_config('@setting@', its_organization, true);
BEGIN
    UPDATE @schema@.task_record SET
        abort_requested_at = coalesce(abort_requested_at, clock_timestamp()),
        abort_requested_by = CASE WHEN abort_requested_at IS NULL THEN by_user ELSE abort_requested_by END
    WHERE organization_id = its_organization AND task_id = its_id AND state = ANY (states);
    RETURN FOUND;
END
$$;

-- Whether somebody waits for a message's task besides whoever launched it: a chord, or the rest of a chain.  What cannot
-- be looked into may have one.
CREATE OR REPLACE FUNCTION @schema@.is_of_canvas(envelope json, body bytea) RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT envelope #>> '{headers,group}' IS NOT NULL
        OR envelope #>> '{headers,compression}' IS NOT NULL
        OR coalesce(envelope ->> 'content-type', '') <> 'application/json'
        OR position('"chain": ['::bytea IN body) > 0
        OR position('"chain":['::bytea IN body) > 0
$$;

-- Cancel a task that has not started: it ends as cancelled, and its message goes if no worker has it (the worker that
-- has it drops it).  That of a part of a canvas stays: the worker that drops it tells those who wait.  Returns whether it did.  As the owner, since nobody else reads messages; only its own
-- organization's.  Index: message_task_id.
CREATE OR REPLACE FUNCTION @schema@.record_cancel(
    its_organization text, its_id text, by_user text, its_state text, its_result bytea, its_error_type text,
    its_error_message text, sources text[]
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wanted timestamptz;
BEGIN
    UPDATE @schema@.task_record SET
        state = its_state,
        result = its_result,
        error_type = its_error_type,
        error_message = its_error_message,
        finished_at = clock_timestamp(),
        abort_requested_at = coalesce(abort_requested_at, clock_timestamp()),
        abort_requested_by = CASE WHEN abort_requested_at IS NULL THEN by_user ELSE abort_requested_by END
    WHERE organization_id = its_organization AND task_id = its_id AND state = ANY (sources)
    RETURNING wanted_until INTO wanted;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    DELETE FROM @schema@.message
    WHERE task_id = its_id AND tenant = its_organization AND claim_token IS NULL
      AND NOT @schema@.is_of_canvas(envelope, body);
    IF wanted > clock_timestamp() THEN
        PERFORM pg_notify(@schema@.result_channel(), @schema@.result_key(its_organization, its_id));
    END IF;
    RETURN true;
END
$$;

-- --- groups and chords ---------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION @schema@.group_save(its_organization text, its_id text, its_result bytea) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tenant text := set_config('@setting@', its_organization, true);
BEGIN
    INSERT INTO @schema@.group_record (organization_id, group_id, result) VALUES (its_organization, its_id, its_result)
    ON CONFLICT (organization_id, group_id) DO UPDATE SET result = excluded.result;
END
$$;

CREATE OR REPLACE FUNCTION @schema@.group_of(its_organization text, its_id text) RETURNS SETOF @schema@.group_record
LANGUAGE plpgsql ROWS 1 SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    tenant text := set_config('@setting@', its_organization, true);
BEGIN
    RETURN QUERY SELECT * FROM @schema@.group_record WHERE organization_id = its_organization AND group_id = its_id;
END
$$;

-- As the owner, since what the parts of a chord have returned goes with it.
CREATE OR REPLACE FUNCTION @schema@.group_forget(its_organization text, its_id text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    DELETE FROM @schema@.group_record WHERE organization_id = its_organization AND group_id = its_id;
    DELETE FROM @schema@.chord_part WHERE organization_id = its_organization AND group_id = its_id;
END
$$;

-- A chord is launched: how many parts it has (NULL while that is not known).  How many its parts have added is what
-- workers of earlier versions say here; see chord_add().
CREATE OR REPLACE FUNCTION @schema@.chord_size(its_organization text, its_id text, its_size integer, more integer)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO @schema@.group_record AS g (organization_id, group_id, chord_size, chord_added)
    VALUES (its_organization, its_id, its_size, more)
    ON CONFLICT (organization_id, group_id) DO UPDATE SET
        chord_size = coalesce(excluded.chord_size, g.chord_size),
        chord_added = g.chord_added + excluded.chord_added;
END
$$;

-- A part adds another task to its chord: once, however often it says so.  The row of one that has not ended has no
-- state.
CREATE OR REPLACE FUNCTION @schema@.chord_add(its_organization text, its_id text, of_task text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM FROM @schema@.group_record WHERE organization_id = its_organization AND group_id = its_id FOR UPDATE;
    INSERT INTO @schema@.chord_part (organization_id, group_id, task_id, state)
    VALUES (its_organization, its_id, of_task, '')
    ON CONFLICT DO NOTHING;
    IF FOUND THEN
        INSERT INTO @schema@.group_record AS g (organization_id, group_id, chord_added)
        VALUES (its_organization, its_id, 1)
        ON CONFLICT (organization_id, group_id) DO UPDATE SET chord_added = g.chord_added + 1;
    END IF;
END
$$;

-- A part of a chord has ended.  Returns whether all have: by their rows, under the lock of the chord's, so that of the
-- last two one sees the other.  As the owner, since parts may be other tenants'.
CREATE OR REPLACE FUNCTION @schema@.chord_part_ended(
    its_organization text, its_id text, of_task text, its_position integer, its_state text, its_result bytea
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    size integer;
BEGIN
    SELECT chord_size + chord_added INTO size FROM @schema@.group_record
    WHERE organization_id = its_organization AND group_id = its_id AND chord_done_at IS NULL FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO @schema@.chord_part AS p (organization_id, group_id, task_id, position, state, result)
    VALUES (its_organization, its_id, of_task, its_position, its_state, its_result)
    ON CONFLICT (organization_id, group_id, task_id) DO UPDATE SET
        position = excluded.position, state = excluded.state, result = excluded.result
    WHERE p.state = '';
    RETURN coalesce((SELECT count(*) FROM @schema@.chord_part
                     WHERE organization_id = its_organization AND group_id = its_id AND state <> '')
                    >= size, false);
END
$$;

-- What the parts of a chord have returned, if all have ended and its body is not launched: whoever calls it holds the
-- chord until the end of the transaction, and launches the body.  Returns NULL for a chord that is done.
CREATE OR REPLACE FUNCTION @schema@.chord_complete(its_organization text, its_id text)
RETURNS TABLE (task_id text, state text, result bytea)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM FROM @schema@.group_record g
    WHERE g.organization_id = its_organization AND g.group_id = its_id AND g.chord_done_at IS NULL FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    UPDATE @schema@.group_record g SET chord_done_at = clock_timestamp()
    WHERE g.organization_id = its_organization AND g.group_id = its_id;
    RETURN QUERY
        WITH parts AS (
            DELETE FROM @schema@.chord_part p
            WHERE p.organization_id = its_organization AND p.group_id = its_id
            RETURNING p.position, p.task_id, p.state, p.result)
        SELECT parts.task_id, parts.state, parts.result FROM parts
        WHERE parts.state <> '' ORDER BY parts.position, parts.task_id;
END
$$;

-- --- expiry --------------------------------------------------------------------------------------------------------

-- Expiry reaches across tenants, so it is the owner's, lent to the roles that run workers; it lets nobody delete what
-- has just ended.  What never ended (its message or its worker was lost) goes thirty days after it should have begun,
-- or has; a chord, thirty days after its launch.
-- Index: task_record_age, since nothing has ended before it was launched.
CREATE OR REPLACE FUNCTION @schema@.expire_records(before timestamptz, batch integer DEFAULT 10000) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH old_tasks AS (
        DELETE FROM @schema@.task_record WHERE (organization_id, task_id) IN (
            SELECT organization_id, task_id FROM @schema@.task_record
            WHERE launched_at < least(before, now() - interval '1 minute')
              AND (finished_at < least(before, now() - interval '1 minute')
                   OR (finished_at IS NULL AND launched_at < least(before, now()) - interval '30 days'
                       AND greatest(launched_at, eta, last_started_at) < least(before, now()) - interval '30 days'))
            LIMIT batch FOR UPDATE SKIP LOCKED)
        RETURNING 1),
    old_groups AS (
        DELETE FROM @schema@.group_record WHERE (organization_id, group_id) IN (
            SELECT organization_id, group_id FROM @schema@.group_record
            WHERE created_at < least(before, now() - interval '1 minute')
              AND (chord_size IS NULL OR chord_done_at IS NOT NULL
                   OR created_at < least(before, now()) - interval '30 days')
            LIMIT batch FOR UPDATE SKIP LOCKED)
        RETURNING organization_id, group_id),
    old_parts AS (
        DELETE FROM @schema@.chord_part p USING old_groups g
        WHERE p.organization_id = g.organization_id AND p.group_id = g.group_id)
    SELECT (SELECT count(*) FROM old_tasks) + (SELECT count(*) FROM old_groups)
$$;
