"""The way of one answer, behind the OpenAI-compatible routes.

    bodies     what may be asked, and what is refused rather than ignored
    answer     one answer under way: what it was asked, what it said, what it costs
    asking     the model's terms, the prompt's tokens, the money held, the intent on disk
    flow       the pieces as they come from the engine, and whether anybody still listens
    wire       the bytes that OpenAI clients read
    delivery   whole answers and streams: piece, journal, client, in this order
    recording  `inference.recorded` with its fee, or `inference.interrupted`, in the ledger
    journal    what was promised and delivered, on this disk, until the ledger has it
    settling   answers of processes that died, and those that the ledger could not take at once
    repeats    the same request again: the recorded answer, not a second one

An answer's id is made when its request is accepted. It is the id of the event that records it, and
goes out as `X-Receipt-Id` before any of the answer does; from then on exactly one event of that id
comes into the ledger, whatever crashes.
"""
