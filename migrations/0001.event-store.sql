-- The event store: one dense, append-only log.
--
-- stored_events is the table that the `eventsourcing` library expects (the library's own CREATE
-- TABLE is off; a test compares the two), and three columns of ours:
--   recorded_at  microseconds since 1970 UTC, never decreasing along the log
--   leaf_hash    SHA-256(0x00 || u64 leaf index || u64 recorded_at || state): RFC 9162's leaf
--   event_id     the envelope's id; a second row with the same id is a replay and is refused
-- The leaf index is notification_id - 1. Rows are added by append_events and by nothing else.

CREATE TYPE stored_event_uuid AS (
    originator_id uuid,
    originator_version bigint,
    topic text,
    state bytea
);

CREATE TABLE stored_events (
    originator_id uuid NOT NULL,
    originator_version bigint NOT NULL,
    topic text,
    state bytea CHECK (octet_length(state) BETWEEN 1 AND 65519), -- an entry has 65535 bytes at most
    notification_id bigint NOT NULL CHECK (notification_id > 0),
    recorded_at bigint NOT NULL,
    leaf_hash bytea NOT NULL CHECK (octet_length(leaf_hash) = 32),
    event_id uuid,
    PRIMARY KEY (originator_id, originator_version)
) WITH (
    autovacuum_enabled = true,
    autovacuum_vacuum_threshold = 100000000,
    autovacuum_vacuum_scale_factor = 0.5,
    autovacuum_analyze_threshold = 1000,
    autovacuum_analyze_scale_factor = 0.01
);

CREATE UNIQUE INDEX stored_events_notification_id_idx ON stored_events (notification_id ASC);

CREATE UNIQUE INDEX stored_events_event_id_idx ON stored_events (event_id);

CREATE TABLE stored_snapshots (
    originator_id uuid NOT NULL,
    originator_version bigint NOT NULL,
    topic text,
    state bytea,
    PRIMARY KEY (originator_id, originator_version)
);

-- The head: how many entries the log has. Its row lock is held from append_events to commit, so
-- indexes are given in commit order, and an aborted append gives its indexes back.
CREATE TABLE log_head (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    size bigint NOT NULL CHECK (size >= 0),
    recorded_at bigint NOT NULL
) WITH (fillfactor = 10);

INSERT INTO log_head (size, recorded_at) VALUES (0, 0);

-- Append rows, all or none, and return the leaf index of the first. The arrays run in parallel.
CREATE FUNCTION append_events(
    originator_ids uuid[],
    originator_versions bigint[],
    topics text[],
    states bytea[],
    event_ids uuid[],
    clock_us bigint
) RETURNS bigint LANGUAGE plpgsql AS $append$
DECLARE
    first_index bigint;
    at_us bigint;
BEGIN
    UPDATE log_head
        SET size = size + cardinality(states), recorded_at = greatest(recorded_at, clock_us)
        RETURNING size - cardinality(states), recorded_at INTO STRICT first_index, at_us;
    INSERT INTO stored_events (originator_id, originator_version, topic, state,
                               notification_id, recorded_at, leaf_hash, event_id)
        SELECT e.originator_id, e.originator_version, e.topic, e.state,
               first_index + e.position, at_us,
               sha256('\x00'::bytea || int8send(first_index + e.position - 1)
                      || int8send(at_us) || e.state),
               e.event_id
        FROM unnest(originator_ids, originator_versions, topics, states, event_ids)
             WITH ORDINALITY
             AS e (originator_id, originator_version, topic, state, event_id, position);
    PERFORM pg_notify('stored_events', '');
    RETURN first_index;
END
$append$;

-- History is corrected by new events only. Whoever may drop this trigger could also edit the
-- files: it stops mistakes, and the signed checkpoints show the rest.
CREATE FUNCTION refuse_rewriting() RETURNS trigger LANGUAGE plpgsql AS $refuse$
BEGIN
    RAISE EXCEPTION '% on %: the log is append-only, record a correcting event instead',
        TG_OP, TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
END
$refuse$;

CREATE TRIGGER stored_events_append_only
    BEFORE UPDATE OR DELETE OR TRUNCATE ON stored_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewriting();
