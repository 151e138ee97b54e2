"""Near-duplicate clusters over the text of rows: whoever registered a text first speaks for it.

Pure text and integers (numpy); no model, no files. Text is normalised (NFKC, case folded, letters
and digits only), cut into overlapping runs of SHINGLE characters, and two rows are the same voice
when the Jaccard similarity of their sets reaches a threshold, over the whole row and over the
completion alone (rows of one form, "view the documentation of X", say different things). MinHash
with banding finds the candidates without comparing all pairs; each candidate is then compared
exactly, so a hash collision never merges two rows.

Rows join, in order of registration, the earliest *representative* that is similar enough;
otherwise they represent themselves. Similarity is always to the representative itself, so a
chain of small changes cannot tie unrelated rows together.

Source: Broder, "On the resemblance and containment of documents" (1997); Leskovec et al., Mining
of Massive Datasets, ch. 3. Known weak spots: a paraphrase is another text; rows cut from one
template that differ in a word or two of a long text look like copies.
"""

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ledger.errors import InvalidEvent

SHINGLE = 3
"""Characters a shingle. Three: at 5 % changed characters Jaccard is still about 0.75."""
BANDS, BAND_ROWS = 32, 4
"""MinHash bands: a pair of similarity 0.6 is found with probability 0.99, of 0.7 with 0.9999."""
THRESHOLD_PPM = 650_000
"""Jaccard similarity of whole rows, in millionths, from which they are one voice."""
COMPLETION_THRESHOLD_PPM = 450_000
"""The same for completions alone: lower, as one changed letter weighs more in a short text."""
MAX_CHARS = 20_000
"""Normalised characters read of one row; more would let one row set the price of the pass."""

Hashes = NDArray[np.uint64]


def normalise(text: str) -> str:
    """NFKC, case folded, every run of other characters than letters and digits one space."""
    folded = unicodedata.normalize("NFKC", text[: 4 * MAX_CHARS]).casefold()
    words = "".join(c if c.isalnum() else " " for c in folded).split()
    return " ".join(words)[:MAX_CHARS]


def clusters(
    rows: Sequence[tuple[str, str]],
    registered: Sequence[int],
    *,
    seed: int,
    threshold_ppm: int = THRESHOLD_PPM,
) -> list[int]:
    """For each (prompt, completion) the index of its representative: the earliest, or itself.

    `registered[i]` orders the rows in time (ties: lower index first). The answer depends on
    texts, order and seed alone. Raises InvalidEvent on unequal lengths or a threshold outside
    1..1,000,000.
    """
    if len(rows) != len(registered):
        raise InvalidEvent(f"{len(rows)} rows but {len(registered)} registration indexes")
    if not 1 <= threshold_ppm <= 1_000_000:
        raise InvalidEvent(f"threshold is {threshold_ppm} ppm; expected 1 to 1,000,000")
    permutations = _permutations(seed)
    representative = list(range(len(rows)))
    exact: dict[bytes, int] = {}
    sets: dict[int, tuple[Hashes, Hashes]] = {}
    buckets: dict[bytes, list[int]] = defaultdict(list)
    rank = {row: place for place, row in enumerate(_by_time(registered))}

    for row in _by_time(registered):
        prompt, completion = (normalise(part) for part in rows[row])
        digest = hashlib.sha256(f"{prompt}\n{completion}".encode()).digest()
        if digest in exact:
            representative[row] = exact[digest]
            continue
        whole, tail = _shingles(f"{prompt} {completion}"), _shingles(completion)
        keys = _band_keys(whole, permutations)
        found = {other for key in keys for other in buckets.get(key, ())}
        for other in sorted(found, key=rank.__getitem__):
            if _similar(whole, sets[other][0], threshold_ppm) and _similar(
                tail, sets[other][1], COMPLETION_THRESHOLD_PPM
            ):
                representative[row] = exact[digest] = other
                break
        else:
            exact[digest] = row
            sets[row] = (whole, tail)
            for key in keys:
                buckets[key].append(row)
    return representative


def jaccard_ppm(a: str, b: str) -> int:
    """Similarity of two texts as the clusters see it, in millionths, rounded down."""
    x, y = _shingles(normalise(a)), _shingles(normalise(b))
    both = len(np.intersect1d(x, y, assume_unique=True))
    return both * 1_000_000 // (len(x) + len(y) - both)


def _by_time(registered: Sequence[int]) -> list[int]:
    return sorted(range(len(registered)), key=lambda i: (registered[i], i))


def _similar(a: Hashes, b: Hashes, threshold_ppm: int) -> bool:
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both * 1_000_000 >= threshold_ppm * (len(a) + len(b) - both)


def _shingles(text: str) -> Hashes:
    """The distinct SHINGLE-character runs as integers: three code points, 21 bits each, exactly."""
    codes = np.frombuffer(text.ljust(SHINGLE).encode("utf-32-le"), dtype=np.uint32)
    wide = codes.astype(np.uint64)
    packed = wide[:-2] << np.uint64(42) | wide[1:-1] << np.uint64(21) | wide[2:]
    return np.unique(packed)


def _permutations(seed: int) -> tuple[Hashes, Hashes]:
    random = np.random.Generator(np.random.PCG64(seed))
    shape = (BANDS * BAND_ROWS, 1)
    odd = random.integers(0, 2**63, size=shape, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return odd, random.integers(0, 2**63, size=shape, dtype=np.uint64)


def _band_keys(shingles: Hashes, permutations: tuple[Hashes, Hashes]) -> list[bytes]:
    """One key per band: its number and BAND_ROWS minima of hashed shingles."""
    mixed = shingles ^ shingles >> np.uint64(31)
    odd, shift = permutations
    # Multiply-shift (mod 2^64 on purpose); only the high half of a product is well mixed.
    hashed = (odd * mixed[None, :] + shift) >> np.uint64(32)
    minima = hashed.min(axis=1).reshape(BANDS, BAND_ROWS)
    return [band.to_bytes(1, "big") + minima[band].tobytes() for band in range(BANDS)]
