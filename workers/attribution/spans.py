"""Verbatim spans of an answer in the training rows: evidence that people can read, never a payout.

Numpy, on an opened `SpanIndex`; no model, no network. A *span* is a run of the answer, from word
to word, that stands character for character in the prompt or the completion of a row, and that no
longer run contains which does so too. Of those, `find_spans` keeps what says something:

- at least MIN_TOKENS words (a punctuation mark counts as one);
- rare words: the bits of its words, log2(words in the rows / occurrences), exceed the bits of one
  place in the rows by MARGIN_BITS, so that words thrown together would match by chance less than
  once in 2^MARGIN_BITS answers;
- not common: in at most COMMON_TEXTS different texts.

Each test, once failed by a span, is failed by every part of it, so nothing that would pass is lost
by looking at maximal spans only, and "none" is exact. Most bits first; at most MAX_SPANS.

Sources: Liu et al., OLMoTrace (arXiv:2504.07096), maximal spans by one suffix array lookup for
each position, ranked by unigram probability; Liu et al., infini-gram (arXiv:2401.17377). Known
weak spot: COMMON_TEXTS near-copies of a text, each a little different, make it common.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from math import log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.attribution.span_index import MILLIBITS, UNKNOWN, Numbers, SpanIndex
from workers.attribution.span_words import is_word, split

VERSION = 1
MIN_TOKENS = 5
MARGIN_BITS = 7
COMMON_TEXTS = 100
MAX_SPANS = 32
MAX_ROWS_LISTED = 10
MAX_ANSWER_PIECES = 16_384
"""Words, marks and spaces of an answer that are looked up; what is beyond has no evidence."""
BASELINE_TOKENS = 16
BASELINE_COMMON = 500
_WIDTH = 4


@dataclass(frozen=True, kw_only=True)
class Span:
    """`start`, `end`: character offsets into the answer; `rows` index rows, earliest first."""

    start: int
    end: int
    millibits: int
    texts: int
    rows: Numbers


@dataclass(frozen=True, kw_only=True)
class _Match:
    """Pieces `first` to `last` (exclusive) of an answer, which stand in a row."""

    first: int
    last: int


def find_spans(index: SpanIndex, answer: str) -> list[Span]:
    """The spans of `answer` that say something, most bits first."""
    query = _Query(index, answer)
    candidates = sorted(
        (-query.millibits(match), match.first, match)
        for match in _maximal(query)
        if query.words(match) >= MIN_TOKENS
    )
    spans: list[Span] = []
    for negative, _, match in candidates:
        if -negative <= _floor(index) or len(spans) == MAX_SPANS:
            break
        texts = query.texts(match)
        if len(texts) <= COMMON_TEXTS:
            spans.append(
                Span(
                    start=query.edges[match.first],
                    end=query.edges[match.last],
                    millibits=-negative,
                    texts=len(texts),
                    rows=index.rows_of(texts),
                )
            )
    return spans


def spans_document(index: SpanIndex, answer: str) -> dict[str, Any]:
    """The `spans` part of an evidence document (docs/FORMATS.md). It holds no row text."""
    spans = find_spans(index, answer)
    return {
        "v": VERSION,
        "min_tokens": MIN_TOKENS,
        "spans": [
            {
                "start": span.start,
                "end": span.end,
                "rows": [_named(index, int(row)) for row in span.rows[:MAX_ROWS_LISTED]],
                "count": len(span.rows),
            }
            for span in spans
        ],
        "none": not spans,
    }


def span_scores(index: SpanIndex, answer: str) -> NDArray[np.int64]:
    """(rows,) how much of the answer each row says verbatim: a baseline that never pays.

    The verbatim method as others describe it, for comparison: each run of up to BASELINE_TOKENS
    words of the answer that stands in the rows is worth the millibits of its last word, split
    evenly (rounded down) over the texts that hold it; runs that stand in more than
    BASELINE_COMMON places are passed over. Rows are in the order in which they were given to
    `build_span_index`.
    """
    query = _Query(index, answer)
    scores = np.zeros(index.rows, np.int64)
    for worth, first, after in _runs(query):
        if after - first <= BASELINE_COMMON:
            texts = index.texts_of(first, after)
            scores[index.holders_of(texts)] += worth // len(texts)
    return scores


class _Query:
    """An answer as tokens of the index, and what its parts are worth."""

    def __init__(self, index: SpanIndex, answer: str) -> None:
        pieces = split(answer)[:MAX_ANSWER_PIECES]
        weights = index.arrays["weights"]
        ids = [index.ids.get(piece, UNKNOWN) for piece in pieces]
        self._index = index
        self._bytes = np.array(ids, ">u4").tobytes()
        self.size = len(pieces)
        self.suffixes = len(index.suffixes)
        self.is_word = [is_word(piece) for piece in pieces]
        self.edges = [0]
        for piece in pieces:
            self.edges.append(self.edges[-1] + len(piece))
        self.weights = [0 if i == UNKNOWN else int(weights[i]) for i in ids]
        self._bits_before = [0, *np.cumsum(self.weights, dtype=np.int64).tolist()]
        self._words_before = [0, *np.cumsum(self.is_word, dtype=np.int64).tolist()]

    def millibits(self, match: _Match) -> int:
        return int(self._bits_before[match.last] - self._bits_before[match.first])

    def words(self, match: _Match) -> int:
        return int(self._words_before[match.last] - self._words_before[match.first])

    def texts(self, match: _Match) -> Numbers:
        """The texts that hold this part of the answer."""
        return self._index.texts_of(*self.places(match, 0, len(self._index.suffixes)))

    def places(self, match: _Match, low: int, high: int) -> tuple[int, int]:
        """Which of the suffixes `low` to `high` begin with this part: first and one past last."""
        wanted = self._bytes[_WIDTH * match.first : _WIDTH * match.last]
        after = (int.from_bytes(wanted, "big") + 1).to_bytes(len(wanted), "big")
        slices = _Slices(self._index, match.last - match.first)
        first = bisect_left(slices, wanted, low, high)
        return first, bisect_left(slices, after, first, high)

    def longest_at(self, first: int) -> int:
        """The end of the longest run of pieces from `first` on that stands in a row."""
        size = min(self.size - first, self._index.longest)
        wanted = self._bytes[_WIDTH * first : _WIDTH * (first + size)]
        slices = _Slices(self._index, size)
        place = bisect_left(slices, wanted)
        near = range(max(place - 1, 0), min(place + 1, len(slices)))
        return first + max((_common(wanted, slices[n]) for n in near), default=0)


class _Slices:
    """The suffixes in order, each cut to `size` tokens, for `bisect`."""

    def __init__(self, index: SpanIndex, size: int) -> None:
        self._suffixes, self._tokens, self._bytes = index.suffixes, index.tokens, _WIDTH * size

    def __len__(self) -> int:
        return len(self._suffixes)

    def __getitem__(self, place: int) -> bytes:
        start = _WIDTH * self._suffixes[place]
        return self._tokens[start : start + self._bytes]


def _maximal(query: _Query) -> Iterator[_Match]:
    """Runs that stand in a row and lie in no longer one that does; starts and ends ascend."""
    reached = 0
    for first in range(query.size):
        if query.is_word[first]:
            last = query.longest_at(first)
            while last > first and not query.is_word[last - 1]:
                last -= 1
            if last > max(reached, first):
                reached = last
                yield _Match(first=first, last=last)


def _runs(query: _Query) -> Iterator[tuple[int, int, int]]:
    """Every run of at most BASELINE_TOKENS words that stands in a row: the millibits of its last
    word, and the suffixes that begin with it."""
    for first in range(query.size):
        if not query.is_word[first]:
            continue
        low, high = 0, query.suffixes
        for last in range(first + 1, query.size + 1):
            run = _Match(first=first, last=last)
            if not query.is_word[last - 1]:
                continue
            low, high = query.places(run, low, high)
            if low == high or query.words(run) > BASELINE_TOKENS:
                break
            yield query.weights[last - 1], low, high


def _common(a: bytes, b: bytes) -> int:
    """How many tokens two slices have in common at their beginning."""
    size = min(len(a), len(b)) // _WIDTH
    if a[: _WIDTH * size] == b[: _WIDTH * size]:
        return size
    differ = np.frombuffer(a, ">u4", size) != np.frombuffer(b, ">u4", size)
    return int(differ.argmax())


def _floor(index: SpanIndex) -> int:
    """Millibits that a span must exceed."""
    return round(MILLIBITS * (log2(max(index.words, 1)) + MARGIN_BITS))


def _named(index: SpanIndex, row: int) -> dict[str, Any]:
    source = index.sources[int(index.arrays["row_sources"][row])]
    return {
        "contribution": source.contribution,
        "row": int(index.arrays["row_positions"][row]),
        "contributor": source.contributor,
        "licence": source.licence,
    }
