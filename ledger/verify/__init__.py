"""The offline verifier: what a proof proves, and nothing else.

Read in this order. `merkle`: is this leaf in that tree, is this tree a prefix of that one. `note`:
who signed this text. `checkpoint`: which tree a log has signed. `tlog_proof`: one entry, one proof,
one checkpoint. `policy`: whose witnesses are enough. `bundle`: a whole lineage in numbered steps,
over `bundle_format` and `fields` (the bytes), `lineage` and `manifest` (what the events claim of
each other), `l1` (what an EVM chain holds), `disclosure` (rows that were shown), `payouts` (lines
of payout trees) and `statement` (what they add up from). `verdict`, `sentences`, `sentences_v2` and
`subjects` say what was proven and what is left to trust. `tiles` names a log's files. `receipt`:
what a log promised; `evidence`: that a log broke its word, to be shown to others. `packet`, over
`packet_format`: one row's influence on one answer.

No clock, network or logging; I/O in `__main__` alone. Imports: the standard library, PyNaCl,
`ledger.domain`, `ledger.errors`; `l1` and `payouts` need more and import it only when a bundle has
an L1 section or payout lines. Everything here returns or raises a `VerificationError`, whatever
bytes it is fed.
"""
