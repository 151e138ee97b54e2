"""The rows of a run as tokens, packed: what an index walks over several times.

A list of Python integers takes ten times the memory of the numbers; 100,000 rows of some fifty
tokens are 20 MB here. Batches hold rows of like length, so that little is padded, and depend on
the lengths alone: a build that goes on after a crash meets the same batches, hence the same bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.training.data import IGNORED, Example, encode_row


class Examples:
    """Read-only sequence of `Example`, made anew at each look."""

    def __init__(self, examples: Iterable[Example]) -> None:
        ids: list[NDArray[np.uint32]] = []
        heads: list[int] = []
        for example in examples:
            ids.append(np.array(example.input_ids, dtype=np.uint32))
            heads.append(sum(label == IGNORED for label in example.labels))
        self.lengths = np.array([len(part) for part in ids], dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        self._ids = np.concatenate(ids) if ids else np.zeros(0, dtype=np.uint32)
        self._heads = heads

    def __len__(self) -> int:
        return len(self._heads)

    def __getitem__(self, row: int) -> Example:
        end = int(self._ends[row])
        ids = self._ids[end - int(self.lengths[row]) : end].tolist()
        head = self._heads[row]
        return Example(
            row_id=str(row), input_ids=ids, labels=[IGNORED] * head + [int(i) for i in ids[head:]]
        )

    def answer_tokens(self, row: int) -> list[int]:
        """The labelled tokens of a row, its end token too."""
        end, length = int(self._ends[row]), int(self.lengths[row])
        tokens: list[int] = self._ids[end - length + self._heads[row] : end].tolist()
        return tokens

    def batches(self, chosen: Sequence[int], size: int) -> list[list[int]]:
        """`chosen` rows in batches of at most `size`, shortest first."""
        order = sorted(chosen, key=lambda row: (self.lengths[row], row))
        return [order[start : start + size] for start in range(0, len(order), size)]


def encode_all(
    tokenizer: Any, rows: Iterable[tuple[str, str, str]], *, max_len: int
) -> Iterator[Example]:
    """Rows (id, prompt, completion) as the trainer encodes them."""
    for row_id, prompt, completion in rows:
        yield encode_row(tokenizer, prompt, completion, max_len=max_len, row_id=row_id)
