"""The log: from stored entries to signed checkpoints, proofs, files and bundles.

The life of a leaf: `appender` (stored, in groups), `sequencer` (integrated by `tree`, signed by
`signer`, published), then read by `prover`, `serving` and `bundle`. Knows the ports, never an
engine; what a proof means is `ledger.verify`'s to say.
"""
