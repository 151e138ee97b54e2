"""The append path on the event loop: no thread is held while an append waits for its commit.

What is pure computing and short (form and signature of one event) runs on the loop; a batch's
checks, gates, and all that reads the store run on the pool. The wait for the committing thread is
a future. `Ledger` (ledger.aggregates.application) says what each step is for.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread
from eventsourcing.persistence import PersistenceError
from fastapi.concurrency import run_in_threadpool

from ledger.aggregates.application import Appended, Ledger
from ledger.errors import Backpressure, LedgerError

MAX_CHECKED_ON_LOOP = 2
"""Events whose signatures are checked on the event loop, 0.1 ms each; more go to a thread."""
MAX_BATCHES = 128
"""Batches that are read and worked on at a time: each may hold MAX_BATCH_BYTES."""


@dataclass(kw_only=True)
class _Room:
    """What one event loop has at hand. As many threads check batches as there are cores: more
    would only take turns, at a price."""

    checkers: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(os.cpu_count() or 1)
    )
    batches: int = 0


_rooms: WeakKeyDictionary[asyncio.AbstractEventLoop, _Room] = WeakKeyDictionary()


def _room() -> _Room:
    return _rooms.setdefault(asyncio.get_running_loop(), _Room())


@asynccontextmanager
async def place_for_a_batch() -> AsyncIterator[None]:
    """Around reading and appending a batch. Raises Backpressure when MAX_BATCHES are under way."""
    room = _room()
    if room.batches >= MAX_BATCHES:
        raise Backpressure(
            f"{room.batches} batches are under way, MAX_BATCHES = {MAX_BATCHES}: retry after a "
            "second"
        )
    room.batches += 1
    try:
        yield
    finally:
        room.batches -= 1


async def append_all(ledger: Ledger, raws: Sequence[bytes]) -> list[Appended]:
    """As `Ledger.append_all`, with the same errors."""
    if len(raws) <= MAX_CHECKED_ON_LOOP:
        events = ledger.check(raws)
    else:
        events = await anyio.to_thread.run_sync(ledger.check, raws, limiter=_room().checkers)
    try:
        if ledger.gated(events):
            await run_in_threadpool(ledger.pass_gates, events)
        ids = await asyncio.wrap_future(ledger.ask(events))
        return ledger.placed(events, ids)
    except (LedgerError, PersistenceError) as error:
        stored = await run_in_threadpool(ledger.settle, events, error)
    if stored is not None:
        return stored
    # Another writer was quicker on one of its streams: rare enough to hold a thread for.
    return await run_in_threadpool(ledger.append_checked, events)
