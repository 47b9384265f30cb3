-- The broker's functions: all that publishers and workers may do.  @schema@ is the library's schema, quoted.
--
-- They run as the owner of the tables, with a search_path that nobody else can put anything into.  Seconds are
-- double precision.
--
-- Where a function forgoes sequential scans, the planner gives those that are left a fantastic cost, and JIT would
-- compile them at each call, for a tenth of a second and longer.

-- The first half of a consumer's advisory lock: a number that is this schema's own within the database.
CREATE OR REPLACE FUNCTION @schema@.lock_class() RETURNS integer
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT '@schema@.consumer'::regclass::oid::integer
$$;

-- The channel on which a consumer is notified.
CREATE OR REPLACE FUNCTION @schema@.channel_of(consumer_id integer) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT 'rhesis_tasks_' || '@schema@.consumer'::regclass::oid || '_' || consumer_id
$$;

-- Notify one of those who wait for a queue, if anybody does.  A waiter that another transaction is notifying at this
-- moment is passed over, so that publishers never wait for each other.  Index: waiter_queue, from the mark on.
CREATE OR REPLACE FUNCTION @schema@.wake(of_queue text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    woken integer;
BEGIN
    DELETE FROM @schema@.waiter w
    WHERE w.ctid = (SELECT x.ctid FROM @schema@.waiter x
                    WHERE x.queue = of_queue
                      AND x.since > (SELECT coalesce(pg_sequence_last_value('@schema@.waiter_mark'::regclass), 0))
                    ORDER BY x.queue, x.since LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING w.consumer INTO woken;
    IF FOUND THEN
        PERFORM pg_notify(@schema@.channel_of(woken), of_queue);
    END IF;
END
$$;

-- Publish a message to the queues that an exchange routes it to; the exchange '' routes to the queue named like the
-- routing key, which is made if there is none.  Returns the number of queues, or NULL if there is no such exchange.
--
-- With a delay in seconds it is not claimed before; it is promoted earlier if it lapses earlier, for a worker to say so.
-- Only then it waits, and what its queue says of how long counts.
-- Both are durations, so that nobody's clock counts but the server's.
-- Index: binding's primary key (all bindings of the exchange for topic and fanout), queue's primary key; waiter_queue,
-- from the mark on.
DROP FUNCTION IF EXISTS @schema@.put(
    @schema@.queue, json, bytea, integer, text, text, text, double precision, double precision, double precision);
CREATE OR REPLACE FUNCTION @schema@.publish(
    to_exchange text, with_key text, its_envelope json, its_body bytea, its_priority integer, its_tenant text,
    its_task_id text, its_task_name text, ttl double precision, delay double precision, lapse double precision
) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    kind    text;
    words   text;
    to_name text;
    names   text[] := ARRAY[with_key];
    target  @schema@.queue;
    expiry  timestamptz;
    eta     timestamptz;
    due     timestamptz;
    routed  integer := 0;
BEGIN
    IF to_exchange <> '' THEN
        SELECT type INTO kind FROM @schema@.exchange WHERE name = to_exchange;
        IF NOT FOUND THEN
            RETURN NULL;
        END IF;
        words := CASE with_key WHEN '' THEN '' ELSE '.' || with_key END;  -- each behind its dot, as in a pattern
        SELECT coalesce(array_agg(DISTINCT b.queue), '{}') INTO names FROM @schema@.binding b
        WHERE b.exchange = to_exchange
          AND CASE kind WHEN 'direct' THEN b.routing_key = with_key WHEN 'topic' THEN words ~ b.pattern ELSE true END;
    END IF;
    IF delay > 0 THEN
        eta := clock_timestamp() + make_interval(secs => delay);
        due := clock_timestamp() + make_interval(secs => greatest(least(delay, lapse), 0));
    END IF;
    FOREACH to_name IN ARRAY names LOOP
        SELECT * INTO target FROM @schema@.queue WHERE name = to_name;
        IF NOT FOUND THEN
            CONTINUE WHEN to_exchange <> '';  -- it was deleted a moment ago
            INSERT INTO @schema@.queue (name) VALUES (to_name) ON CONFLICT DO NOTHING;
            SELECT * INTO STRICT target FROM @schema@.queue WHERE name = to_name;
        END IF;
        expiry := least(clock_timestamp() + make_interval(secs => ttl),
                        coalesce(due, clock_timestamp()) + target.message_ttl);
        IF target.durable THEN
            INSERT INTO @schema@.message
                (queue, priority, tenant, task_id, task_name, expires_at, not_before, due_at, envelope, body)
            VALUES (to_name, its_priority, its_tenant, its_task_id, its_task_name, expiry, eta, due, its_envelope,
                    its_body);
        ELSE
            INSERT INTO @schema@.transient_message
                (queue, priority, tenant, task_id, task_name, expires_at, not_before, due_at, envelope, body)
            VALUES (to_name, its_priority, its_tenant, its_task_id, its_task_name, expiry, eta, due, its_envelope,
                    its_body);
        END IF;
        IF due IS NULL
           AND EXISTS (SELECT FROM @schema@.waiter
                       WHERE queue = to_name
                         AND since > (SELECT coalesce(pg_sequence_last_value('@schema@.waiter_mark'::regclass), 0)))
        THEN
            PERFORM @schema@.wake(to_name);
        END IF;
        routed := routed + 1;
    END LOOP;
    RETURN routed;
END
$$;

-- The same without a delay.
CREATE OR REPLACE FUNCTION @schema@.publish(
    to_exchange text, with_key text, its_envelope json, its_body bytea, its_priority integer DEFAULT 0,
    its_tenant text DEFAULT NULL, its_task_id text DEFAULT NULL, its_task_name text DEFAULT NULL,
    ttl double precision DEFAULT NULL
) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN @schema@.publish(
        to_exchange, with_key, its_envelope, its_body, its_priority, its_tenant, its_task_id, its_task_name, ttl, NULL,
        NULL);
END
$$;

-- --- declaring -----------------------------------------------------------------------------------------------------

-- Make an exchange if there is none of this name; returns it as it is.
CREATE OR REPLACE FUNCTION @schema@.declare_exchange(
    its_name text, its_type text, its_durable boolean, its_auto_delete boolean, its_arguments json DEFAULT '{}'
) RETURNS TABLE (type text, durable boolean, auto_delete boolean, arguments json)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO @schema@.exchange (name, type, durable, auto_delete, arguments)
    SELECT its_name, its_type, its_durable, its_auto_delete, its_arguments
    WHERE NOT EXISTS (SELECT FROM @schema@.exchange e WHERE e.name = its_name)
    ON CONFLICT DO NOTHING;
    RETURN QUERY SELECT e.type, e.durable, e.auto_delete, e.arguments FROM @schema@.exchange e WHERE e.name = its_name;
END
$$;

CREATE OR REPLACE FUNCTION @schema@.exchange_exists(its_name text) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (SELECT FROM @schema@.exchange WHERE name = its_name)
$$;

-- Make a queue if there is none of this name; returns it as it is.
CREATE OR REPLACE FUNCTION @schema@.declare_queue(
    its_name text, its_durable boolean, its_auto_delete boolean, expires_after double precision DEFAULT NULL,
    its_ttl double precision DEFAULT NULL
) RETURNS TABLE (durable boolean, auto_delete boolean, expires double precision, message_ttl double precision)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO @schema@.queue (name, durable, auto_delete, expires, message_ttl)
    SELECT its_name, its_durable, its_auto_delete, make_interval(secs => expires_after), make_interval(secs => its_ttl)
    WHERE NOT EXISTS (SELECT FROM @schema@.queue q WHERE q.name = its_name)
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        UPDATE @schema@.queue q SET used_at = clock_timestamp() WHERE q.name = its_name AND q.expires IS NOT NULL;
    END IF;
    RETURN QUERY
    SELECT q.durable, q.auto_delete, extract(epoch FROM q.expires)::double precision,
           extract(epoch FROM q.message_ttl)::double precision
    FROM @schema@.queue q WHERE q.name = its_name;
END
$$;

CREATE OR REPLACE FUNCTION @schema@.queue_exists(its_name text) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (SELECT FROM @schema@.queue WHERE name = its_name)
$$;

-- How many messages of a queue wait.  Index: message_next and message_suspect.
CREATE OR REPLACE FUNCTION @schema@.queue_size(of_queue text) RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT (SELECT count(*) FROM @schema@.message
            WHERE queue = of_queue AND claim_token IS NULL AND due_at IS NULL AND deliveries < 2)
         + (SELECT count(*) FROM @schema@.message
            WHERE queue = of_queue AND claim_token IS NULL AND due_at IS NULL AND deliveries >= 2)
$$;

-- Let an exchange route to a queue; returns false if one of them is not there.  A topic's pattern is a regular
-- expression for the routing key with a dot before each of its words.
CREATE OR REPLACE FUNCTION @schema@.bind(to_queue text, from_exchange text, with_key text, its_pattern text)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM @schema@.binding
               WHERE exchange = from_exchange AND routing_key = with_key AND queue = to_queue) THEN
        RETURN true;
    END IF;
    PERFORM '' ~ its_pattern;  -- what is no regular expression is an error here, not of whoever publishes
    INSERT INTO @schema@.binding (exchange, routing_key, queue, pattern)
    SELECT e.name, with_key, q.name, its_pattern
    FROM @schema@.exchange e, @schema@.queue q WHERE e.name = from_exchange AND q.name = to_queue
    ON CONFLICT DO NOTHING;
    RETURN FOUND OR EXISTS (SELECT FROM @schema@.binding
                            WHERE exchange = from_exchange AND routing_key = with_key AND queue = to_queue);
END
$$;

CREATE OR REPLACE FUNCTION @schema@.unbind(from_queue text, from_exchange text, with_key text) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    DELETE FROM @schema@.binding WHERE exchange = from_exchange AND routing_key = with_key AND queue = from_queue
$$;

CREATE OR REPLACE FUNCTION @schema@.bindings() RETURNS TABLE (queue text, exchange text, routing_key text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT queue, exchange, routing_key FROM @schema@.binding ORDER BY exchange, routing_key, queue
$$;

-- Delete the messages of a queue that wait or are delayed, not what is claimed and no dead letters; returns how many.
CREATE OR REPLACE FUNCTION @schema@.purge(of_queue text) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH gone AS (
        DELETE FROM @schema@.message
        WHERE queue = of_queue AND claim_token IS NULL
        RETURNING 1)
    SELECT count(*) FROM gone
$$;

-- Delete a queue with its messages and bindings; returns how many messages went, or NULL if it was left alone.
--
-- What is delayed or claimed goes before what waits, so that what is promoted or given back meanwhile goes, too.
-- Index: message_next and message_suspect for what waits; message_due and message_held, of all queues that are as durable
-- as this one: those that go by themselves are not, and of such there is little.
CREATE OR REPLACE FUNCTION @schema@.delete_queue(its_name text, if_unused boolean, if_empty boolean) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off AS $$
DECLARE
    of_table text;
    part     text;
    went     bigint;
    gone     bigint := 0;
BEGIN
    SELECT CASE WHEN durable THEN 'ONLY @schema@.message' ELSE '@schema@.transient_message' END INTO of_table
    FROM @schema@.queue WHERE name = its_name FOR UPDATE;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    IF (if_unused AND EXISTS (SELECT FROM @schema@.subscription WHERE queue = its_name))
       OR (if_empty AND EXISTS (SELECT FROM @schema@.message WHERE queue = its_name)) THEN
        RETURN NULL;
    END IF;
    FOREACH part IN ARRAY ARRAY['due_at IS NOT NULL', 'holder IS NOT NULL',
                                'claim_token IS NULL AND due_at IS NULL AND deliveries >= 2',
                                'claim_token IS NULL AND due_at IS NULL AND deliveries < 2'] LOOP
        EXECUTE format('DELETE FROM %s WHERE queue = $1 AND %s', of_table, part) USING its_name;
        GET DIAGNOSTICS went = ROW_COUNT;
        gone := gone + went;
    END LOOP;
    DELETE FROM @schema@.queue WHERE name = its_name;
    RETURN gone;
END
$$;

CREATE OR REPLACE FUNCTION @schema@.delete_exchange(its_name text, if_unused boolean) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    DELETE FROM @schema@.exchange
    WHERE name = its_name AND NOT (if_unused AND EXISTS (SELECT FROM @schema@.binding WHERE exchange = its_name))
$$;

-- --- consuming -----------------------------------------------------------------------------------------------------

-- Say that a consumer is there, and what it consumes; a consumer that was reaped meanwhile is known again.
-- With hold_lock the session takes its advisory lock, for as long as it lasts; returns whether it has it.
CREATE OR REPLACE FUNCTION @schema@.attach(
    consumer_id integer, its_name text, queues text[], hold_lock boolean, its_grace double precision
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO @schema@.consumer (id, name, grace) VALUES (consumer_id, its_name, its_grace)
    ON CONFLICT (id) DO UPDATE
    SET name = excluded.name, grace = excluded.grace, absent_since = NULL, seen_at = clock_timestamp();
    INSERT INTO @schema@.subscription (queue, consumer) SELECT q, consumer_id FROM unnest(queues) q
    ON CONFLICT DO NOTHING;
    RETURN hold_lock AND pg_try_advisory_lock(@schema@.lock_class(), consumer_id);
END
$$;

CREATE OR REPLACE FUNCTION @schema@.next_consumer() RETURNS integer
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT nextval('@schema@.consumer_id')::integer
$$;

CREATE OR REPLACE FUNCTION @schema@.subscribe(consumer_id integer, to_queue text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO @schema@.subscription (queue, consumer) VALUES (to_queue, consumer_id) ON CONFLICT DO NOTHING;
    UPDATE @schema@.queue SET used_at = clock_timestamp() WHERE name = to_queue AND expires IS NOT NULL;
END
$$;

-- End subscriptions; a queue that is to go with its last consumer goes.  Others who wait are woken, since the
-- notification of a message may have gone to one who leaves.
CREATE OR REPLACE FUNCTION @schema@.unsubscribe(consumer_ids integer[], from_queues text[] DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    left_behind text;
BEGIN
    DELETE FROM @schema@.waiter
    WHERE consumer = ANY (consumer_ids) AND (from_queues IS NULL OR queue = ANY (from_queues));
    FOR left_behind IN
        WITH ended AS (
            DELETE FROM @schema@.subscription
            WHERE consumer = ANY (consumer_ids) AND (from_queues IS NULL OR queue = ANY (from_queues))
            RETURNING queue)
        SELECT DISTINCT queue FROM ended ORDER BY queue
    LOOP
        IF (SELECT auto_delete FROM @schema@.queue WHERE name = left_behind) THEN
            PERFORM @schema@.delete_queue(left_behind, true, false);
        ELSE
            UPDATE @schema@.queue SET used_at = clock_timestamp() WHERE name = left_behind AND expires IS NOT NULL;
        END IF;
        PERFORM @schema@.wake(left_behind);
    END LOOP;
END
$$;

-- A consumer holds something from now on: whoever takes it for dead at this moment waits until we have committed, or
-- we find it gone, and it is there again, to be taken for dead once more.  For claim() alone, as whom it runs.
CREATE OR REPLACE FUNCTION @schema@.hold(consumer_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM FROM @schema@.consumer WHERE id = consumer_id FOR KEY SHARE;
    IF NOT FOUND THEN
        INSERT INTO @schema@.consumer (id) VALUES (consumer_id) ON CONFLICT DO NOTHING;
    END IF;
END
$$;

-- Whether it is a consumer's turn to claim no more, so that it comes to hold nothing and can take a message of a queue that
-- has waited for that in vain for so many seconds.
--
-- It is that of one consumer of the queue after the other, in the order of their numbers, and then of none, so that a
-- single one has its pauses, too.  All agree on it without a word: each asks when it looks.  The first turn lasts five
-- minutes, each later one twice as long, up to an hour, for tasks that take so long.  For claim() alone, as whom it runs.
-- Index: subscription's primary key.
CREATE OR REPLACE FUNCTION @schema@.makes_room(consumer_id integer, of_queue text, in_vain double precision)
RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    turn    integer := 0;
    lasts   double precision := 300;
    is_mine boolean;
BEGIN
    WHILE in_vain >= lasts LOOP
        in_vain := in_vain - lasts;
        lasts := least(2 * lasts, 3600);
        turn := turn + 1;
    END LOOP;
    SELECT bool_or(s.consumer = consumer_id)
           AND count(*) FILTER (WHERE s.consumer < consumer_id) = turn % (count(*) + 1) INTO is_mine
    FROM @schema@.subscription s WHERE s.queue = of_queue;
    RETURN coalesce(is_mine, false);
END
$$;

-- Acknowledge what was done, and claim what waits: one round trip, one commit.
--
-- Each queue of claim_from is walked in the order of delivery, until slots messages are claimed in all; those of
-- take_from are taken for good, at most take_slots.  An acknowledgement whose claim is no longer the message's is
-- returned with the queue NULL: the message was released meanwhile, and is somebody else's.
--
-- What was delivered twice in vain may be what ends workers.  It is claimed by somebody who holds nothing (has_none),
-- and nothing with it, so that nothing else is blamed.  If it has waited for longer than patience in seconds, one of those
-- who consume its queue claims no more until it holds nothing (makes_room).  What was delivered max_deliveries times is
-- claimed to be buried.
--
-- A place (-priority, start, id) for each queue of claim_from and then of take_from says from where to walk it, NULLs
-- from the beginning.  While a long transaction keeps the server from removing what is gone, a walk from the beginning
-- passes all of it.
-- Index: message_next and message_suspect for each queue; the primary key for acknowledgements.  Planned for a table
-- that is sometimes empty and sometimes huge, whatever its statistics say; and once in a session, since planning costs
-- more than the rest: left to itself, PostgreSQL would plan each claim anew, for its numbers of rows.
-- What is locked is found again by where it is: by its id, PostgreSQL would walk all of an index whose table was empty when
-- it was analyzed, for each of them.
CREATE OR REPLACE FUNCTION @schema@.claim(
    consumer_id integer, acked bigint[], tokens bigint[], claim_from text[], slots integer, take_from text[],
    take_slots integer, has_none boolean, max_deliveries integer, patience double precision,
    from_priorities smallint[], from_starts double precision[], from_ids bigint[]
) RETURNS TABLE (
    id bigint, queue text, token bigint, deliveries integer, rank bigint, envelope text, body bytea,
    place_priority smallint, place_start double precision, is_due boolean, last_reason text
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_sort = off SET enable_bitmapscan = off SET enable_hashjoin = off
SET enable_mergejoin = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    from_queue text;
    found_rows integer;
    number     integer;
    claimed    integer := 0;
    is_known   boolean := false;  -- and locked until we have committed
    in_vain    double precision;  -- seconds for which a message has waited in vain for who holds nothing
BEGIN
    IF slots > 0 AND cardinality(acked) > 0 THEN
        -- Before any message of ours, as whoever takes us for dead does: else each could wait for the other.  (Not where
        -- there is none: a look that finds nothing writes nothing.)
        PERFORM FROM @schema@.consumer c WHERE c.id = consumer_id FOR KEY SHARE;
        is_known := FOUND;
    END IF;
    IF cardinality(acked) > 0 THEN
        RETURN QUERY
        WITH gone AS (
            DELETE FROM @schema@.message m WHERE m.id = ANY (acked) AND m.claim_token = ANY (tokens)
            RETURNING m.claim_token)
        SELECT a.id, NULL::text, a.token, (EXISTS (SELECT FROM @schema@.message m WHERE m.id = a.id))::integer, 0::bigint,
               NULL::text, NULL::bytea, NULL::smallint, NULL::double precision, NULL::boolean, NULL::text
        FROM unnest(acked, tokens) a (id, token) WHERE a.token NOT IN (SELECT gone.claim_token FROM gone);
    END IF;
    number := cardinality(claim_from);
    FOREACH from_queue IN ARRAY take_from LOOP
        EXIT WHEN take_slots <= 0;
        number := number + 1;
        RETURN QUERY
        WITH ready AS (
            SELECT m.row_at, m.of_table, row_number() OVER () AS rank
            FROM (SELECT w.ctid AS row_at, w.tableoid AS of_table FROM @schema@.message w
                  WHERE w.queue = from_queue AND w.claim_token IS NULL AND w.due_at IS NULL AND w.deliveries < 2
                    AND (-w.priority, w.start, w.id) >= (coalesce(from_priorities[number], -32767::smallint),
                                                         coalesce(from_starts[number], '-infinity'),
                                                         coalesce(from_ids[number], 0))
                    AND (w.expires_at IS NULL OR w.expires_at > clock_timestamp())
                  ORDER BY -w.priority, w.start, w.id LIMIT take_slots FOR UPDATE SKIP LOCKED) m)
        DELETE FROM @schema@.message m USING ready
        WHERE m.ctid = ready.row_at AND m.tableoid = ready.of_table
        RETURNING m.id, m.queue, NULL::bigint, m.deliveries + 1, ready.rank, m.envelope::text, m.body,
                  -m.priority, m.start, m.not_before <= clock_timestamp(), NULL::text;
        GET DIAGNOSTICS found_rows = ROW_COUNT;
        take_slots := take_slots - found_rows;
        IF take_slots > 0 THEN
            RETURN QUERY
            WITH suspect AS (
                SELECT w.ctid AS row_at, w.tableoid AS of_table FROM @schema@.message w
                WHERE w.queue = from_queue AND w.claim_token IS NULL AND w.due_at IS NULL AND w.deliveries >= 2
                  AND (w.expires_at IS NULL OR w.expires_at > clock_timestamp())
                ORDER BY w.deliveries DESC, -w.priority, w.start, w.id LIMIT take_slots FOR UPDATE SKIP LOCKED)
            DELETE FROM @schema@.message m USING suspect
            WHERE m.ctid = suspect.row_at AND m.tableoid = suspect.of_table
            RETURNING m.id, m.queue, NULL::bigint, m.deliveries + 1, 1000000 + m.id, m.envelope::text, m.body,
                      NULL::smallint, NULL::double precision, m.not_before <= clock_timestamp(), NULL::text;
            GET DIAGNOSTICS found_rows = ROW_COUNT;
            take_slots := take_slots - found_rows;
        END IF;
    END LOOP;
    IF slots <= 0 THEN
        RETURN;
    END IF;
    FOREACH from_queue IN ARRAY claim_from LOOP
        IF NOT EXISTS (SELECT FROM @schema@.message w
                       WHERE w.queue = from_queue AND w.claim_token IS NULL AND w.due_at IS NULL
                         AND w.deliveries >= 2) THEN
            CONTINUE;
        END IF;
        RETURN QUERY
        WITH spent AS (
            SELECT w.ctid AS row_at, w.tableoid AS of_table FROM @schema@.message w
            WHERE w.queue = from_queue AND w.claim_token IS NULL AND w.due_at IS NULL AND w.deliveries >= 2
              AND w.deliveries >= max_deliveries
            ORDER BY w.deliveries DESC, -w.priority, w.start, w.id LIMIT slots FOR UPDATE SKIP LOCKED)
        UPDATE @schema@.message m
        SET claim_token = nextval('@schema@.claim_token'), holder = consumer_id, claimed_at = clock_timestamp(),
            deliveries = m.deliveries + 1
        FROM spent WHERE m.ctid = spent.row_at AND m.tableoid = spent.of_table
        RETURNING m.id, m.queue, m.claim_token, m.deliveries, 0::bigint, m.envelope::text, m.body,
                  NULL::smallint, NULL::double precision, m.not_before <= clock_timestamp(), m.last_reason;
        GET DIAGNOSTICS found_rows = ROW_COUNT;
        IF found_rows > 0 THEN
            PERFORM @schema@.hold(consumer_id) WHERE NOT is_known;
            RETURN;
        END IF;
        IF has_none THEN
            RETURN QUERY
            WITH suspect AS (
                SELECT w.ctid AS row_at, w.tableoid AS of_table FROM @schema@.message w
                WHERE w.queue = from_queue AND w.claim_token IS NULL AND w.due_at IS NULL AND w.deliveries >= 2
                  AND (w.expires_at IS NULL OR w.expires_at > clock_timestamp())
                ORDER BY w.deliveries DESC, -w.priority, w.start, w.id LIMIT 1 FOR UPDATE SKIP LOCKED)
            UPDATE @schema@.message m
            SET claim_token = nextval('@schema@.claim_token'), holder = consumer_id, claimed_at = clock_timestamp(),
                deliveries = m.deliveries + 1
            FROM suspect WHERE m.ctid = suspect.row_at AND m.tableoid = suspect.of_table
            RETURNING m.id, m.queue, m.claim_token, m.deliveries, 0::bigint, m.envelope::text, m.body,
                      NULL::smallint, NULL::double precision, m.not_before <= clock_timestamp(), NULL::text;
            GET DIAGNOSTICS found_rows = ROW_COUNT;
            IF found_rows > 0 THEN
                PERFORM @schema@.hold(consumer_id) WHERE NOT is_known;
                RETURN;
            END IF;
        ELSE
            SELECT extract(epoch FROM clock_timestamp() - w.claimed_at) - patience INTO in_vain
            FROM @schema@.message w
            WHERE w.queue = from_queue AND w.claim_token IS NULL AND w.due_at IS NULL AND w.deliveries >= 2
              AND (w.expires_at IS NULL OR w.expires_at > clock_timestamp())
              AND extract(epoch FROM clock_timestamp() - w.claimed_at) > patience
            ORDER BY w.deliveries DESC, -w.priority, w.start, w.id LIMIT 1;
            IF FOUND AND @schema@.makes_room(consumer_id, from_queue, in_vain) THEN
                -- Of what came in these queues another one is to be notified, now and until we wait anew.
                DELETE FROM @schema@.waiter w
                WHERE w.consumer = consumer_id AND w.queue = ANY (claim_from)
                  AND w.since > coalesce(pg_sequence_last_value('@schema@.waiter_mark'::regclass), 0);
                PERFORM @schema@.wake(q) FROM unnest(claim_from) q;
                RETURN;
            END IF;
        END IF;
    END LOOP;
    number := 0;
    FOREACH from_queue IN ARRAY claim_from LOOP
        EXIT WHEN slots <= 0;
        number := number + 1;
        RETURN QUERY
        WITH ready AS (
            SELECT m.row_at, m.of_table, row_number() OVER () AS rank
            FROM (SELECT w.ctid AS row_at, w.tableoid AS of_table FROM @schema@.message w
                  WHERE w.queue = from_queue AND w.claim_token IS NULL AND w.due_at IS NULL AND w.deliveries < 2
                    AND (-w.priority, w.start, w.id) >= (coalesce(from_priorities[number], -32767::smallint),
                                                         coalesce(from_starts[number], '-infinity'),
                                                         coalesce(from_ids[number], 0))
                    AND (w.expires_at IS NULL OR w.expires_at > clock_timestamp())
                  ORDER BY -w.priority, w.start, w.id LIMIT slots FOR UPDATE SKIP LOCKED) m)
        UPDATE @schema@.message m
        SET claim_token = nextval('@schema@.claim_token'), holder = consumer_id, claimed_at = clock_timestamp(),
            deliveries = m.deliveries + 1
        FROM ready WHERE m.ctid = ready.row_at AND m.tableoid = ready.of_table
        RETURNING m.id, m.queue, m.claim_token, m.deliveries, ready.rank, m.envelope::text, m.body,
                  -m.priority, m.start, m.not_before <= clock_timestamp(), m.last_reason;
        GET DIAGNOSTICS found_rows = ROW_COUNT;
        slots := slots - found_rows;
        claimed := claimed + found_rows;
    END LOOP;
    IF claimed > 0 AND NOT is_known THEN
        PERFORM @schema@.hold(consumer_id);
    END IF;
END
$$;

-- The same for workers of before version 5, which hold something as far as we know.
CREATE OR REPLACE FUNCTION @schema@.claim(
    consumer_id integer, acked bigint[], tokens bigint[], claim_from text[], slots integer, take_from text[],
    take_slots integer
) RETURNS TABLE (id bigint, queue text, token bigint, deliveries integer, rank bigint, envelope text, body bytea)
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT c.id, c.queue, c.token, c.deliveries, c.rank, c.envelope, c.body
    FROM @schema@.claim(consumer_id, acked, tokens, claim_from, slots, take_from, take_slots, false, NULL, 'infinity',
                        '{}', '{}', '{}') c
$$;

-- Acknowledge what was done; returns the claims that were no longer the messages', and whether these are still there.
CREATE OR REPLACE FUNCTION @schema@.ack(acked bigint[], tokens bigint[])
RETURNS TABLE (id bigint, token bigint, is_there boolean)
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
    WITH gone AS (
        DELETE FROM @schema@.message m WHERE m.id = ANY (acked) AND m.claim_token = ANY (tokens)
        RETURNING m.claim_token)
    SELECT a.id, a.token, EXISTS (SELECT FROM @schema@.message m WHERE m.id = a.id)
    FROM unnest(acked, tokens) a (id, token) WHERE a.token NOT IN (SELECT gone.claim_token FROM gone)
$$;

-- Give claimed messages back, to the place they had; uncounted, as if they had not been delivered, or with the reason
-- why the delivery was in vain.  Returns how many.
CREATE OR REPLACE FUNCTION @schema@.release(ids bigint[], tokens bigint[], uncounted boolean, reason text)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    from_queue text;
    released   integer := 0;
BEGIN
    FOR from_queue IN
        UPDATE @schema@.message m
        SET claim_token = NULL, holder = NULL, claimed_at = clock_timestamp(),
            deliveries = m.deliveries - uncounted::integer, last_reason = coalesce(reason, m.last_reason)
        WHERE m.id = ANY (ids) AND m.claim_token = ANY (tokens)
        RETURNING m.queue
    LOOP
        released := released + 1;
        PERFORM @schema@.wake(from_queue);
    END LOOP;
    RETURN released;
END
$$;

-- The same for workers of before version 5.
CREATE OR REPLACE FUNCTION @schema@.release(ids bigint[], tokens bigint[], uncounted boolean) RETURNS integer
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT @schema@.release(ids, tokens, uncounted, NULL)
$$;

-- Give back what a consumer holds: uncounted, as if it had not been delivered, unless there is a reason why the delivery
-- was in vain.  Index: message_held.
DROP FUNCTION IF EXISTS @schema@.release_held(integer[], boolean);
CREATE OR REPLACE FUNCTION @schema@.release_held(consumer_id integer, reason text) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    from_queue text;
    released   integer := 0;
BEGIN
    FOR from_queue IN
        UPDATE @schema@.message m
        SET claim_token = NULL, holder = NULL, claimed_at = clock_timestamp(),
            deliveries = m.deliveries - (reason IS NULL)::integer, last_reason = coalesce(reason, m.last_reason)
        WHERE m.holder = consumer_id
        RETURNING m.queue
    LOOP
        released := released + 1;
        PERFORM @schema@.wake(from_queue);
    END LOOP;
    RETURN released;
END
$$;

-- Give a claimed message up: it becomes a dead letter.  Returns whether it was still claimed so.
CREATE OR REPLACE FUNCTION @schema@.bury(its_id bigint, its_token bigint, its_reason text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    WITH gone AS (DELETE FROM @schema@.message WHERE id = its_id AND claim_token = its_token RETURNING *)
    INSERT INTO @schema@.dead_letter (id, queue, priority, deliveries, reason, published_at, tenant, task_id, task_name,
                                      envelope, body)
    SELECT id, queue, priority, deliveries, its_reason, published_at, tenant, task_id, task_name, envelope, body
    FROM gone;
    RETURN FOUND;
END
$$;

-- The same for workers of before version 5.
CREATE OR REPLACE FUNCTION @schema@.set_aside(its_id bigint, its_token bigint) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT @schema@.bury(its_id, its_token, 'it could not be read')
$$;

-- Give back what a consumer holds under other claims than these, and return those of them that it still holds.
CREATE OR REPLACE FUNCTION @schema@.agree(consumer_id integer, tokens bigint[]) RETURNS SETOF bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    from_queue text;
BEGIN
    FOR from_queue IN
        UPDATE @schema@.message m
        SET claim_token = NULL, holder = NULL, claimed_at = clock_timestamp(), deliveries = m.deliveries - 1
        WHERE m.holder = consumer_id AND m.claim_token <> ALL (tokens)
        RETURNING m.queue
    LOOP
        PERFORM @schema@.wake(from_queue);
    END LOOP;
    RETURN QUERY SELECT m.claim_token FROM @schema@.message m WHERE m.holder = consumer_id;
END
$$;

-- Wait to be notified of messages in these queues, and in no others.  Of what came in those of pass_on the consumer was
-- notified, and cannot take it: another one is.  Index: waiter_of, from the mark on.
CREATE OR REPLACE FUNCTION @schema@.wait_for(consumer_id integer, queues text[], pass_on text[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    mark bigint := coalesce(pg_sequence_last_value('@schema@.waiter_mark'::regclass), 0);
BEGIN
    DELETE FROM @schema@.waiter WHERE consumer = consumer_id AND since > mark AND queue <> ALL (queues);
    INSERT INTO @schema@.waiter (queue, consumer, since)
    SELECT q, consumer_id, greatest((extract(epoch FROM clock_timestamp()) * 1000000)::bigint, mark + 1)
    FROM unnest(queues) q
    WHERE NOT EXISTS (SELECT FROM @schema@.waiter w WHERE w.consumer = consumer_id AND w.since > mark AND w.queue = q);
    PERFORM @schema@.wake(q) FROM unnest(pass_on) q;
END
$$;

-- Keep short what is passed in looking for those who wait, once it has become long.  For tend() alone, as whom it runs.
--
-- The mark follows the one who waits longest.  Who waits for long is called, to look and to wait anew.  Only one whom
-- an open transaction keeps (it has notified it, and is to commit) is left behind.  Nobody is marked off who began to
-- wait a moment ago, and is not seen here before it has committed.
CREATE OR REPLACE FUNCTION @schema@.mark_waiters() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    now_ bigint := (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
    mark bigint := coalesce(pg_sequence_last_value('@schema@.waiter_mark'::regclass), 0);
    low  bigint;
    gone @schema@.waiter;
BEGIN
    IF pg_relation_size('@schema@.waiter'::regclass) < 131072 OR now_ - mark < 10000000 THEN
        RETURN;
    END IF;
    SELECT min(w.since) INTO low
    FROM (SELECT DISTINCT queue FROM @schema@.subscription) s,
         LATERAL (SELECT since FROM @schema@.waiter
                  WHERE queue = s.queue AND since > greatest(mark, now_ - 60000000) ORDER BY queue, since LIMIT 1) w;
    low := least(low, now_ - 5000000) - 1;
    IF low > mark THEN
        PERFORM setval('@schema@.waiter_mark'::regclass, low);
    END IF;
    FOR gone IN
        DELETE FROM @schema@.waiter w
        WHERE w.ctid = ANY (ARRAY(
            SELECT x.ctid FROM @schema@.waiter x
            WHERE x.queue IN (SELECT queue FROM @schema@.subscription)
              AND x.since > mark AND x.since < now_ - 20000000
            FOR UPDATE SKIP LOCKED))
        RETURNING w.*
    LOOP
        PERFORM pg_notify(@schema@.channel_of(gone.consumer), gone.queue);
    END LOOP;
END
$$;

-- A consumer goes: what it held is given back uncounted, since it was not started or was stopped in order.  The oldest of
-- the others is called to tend() at once if it is not older, since now it promotes what is due.
CREATE OR REPLACE FUNCTION @schema@.detach(consumer_id integer) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT FROM @schema@.consumer WHERE id = consumer_id FOR UPDATE;  -- before its messages, as claim() does
    SELECT @schema@.release_held(consumer_id, NULL);
    SELECT @schema@.unsubscribe(ARRAY[consumer_id]);
    DELETE FROM @schema@.consumer WHERE id = consumer_id;
    SELECT pg_notify(@schema@.channel_of(oldest.id), '')
    FROM (SELECT min(c.id) AS id FROM @schema@.consumer c
          WHERE c.seen_at > clock_timestamp() - make_interval(secs => c.grace)) oldest
    WHERE oldest.id > consumer_id
$$;

-- --- upkeep --------------------------------------------------------------------------------------------------------

-- A consumer says that it is there, and looks after the others.  Called by every consumer a few times in a grace
-- period, done by one at a time.
--
-- A consumer is dead when its lock was seen free at each look for the length of its grace period, all of it since
-- this server was started (so that a restart is no death); or when it has said nothing for three of them (and a second),
-- though its session is there: it was suspended.  What it held is released, its subscriptions end.
--
-- With sweeps it also deletes what nobody will want: that passes what was so before, as long as a long transaction keeps
-- the server from removing it.
--
-- Returns whether the caller was known, whether this session holds its lock, in how many seconds to call again, and
-- whether it is the one that promotes what is due: the oldest of those who gave a sign lately.  (They give one twice in a
-- grace period.  If the oldest is late, two promote for a moment, and pass over what the other one has locked.)
DROP FUNCTION IF EXISTS @schema@.tend(integer, double precision);
CREATE OR REPLACE FUNCTION @schema@.tend(consumer_id integer, grace double precision, sweeps boolean DEFAULT true)
RETURNS TABLE (known boolean, locked boolean, again_in double precision, promotes boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
DECLARE
    class   integer := @schema@.lock_class();
    me      @schema@.consumer;
    present integer[];
    gone    @schema@.consumer;
    next_   timestamptz;  -- when the next one who is absent will be dead
    now_    timestamptz := clock_timestamp();
BEGIN
    SELECT * INTO me FROM @schema@.consumer WHERE id = consumer_id;
    known := FOUND AND me.name IS NOT NULL;
    UPDATE @schema@.consumer SET absent_since = NULL, seen_at = now_ WHERE id = consumer_id;
    promotes := NOT EXISTS (SELECT FROM @schema@.consumer c
                            WHERE c.id < consumer_id AND c.seen_at > now_ - make_interval(secs => 0.6 * tend.grace));
    SELECT array_agg(DISTINCT objid::integer), coalesce(bool_or(pid = pg_backend_pid() AND objid::integer = consumer_id), false)
    INTO present, locked
    FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND classid::integer = class AND objsubid = 2
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database());
    present := present || consumer_id;
    again_in := tend.grace / 2;

    IF NOT pg_try_advisory_xact_lock(class, 0) THEN  -- somebody else is at it
        RETURN NEXT;
        RETURN;
    END IF;

    -- Holders that are not in the table, which a crash of the server empties.
    IF NOT EXISTS (SELECT FROM @schema@.holders_known) THEN
        INSERT INTO @schema@.holders_known VALUES (now_);
        INSERT INTO @schema@.consumer (id)
        SELECT DISTINCT m.holder FROM @schema@.message m WHERE m.holder IS NOT NULL
          AND NOT EXISTS (SELECT FROM @schema@.consumer c WHERE c.id = m.holder)
        ON CONFLICT DO NOTHING;
    END IF;

    UPDATE @schema@.consumer c
    SET absent_since = CASE WHEN c.id = ANY (present) THEN NULL ELSE now_ END
    WHERE CASE WHEN c.id = ANY (present) THEN c.absent_since IS NOT NULL
               ELSE c.absent_since IS NULL OR c.absent_since < pg_postmaster_start_time() END;

    FOR gone IN
        DELETE FROM @schema@.consumer c
        WHERE c.id <> consumer_id
          AND (c.absent_since <= now_ - make_interval(secs => coalesce(c.grace, tend.grace))
               OR greatest(c.seen_at, pg_postmaster_start_time())
                  <= now_ - make_interval(secs => greatest(3 * coalesce(c.grace, tend.grace), 1)))
        RETURNING *
    LOOP
        PERFORM @schema@.release_held(gone.id, coalesce('its worker ' || gone.name, 'its worker') || ' was lost');
        PERFORM @schema@.unsubscribe(ARRAY[gone.id]);
    END LOOP;

    PERFORM @schema@.mark_waiters();
    IF sweeps THEN
        -- Not all at once if there are many, or the caller would seem to be dead meanwhile.
        DELETE FROM @schema@.message
        WHERE id = ANY (ARRAY(
            SELECT m.id FROM @schema@.message m WHERE m.expires_at <= now_ AND m.claim_token IS NULL
            ORDER BY m.expires_at LIMIT 5000 FOR UPDATE SKIP LOCKED));
        PERFORM @schema@.delete_queue(q.name, true, false) FROM @schema@.queue q
        WHERE q.expires IS NOT NULL AND greatest(q.used_at, pg_postmaster_start_time()) + q.expires <= now_
          AND NOT EXISTS (SELECT FROM @schema@.subscription s WHERE s.queue = q.name);

        -- Messages whose queue went while they were published.  Walks from queue to queue, not through the messages.
        WITH RECURSIVE used (queue) AS (
            SELECT min(m.queue) FROM @schema@.transient_message m
            WHERE m.claim_token IS NULL AND m.due_at IS NULL AND m.deliveries < 2
            UNION ALL
            SELECT (SELECT min(m.queue) FROM @schema@.transient_message m
                    WHERE m.queue > used.queue AND m.claim_token IS NULL AND m.due_at IS NULL AND m.deliveries < 2)
            FROM used WHERE used.queue IS NOT NULL)
        DELETE FROM @schema@.transient_message
        WHERE claim_token IS NULL AND due_at IS NULL
          AND queue IN (SELECT used.queue FROM used EXCEPT SELECT name FROM @schema@.queue);
    END IF;

    SELECT min(absent_since + make_interval(secs => coalesce(consumer.grace, tend.grace))) INTO next_
    FROM @schema@.consumer;
    IF next_ IS NOT NULL THEN
        again_in := least(again_in, greatest(extract(epoch FROM next_ - now_), 0) + 0.05);
    END IF;
    RETURN NEXT;
END
$$;

-- The same for workers of before version 5, which do not promote by themselves.
CREATE OR REPLACE FUNCTION @schema@.keep(consumer_id integer, grace double precision)
RETURNS TABLE (known boolean, locked boolean, again_in double precision)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    promotes boolean;
BEGIN
    SELECT t.known, t.locked, t.again_in, t.promotes INTO known, locked, again_in, promotes
    FROM @schema@.tend(consumer_id, grace) t;
    IF promotes THEN
        PERFORM @schema@.promote(1000);
    END IF;
    RETURN NEXT;
END
$$;

-- Let messages that are due be claimed, at most so many; whoever waits for them is notified.  Returns in how many seconds
-- to call again: when the next one is due, or a little later if all that are due are locked; NULL if none is delayed.
-- Index: message_due, up to now: that is a variable, since a condition with clock_timestamp(), which may change from row
-- to row, would be asked of all that is delayed.
CREATE OR REPLACE FUNCTION @schema@.promote(most integer) RETURNS double precision
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    locked_pause CONSTANT double precision := 0.05;  -- seconds
    in_queue text;
    promoted bigint;
    locked   boolean := false;  -- something is due, and others have locked all of it
    next_    timestamptz;
    now_     timestamptz := clock_timestamp();
BEGIN
    SELECT min(due_at) INTO next_ FROM @schema@.message WHERE due_at IS NOT NULL;
    IF next_ <= now_ THEN
        FOR in_queue, promoted IN
            WITH due AS (
                SELECT m.ctid AS row_at, m.tableoid AS of_table FROM @schema@.message m
                WHERE m.due_at <= now_
                ORDER BY m.due_at LIMIT most FOR UPDATE SKIP LOCKED),
            moved AS (
                UPDATE @schema@.message m SET due_at = NULL FROM due
                WHERE m.ctid = due.row_at AND m.tableoid = due.of_table RETURNING m.queue)
            SELECT moved.queue, count(*) FROM moved GROUP BY moved.queue
        LOOP
            WHILE promoted > 0
                AND EXISTS (SELECT FROM @schema@.waiter
                            WHERE queue = in_queue
                              AND since > (SELECT coalesce(pg_sequence_last_value('@schema@.waiter_mark'::regclass), 0))) LOOP
                PERFORM @schema@.wake(in_queue);
                promoted := promoted - 1;
            END LOOP;
        END LOOP;
        locked := NOT FOUND;
        SELECT min(due_at) INTO next_ FROM @schema@.message WHERE due_at IS NOT NULL;
    END IF;
    RETURN CASE WHEN next_ IS NOT NULL
                THEN greatest(extract(epoch FROM next_ - clock_timestamp()), CASE WHEN locked THEN locked_pause ELSE 0 END)
           END;
END
$$;

-- Promote the delayed messages of these tasks before they are due, for a worker to do with them what it would do then.
-- Returns how many.  Index: message_task_id and transient_message_task_id.
CREATE OR REPLACE FUNCTION @schema@.hasten(task_ids text[]) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off SET enable_seqscan = off AS $$
DECLARE
    in_queue text;
    hastened integer := 0;
BEGIN
    FOR in_queue IN
        UPDATE @schema@.message m SET due_at = NULL
        WHERE m.task_id = ANY (task_ids) AND m.claim_token IS NULL AND m.due_at IS NOT NULL
        RETURNING m.queue
    LOOP
        hastened := hastened + 1;
        PERFORM @schema@.wake(in_queue);
    END LOOP;
    RETURN hastened;
END
$$;

-- What is in the durable queues, for metrics: cheap where millions wait, so that no number is higher than `most`, and the
-- age of the oldest message is that among the first of each priority, in the order of delivery.  (A tenant's own messages
-- are in the order of their publishing, so that it is the oldest of all, or nearly.)
-- Index: message_next and message_suspect for what waits, message_held for what is claimed, message_due for what is
-- delayed, dead_letter_queue for the dead letters.
CREATE OR REPLACE FUNCTION @schema@.queue_stats(most integer DEFAULT 10000)
RETURNS TABLE (queue text, waiting bigint, delayed bigint, claimed bigint, oldest double precision, dead bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET jit = off SET enable_seqscan = off AS $$
#variable_conflict use_column
BEGIN
    FOR queue IN SELECT q.name FROM @schema@.queue q WHERE q.durable ORDER BY q.name LOOP
        SELECT least(count(*), most) INTO waiting FROM (
            (SELECT FROM ONLY @schema@.message m
             WHERE m.queue = queue_stats.queue AND m.claim_token IS NULL AND m.due_at IS NULL AND m.deliveries < 2
             LIMIT most)
            UNION ALL
            (SELECT FROM ONLY @schema@.message m
             WHERE m.queue = queue_stats.queue AND m.claim_token IS NULL AND m.due_at IS NULL AND m.deliveries >= 2
             LIMIT most)) w;
        SELECT extract(epoch FROM clock_timestamp() - min(w.published_at)) INTO oldest FROM (
            SELECT f.published_at
            FROM generate_series(0, 9) p CROSS JOIN LATERAL (
                SELECT m.published_at FROM ONLY @schema@.message m
                WHERE m.queue = queue_stats.queue AND -m.priority = -p AND m.claim_token IS NULL AND m.due_at IS NULL
                  AND m.deliveries < 2
                ORDER BY m.start, m.id LIMIT most / 10) f
            UNION ALL
            (SELECT m.published_at FROM ONLY @schema@.message m
             WHERE m.queue = queue_stats.queue AND m.claim_token IS NULL AND m.due_at IS NULL AND m.deliveries >= 2
             LIMIT most)) w;
        SELECT count(*) INTO delayed FROM (
            SELECT FROM (SELECT m.queue FROM ONLY @schema@.message m WHERE m.due_at IS NOT NULL LIMIT 10 * most) d
            WHERE d.queue = queue_stats.queue LIMIT most) w;
        SELECT count(*) INTO claimed FROM (
            SELECT FROM ONLY @schema@.message m
            WHERE m.holder IS NOT NULL AND m.queue = queue_stats.queue LIMIT most) w;
        SELECT count(*) INTO dead FROM (
            SELECT FROM @schema@.dead_letter d WHERE d.queue = queue_stats.queue LIMIT most) w;
        RETURN NEXT;
    END LOOP;
END
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA @schema@ FROM PUBLIC;
