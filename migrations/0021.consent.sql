-- Policies of datanets, holds, what is withheld while they last, appeals of merged rows
-- (projections/consent.py, projections/holds.py). Raised with FOLDS_VERSION 2: the projector replays.

-- The newest datanet.policy_set; without a row the defaults of ledger/domain/datanets.py hold.
CREATE TABLE projections.datanet_policies (
    datanet text COLLATE "C" NOT NULL,
    max_rows_per_contribution bigint NOT NULL,
    max_contributions_per_day bigint NOT NULL,
    max_rows_per_day bigint NOT NULL,
    on_withdrawal text NOT NULL,
    "index" bigint NOT NULL,
    at bigint NOT NULL,
    PRIMARY KEY (datanet)
);

-- The newest hold of a contribution. held_at is the signer's time, which the 30 days count from.
CREATE TABLE projections.holds (
    contribution text COLLATE "C" NOT NULL,
    datanet text NOT NULL,
    contributor text NOT NULL,
    active boolean NOT NULL,
    reason text NOT NULL,
    note text NOT NULL,
    evidence_sha256 text,
    held_by text NOT NULL,
    held_index bigint NOT NULL,
    held_at bigint NOT NULL,
    released_by text,
    released_index bigint,
    release_note text,
    PRIMARY KEY (contribution)
);

CREATE INDEX holds_by_evidence ON projections.holds (evidence_sha256)
    WHERE evidence_sha256 IS NOT NULL;

-- Holds in force: datanets is a JSON object of datanet and number.
CREATE TABLE projections.held_in (
    contributor text COLLATE "C" NOT NULL,
    datanets text NOT NULL,
    PRIMARY KEY (contributor)
);

-- Of the bucket `withheld`: which run's adapters earned it.
CREATE TABLE projections.withheld (
    contributor text COLLATE "C" NOT NULL,
    run text COLLATE "C" NOT NULL,
    amount_wei numeric(78, 0) NOT NULL,
    PRIMARY KEY (contributor, run)
);

-- Rows whose merge with another was appealed: open, split or upheld.
CREATE TABLE projections.appeals (
    contribution text COLLATE "C" NOT NULL,
    "row" bigint NOT NULL,
    datanet text NOT NULL,
    status text NOT NULL,
    reason text NOT NULL,
    note text NOT NULL,
    appealed_index bigint NOT NULL,
    appealed_at bigint NOT NULL,
    decided_index bigint,
    decided_by text,
    PRIMARY KEY (contribution, "row")
);

-- From a withdrawn contribution to the adapters that used it.
CREATE INDEX contributions_withdrawn ON projections.contributions (datanet)
    WHERE status = 'withdrawn';

CREATE INDEX runs_by_request ON projections.runs (requested_index);

CREATE INDEX adapters_by_run ON projections.adapters (run);

-- What one contributor gave a datanet of late, for its daily limits.
CREATE INDEX contributions_of_late ON projections.contributions (datanet, contributor, at);
