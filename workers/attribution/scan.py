"""Integer dot products of every row with some answers: the scan that a query is made of. Exact.

One int8 matrix product with 32-bit sums. torch's (oneDNN's) runs at the speed of memory where the
CPU multiplies bytes in one step (AVX-512 VNNI, AVX-VNNI, Arm's dot product). An auditor must get
the same integers on any machine, so it is used only where it has just been seen to be exact on the
largest entries there are: some CPUs' byte products saturate at 16 bits. Elsewhere float32 does it,
exactly too, ten times slower.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from workers.attribution.sketch import LIMIT, MAX_DIM

SCAN_ROWS = 131_072
"""Rows of one product: bounds what it allocates beside its result."""
WHOLE_WIDTH = 64
"""The byte product is used for multiples of this: with one entry a row, torch 2.13's returns
memory that it never wrote. Indexes of few rows have other widths, and cost nothing either way."""
EXACT_WIDTH = 1_024
"""Entries that float32 sums exactly: every partial sum is an integer below 2^24."""
assert EXACT_WIDTH * LIMIT * LIMIT < 2**24
assert MAX_DIM * LIMIT * LIMIT < 2**31


def dots(vectors: NDArray[np.int8], queries: NDArray[np.int8]) -> NDArray[np.int64]:
    """`vectors` (rows, dim) times `queries` (count, dim): (count, rows)."""
    whole = vectors.shape[1] % WHOLE_WIDTH == 0 and whole_product_is_exact()
    product = _whole_product if whole else float_product
    out = np.empty((len(queries), len(vectors)), dtype=np.int64)
    for start in range(0, len(vectors), SCAN_ROWS):
        part = vectors[start : start + SCAN_ROWS]
        found = product(part, queries)
        if whole and not _spot_check(part, queries, found):
            found = float_product(part, queries)
        out[:, start : start + SCAN_ROWS] = found
    return out


def _spot_check(vectors: NDArray[np.int8], queries: NDArray[np.int8], found: NDArray[Any]) -> bool:
    """First, middle and last row once more, by numpy: money rests on a kernel that may have bugs
    for shapes and strides that nobody tried."""
    rows = [0, len(vectors) // 2, len(vectors) - 1]
    again = queries.astype(np.int64) @ vectors[rows].T.astype(np.int64)
    return bool((found[:, rows] == again).all())


@lru_cache(maxsize=1)
def whole_product_is_exact() -> bool:
    """Tried on this machine with the largest entries, in both signs, and with random ones."""
    random = np.random.Generator(np.random.PCG64(0))
    ends = random.choice(np.array([-LIMIT, LIMIT], dtype=np.int8), (33, EXACT_WIDTH))
    any_ = random.integers(-LIMIT, LIMIT + 1, (33, EXACT_WIDTH), dtype=np.int8)
    full = np.full((2, EXACT_WIDTH), LIMIT, dtype=np.int8)
    rows = np.concatenate([ends, any_, full, -full])
    expected = rows.astype(np.int64) @ rows.T.astype(np.int64)
    try:
        return all(
            bool((_whole_product(rows, rows[:count]) == expected[:count]).all())
            for count in (1, 2, len(rows))
        )
    except (RuntimeError, AttributeError):  # this build of torch has none for the CPU
        return False


def _whole_product(vectors: NDArray[np.int8], queries: NDArray[np.int8]) -> NDArray[np.int32]:
    # Copied: an array of one row may claim a row stride of 0 (`vector[None]`), and oneDNN believes
    # it.
    asked = np.empty(queries.shape, dtype=np.int8)
    asked[:] = queries
    rows = vectors if len(vectors) > 1 else np.concatenate([vectors, vectors])
    found: NDArray[np.int32] = torch._int_mm(
        torch.from_numpy(asked), torch.from_numpy(rows).T
    ).numpy()[:, : len(vectors)]
    return found


def float_product(vectors: NDArray[np.int8], queries: NDArray[np.int8]) -> NDArray[np.int64]:
    """The same through float32, in pieces that it sums exactly."""
    total = np.zeros((len(queries), len(vectors)), dtype=np.int64)
    for left in range(0, vectors.shape[1], EXACT_WIDTH):
        columns = slice(left, left + EXACT_WIDTH)
        rows = vectors[:, columns].astype(np.float32)
        total += (queries[:, columns].astype(np.float32) @ rows.T).astype(np.int64)
    return total
