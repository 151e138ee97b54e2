-- append_events says when it recorded the events, and can be told at which size of the log.
--
-- The writer decides what may happen next on what it knows of the log. With expected_size it stores
-- only if the log has still that size: nothing was appended meanwhile by anyone else. Else nothing
-- happens and both results are null; the writer catches up and decides again.

DROP FUNCTION append_events(uuid[], bigint[], text[], bytea[], uuid[], bigint);

-- Append rows, all or none; the leaf index of the first, and their time. The arrays run in parallel.
CREATE FUNCTION append_events(
    originator_ids uuid[],
    originator_versions bigint[],
    topics text[],
    states bytea[],
    event_ids uuid[],
    clock_us bigint,
    expected_size bigint,
    OUT first_index bigint,
    OUT at_us bigint
) LANGUAGE plpgsql AS $append$
BEGIN
    -- The row lock is held until the commit. Who waits for it compares with what the other left.
    UPDATE log_head
        SET size = size + cardinality(states), recorded_at = greatest(recorded_at, clock_us)
        WHERE expected_size IS NULL OR size = expected_size
        RETURNING size - cardinality(states), recorded_at INTO first_index, at_us;
    IF NOT FOUND THEN
        IF NOT EXISTS (SELECT FROM log_head) THEN
            RAISE EXCEPTION 'log_head has lost its row: restore the database from a backup';
        END IF;
        RETURN;
    END IF;
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
END
$append$;
