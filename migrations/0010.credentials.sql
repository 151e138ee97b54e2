-- API credentials. A token is shown once; only its SHA-256 is kept. Not events: credentials are secrets.
CREATE TABLE credentials (
    token_sha256 bytea PRIMARY KEY,
    actor        text   NOT NULL,
    label        text   NOT NULL,
    created_at   bigint NOT NULL,
    revoked_at   bigint
);
CREATE INDEX credentials_actor ON credentials (actor);

-- Nonces of login requests, so that none is used twice while it is still fresh.
CREATE TABLE login_nonces (
    nonce   bytea PRIMARY KEY,
    used_at bigint NOT NULL
);

-- Who uploaded a blob. Who may read it follows from the events that name it (ledger/api/routes/blobs.py).
CREATE TABLE blob_uploads (
    sha256     text   NOT NULL,
    actor      text   NOT NULL,
    size_bytes bigint NOT NULL,
    created_at bigint NOT NULL,
    PRIMARY KEY (sha256, actor)
);
