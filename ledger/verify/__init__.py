"""The offline verifier: what a proof proves, and nothing else.

Read in this order: `merkle` (is this leaf in that tree, is this tree a prefix of that one), `note`
(who signed this text), `checkpoint` (which tree a log has signed), `tlog_proof` (one entry, one
proof, one checkpoint), `bundle` (a whole lineage). `tiles` names the files of a log, `l1` checks
what an EVM chain holds, `lineage` what the events of a bundle claim of each other.

No I/O, no clock, no network, no logging. Imports: the standard library, PyNaCl, `ledger.domain`,
`ledger.errors`; `l1` alone needs more and is imported only when asked for. Everything here returns
or raises a `VerificationError`, whatever bytes it is fed.
"""
