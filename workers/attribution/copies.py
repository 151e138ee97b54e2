"""Which rows copy an earlier row of another contributor, exactly or nearly. For the gates.

Pure text and integers (numpy). The question is narrower than that of `dedup.clusters`, and must be
answered for any input in time that grows with the rows: a clustering compares a row with all that
look a little like it, and a template makes all rows look alike. Here each row gets a sketch, the
SKETCH smallest hashes of its runs of SHINGLE characters; a hash belongs to the row that had it
first; and a row is compared, by the rules of `dedup`, with the CANDIDATES rows of
others that own most of its sketch. What is a row's own is owned by it and leads to it, whatever
template surrounds it.

Source: bottom-k sketches, Cohen and Kaplan, "Summarizing data using bottom-k sketches" (2007).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.attribution.dedup import Text, one_voice

SHINGLE = 12
"""Characters. Shorter runs belong to the language, not to a row; of longer ones few survive where
one letter in twenty is changed (of these, half)."""
SKETCH = 64
CANDIDATES = 6
NONE = -1

Hashes = NDArray[np.uint64]


def copies(rows: Sequence[tuple[str, str]], contributors: NDArray[np.int64]) -> NDArray[np.int64]:
    """(rows,) for each (prompt, completion), in order of registration, the row of another
    contributor that it copies, or NONE."""
    texts = [Text.of(prompt, completion) for prompt, completion in rows]
    sketches = [_sketch(text.prompt + text.completion) for text in texts]
    found = np.full(len(rows), NONE, np.int64)
    if not sketches:
        return found
    hashes = np.concatenate(sketches)
    row_of = np.repeat(np.arange(len(rows)), [len(sketch) for sketch in sketches])
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    owner = row_of[first][inverse]
    foreign = contributors[owner] != contributors[row_of]
    edges = np.searchsorted(row_of[foreign], np.arange(len(rows) + 1))
    owners = owner[foreign]
    for row in range(len(rows)):
        for other in _candidates(owners[edges[row] : edges[row + 1]]):
            if one_voice(texts[row], texts[other]):
                found[row] = other
                break
    return found


def _candidates(owners: NDArray[np.int64]) -> list[int]:
    """The rows named most often, at most CANDIDATES; of two named equally often the earlier."""
    found, votes = np.unique(owners, return_counts=True)
    best = np.lexsort((found, -votes))[:CANDIDATES]
    return [int(found[n]) for n in best]


def _sketch(text: str) -> Hashes:
    """The SKETCH smallest hashes of the distinct runs, fewer for a short text."""
    codes = np.frombuffer(text.ljust(SHINGLE).encode("utf-32-le", "surrogatepass"), np.uint32)
    total = np.zeros(len(codes) - SHINGLE + 1, np.uint64)
    for place in range(SHINGLE):
        total += codes[place : len(total) + place]
        total *= np.uint64(0x9E3779B97F4A7C15)  # mod 2^64 on purpose
        total ^= total >> np.uint64(31)
    distinct = np.unique(total)
    return distinct[:SKETCH]
