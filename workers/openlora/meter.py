"""What the engine did, as counts: cheap enough for every step, and read while it runs.

Histograms have fixed bounds and only ever grow, so that a reader subtracts two snapshots to know
what happened between them (Prometheus does; so does the live page). Counts per adapter are kept for
`MAX_ADAPTERS` of them, the busy ones; the rest share `OTHER`. A ledger of 10,000 adapters must not
make 10,000 time series, nor may they come and go all the time: a minute decides who is busy, and at
most `MAX_SWAPS` change places then. Knows neither Prometheus nor the engine.

Thread-safe: one lock, held for the time of some additions.
"""

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_ADAPTERS = 64
"""Adapters with counts of their own, the base model included."""
MAX_CANDIDATES = 4096
"""Other adapters whose requests of this minute are counted, to find the busy ones."""
MAX_SWAPS = 8
"""Adapters a minute that may take the place of quieter ones."""
MAX_REASONS = 32
PERIOD_S = 60.0
RATE_WINDOW_S = 10
"""Tokens per second are those of so many whole seconds before the present one."""
OTHER = "other"
BASE = "base"
"""How rows and requests of the base model itself are named where adapters are."""

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
FINE_SECONDS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15,
    0.2, 0.3, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip
"""Bounds for what is tens of milliseconds on a CPU and a few on a GPU."""
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Histogram:
    """Counts by upper bound (`value <= bound`), the last for what is above all; and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def snapshot(self) -> dict[str, Any]:
        """JSON-able: `bounds`, `counts` (one more than bounds, not cumulated), `sum`."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum}


@dataclass(slots=True)
class AdapterCounts:
    """Of one adapter, since it has counts of its own. `ttft_s` is the sum over `first_tokens`."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_tokens: int = 0
    ttft_s: float = 0.0
    recent: int = 0
    """Requests of this minute."""

    def add(self, prompt: int, completion: int, ttft_s: float | None) -> None:
        self.requests += 1
        self.recent += 1
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        if ttft_s is not None:
            self.first_tokens += 1
            self.ttft_s += ttft_s

    def snapshot(self) -> dict[str, float]:
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "first_tokens": self.first_tokens,
            "ttft_s": self.ttft_s,
        }


class AdapterTable:
    """Counts by adapter, bounded. What was counted under `OTHER` stays there: no count ever falls
    but that of an adapter that lost its place and begins anew when it comes back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: dict[str, AdapterCounts] = {}
        self._other = AdapterCounts()
        self._candidates: dict[str, int] = {}
        self._period_ends = clock() + PERIOD_S

    def add(self, adapter: str, prompt: int, completion: int, ttft_s: float | None) -> None:
        if self._clock() >= self._period_ends:
            self._turn()
        counts = self._kept.get(adapter)
        if counts is None and len(self._kept) < MAX_ADAPTERS:
            counts = self._kept[adapter] = AdapterCounts()
        if counts is None:
            counts = self._other
            if adapter in self._candidates or len(self._candidates) < MAX_CANDIDATES:
                self._candidates[adapter] = self._candidates.get(adapter, 0) + 1
        counts.add(prompt, completion, ttft_s)

    def snapshot(self) -> dict[str, dict[str, float]]:
        found = {adapter: counts.snapshot() for adapter, counts in self._kept.items()}
        if self._other.requests:
            found[OTHER] = self._other.snapshot()
        return found

    def _turn(self) -> None:
        """A minute is over: candidates that had twice the requests of a kept one replace it."""
        quiet = sorted(self._kept, key=lambda adapter: self._kept[adapter].recent)
        busy = sorted(self._candidates, key=lambda adapter: -self._candidates[adapter])
        for out, into in list(zip(quiet, busy, strict=False))[:MAX_SWAPS]:
            if self._candidates[into] <= 2 * self._kept[out].recent:
                break
            del self._kept[out]
            self._kept[into] = AdapterCounts()
        for counts in self._kept.values():
            counts.recent = 0
        self._candidates.clear()
        self._period_ends = self._clock() + PERIOD_S


@dataclass(kw_only=True)
class _Histograms:
    """By what is measured. Seconds, tokens, rows or adapters, as the name ends."""

    queue_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    ttft_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    inter_token_s: Histogram = field(default_factory=lambda: Histogram(FINE_SECONDS))
    request_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    decode_step_s: Histogram = field(default_factory=lambda: Histogram(FINE_SECONDS))
    prefill_step_s: Histogram = field(default_factory=lambda: Histogram(FINE_SECONDS))
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(COUNTS))
    completion_tokens: Histogram = field(default_factory=lambda: Histogram(COUNTS))
    batch_rows: Histogram = field(default_factory=lambda: Histogram(COUNTS))
    batch_adapters: Histogram = field(default_factory=lambda: Histogram((0, *COUNTS)))


class Meter:
    """The engine calls, anyone reads `snapshot`. `clock` counts seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._histograms = _Histograms()
        self._adapters = AdapterTable(clock)
        self._counts: dict[str, int] = dict.fromkeys(
            ("prefill_steps", "prefill_rows", "prefill_tokens", "decode_steps", "decode_rows",
             "base_rows", "tokens"), 0
        )  # fmt: skip
        self._forms: dict[str, int] = {}
        self._reasons: dict[str, int] = {}
        self._refusals: dict[str, int] = {}
        self._seconds: deque[tuple[int, int]] = deque(maxlen=RATE_WINDOW_S + 1)
        """(second, tokens in it), newest last."""
        self._last = {"rows": 0, "adapters": 0, "base_rows": 0}
        self._began = clock()

    # --- the engine's thread ---

    def prefill(self, *, rows: int, tokens: int, seconds: float) -> None:
        """A forward read `tokens` of the prompts of `rows` rows, padding not counted."""
        with self._lock:
            self._counts["prefill_steps"] += 1
            self._counts["prefill_rows"] += rows
            self._counts["prefill_tokens"] += tokens
            self._histograms.prefill_step_s.observe(seconds)

    def decode(self, adapters: Iterable[str | None], *, form: str, seconds: float) -> None:
        """A forward gave each row a token; `adapters` are the rows' own, None the base model's."""
        named = list(adapters)
        rows, base = len(named), named.count(None)
        distinct = len(set(named)) - (base > 0)
        with self._lock:
            counts = self._counts
            counts["decode_steps"] += 1
            counts["decode_rows"] += rows
            counts["base_rows"] += base
            self._forms[form] = self._forms.get(form, 0) + 1
            self._last = {"rows": rows, "adapters": distinct, "base_rows": base}
            self._histograms.decode_step_s.observe(seconds)
            self._histograms.batch_rows.observe(rows)
            self._histograms.batch_adapters.observe(distinct)

    def tokens(self, now: float, gaps_s: Sequence[float], firsts_s: Sequence[float]) -> None:
        """Tokens came at `now`: next ones, each so long after the one before it in its answer, and
        first ones, each so long after its request was submitted."""
        fresh = len(gaps_s) + len(firsts_s)
        with self._lock:
            self._counts["tokens"] += fresh
            second = int(now)
            if self._seconds and self._seconds[-1][0] == second:
                fresh += self._seconds.pop()[1]
            self._seconds.append((second, fresh))
            for gap_s in gaps_s:
                self._histograms.inter_token_s.observe(gap_s)
            for first_s in firsts_s:
                self._histograms.ttft_s.observe(first_s)

    # --- any thread ---

    def started(self, queue_s: float) -> None:
        """A request was given a row, after so long in the queue."""
        with self._lock:
            self._histograms.queue_s.observe(queue_s)

    def finished(
        self,
        adapter: str | None,
        reason: str,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        ttft_s: float | None,
        total_s: float,
    ) -> None:
        with self._lock:
            _count(self._reasons, reason)
            hist = self._histograms
            hist.request_s.observe(total_s)
            hist.prompt_tokens.observe(prompt_tokens)
            hist.completion_tokens.observe(completion_tokens)
            self._adapters.add(
                BASE if adapter is None else adapter, prompt_tokens, completion_tokens, ttft_s
            )

    def refused(self, why: str) -> None:
        """A request was not accepted; `why` is the error's slug."""
        with self._lock:
            _count(self._refusals, why)

    def snapshot(self) -> dict[str, Any]:
        """JSON-able. Everything but `tokens_per_s` and `last_step` only grows."""
        with self._lock:
            return {
                **self._counts,
                "tokens_per_s": self._rate(),
                "uptime_s": self._clock() - self._began,
                "last_step": dict(self._last),
                "forms": dict(self._forms),
                "finished": dict(self._reasons),
                "refused": dict(self._refusals),
                "histograms": {
                    name: histogram.snapshot() for name, histogram in vars(self._histograms).items()
                },
                "adapters": self._adapters.snapshot(),
            }

    def _rate(self) -> float:
        """Tokens per second over RATE_WINDOW_S whole seconds, or since the start where less."""
        now = int(self._clock())
        seen = sum(n for second, n in self._seconds if now - RATE_WINDOW_S <= second < now)
        return seen / max(1, min(RATE_WINDOW_S, now - int(self._began)))


def _count(counts: dict[str, int], name: str) -> None:
    """Names come from our own code, and are few; a bound all the same."""
    if name not in counts and len(counts) >= MAX_REASONS:
        name = OTHER
    counts[name] = counts.get(name, 0) + 1
