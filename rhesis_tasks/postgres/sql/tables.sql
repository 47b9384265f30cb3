-- The broker's tables.  Run again safely.  @schema@ is the library's schema, quoted.
--
-- Nobody but the owner reads or writes them: publishers and workers call the functions in functions.sql, which run
-- as the owner.  A login that could read the message table could read every tenant's arguments.

CREATE SEQUENCE IF NOT EXISTS @schema@.message_id;
CREATE SEQUENCE IF NOT EXISTS @schema@.claim_token;
CREATE SEQUENCE IF NOT EXISTS @schema@.consumer_id AS integer CYCLE;

CREATE TABLE IF NOT EXISTS @schema@.exchange (
    name        text PRIMARY KEY CHECK (length(name) BETWEEN 1 AND 255),
    type        text NOT NULL CHECK (type IN ('direct', 'topic', 'fanout')),
    durable     boolean NOT NULL,
    auto_delete boolean NOT NULL,
    arguments   json NOT NULL DEFAULT '{}'
);
INSERT INTO @schema@.exchange (name, type, durable, auto_delete)
VALUES ('amq.direct', 'direct', true, false), ('amq.topic', 'topic', true, false), ('amq.fanout', 'fanout', true, false)
ON CONFLICT DO NOTHING;

CREATE TABLE IF NOT EXISTS @schema@.queue (
    name        text PRIMARY KEY CHECK (length(name) BETWEEN 1 AND 255),
    durable     boolean NOT NULL DEFAULT true,   -- whether its messages survive a crash of the server
    auto_delete boolean NOT NULL DEFAULT false,  -- goes with its last consumer
    expires     interval,                        -- goes when it was unused for so long
    message_ttl interval,                        -- its messages go when they have waited for so long since they were due
    used_at     timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE IF NOT EXISTS @schema@.binding (
    exchange    text NOT NULL REFERENCES @schema@.exchange ON DELETE CASCADE,
    routing_key text NOT NULL,
    queue       text NOT NULL REFERENCES @schema@.queue ON DELETE CASCADE,
    pattern     text NOT NULL,  -- what a topic matches: a regular expression for the routing key's words
    PRIMARY KEY (exchange, routing_key, queue)
);
CREATE INDEX IF NOT EXISTS binding_queue ON @schema@.binding (queue);

-- A message is delayed (due_at is not NULL), waits (claim_token is NULL), or is claimed by the consumer that holds it.
-- Acknowledged, it is gone.
CREATE TABLE IF NOT EXISTS @schema@.message (
    id           bigint PRIMARY KEY DEFAULT nextval('@schema@.message_id'),
    queue        text NOT NULL,
    priority     smallint NOT NULL DEFAULT 0,        -- 0 to 9; higher ones go first
    start        double precision NOT NULL DEFAULT 0,  -- the fair order among equal priorities
    due_at       timestamptz,                        -- while it waits to be promoted: when it is due
    expires_at   timestamptz,
    deliveries   integer NOT NULL DEFAULT 0,
    claim_token  bigint,                             -- fences the claim: who has an older one has lost the message
    holder       integer,                            -- the consumer that claimed it
    claimed_at   timestamptz,                        -- when it was claimed, or given back, last
    published_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    tenant       text,
    task_id      text,
    task_name    text,
    envelope     json NOT NULL,                      -- headers, properties, content type and encoding
    body         bytea NOT NULL
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_analyze_scale_factor = 0.5, autovacuum_vacuum_cost_delay = 0);
-- Since version 5.
ALTER TABLE @schema@.message
    ADD COLUMN IF NOT EXISTS not_before  timestamptz,  -- its ETA, also when it was promoted
    ADD COLUMN IF NOT EXISTS last_reason text;         -- why its last delivery was in vain
-- What a claim walks, in the order of delivery.  What was delivered twice in vain is not there: it is claimed alone.
DROP INDEX IF EXISTS @schema@.message_ready;
CREATE INDEX IF NOT EXISTS message_next ON @schema@.message (queue, (-priority), start, id)
    WHERE claim_token IS NULL AND due_at IS NULL AND deliveries < 2;
CREATE INDEX IF NOT EXISTS message_suspect ON @schema@.message (queue, deliveries DESC, (-priority), start, id)
    WHERE claim_token IS NULL AND due_at IS NULL AND deliveries >= 2;
-- What is promoted next.
CREATE INDEX IF NOT EXISTS message_due ON @schema@.message (due_at) WHERE due_at IS NOT NULL;
-- What a task is cancelled by.
CREATE INDEX IF NOT EXISTS message_task_id ON @schema@.message (task_id) WHERE claim_token IS NULL;
-- What a dead consumer held.
CREATE INDEX IF NOT EXISTS message_held ON @schema@.message (holder) WHERE holder IS NOT NULL;
CREATE INDEX IF NOT EXISTS message_expires_at ON @schema@.message (expires_at) WHERE expires_at IS NOT NULL;

-- Messages in queues that are not durable: events, remote control and its replies.  Not in the write-ahead log, so
-- that they cost no flush; gone after a crash of the server.
CREATE UNLOGGED TABLE IF NOT EXISTS @schema@.transient_message () INHERITS (@schema@.message)
WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
      autovacuum_analyze_scale_factor = 0.5, autovacuum_vacuum_cost_delay = 0);
CREATE UNIQUE INDEX IF NOT EXISTS transient_message_id ON @schema@.transient_message (id);
DROP INDEX IF EXISTS @schema@.transient_message_ready;
CREATE INDEX IF NOT EXISTS transient_message_next ON @schema@.transient_message (queue, (-priority), start, id)
    WHERE claim_token IS NULL AND due_at IS NULL AND deliveries < 2;
CREATE INDEX IF NOT EXISTS transient_message_suspect
    ON @schema@.transient_message (queue, deliveries DESC, (-priority), start, id)
    WHERE claim_token IS NULL AND due_at IS NULL AND deliveries >= 2;
-- What a task is cancelled by, if its queue is not durable; events and the like are no tasks.  Since version 6.
CREATE INDEX IF NOT EXISTS transient_message_task_id ON @schema@.transient_message (task_id)
    WHERE claim_token IS NULL AND task_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS transient_message_due ON @schema@.transient_message (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS transient_message_held ON @schema@.transient_message (holder) WHERE holder IS NOT NULL;
CREATE INDEX IF NOT EXISTS transient_message_expires_at ON @schema@.transient_message (expires_at)
    WHERE expires_at IS NOT NULL;

-- Messages that were given up: those that nobody could read, and those that were delivered too often.  Kept until an
-- operator has looked at them.  Since version 5.
CREATE TABLE IF NOT EXISTS @schema@.dead_letter (
    id           bigint PRIMARY KEY,  -- the message's
    queue        text NOT NULL,
    priority     smallint NOT NULL,
    deliveries   integer NOT NULL,
    reason       text NOT NULL,
    published_at timestamptz NOT NULL,
    died_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    tenant       text,
    task_id      text,
    task_name    text,
    envelope     json NOT NULL,
    body         bytea NOT NULL
);
CREATE INDEX IF NOT EXISTS dead_letter_tenant ON @schema@.dead_letter (tenant, id);
CREATE INDEX IF NOT EXISTS dead_letter_queue ON @schema@.dead_letter (queue);  -- since version 6
WITH gone AS (DELETE FROM @schema@.message WHERE due_at = 'infinity' RETURNING *)
INSERT INTO @schema@.dead_letter (id, queue, priority, deliveries, reason, published_at, tenant, task_id, task_name,
                                  envelope, body)
SELECT id, queue, priority, deliveries, 'it could not be read', published_at, tenant, task_id, task_name, envelope, body
FROM gone;

-- What operators did, and what it came to.  Nobody changes a row.  Since version 5.
CREATE TABLE IF NOT EXISTS @schema@.audit_record (
    id        bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    operation uuid NOT NULL,      -- that of a million messages is done in batches, with a row for each
    action    text NOT NULL,
    operator  text NOT NULL,      -- as they name themselves
    login     text NOT NULL,      -- of the database
    filter    jsonb NOT NULL,
    counts    jsonb NOT NULL,
    at        timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX IF NOT EXISTS audit_record_operation ON @schema@.audit_record (operation, id);

-- Who consumes.  A consumer that is alive holds the advisory lock (lock_class(), id), or clears absent_since; and it
-- gives a sign.  All three tables are unlogged: after a crash of the server every consumer attaches anew.
CREATE UNLOGGED TABLE IF NOT EXISTS @schema@.consumer (
    id           integer PRIMARY KEY,
    name         text,
    grace        double precision,  -- seconds that it may be silent; NULL is what whoever looks allows itself
    attached_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    absent_since timestamptz  -- its lock was seen free at this time, and at each look since
);
ALTER TABLE @schema@.consumer ADD COLUMN IF NOT EXISTS seen_at timestamptz NOT NULL DEFAULT clock_timestamp();
-- Empty after a crash of the server, until somebody has looked for messages whose holders are forgotten.
CREATE UNLOGGED TABLE IF NOT EXISTS @schema@.holders_known (since timestamptz NOT NULL);
CREATE UNLOGGED TABLE IF NOT EXISTS @schema@.subscription (
    queue    text NOT NULL,
    consumer integer NOT NULL,
    PRIMARY KEY (queue, consumer)
);
CREATE INDEX IF NOT EXISTS subscription_consumer ON @schema@.subscription (consumer);
-- Who waits to be notified, since when (microseconds of the epoch).  A publisher takes the row away, and notifies.
--
-- While a long transaction keeps the server from removing what is gone, each publisher would pass all who have waited
-- since it began.  So all begin at the mark, a sequence, since that is changed at once for everybody: who waits since
-- then or before is not looked for, and asks again (see tend()).  Since version 5.
CREATE SEQUENCE IF NOT EXISTS @schema@.waiter_mark;
CREATE UNLOGGED TABLE IF NOT EXISTS @schema@.waiter (
    queue    text NOT NULL,
    consumer integer NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_cost_delay = 0);
ALTER TABLE @schema@.waiter
    DROP CONSTRAINT IF EXISTS waiter_pkey,
    ADD COLUMN IF NOT EXISTS since bigint NOT NULL DEFAULT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
CREATE INDEX IF NOT EXISTS waiter_queue ON @schema@.waiter (queue, since);
DROP INDEX IF EXISTS @schema@.waiter_consumer;
CREATE INDEX IF NOT EXISTS waiter_of ON @schema@.waiter (consumer, since);
