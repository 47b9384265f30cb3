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
    message_ttl interval,                        -- its messages go when they have waited for so long
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

-- A message is waiting (claim_token is NULL), or claimed by the consumer that holds it.  Acknowledged, it is gone.
CREATE TABLE IF NOT EXISTS @schema@.message (
    id           bigint PRIMARY KEY DEFAULT nextval('@schema@.message_id'),
    queue        text NOT NULL,
    priority     smallint NOT NULL DEFAULT 0,        -- 0 to 9; higher ones go first
    start        double precision NOT NULL DEFAULT 0,  -- the fair order among equal priorities
    due_at       timestamptz,                        -- not to be claimed before; 'infinity': set aside
    expires_at   timestamptz,
    deliveries   integer NOT NULL DEFAULT 0,
    claim_token  bigint,                             -- fences the claim: who has an older one has lost the message
    holder       integer,                            -- the consumer that claimed it
    claimed_at   timestamptz,
    published_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    tenant       text,
    task_id      text,
    task_name    text,
    envelope     json NOT NULL,                      -- headers, properties, content type and encoding
    body         bytea NOT NULL
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_analyze_scale_factor = 0.5, autovacuum_vacuum_cost_delay = 0);
-- What a claim walks, in the order of delivery.
CREATE INDEX IF NOT EXISTS message_ready ON @schema@.message (queue, priority DESC, start, id)
    WHERE claim_token IS NULL AND due_at IS NULL;
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
CREATE INDEX IF NOT EXISTS transient_message_ready ON @schema@.transient_message (queue, priority DESC, start, id)
    WHERE claim_token IS NULL AND due_at IS NULL;
CREATE INDEX IF NOT EXISTS transient_message_held ON @schema@.transient_message (holder) WHERE holder IS NOT NULL;
CREATE INDEX IF NOT EXISTS transient_message_expires_at ON @schema@.transient_message (expires_at)
    WHERE expires_at IS NOT NULL;

-- Who consumes.  A consumer that is alive holds the advisory lock (lock_class(), id), or clears absent_since.
-- All three tables are unlogged: after a crash of the server every consumer attaches anew.
CREATE UNLOGGED TABLE IF NOT EXISTS @schema@.consumer (
    id           integer PRIMARY KEY,
    name         text,
    grace        double precision,  -- seconds that it may be silent; NULL is what whoever looks allows itself
    attached_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    absent_since timestamptz  -- its lock was seen free at this time, and at each look since
);
CREATE UNLOGGED TABLE IF NOT EXISTS @schema@.subscription (
    queue    text NOT NULL,
    consumer integer NOT NULL,
    PRIMARY KEY (queue, consumer)
);
CREATE INDEX IF NOT EXISTS subscription_consumer ON @schema@.subscription (consumer);
-- Who waits to be notified.  A publisher takes the row away, and notifies.
CREATE UNLOGGED TABLE IF NOT EXISTS @schema@.waiter (
    queue    text NOT NULL,
    consumer integer NOT NULL,
    PRIMARY KEY (queue, consumer)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX IF NOT EXISTS waiter_consumer ON @schema@.waiter (consumer);
