"""Replicas of OpenLoRA and the way to them: a gRPC data plane, and the choice of a replica.

A replica is one engine in one process. Ray starts, restarts and places that process and knows
nothing of tokens; those travel from the replica to its clients over gRPC, so that a client (the
API) need not join a Ray cluster, whose death would block or end it.

    replica's process                                       client's process
    adapters   ledger's adapters -> engine                  routing   which replica (pure)
    backend    engine's deltas -> pieces        session     session   one stream to one replica
    pending    pieces not sent yet           <==========>   fleet     registrations -> sessions
    server     gRPC: session and unary calls   one message  (workers.serving: answers, resumed)
    replica    all that, on a thread             a step

Both sides: `protocol` (bytes and limits), `errors` (designed errors as bytes), `registry` (files by
which they find each other, and the secret they share). Nothing here knows Ray, and the right column
knows no torch either.
"""
