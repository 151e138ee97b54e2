-- Projections: rows folded from the log, dropped and replayed at will (projections/registry.py; a test
-- compares the tables there with these). Written by the projector alone, in one transaction with its
-- position. Keys sort by byte (COLLATE "C"), as a replay in memory does. Columns named index, child,
-- parent, *_index hold leaf indexes; at, *_at microseconds UTC; *_wei base units.

CREATE SCHEMA projections;

-- events: how many the rows hold. version: FOLDS_VERSION of the program that made them, 0 for none.
CREATE TABLE projections.position (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    events bigint NOT NULL CHECK (events >= 0),
    version bigint NOT NULL
) WITH (fillfactor = 10);

INSERT INTO projections.position (events, version) VALUES (0, 0);

-- What a stored event asked for and the rules do not allow (projections/base.py).
CREATE TABLE projections.anomalies (
    "index" bigint NOT NULL,
    n bigint NOT NULL,
    at bigint NOT NULL,
    type text NOT NULL,
    code text NOT NULL,
    message text NOT NULL,
    PRIMARY KEY ("index", n)
);

-- Wei by owner and bucket. Only the owner `world` may be below zero.
CREATE TABLE projections.balances (
    owner text COLLATE "C" NOT NULL,
    bucket text COLLATE "C" NOT NULL,
    amount_wei numeric(78, 0) NOT NULL,
    PRIMARY KEY (owner, bucket)
) WITH (fillfactor = 50);

-- Every posting, with the balance of its bucket after it.
CREATE TABLE projections.statement_lines (
    owner text COLLATE "C" NOT NULL,
    "index" bigint NOT NULL,
    n bigint NOT NULL,
    at bigint NOT NULL,
    type text NOT NULL,
    bucket text NOT NULL,
    part text NOT NULL,
    amount_wei numeric(78, 0) NOT NULL,
    balance_wei numeric(78, 0) NOT NULL,
    counterparty text,
    inference text,
    adapter text,
    period bigint,
    ppm bigint,
    pool_wei numeric(78, 0),
    tx_hash text,
    PRIMARY KEY (owner, "index", n)
);

CREATE INDEX statement_lines_by_inference ON projections.statement_lines (inference)
    WHERE inference IS NOT NULL;

-- The contributors' part of one inference, between fee and attribution.
CREATE TABLE projections.pools (
    inference text COLLATE "C" NOT NULL,
    amount_wei numeric(78, 0),
    fee_index bigint,
    attribution_index bigint,
    waiting text,
    PRIMARY KEY (inference)
);

-- EVM logs that moved money, each once.
CREATE TABLE projections.chain_events (
    chain_id bigint NOT NULL,
    tx_hash text COLLATE "C" NOT NULL,
    log_index bigint NOT NULL,
    "index" bigint NOT NULL,
    PRIMARY KEY (chain_id, tx_hash, log_index)
);

-- Which actor an EVM address (lower case) is bound to now.
CREATE TABLE projections.addresses (
    address text COLLATE "C" NOT NULL,
    actor text NOT NULL,
    "index" bigint NOT NULL,
    PRIMARY KEY (address)
);

-- The same, by actor.
CREATE TABLE projections.bindings (
    actor text COLLATE "C" NOT NULL,
    address text NOT NULL,
    "index" bigint NOT NULL,
    PRIMARY KEY (actor)
);

-- What an address is owed in all, may claim now, and was paid.
CREATE TABLE projections.payees (
    address text COLLATE "C" NOT NULL,
    owner text COLLATE "C" NOT NULL,
    cumulative_wei numeric(78, 0) NOT NULL,
    available_wei numeric(78, 0) NOT NULL,
    paid_wei numeric(78, 0) NOT NULL,
    PRIMARY KEY (address, owner)
) WITH (fillfactor = 50);

-- Payout periods: cutoff, closed, proposed, activated, superseded or vetoed.
CREATE TABLE projections.periods (
    period bigint NOT NULL,
    status text NOT NULL,
    cutoff_index bigint NOT NULL,
    cutoff_at bigint NOT NULL,
    closed_index bigint,
    log_size bigint,
    root text,
    total_wei numeric(78, 0),
    accounts bigint,
    tree_sha256 text,
    chain_id bigint,
    contract text,
    proposed_tx text,
    activated_tx text,
    vetoed_tx text,
    PRIMARY KEY (period)
);

-- The payout tree of a period: every address with a cumulative amount.
CREATE TABLE projections.payout_lines (
    period bigint NOT NULL,
    address text COLLATE "C" NOT NULL,
    owner text COLLATE "C" NOT NULL,
    amount_wei numeric(78, 0) NOT NULL,
    cumulative_wei numeric(78, 0) NOT NULL,
    PRIMARY KEY (period, address, owner)
);

-- What the chain paid. applied_index is null until an active period covers it.
CREATE TABLE projections.claims (
    address text COLLATE "C" NOT NULL,
    "index" bigint NOT NULL,
    at bigint NOT NULL,
    amount_wei numeric(78, 0) NOT NULL,
    cumulative_wei numeric(78, 0) NOT NULL,
    chain_id bigint NOT NULL,
    contract text NOT NULL,
    tx_hash text NOT NULL,
    block_number bigint NOT NULL,
    applied_index bigint,
    PRIMARY KEY (address, "index")
);

CREATE INDEX claims_waiting ON projections.claims ("index") WHERE applied_index IS NULL;

-- reviewers is a JSON array of actors; rows counts those of approved contributions.
CREATE TABLE projections.datanets (
    datanet text COLLATE "C" NOT NULL,
    owner text NOT NULL,
    name text NOT NULL,
    description text NOT NULL,
    licence text NOT NULL,
    reviewers text NOT NULL,
    status text NOT NULL,
    contributions bigint NOT NULL,
    approved bigint NOT NULL,
    "rows" bigint NOT NULL,
    created_index bigint NOT NULL,
    created_at bigint NOT NULL,
    PRIMARY KEY (datanet)
);

-- recorded, approved, rejected or withdrawn; note is the reviewer's or the reason.
CREATE TABLE projections.contributions (
    contribution text COLLATE "C" NOT NULL,
    datanet text NOT NULL,
    contributor text NOT NULL,
    title text NOT NULL,
    licence text NOT NULL,
    rows_root text NOT NULL,
    rows_count bigint NOT NULL,
    rows_sha256 text NOT NULL,
    status text NOT NULL,
    note text NOT NULL,
    "index" bigint NOT NULL,
    at bigint NOT NULL,
    decided_index bigint,
    decided_by text,
    PRIMARY KEY (contribution)
);

CREATE INDEX contributions_by_rows ON projections.contributions (rows_sha256);

CREATE INDEX contributions_by_datanet ON projections.contributions (datanet, "index");

CREATE INDEX contributions_by_contributor ON projections.contributions (contributor, "index");

-- requested, started, completed, failed or cancelled; config and datanets are JSON.
CREATE TABLE projections.runs (
    run text COLLATE "C" NOT NULL,
    requester text NOT NULL,
    name text NOT NULL,
    base_model text NOT NULL,
    base_id text NOT NULL,
    config text NOT NULL,
    datanets text NOT NULL,
    status text NOT NULL,
    attempt bigint NOT NULL,
    submission_id text,
    requested_index bigint NOT NULL,
    requested_at bigint NOT NULL,
    started_index bigint,
    finished_index bigint,
    finished_at bigint,
    manifest_sha256 text,
    adapter_sha256 text,
    adapter_config_sha256 text,
    index_sha256 text,
    index_root text,
    rows_count bigint,
    contributions_count bigint,
    steps bigint,
    loss text,
    reason text,
    PRIMARY KEY (run)
);

CREATE INDEX runs_by_status ON projections.runs (status, requested_index);

-- published or retired. A model name may be published again; the newest one counts.
CREATE TABLE projections.adapters (
    adapter text COLLATE "C" NOT NULL,
    run text NOT NULL,
    owner text NOT NULL,
    model text NOT NULL,
    adapter_sha256 text NOT NULL,
    base_model text NOT NULL,
    input_wei_per_token numeric(78, 0) NOT NULL,
    output_wei_per_token numeric(78, 0) NOT NULL,
    status text NOT NULL,
    "index" bigint NOT NULL,
    at bigint NOT NULL,
    retired_index bigint,
    reason text,
    PRIMARY KEY (adapter)
);

CREATE INDEX adapters_by_model ON projections.adapters (model, "index");

-- Names and bound addresses.
CREATE TABLE projections.identities (
    actor text COLLATE "C" NOT NULL,
    name text,
    evm_address text,
    "index" bigint NOT NULL,
    at bigint NOT NULL,
    PRIMARY KEY (actor)
);

-- Roles in force.
CREATE TABLE projections.roles (
    member text COLLATE "C" NOT NULL,
    role text COLLATE "C" NOT NULL,
    "index" bigint NOT NULL,
    PRIMARY KEY (member, role)
);

-- A policy is in force from its index until the next one's.
CREATE TABLE projections.fee_policies (
    version bigint NOT NULL,
    protocol_bps bigint NOT NULL,
    owner_bps bigint NOT NULL,
    operator_bps bigint NOT NULL,
    contributors_bps bigint NOT NULL,
    "index" bigint NOT NULL,
    PRIMARY KEY (version)
);

-- The one ledger that this database holds.
CREATE TABLE projections.ledgers (
    log text COLLATE "C" NOT NULL,
    name text NOT NULL,
    opened_by text NOT NULL,
    "index" bigint NOT NULL,
    at bigint NOT NULL,
    PRIMARY KEY (log)
);

-- Answers: commitments, tokens, fee; null indexes are still to come.
CREATE TABLE projections.inferences (
    inference text COLLATE "C" NOT NULL,
    "index" bigint NOT NULL,
    at bigint NOT NULL,
    adapter text NOT NULL,
    consumer text NOT NULL,
    operator text NOT NULL,
    prompt_commitment text NOT NULL,
    output_commitment text NOT NULL,
    transcript_sha256 text NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    max_tokens bigint NOT NULL,
    seed bigint NOT NULL,
    temperature_ppm bigint NOT NULL,
    top_p_ppm bigint NOT NULL,
    finish_reason text NOT NULL,
    fee_wei numeric(78, 0) NOT NULL,
    fee_index bigint,
    attribution_index bigint,
    PRIMARY KEY (inference)
);

CREATE INDEX inferences_by_transcript ON projections.inferences (transcript_sha256);

CREATE INDEX inferences_pending ON projections.inferences ("index")
    WHERE attribution_index IS NULL;

CREATE INDEX inferences_by_adapter ON projections.inferences (adapter, "index");

CREATE INDEX inferences_by_consumer ON projections.inferences (consumer, "index");

-- How an inference was attributed; its shares are in shares.
CREATE TABLE projections.attributions (
    inference text COLLATE "C" NOT NULL,
    "index" bigint NOT NULL,
    at bigint NOT NULL,
    adapter text NOT NULL,
    run text NOT NULL,
    method text NOT NULL,
    index_sha256 text NOT NULL,
    evidence_sha256 text NOT NULL,
    unattributed_ppm bigint NOT NULL,
    attributor text NOT NULL,
    PRIMARY KEY (inference)
);

CREATE INDEX attributions_by_evidence ON projections.attributions (evidence_sha256);

-- Parts per million by contributor.
CREATE TABLE projections.shares (
    inference text COLLATE "C" NOT NULL,
    contributor text COLLATE "C" NOT NULL,
    ppm bigint NOT NULL,
    PRIMARY KEY (inference, contributor)
);

CREATE INDEX shares_by_contributor ON projections.shares (contributor);

-- Counters per adapter; fees that were charged.
CREATE TABLE projections.adapter_usage (
    adapter text COLLATE "C" NOT NULL,
    inferences bigint NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    fees_wei numeric(78, 0) NOT NULL,
    PRIMARY KEY (adapter)
) WITH (fillfactor = 50);

-- Counters per consumer; fees that were charged.
CREATE TABLE projections.consumer_usage (
    consumer text COLLATE "C" NOT NULL,
    inferences bigint NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    fees_wei numeric(78, 0) NOT NULL,
    PRIMARY KEY (consumer)
) WITH (fillfactor = 50);

-- Checkpoints that the chain holds.
CREATE TABLE projections.anchors (
    size bigint NOT NULL,
    root text NOT NULL,
    chain_id bigint NOT NULL,
    contract text NOT NULL,
    tx_hash text NOT NULL,
    block_number bigint NOT NULL,
    block_hash text NOT NULL,
    l1_sha256 text NOT NULL,
    "index" bigint NOT NULL,
    at bigint NOT NULL,
    PRIMARY KEY (size)
);

-- Every event: its type, signer and stream.
CREATE TABLE projections.edges (
    "index" bigint NOT NULL,
    event text NOT NULL,
    type text NOT NULL,
    actor text NOT NULL,
    stream text NOT NULL,
    at bigint NOT NULL,
    PRIMARY KEY ("index")
);

CREATE INDEX edges_by_stream ON projections.edges (stream, "index");

CREATE INDEX edges_by_actor ON projections.edges (actor, "index");

-- child rests on parent, both leaf indexes; field says how.
CREATE TABLE projections.lineage (
    child bigint NOT NULL,
    n bigint NOT NULL,
    parent bigint NOT NULL,
    field text NOT NULL,
    PRIMARY KEY (child, n)
);

CREATE INDEX lineage_by_parent ON projections.lineage (parent);

-- The first event of a thing, by kind and id.
CREATE TABLE projections.things (
    kind text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    "index" bigint NOT NULL,
    PRIMARY KEY (kind, id)
);

-- Approved contributions by datanet: what a run requested now would rest on.
CREATE TABLE projections.inputs (
    datanet text COLLATE "C" NOT NULL,
    contribution text COLLATE "C" NOT NULL,
    "index" bigint NOT NULL,
    PRIMARY KEY (datanet, contribution)
);
