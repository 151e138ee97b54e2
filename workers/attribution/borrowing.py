"""What each row takes word for word from rows of others that were there before it.

Pure numpy on text. A row's words (case folded) are cut into runs of RUN words; a run belongs to the
row that had it first, by registration. The words of a row that lie in runs of *other contributors*
are borrowed. Phrases that many people use are borrowed too, from whoever was first: it is for
`screening` to say how much of that is too much.

One sort over all runs, so the cost grows with the words and not with pairs of rows. Memory is about
60 bytes a word; beyond MAX_WORDS only the beginning of each row is read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RUN = 6
MAX_WORDS = 16_000_000
"""Words looked at in all: the first MAX_WORDS / rows of each row, where there are more."""
MIN_ROW_WORDS = 64
"""Words of each row that are looked at however many rows there are."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class Borrowed:
    """Per row (rows,): words in all, borrowed words, from how many contributors.

    `pairs` (runs, 2): each borrowed run as (row, row that had it first), ascending by row.
    """

    words: NDArray[np.int64]
    borrowed: NDArray[np.int64]
    lenders: NDArray[np.int64]
    pairs: NDArray[np.int64]

    def sources(self, rows: Sequence[int], limit: int) -> list[int]:
        """Whom these rows borrowed from: at most `limit` rows, those with most runs first."""
        found, counts = np.unique(self._owners(rows), return_counts=True)
        return [int(row) for row in found[np.lexsort((found, -counts))][:limit]]

    def lenders_of(self, rows: Sequence[int], contributors: NDArray[np.int64]) -> int:
        """From how many contributors these rows borrowed together."""
        return len(np.unique(contributors[self._owners(rows)]))

    def _owners(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """The owner of each run that these rows borrowed."""
        first = np.searchsorted(self.pairs[:, 0], rows, side="left")
        last = np.searchsorted(self.pairs[:, 0], rows, side="right")
        parts = [self.pairs[a:b, 1] for a, b in zip(first, last, strict=True)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def borrowed(texts: Sequence[str], contributors: NDArray[np.int64]) -> Borrowed:
    """`texts` (rows,) in order of registration, with the number of each row's contributor."""
    ids, row_of = _words(texts)
    rows = len(texts)
    words = np.bincount(row_of, minlength=rows).astype(np.int64)
    if len(ids) < RUN:
        nothing = np.zeros(rows, np.int64)
        return Borrowed(
            words=words, borrowed=nothing, lenders=nothing, pairs=np.zeros((0, 2), np.int64)
        )
    starts = np.flatnonzero(row_of[: len(ids) - RUN + 1] == row_of[RUN - 1 :])
    _, first, inverse = np.unique(_hashes(ids)[starts], return_index=True, return_inverse=True)
    mine, owner = row_of[starts], row_of[starts[first]][inverse]
    foreign = contributors[mine] != contributors[owner]
    covered = _covered(starts[foreign], len(ids))
    pairs = np.stack([mine[foreign], owner[foreign]], axis=1)
    lending = np.unique(pairs[:, 0] * (contributors.max() + 1) + contributors[pairs[:, 1]])
    return Borrowed(
        words=words,
        borrowed=np.bincount(row_of[covered], minlength=rows).astype(np.int64),
        lenders=np.bincount(lending // (contributors.max() + 1), minlength=rows).astype(np.int64),
        pairs=pairs,
    )


def _words(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """All words as numbers, and the row of each."""
    limit = max(MIN_ROW_WORDS, MAX_WORDS // max(len(texts), 1))
    known: dict[str, int] = {}
    parts, counts = [], []
    for text in texts:
        found = _WORD.findall(text.casefold())[:limit]
        parts.append(np.array([known.setdefault(w, len(known)) for w in found], np.uint32))
        counts.append(len(found))
    ids = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
    return ids.astype(np.uint64), np.repeat(np.arange(len(texts)), counts)


def _hashes(ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(words - RUN + 1,) 64 bits of each run. A collision needs about 2^32 runs by chance."""
    total = np.zeros(len(ids) - RUN + 1, np.uint64)
    for place in range(RUN):
        total += ids[place : len(ids) - RUN + 1 + place]  # mod 2^64 on purpose, here and below
        total *= np.uint64(0x9E3779B97F4A7C15)
        total ^= total >> np.uint64(29)
    return total


def _covered(starts: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    """(size,) whether a word lies in one of the runs that start at `starts`."""
    steps = np.bincount(starts, minlength=size + RUN) - np.bincount(
        starts + RUN, minlength=size + RUN
    )
    return np.cumsum(steps)[:size] > 0
