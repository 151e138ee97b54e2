-- The published log: Merkle tiles and signed checkpoints.
-- depends: 0001.event-store
--
-- A tile (level, n) holds 1 to 256 hashes of 32 bytes, back to back; it grows to the right and
-- is never rewritten (the store checks that on each publish, in the publishing transaction).

CREATE TABLE log_tiles (
    level integer NOT NULL CHECK (level BETWEEN 0 AND 63),
    n bigint NOT NULL CHECK (n >= 0),
    hashes bytea NOT NULL
        CHECK (octet_length(hashes) BETWEEN 32 AND 8192 AND octet_length(hashes) % 32 = 0),
    PRIMARY KEY (level, n)
);

CREATE TABLE log_checkpoints (
    size bigint PRIMARY KEY CHECK (size >= 0),
    root bytea NOT NULL CHECK (octet_length(root) = 32),
    note bytea NOT NULL,
    signed_at bigint NOT NULL
);

-- A note may gain signatures; what was signed, size and root, stays.
CREATE FUNCTION refuse_checkpoint_change() RETURNS trigger LANGUAGE plpgsql AS $refuse$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.size = OLD.size AND NEW.root = OLD.root THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION '% on %: a signed checkpoint is never withdrawn', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END
$refuse$;

CREATE TRIGGER log_checkpoints_signed
    BEFORE UPDATE OR DELETE ON log_checkpoints
    FOR EACH ROW EXECUTE FUNCTION refuse_checkpoint_change();
