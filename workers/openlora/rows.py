"""The running batch: which request sits in which row, and how rows move together.

Batch rows are kept contiguous: rows [0, decoding) have their whole prompt in the cache, rows
[decoding, len) are still reading it. So every forward works on a slice of the key-value pool and
of the working set, and nothing is gathered per token. A row that ends is replaced by the last one
of its part. Belongs to the engine's step; not thread-safe.
"""

from dataclasses import dataclass, field

from ledger.errors import LedgerError
from workers.openlora.adapter import AdapterWeights
from workers.openlora.forms import LoraForm
from workers.openlora.kv import RowCache
from workers.openlora.requests import GenerationRequest
from workers.openlora.slots import AdapterEntry
from workers.openlora.text import TextStream


@dataclass(kw_only=True, eq=False)
class Row:
    """A request on its way, waiting or running. `cached` counts its positions in the pool."""

    request: GenerationRequest
    entry: AdapterEntry | None
    stream: TextStream | None
    seed: int
    limit: int
    submitted: float
    deadline: float
    prefill: tuple[int, ...]
    """What is read before the first new token: the prompt, and what was answered elsewhere."""
    output: list[int]
    cost: float = 1.0
    """Tokens it is expected to take, by which its payer's turn is counted."""
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    pinned: bool = False
    cached: int = 0
    reused: int = 0
    """Positions that were copied from another sequence and not computed."""
    weights: AdapterWeights | None = None
    """Its adapter in a slot, from its turn on until its row is filled."""
    failure: LedgerError | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def payer(self) -> str:
        return self.request.payer

    @property
    def turn_key(self) -> AdapterEntry | None:
        return self.entry

    def sequence(self) -> tuple[int, ...]:
        """All tokens so far; the first `cached` of them have keys and values."""
        return self.prefill + tuple(self.output[len(self.request.resume_ids) :])

    @property
    def prefill_left(self) -> int:
        return len(self.prefill) - self.cached


@dataclass(kw_only=True)
class Rows:
    """Rows [0, decoding) make tokens, rows [decoding, len) read their prompts."""

    cache: RowCache
    working: LoraForm
    all: list[Row] = field(default_factory=list)
    decoding: int = 0

    def __len__(self) -> int:
        return len(self.all)

    def add(self, row: Row) -> None:
        """Give the request the next free row, with its adapter."""
        self.working.fill(len(self.all), row.entry, row.weights)
        row.weights = None
        self.all.append(row)

    def clear(self) -> list[Row]:
        gone, self.all, self.decoding = self.all, [], 0
        return gone

    def promote(self, at: int) -> None:
        """A row whose prompt is read joins the decoding part."""
        first = self.decoding
        if at != first:
            one, other = self.all[at], self.all[first]
            self.working.swap(at, first)  # first: it may need memory, and then nothing has changed
            self.cache.swap(at, first, max(one.cached, other.cached))
            self.all[at], self.all[first] = other, one
        self.decoding += 1

    def end(self, at: int) -> Row:
        """Free row `at`: the last decoding row takes its place, the last of all that one's."""
        row = self.all[at]
        if at < self.decoding:
            self.decoding -= 1
            self._move(self.decoding, at)
            at = self.decoding
        self._move(len(self.all) - 1, at)
        self.all.pop()
        return row

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self.all[target] = self.all[source]
            self.cache.move(source, target, self.all[source].cached)
            self.working.move(source, target)
