-- What a role needs to launch tasks and to read their records: no table of the broker, only EXECUTE.

GRANT USAGE ON SCHEMA @schema@ TO @role@;
GRANT SELECT ON @schema@.schema_version TO @role@;
GRANT EXECUTE ON FUNCTION
    @schema@.publish(text, text, json, bytea, integer, text, text, text, double precision),
    @schema@.declare_exchange(text, text, boolean, boolean, json),
    @schema@.exchange_exists(text),
    @schema@.declare_queue(text, boolean, boolean, double precision, double precision),
    @schema@.queue_exists(text),
    @schema@.queue_size(text),
    @schema@.bind(text, text, text, text)
TO @role@;
GRANT SELECT, INSERT, UPDATE, DELETE ON @schema@.task_record, @schema@.group_record TO @role@;
