"""The offline verifier: what a proof proves, and nothing else.

Read in this order. `merkle`: is this leaf in that tree, is this tree a prefix of that one. `note`:
who signed this text. `checkpoint`: which tree a log has signed. `tlog_proof`: one entry, one proof,
one checkpoint. `bundle`: a whole lineage in six numbered steps, over `bundle_format` (the bytes),
`lineage` and `manifest` (what the events claim of each other), `l1` (what an EVM chain holds),
`verdict` and `sentences` (what was proven and what is left to trust). `tiles` names a log's files.

No clock, network or logging; I/O in `__main__` alone. Imports: the standard library, PyNaCl,
`ledger.domain`, `ledger.errors`; `l1` needs more and is imported only when a bundle has an L1
section. Everything here returns or raises a `VerificationError`, whatever bytes it is fed.
"""
