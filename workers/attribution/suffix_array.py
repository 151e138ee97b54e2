"""A suffix array over integer tokens: all suffixes of a text in order, as start positions.

Numpy alone, no files. Prefix doubling (Manber and Myers, "Suffix arrays", 1993): suffixes sorted by
their first h tokens are sorted by 2h when the rank of each is paired with the rank h further on.
Only groups that are still tied are looked at again, and in blocks, so that a round takes little
memory beside the two arrays it works on (Larsson and Sadakane, "Faster suffix sorting", 2007,
whose ranks may be refined in place: a finer rank never contradicts a coarser one).

O(n log n) a round and at most log2(longest repeat) rounds. 5.0 million word tokens take 1.8 s;
libdivsufsort on the same tokens as bytes 1.0 s (docs/DECISIONS.md).
"""

import numpy as np
from numpy.typing import NDArray

MAX_TOKENS = 2**32 - 2
"""Positions and ranks are 32 bits wide."""
BLOCK = 2**19
"""Positions sorted at a time, or one tied group where that is larger."""

Tokens = NDArray[np.uint32]


def suffix_array(tokens: Tokens) -> NDArray[np.uint32]:
    """(n,) start positions of the suffixes of `tokens` (n,), in lexicographic order.

    A suffix that is the beginning of another comes first.
    """
    count = len(tokens)
    assert count <= MAX_TOKENS
    if count == 0:
        return np.zeros(0, np.uint32)
    order = np.argsort(tokens, kind="stable").astype(np.uint32)
    heads = _changes(tokens[order])
    ranks = np.empty(count, np.uint32)
    ranks[order] = _starts_of(heads)
    step = 1
    while not heads.all():
        for places in _blocks(heads):
            _refine(order, ranks, heads, places, step)
        step *= 2
    return order


def _refine(
    order: NDArray[np.uint32],
    ranks: NDArray[np.uint32],
    heads: NDArray[np.bool_],
    places: NDArray[np.int64],
    step: int,
) -> None:
    """Sort whole tied groups, at `places` of `order`, by the rank `step` tokens further on."""
    starts = order[places]
    beyond = starts.astype(np.int64) + step
    key = ranks[starts].astype(np.uint64) << np.uint64(32)
    inside = beyond < len(order)
    key[inside] |= ranks[beyond[inside]].astype(np.uint64) + np.uint64(1)  # 0: the text has ended
    sorting = np.argsort(key)
    order[places] = starts[sorting]
    new = _changes(key[sorting])
    heads[places] = new
    group = np.maximum.accumulate(np.where(new, places, 0))
    ranks[starts[sorting]] = group.astype(np.uint32)


def _blocks(heads: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Places of tied groups (two or more suffixes), whole groups, about BLOCK places at a time."""
    single = heads.copy()
    single[:-1] &= heads[1:]
    tied = np.flatnonzero(~single)
    firsts = np.flatnonzero(heads[tied])
    cuts = np.searchsorted(firsts, np.arange(BLOCK, len(tied), BLOCK))
    edges = np.unique(firsts[cuts[cuts < len(firsts)]])
    return [part for part in np.split(tied, edges) if len(part)]


def _changes(values: NDArray[np.generic]) -> NDArray[np.bool_]:
    """True where a sorted value differs from the one before it."""
    changed = np.empty(len(values), np.bool_)
    changed[0] = True
    np.not_equal(values[1:], values[:-1], out=changed[1:])
    return changed


def _starts_of(heads: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """For each place the place where its group begins."""
    places = np.where(heads, np.arange(len(heads), dtype=np.uint32), np.uint32(0))
    return np.maximum.accumulate(places).astype(np.uint32)
