"""Which texts to compare: pairs that share enough runs of characters, found without all pairs.

MinHash with banding over prompts and completions: each gets HASHES minima of its hashed runs of
SHINGLE characters; a band is BAND minima, and two texts meet where a whole band is equal. There are
bands of the whole row, of the completion, of the prompt, and of row and completion together, which
tell rows of one template apart. A band that more than CROWD texts share leads to the earliest CROWD
only, so the price of a text is bounded whatever others gave.

`least_edits` then bounds the edits between texts from below by counting letters, all candidates at
once: who is too far apart by that need not be compared. Of the rest `nearest` keeps COMPARED.

Source: Broder, "On the resemblance and containment of documents" (1997); Leskovec et al., Mining
of Massive Datasets, ch. 3. Memory: about two kilobytes a text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SHINGLE, RUN = 3, 8
HASHES = 96
BAND = 4
BANDS, PROMPT_BANDS = 24, 16
"""A pair of similarity 0.6 meets in 24 bands of four with probability 0.96, of 0.7 with 0.999."""
CROWD = 16
COMPARED = 12
BINS = 64
"""Letters are counted modulo BINS."""
CHUNK = 65_536
"""Runs hashed at once: 100 MB."""

Hashes = NDArray[np.uint64]
Minima = NDArray[np.uint32]
Places = NDArray[np.int64]
Counts = NDArray[np.int32]


@dataclass(frozen=True)
class Gaps:
    """(others,) each: fewest edits between two texts, and how long the longer one is."""

    edits: Places
    longer: Places


@dataclass(frozen=True)
class Bounds:
    """What lies between a row and others at least. `inside`: from the shorter completion, of
    `shorter` characters, to a part of the longer."""

    whole: Gaps
    prompt: Gaps
    answer: Gaps
    inside: Places
    shorter: Places


class Candidates:
    """Of (prompt, completion) texts in a fixed order, who should be compared with whom."""

    def __init__(self, texts: Sequence[tuple[str, str]], *, seed: int) -> None:
        prompts, answers = ([text[side] for text in texts] for side in (0, 1))
        self._prompts, self._answers = _letters(prompts), _letters(answers)
        permutations = _permutations(seed)
        self._minima = _minima(prompts, permutations), _minima(answers, permutations)
        shape = (3 * BANDS + PROMPT_BANDS, len(texts))
        self._members = np.zeros(shape, np.int32)
        self._begins = np.zeros(shape, np.int32)
        self._met = np.zeros(shape, np.uint8)
        for band, keys in enumerate(_bands(*self._minima)):
            self._members[band], self._begins[band], self._met[band] = _meetings(keys)

    def before(self, place: int) -> Places:
        """The places, ascending, of earlier texts that share a band with this one."""
        slots = self._begins[:, place, None] + np.arange(CROWD, dtype=np.int32)
        bands, steps = np.nonzero(np.arange(CROWD) < self._met[:, place, None])
        return np.unique(self._members[bands, slots[bands, steps]]).astype(np.int64)

    def least_edits(self, place: int, others: Places) -> Bounds:
        """Between this text and each of the others."""
        asked, said = self._prompts[place], self._answers[place]
        prompts, answers = self._prompts[others], self._answers[others]
        longer = _size(answers) > _size(said)
        return Bounds(
            whole=_gaps(asked + said, prompts + answers),
            prompt=_gaps(asked, prompts),
            answer=_gaps(said, answers),
            inside=np.where(longer, _surplus(said, answers), _surplus(answers, said)),
            shorter=np.minimum(_size(answers), _size(said)),
        )

    def nearest(self, place: int, others: Places) -> Places:
        """Those of `others`, ascending, that share most minima: at most COMPARED."""
        if len(others) <= COMPARED:
            return others
        shared = sum((side[:, others] == side[:, place, None]).sum(axis=0) for side in self._minima)
        return np.sort(others[np.argsort(-shared, kind="stable")[:COMPARED]])


@lru_cache(maxsize=1_024)
def long_runs(text: str) -> Hashes:
    """The distinct runs of RUN characters, as hashes: of a long text few are there by chance."""
    codes = _codes(text.ljust(RUN))
    total = np.zeros(len(codes) - RUN + 1, np.uint64)
    for place in range(RUN):
        total += codes[place : len(total) + place]
        total = _mixed(total)
    return np.unique(total)


def _codes(text: str) -> NDArray[np.uint64]:
    wide = text.ljust(SHINGLE).encode("utf-32-le", "surrogatepass")
    return np.frombuffer(wide, dtype=np.uint32).astype(np.uint64)


def _runs(codes: NDArray[np.uint64]) -> Hashes:
    runs: Hashes = codes[:-2] << np.uint64(42) | codes[1:-1] << np.uint64(21) | codes[2:]
    return runs


def _permutations(seed: int) -> tuple[Hashes, Hashes]:
    random = np.random.Generator(np.random.PCG64(seed))
    odd = random.integers(0, 2**63, size=(HASHES, 1), dtype=np.uint64) * np.uint64(2)
    return odd + np.uint64(1), random.integers(0, 2**63, size=(HASHES, 1), dtype=np.uint64)


def _minima(texts: Sequence[str], permutations: tuple[Hashes, Hashes]) -> Minima:
    """(HASHES, texts): the smallest hash of each text's runs under each permutation."""
    odd, shift = permutations
    found = np.zeros((HASHES, len(texts)), np.uint32)
    place = 0
    for runs, starts in _chunks(texts):
        mixed = runs ^ runs >> np.uint64(31)
        # Multiply-shift (mod 2^64 on purpose); only the high half of a product is well mixed.
        hashed = ((odd * mixed + shift) >> np.uint64(32)).astype(np.uint32)
        found[:, place : place + len(starts)] = np.minimum.reduceat(hashed, starts, axis=1)
        place += len(starts)
    return found


def _chunks(texts: Sequence[str]) -> Iterator[tuple[Hashes, list[int]]]:
    """Runs of consecutive texts, about CHUNK together, and where each text's begin."""
    parts: list[Hashes] = []
    starts: list[int] = []
    total = 0
    for text in texts:
        parts.append(_runs(_codes(text)))
        starts.append(total)
        total += len(parts[-1])
        if total >= CHUNK:
            yield np.concatenate(parts), starts
            parts, starts, total = [], [], 0
    if parts:
        yield np.concatenate(parts), starts


def _bands(prompts: Minima, answers: Minima) -> Iterator[Hashes]:
    """(texts,) one key per band, all bands in turn."""
    whole = np.minimum(prompts, answers)
    half = BAND // 2
    for band in range(BANDS):
        four, two = slice(band * BAND, (band + 1) * BAND), slice(band * half, (band + 1) * half)
        yield _keys(whole[four])
        yield _keys(answers[four])
        yield _keys(np.concatenate([whole[two], answers[two]]))
    for band in range(PROMPT_BANDS):
        yield _keys(prompts[band * BAND : (band + 1) * BAND])


def _keys(minima: Minima) -> Hashes:
    """(texts,) 64 bits of the minima; two keys that agree by chance cost one comparison."""
    total = np.zeros(minima.shape[1], np.uint64)
    for row in minima:
        total = _mixed(total + row)
    return total


def _mixed(numbers: Hashes) -> Hashes:
    spread = numbers * np.uint64(0x9E3779B97F4A7C15)  # mod 2^64 on purpose
    return spread ^ spread >> np.uint64(29)


def _meetings(keys: Hashes) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
    """Places sorted by key; where each place's key begins there; how many stand before it,
    up to CROWD."""
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    new = np.flatnonzero(np.diff(sorted_keys, prepend=sorted_keys[:1] + np.uint64(1)))
    begin = np.repeat(new, np.diff(new, append=len(keys)))
    begins, met = np.zeros(len(keys), np.int32), np.zeros(len(keys), np.uint8)
    begins[order] = begin
    met[order] = np.minimum(np.arange(len(keys)) - begin, CROWD)
    return order.astype(np.int32), begins, met


def _letters(texts: Sequence[str]) -> Counts:
    """(texts, BINS) how often each letter stands in each text."""
    counts = np.zeros((len(texts), BINS), np.int32)
    for place, text in enumerate(texts):
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        counts[place] = np.bincount(codes % BINS, minlength=BINS)
    return counts


def _gaps(one: Counts, others: Counts) -> Gaps:
    return Gaps(
        edits=np.maximum(_surplus(one, others), _surplus(others, one)),
        longer=np.maximum(_size(one), _size(others)),
    )


def _surplus(a: Counts, b: Counts) -> Places:
    """(others,) letters that `a` has more of than `b`."""
    extra: Places = np.maximum(a - b, 0).sum(axis=-1, dtype=np.int64)
    return extra


def _size(counts: Counts) -> Places:
    size: Places = counts.sum(axis=-1, dtype=np.int64)
    return size
