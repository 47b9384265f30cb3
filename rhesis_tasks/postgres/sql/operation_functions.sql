-- What operators ask of the queues and records, across tenants.  @schema@ is the library's schema, quoted.
--
-- They run as the owner, and are granted to the roles that run workers, not to those that only launch tasks.  Which
-- messages are meant is one jsonb: organization_id ('' is no tenant), user_id, task_name, queue, task_id, states,
-- older_than (seconds) and published_before; what it does not name is not looked at.  Messages that are no task's
-- (events, remote control and its answers) are meant only where their queue is named.
--
-- All walk the messages by their ids, a batch at a time, so that no call holds many locks for long.

-- Messages and dead letters, the oldest first, from after a place on.  Index: the primary keys.
CREATE OR REPLACE FUNCTION @schema@.operation_messages(which jsonb, after_id bigint, up_to integer)
RETURNS TABLE (
    id bigint, state text, queue text, priority smallint, deliveries integer, organization_id text, user_id text,
    task_id text, task_name text, worker text, reason text, published_at timestamptz, due_at timestamptz,
    expires_at timestamptz, claimed_at timestamptz, died_at timestamptz
)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    its_tenant text := which ->> 'organization_id';
    its_user   text := which ->> 'user_id';
    its_name   text := which ->> 'task_name';
    its_queue  text := which ->> 'queue';
    its_task   text := which ->> 'task_id';
    its_states jsonb := which -> 'states';
    until_     timestamptz := least((which ->> 'published_before')::timestamptz,
        clock_timestamp() - make_interval(secs => (which ->> 'older_than')::double precision));
BEGIN
    RETURN QUERY
    SELECT * FROM (
        (SELECT m.id,
                CASE WHEN m.claim_token IS NOT NULL THEN 'running' WHEN m.due_at IS NOT NULL THEN 'delayed'
                     ELSE 'waiting' END AS state,
                m.queue, m.priority, m.deliveries, m.tenant, m.envelope #>> '{headers,rhesis_tasks,user_id}',
                m.task_id, m.task_name, c.name, m.last_reason, m.published_at, m.due_at, m.expires_at,
                CASE WHEN m.claim_token IS NOT NULL THEN m.claimed_at END, NULL::timestamptz
         FROM @schema@.message m LEFT JOIN @schema@.consumer c ON c.id = m.holder
         WHERE m.id > after_id
           AND (its_states IS NULL OR its_states ?
                CASE WHEN m.claim_token IS NOT NULL THEN 'running' WHEN m.due_at IS NOT NULL THEN 'delayed'
                     ELSE 'waiting' END)
           AND (its_tenant IS NULL OR coalesce(m.tenant, '') = its_tenant)
           AND (its_name IS NULL OR m.task_name = its_name)
           AND CASE WHEN its_queue IS NOT NULL THEN m.queue = its_queue
                    ELSE m.task_id IS NOT NULL OR m.tableoid = '@schema@.message'::regclass END
           AND (its_task IS NULL OR m.task_id = its_task)
           AND (until_ IS NULL OR m.published_at < until_)
           AND (its_user IS NULL OR m.envelope #>> '{headers,rhesis_tasks,user_id}' = its_user)
         ORDER BY m.id LIMIT up_to)
        UNION ALL
        (SELECT d.id, 'dead', d.queue, d.priority, d.deliveries, d.tenant,
                d.envelope #>> '{headers,rhesis_tasks,user_id}', d.task_id, d.task_name, NULL, d.reason,
                d.published_at, NULL, NULL, NULL, d.died_at
         FROM @schema@.dead_letter d
         WHERE d.id > after_id
           AND (its_states IS NULL OR its_states ? 'dead')
           AND (its_tenant IS NULL OR coalesce(d.tenant, '') = its_tenant)
           AND (its_name IS NULL OR d.task_name = its_name)
           AND (its_queue IS NULL OR d.queue = its_queue)
           AND (its_task IS NULL OR d.task_id = its_task)
           AND (until_ IS NULL OR d.published_at < until_)
           AND (its_user IS NULL OR d.envelope #>> '{headers,rhesis_tasks,user_id}' = its_user)
         ORDER BY d.id LIMIT up_to)) found
    ORDER BY 1 LIMIT up_to;
END
$$;

-- How many of them there are in each state.
CREATE OR REPLACE FUNCTION @schema@.operation_count(which jsonb) RETURNS TABLE (state text, number bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
    SELECT m.state, count(*) FROM @schema@.operation_messages(which, -1, NULL) m GROUP BY m.state
$$;

-- The same for each queue, organization or task, the most first; and when the oldest one was published.
CREATE OR REPLACE FUNCTION @schema@.operation_summary(which jsonb, by_what text)
RETURNS TABLE (name text, state text, number bigint, oldest timestamptz)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
    SELECT CASE by_what WHEN 'queue' THEN m.queue WHEN 'organization_id' THEN m.organization_id
                        WHEN 'user_id' THEN m.user_id WHEN 'task_name' THEN m.task_name END,
           m.state, count(*), min(m.published_at)
    FROM @schema@.operation_messages(which, -1, NULL) m GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2
$$;

-- Delete a batch of messages that wait or are delayed, and of dead letters; what is claimed stays, and what was claimed
-- at this moment is returned as running.  Those of parts of a canvas are returned with their envelopes and bodies, if
-- their canvases are to be told.  Index: the primary keys.
CREATE OR REPLACE FUNCTION @schema@.operation_remove(
    which jsonb, after_id bigint, up_to integer, tells_canvas boolean
) RETURNS TABLE (id bigint, state text, organization_id text, task_id text, envelope text, body bytea)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
    RETURN QUERY
    WITH chosen AS MATERIALIZED (
        SELECT f.id, f.state FROM @schema@.operation_messages(which, after_id, up_to) f WHERE f.state <> 'running'),
    gone AS (
        DELETE FROM @schema@.message m USING chosen c
        WHERE m.id = c.id AND c.state <> 'dead' AND m.claim_token IS NULL
        RETURNING m.id, m.tenant, m.task_id,
                  CASE WHEN tells_canvas AND @schema@.is_of_canvas(m.envelope, m.body) THEN m.envelope::text
                  END AS envelope, m.body),
    buried AS (
        DELETE FROM @schema@.dead_letter d USING chosen c WHERE d.id = c.id AND c.state = 'dead'
        RETURNING d.id, d.tenant, d.task_id),
    removed AS (
        SELECT g.id, g.tenant, g.task_id, g.envelope, CASE WHEN g.envelope IS NOT NULL THEN g.body END AS body FROM gone g
        UNION ALL SELECT b.id, b.tenant, b.task_id, NULL, NULL FROM buried b)
    SELECT c.id, CASE WHEN r.id IS NULL THEN 'running' ELSE c.state END, r.tenant, r.task_id, r.envelope, r.body
    FROM chosen c LEFT JOIN removed r ON r.id = c.id;
END
$$;

-- Tasks whose messages were removed come to the end state that is given, by whom: those that have not begun (sources),
-- and those that have begun in vain, and whose message nobody has claimed again.  Returns how many.  Index: the primary
-- key of the records, message_held.
CREATE OR REPLACE FUNCTION @schema@.operation_end(
    of_organizations text[], of_tasks text[], by_whom text, end_state text, error_type_ text, error_message_ text,
    sources text[], unfinished text[]
) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
    WITH removed AS (
        SELECT DISTINCT coalesce(u.organization_id, '') AS organization_id, u.task_id
        FROM unnest(of_organizations, of_tasks) u (organization_id, task_id) WHERE u.task_id IS NOT NULL),
    claimed AS (
        SELECT coalesce(m.tenant, '') AS organization_id, m.task_id FROM @schema@.message m
        WHERE m.holder IS NOT NULL AND m.task_id IS NOT NULL),
    ended AS (
        UPDATE @schema@.task_record r SET
            state = end_state, result = NULL, custom_state = NULL, traceback = NULL,
            error_type = error_type_, error_message = error_message_, finished_at = clock_timestamp(),
            abort_requested_at = coalesce(r.abort_requested_at, clock_timestamp()),
            abort_requested_by = CASE WHEN r.abort_requested_at IS NULL THEN by_whom ELSE r.abort_requested_by END
        FROM removed g
        WHERE r.organization_id = g.organization_id AND r.task_id = g.task_id
          AND (r.state = ANY (sources)
               OR r.state = ANY (unfinished)
                  AND (r.organization_id, r.task_id) NOT IN (SELECT c.organization_id, c.task_id FROM claimed c))
        RETURNING CASE WHEN r.wanted_until > clock_timestamp()
            THEN pg_notify(@schema@.result_channel(), @schema@.result_key(r.organization_id, r.task_id)) END)
    SELECT count(*) FROM ended
$$;

-- Write down what an operator did, and what it came to.  An operation in several batches has a row for each.
CREATE OR REPLACE FUNCTION @schema@.operation_note(
    its_operation uuid, its_action text, its_operator text, its_filter jsonb, its_counts jsonb
) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO @schema@.audit_record (operation, action, operator, login, filter, counts)
    VALUES (its_operation, its_action, its_operator, session_user, its_filter, its_counts)
$$;

-- Operations, the latest first, from before a place on: when, what, who, which, and all that it came to.
CREATE OR REPLACE FUNCTION @schema@.operation_notes(before_id bigint, up_to integer)
RETURNS TABLE (
    id bigint, operation uuid, action text, operator text, login text, filter jsonb, counts jsonb, at timestamptz
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH operations AS (
        SELECT a.operation, min(a.id) AS id FROM @schema@.audit_record a GROUP BY a.operation
        HAVING before_id IS NULL OR min(a.id) < before_id ORDER BY 2 DESC LIMIT up_to)
    SELECT o.id, o.operation, a.action, a.operator, a.login, a.filter,
           (SELECT coalesce(jsonb_object_agg(s.key, s.number), '{}')
            FROM (SELECT c.key, sum(c.value::bigint) AS number
                  FROM @schema@.audit_record r, jsonb_each_text(r.counts) c
                  WHERE r.operation = o.operation GROUP BY c.key) s),
           a.at
    FROM operations o JOIN @schema@.audit_record a ON a.id = o.id ORDER BY o.id DESC
$$;

-- What `celery purge` does to a queue, a batch of it: the same as an operator's purge of all that waits or is delayed
-- there, but canvases are not told.  Returns how many messages went, and where to go on; NULL if there is no more.
CREATE OR REPLACE FUNCTION @schema@.operation_purge(
    its_operation uuid, of_queue text, after_id bigint, up_to integer, its_operator text, by_whom text, end_state text,
    error_type text, error_message text, sources text[], unfinished text[]
) RETURNS TABLE (number bigint, last_id bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    which         jsonb := jsonb_build_object('queue', of_queue, 'states', jsonb_build_array('waiting', 'delayed'));
    waiting       bigint;
    organizations text[];
    tasks         text[];
BEGIN
    SELECT count(*) FILTER (WHERE r.state <> 'running'), max(r.id), count(*) FILTER (WHERE r.state = 'waiting'),
           array_agg(r.organization_id), array_agg(r.task_id)
    INTO number, last_id, waiting, organizations, tasks
    FROM @schema@.operation_remove(which, after_id, up_to, false) r;
    IF number > 0 THEN
        PERFORM @schema@.operation_note(its_operation, 'purge', its_operator, which, jsonb_build_object(
            'waiting', waiting, 'delayed', number - waiting, 'records', @schema@.operation_end(
                organizations, tasks, by_whom, end_state, error_type, error_message, sources, unfinished)));
    END IF;
    RETURN NEXT;
END
$$;

-- Put a batch of dead letters back into their queues, delivered not once so far, behind what waits there.  A task that
-- was given up is in the state that is given; one that has ended otherwise meanwhile, or ran under another message,
-- keeps its dead letter.
CREATE OR REPLACE FUNCTION @schema@.operation_replay(
    which jsonb, after_id bigint, up_to integer, to_state text, sources text[], unfinished text[]
) RETURNS TABLE (id bigint, task_id text, is_replayed boolean, is_recorded boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    letter @schema@.dead_letter;
    stays  text;
BEGIN
    FOR letter IN
        SELECT d.* FROM @schema@.dead_letter d
        WHERE d.id IN (SELECT f.id FROM @schema@.operation_messages(which || '{"states": ["dead"]}', after_id, up_to) f)
        ORDER BY d.id FOR UPDATE SKIP LOCKED
    LOOP
        id := letter.id;
        task_id := letter.task_id;
        is_replayed := false;
        SELECT r.state INTO stays FROM @schema@.task_record r
        WHERE r.organization_id = coalesce(letter.tenant, '') AND r.task_id = letter.task_id FOR UPDATE;
        is_recorded := FOUND AND stays = ANY (sources);
        IF is_recorded OR stays IS NULL OR stays = ANY (unfinished) THEN
            UPDATE @schema@.task_record r SET
                state = to_state, result = NULL, children = NULL, custom_state = NULL, error_type = NULL,
                error_message = NULL, traceback = NULL, failure_reason = NULL, finished_at = NULL,
                abort_requested_at = NULL, abort_requested_by = NULL
            WHERE is_recorded AND r.organization_id = coalesce(letter.tenant, '') AND r.task_id = letter.task_id;
            DELETE FROM @schema@.dead_letter d WHERE d.id = letter.id;
            PERFORM @schema@.publish('', letter.queue, letter.envelope, letter.body, letter.priority::integer,
                                     letter.tenant, letter.task_id, letter.task_name, NULL, NULL, NULL);
            is_replayed := true;
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Ask tasks whose messages are claimed to stop early; those that have not begun are in the end state that is given, and
-- whoever has the message drops it.  Returns all of them.
DROP FUNCTION IF EXISTS @schema@.operation_abort(jsonb, text, text[], text, text, text, text[]);
CREATE OR REPLACE FUNCTION @schema@.operation_stop(
    which jsonb, by_whom text, unfinished text[], end_state text, error_type_ text, error_message_ text, sources text[]
) RETURNS TABLE (id bigint, organization_id text, task_id text, is_ended boolean, is_asked boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
    RETURN QUERY
    WITH held AS MATERIALIZED (
        SELECT m.id, m.organization_id, m.task_id
        FROM @schema@.operation_messages(which || '{"states": ["running"]}', -1, NULL) m WHERE m.task_id IS NOT NULL),
    asked AS (
        UPDATE @schema@.task_record r SET
            state = CASE WHEN r.state = ANY (sources) THEN end_state ELSE r.state END,
            error_type = CASE WHEN r.state = ANY (sources) THEN error_type_ ELSE r.error_type END,
            error_message = CASE WHEN r.state = ANY (sources) THEN error_message_ ELSE r.error_message END,
            result = CASE WHEN r.state = ANY (sources) THEN NULL ELSE r.result END,
            finished_at = CASE WHEN r.state = ANY (sources) THEN clock_timestamp() ELSE r.finished_at END,
            abort_requested_at = coalesce(r.abort_requested_at, clock_timestamp()),
            abort_requested_by = CASE WHEN r.abort_requested_at IS NULL THEN by_whom ELSE r.abort_requested_by END
        FROM held h
        WHERE r.organization_id = coalesce(h.organization_id, '') AND r.task_id = h.task_id
          AND r.state = ANY (unfinished)
        RETURNING r.organization_id, r.task_id, r.state = end_state AS is_ended,
            CASE WHEN r.state = end_state AND r.wanted_until > clock_timestamp()
                 THEN pg_notify(@schema@.result_channel(), @schema@.result_key(r.organization_id, r.task_id)) END)
    SELECT h.id, h.organization_id, h.task_id, coalesce(a.is_ended, false), a.task_id IS NOT NULL AND NOT a.is_ended
    FROM held h LEFT JOIN asked a ON a.organization_id = coalesce(h.organization_id, '') AND a.task_id = h.task_id;
END
$$;

-- Records of one task's id, in whichever organization.  (Walks the records: there is no index for it.)
CREATE OR REPLACE FUNCTION @schema@.operation_records(its_id text) RETURNS SETOF @schema@.task_record
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT * FROM @schema@.task_record WHERE task_id = its_id ORDER BY launched_at
$$;

-- How many records an organization has: of tasks, and of groups.
CREATE OR REPLACE FUNCTION @schema@.operation_count_records(its_organization text)
RETURNS TABLE (tasks bigint, groups bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT (SELECT count(*) FROM @schema@.task_record r WHERE r.organization_id = its_organization),
           (SELECT count(*) FROM @schema@.group_record g WHERE g.organization_id = its_organization)
$$;

-- Delete a batch of an organization's records, whoever waits for them is told; returns how many went.  Index: the
-- primary keys.
CREATE OR REPLACE FUNCTION @schema@.operation_forget(its_organization text, up_to integer)
RETURNS TABLE (tasks bigint, groups bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
    WITH gone AS (
        DELETE FROM @schema@.task_record r
        WHERE r.organization_id = its_organization AND r.task_id IN (
            SELECT t.task_id FROM @schema@.task_record t WHERE t.organization_id = its_organization LIMIT up_to)
        RETURNING CASE WHEN r.wanted_until > clock_timestamp() THEN
            pg_notify(@schema@.result_channel(), @schema@.result_key(r.organization_id, r.task_id)) END)
    SELECT count(*) INTO tasks FROM gone;
    WITH gone AS (
        DELETE FROM @schema@.group_record g
        WHERE g.organization_id = its_organization AND g.group_id IN (
            SELECT t.group_id FROM @schema@.group_record t WHERE t.organization_id = its_organization LIMIT up_to)
        RETURNING g.group_id),
    parts AS (
        DELETE FROM @schema@.chord_part p WHERE p.organization_id = its_organization)
    SELECT count(*) INTO groups FROM gone;
    PERFORM @schema@.schedule_forget(its_organization);
    RETURN NEXT;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA @schema@ FROM PUBLIC;
