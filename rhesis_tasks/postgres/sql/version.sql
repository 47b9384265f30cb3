-- The schema and its version.  A newer version than this one is left alone.

-- Rather fail than make everybody wait behind us for somebody who holds a table.
SET LOCAL lock_timeout = '5s';

-- Also IF NOT EXISTS asks for the right to create a schema, which the owner of one that is there need not have.
DO $$ BEGIN
    IF to_regnamespace('@schema@') IS NULL THEN
        CREATE SCHEMA IF NOT EXISTS @schema@;
    END IF;
END $$;

CREATE TABLE IF NOT EXISTS @schema@.schema_version (
    version     integer NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);

DO $$ BEGIN
    IF (SELECT max(version) > @version@ FROM @schema@.schema_version) THEN
        RAISE EXCEPTION 'the tables in schema % are of a newer version than @version@: upgrade rhesis-tasks', '@schema@'
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    INSERT INTO @schema@.schema_version (version)
    SELECT @version@ WHERE NOT EXISTS (SELECT FROM @schema@.schema_version WHERE version = @version@);
END $$;
