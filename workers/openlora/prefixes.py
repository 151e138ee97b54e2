"""Prompts that begin alike are read once: the common beginning's keys and values are copied.

A row that has read nothing yet looks for the longest common beginning with another sequence *of
the same adapter* (keys and values depend on its weights; entries are compared by identity, so that
an adapter that was replaced shares nothing with its successor). Sources are the rows that run, and
spare rows of the pool where the last sequences that ended are kept. When an earlier row is about to
read what this one needs, this one waits for it: a burst of requests with one system prompt reads
that prompt once.

A sequence is kept only when another one has begun like it before, or every request would pay a
copy for nothing. Reuse changes no token. It does change the time to the first one, and who shares
an adapter can measure that: whether somebody sent a prompt that begins like mine is no secret here.
"""

from collections import OrderedDict
from dataclasses import dataclass

from workers.openlora.kv import RowCache
from workers.openlora.rows import Row
from workers.openlora.slots import AdapterEntry

MIN_PREFIX = 16
"""Shorter beginnings are read again: it costs less than to look after them."""
MAX_SEEN = 4096
"""Beginnings that are remembered (as a hash) to know which ones come back."""


@dataclass(kw_only=True, eq=False)
class Kept:
    """What a spare row of the pool holds. `used` is a clock of reuse, not of time."""

    entry: AdapterEntry | None
    tokens: tuple[int, ...]
    used: int

    @property
    def cached(self) -> int:
        return len(self.tokens)


class PrefixReuse:
    """Copies between rows of the key-value pool; `spare` are the rows that no batch uses."""

    def __init__(self, cache: RowCache, spare: range) -> None:
        self._cache = cache
        self._spare = spare
        self._kept: dict[int, Kept] = {}
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._clock = 0
        self.hit_tokens = 0
        self.hits = 0

    def ready(self, rows: list[Row], lo: int) -> int:
        """Rows [lo, result) may read their prompts now; those that could begin with a copy did.

        `rows` are all that run, `lo` the first that still reads. At least one is ready: only what
        an earlier row will read is waited for.
        """
        for at in range(lo, len(rows)):
            if rows[at].cached == 0 and not self._begin(rows, lo, at):
                return at
        return len(rows)

    def _begin(self, rows: list[Row], lo: int, at: int) -> bool:
        """Copy what can be copied into row `at`; False when it is better to wait for more."""
        row = rows[at]
        most = len(row.prefill) - 1  # the last token is always read: its logits are needed
        if most < MIN_PREFIX:
            return True
        source, best, coming = -1, 0, 0
        for other, candidate in enumerate(rows):
            if other == at or candidate.entry is not row.entry:
                continue
            if candidate.prefill[:MIN_PREFIX] != row.prefill[:MIN_PREFIX]:
                continue  # before its whole sequence is put together
            alike = common(candidate.sequence(), row.prefill, most)
            if min(alike, candidate.cached) > best:
                source, best = other, min(alike, candidate.cached)
            if lo <= other < at:
                coming = max(coming, alike)
        for other, kept in self._kept.items():
            if kept.entry is row.entry and (alike := common(kept.tokens, row.prefill, most)) > best:
                source, best = other, alike
        if coming >= best + MIN_PREFIX:
            return False
        if best >= MIN_PREFIX:
            self._copy(source, at, row, best)
        return True

    def _copy(self, source: int, at: int, row: Row, length: int) -> None:
        self._cache.move(source, at, length)
        row.cached = row.reused = length
        self.hits += 1
        self.hit_tokens += length
        if source in self._kept:
            self._kept[source].used = self._tick()

    def keep(self, at: int, row: Row) -> None:
        """The sequence of row `at` has ended: copy it to a spare row if it is worth that."""
        tokens = row.sequence()[: row.cached]
        if not self._spare or len(tokens) <= MIN_PREFIX:
            return
        if not self._comes_back(row.entry, tokens) or (row.entry and row.entry.retired):
            return
        target = self._target(row.entry, tokens)
        if target is not None:
            self._kept.pop(target, None)  # first: a copy that breaks off leaves nothing to reuse
            self._cache.move(at, target, len(tokens))
            self._kept[target] = Kept(entry=row.entry, tokens=tokens, used=self._tick())

    def _target(self, entry: AdapterEntry | None, tokens: tuple[int, ...]) -> int | None:
        """The spare row to overwrite; None when a kept sequence holds all of this one."""
        like = {s: k for s, k in self._kept.items() if k.entry is entry}
        for spare, kept in like.items():
            alike = common(kept.tokens, tokens, len(tokens))
            if alike == len(tokens):
                kept.used = self._tick()
                return None
            if alike == kept.cached:
                return spare  # it goes on where that one ended: a conversation's next turn
        for spare in self._spare:
            if spare not in self._kept:
                return spare
        crowd = len(like) > len(self._spare) // 2  # one adapter does not push out all others
        among = like if crowd else self._kept
        return min(among, key=lambda s: among[s].used)

    def _comes_back(self, entry: AdapterEntry | None, tokens: tuple[int, ...]) -> bool:
        key = hash((id(entry), tokens[:MIN_PREFIX]))  # a collision costs a copy, nothing else
        known = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return known

    def forget(self) -> None:
        """Nothing that is kept may be used any more."""
        self._kept.clear()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def leaders_first(fresh: list[Row]) -> list[Row]:
    """Rows in the same order, but for those that begin as an earlier one does: they come last.

    Rows are read in order, and the first that waits for another holds up those behind it.
    """
    seen: set[tuple[AdapterEntry | None, tuple[int, ...]]] = set()
    leaders: list[Row] = []
    followers: list[Row] = []
    for row in fresh:
        head = (row.entry, row.prefill[:MIN_PREFIX])
        (followers if head in seen and len(row.prefill) > MIN_PREFIX else leaders).append(row)
        seen.add(head)
    return leaders + followers


def common(one: tuple[int, ...], other: tuple[int, ...], most: int) -> int:
    """Length of the common beginning, up to `most`; 0 when it is shorter than MIN_PREFIX."""
    high = min(len(one), len(other), most)
    low = MIN_PREFIX
    if high < low or one[:low] != other[:low]:
        return 0
    while low < high:  # one[:low] == other[:low] always holds
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
