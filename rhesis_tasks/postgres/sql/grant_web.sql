-- What a role needs to launch tasks and to read their records: no table of the broker, only EXECUTE.

GRANT USAGE ON SCHEMA @schema@ TO @role@;
GRANT SELECT ON @schema@.schema_version TO @role@;
GRANT EXECUTE ON FUNCTION
    @schema@.publish(text, text, json, bytea, integer, text, text, text, double precision),
    @schema@.publish(
        text, text, json, bytea, integer, text, text, text, double precision, double precision, double precision),
    @schema@.declare_exchange(text, text, boolean, boolean, json),
    @schema@.exchange_exists(text),
    @schema@.declare_queue(text, boolean, boolean, double precision, double precision),
    @schema@.queue_exists(text),
    @schema@.queue_size(text),
    @schema@.bind(text, text, text, text),
    @schema@.result_channel(),
    @schema@.result_key(text, text),
    @schema@.record_launch(text, text, text, text, text, text, text, timestamptz, text[], boolean),
    @schema@.record_discard(text, text, text[]),
    @schema@.record_state(
        text, text, text, text, text, text, integer, text, text, text, text, bytea, bytea, bytea, bytea, text, text,
        text, text, bigint, bigint, text, boolean, boolean, text[]),
    @schema@.record_wanted(text, text, double precision),
    @schema@.record_of(text, text),
    @schema@.records_of(
        text, text[], text, text, timestamptz, timestamptz, timestamptz, text, integer),
    @schema@.record_forget(text, text),
    @schema@.record_abort(text, text, text, text[]),
    @schema@.record_cancel(text, text, text, text, bytea, text, text, text[]),
    @schema@.group_save(text, text, bytea),
    @schema@.group_of(text, text),
    @schema@.group_forget(text, text),
    @schema@.chord_size(text, text, integer, integer),
    @schema@.chord_part_ended(text, text, text, integer, text, bytea),
    @schema@.chord_complete(text, text)
TO @role@;
GRANT SELECT, INSERT, UPDATE, DELETE ON @schema@.task_record, @schema@.group_record TO @role@;
