"""One look a second at the serving engines, for everybody who wants to know: Prometheus' scrapes
read the last look and wait for nothing, viewers of the live page share one message.

A look that takes longer than `STATS_TIMEOUT_S`, or fails, leaves what was known before, and says of
every replica that it does not answer. Nothing here can fail a request.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from ledger.api.serving_totals import Stats, Totals
from ledger.errors import Backpressure, LedgerError
from ledger.ports import ServingEngine

log = structlog.get_logger(__name__)

PERIOD_S = 1.0
STATS_TIMEOUT_S = 3.0
"""Above what a router gives its replicas: one that hangs must not hide the others."""
FORGET_S = 600.0
"""A replica that was not heard of for so long is no longer shown."""
HISTORY = 181
"""Looks that are kept: three minutes."""
RECENT_S = 10.0
MAX_REPLICAS = 64
MAX_VIEWERS = 100
HEARTBEAT_S = 15.0
MAX_STREAM_S = 3_600.0
"""Then a viewer's browser connects again: no connection is for ever."""
NAMES_A_LOOK = 8
MAX_NAMES = 10_000
NO_ADAPTERS = frozenset({"base", "other"})
"""What the meter names so is no adapter's id: the base model, and the adapters that it lumps."""


@dataclass(kw_only=True)
class Replica:
    """One engine process as it was seen last. `stats` is its own last word."""

    name: str
    state: str
    stats: Stats
    heard_at: float
    tokens_per_s: float = 0.0

    @property
    def up(self) -> bool:
        return self.state != "down"


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was known at one moment. `at` is monotonic, `totals` those up to then; `ttft_s` is the
    95th percentile of the first tokens of the last RECENT_S, None without any."""

    at: float
    totals: Totals
    rows: int
    waiting: int
    tokens_per_s: float
    ttft_s: float | None


@dataclass(kw_only=True)
class ServingWatch:
    """`engine()` is the port or None; `name_of` tells the model name of an adapter's id."""

    engine: Callable[[], ServingEngine | None]
    name_of: Callable[[str], str | None]
    message: Callable[["ServingWatch"], bytes]
    """What viewers get after each look."""
    clock: Callable[[], float] = time.monotonic
    replicas: dict[str, Replica] = field(default_factory=dict)
    router: Mapping[str, Any] = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)
    history: deque[Look] = field(default_factory=lambda: deque(maxlen=HISTORY))
    names: dict[str, str] = field(default_factory=dict)
    viewers: int = 0
    _looks: int = 0
    _last_message: tuple[int, bytes] = (-1, b"")
    _failing: bool = False
    _changed: asyncio.Condition | None = None

    async def run(self) -> None:
        """Look until cancelled."""
        self._changed = asyncio.Condition()
        while True:
            started = self.clock()
            await self.look()
            await asyncio.sleep(max(0.05, PERIOD_S - (self.clock() - started)))

    async def look(self) -> None:
        """Ask the engines once."""
        engine = self.engine()
        try:
            found = await asyncio.wait_for(engine.stats(), STATS_TIMEOUT_S) if engine else {}
            self._take(found)
            self._failing = False
        except Exception as error:
            self._missed(error)
        self._remember()
        with contextlib.suppress(Exception):  # a name is decoration; the database may be away
            await self._learn_names()
        self._looks += 1
        if self._changed is not None:
            async with self._changed:
                self._changed.notify_all()

    async def follow(self) -> AsyncGenerator[bytes]:
        """Server-sent events, one a look. Raises Backpressure when too many watch already."""
        if self.viewers >= MAX_VIEWERS:
            raise Backpressure(
                f"{self.viewers} watch already, which is the limit; look again later",
                retry_after_s=30,
            )
        self.viewers += 1
        try:
            ends = self.clock() + MAX_STREAM_S
            seen = -1
            yield b"retry: 3000\n\n"
            while self.clock() < ends:
                if seen != self._looks:
                    seen = self._looks
                    yield self._event()
                    continue
                if not await self._next(seen):
                    yield b": still here\n\n"
        finally:
            self.viewers -= 1

    async def _next(self, seen: int) -> bool:
        """Wait for a look after `seen`; False when none came within HEARTBEAT_S."""
        changed = self._changed
        if changed is None:
            await asyncio.sleep(PERIOD_S)
            return False
        try:
            async with changed, asyncio.timeout(HEARTBEAT_S):
                await changed.wait_for(lambda: self._looks != seen)
        except TimeoutError:
            return False
        return True

    def _event(self) -> bytes:
        if self._last_message[0] != self._looks:
            self._last_message = self._looks, b"data: " + self.message(self) + b"\n\n"
        return self._last_message[1]

    def window(self, seconds: float) -> Totals:
        """What happened in the last so many seconds, or since the first look."""
        if not self.history:
            return Totals()
        since = self.clock() - seconds
        then = next((look for look in self.history if look.at >= since), self.history[-1])
        return self.totals.since(then.totals)

    # --- one look ------------------------------------------------------------------------------

    def _take(self, found: Mapping[str, Any]) -> None:
        now = self.clock()
        # An engine in this process has no replicas: its counts are the whole answer.
        alone = [{"name": "local", "state": "ready", "stats": found}] if found else []
        listed = found.get("replicas", alone)
        self.router = found.get("router", {})
        named = {str(row["name"]): row for row in listed[:MAX_REPLICAS]}
        for name, row in named.items():
            self._take_replica(name, str(row.get("state", "ready")), row.get("stats") or {}, now)
        for name in [n for n in self.replicas if n not in named]:
            self.replicas[name].state = "down"
            if now - self.replicas[name].heard_at > FORGET_S:
                del self.replicas[name]

    def _take_replica(self, name: str, state: str, stats: Stats, now: float) -> None:
        known = self.replicas.get(name)
        if not stats:  # it is listed and does not answer: what it said last still stands
            if known is not None:
                known.state = state
            else:
                self.replicas[name] = Replica(name=name, state=state, stats={}, heard_at=now)
            return
        self.totals.take((known.stats or None) if known else None, stats)
        rate = float(stats.get("metrics", {}).get("tokens_per_s", 0.0))
        self.replicas[name] = Replica(
            name=name, state=state, stats=stats, heard_at=now, tokens_per_s=rate
        )

    def _missed(self, error: Exception) -> None:
        for replica in self.replicas.values():
            replica.state = "down"
        if not self._failing:
            known = isinstance(error, LedgerError)
            why = error.message if isinstance(error, LedgerError) else type(error).__name__
            (log.info if known else log.warning)("serving does not say what it does", why=why)
        self._failing = True

    def _remember(self) -> None:
        up = [replica for replica in self.replicas.values() if replica.up]
        now = self.clock()
        before = self.history[-1] if self.history else None
        fresh = self.totals.counts["tokens"] - (before.totals.counts["tokens"] if before else 0)
        self.history.append(
            Look(
                at=now,
                totals=self.totals.copy(),
                rows=sum(int(replica.stats.get("rows", 0)) for replica in up),
                waiting=sum(int(replica.stats.get("queued", 0)) for replica in up),
                tokens_per_s=fresh / max(now - before.at, 0.001) if before else 0.0,
                ttft_s=self.window(RECENT_S).quantile("ttft_s", 0.95),
            )
        )

    async def _learn_names(self) -> None:
        """Model names of adapters that were not seen before, a few at a time."""
        seen = {
            adapter
            for replica in self.replicas.values()
            for adapter in replica.stats.get("metrics", {}).get("adapters", {})
        }
        for adapter in sorted(seen - self.names.keys() - NO_ADAPTERS)[:NAMES_A_LOOK]:
            if len(self.names) >= MAX_NAMES:
                self.names.clear()
            name = await asyncio.to_thread(self.name_of, adapter)
            self.names[adapter] = name or adapter
