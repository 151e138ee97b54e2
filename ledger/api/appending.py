"""The append path on the event loop: no thread is held while an append waits for its commit.

What is pure computing and short (form and signature of one event) runs on the loop; a batch's
checks, gates, and all that reads the store run on the pool. The wait for the committing thread is
a future. `Ledger` (ledger.aggregates.application) says what each step is for.
"""

import asyncio
import os
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread
from eventsourcing.persistence import PersistenceError
from fastapi.concurrency import run_in_threadpool

from ledger.aggregates.application import Appended, Ledger
from ledger.errors import LedgerError

MAX_CHECKED_ON_LOOP = 2
"""Events whose signatures are checked on the event loop, 0.1 ms each; more go to a thread."""


_limiters: WeakKeyDictionary[asyncio.AbstractEventLoop, anyio.CapacityLimiter] = WeakKeyDictionary()


def _checkers() -> anyio.CapacityLimiter:
    """As many threads check batches as there are cores: more would only take turns, at a price."""
    loop = asyncio.get_running_loop()
    if loop not in _limiters:
        _limiters[loop] = anyio.CapacityLimiter(os.cpu_count() or 1)
    return _limiters[loop]


async def append_all(ledger: Ledger, raws: Sequence[bytes]) -> list[Appended]:
    """As `Ledger.append_all`, with the same errors."""
    if len(raws) <= MAX_CHECKED_ON_LOOP:
        events = ledger.check(raws)
    else:
        events = await anyio.to_thread.run_sync(ledger.check, raws, limiter=_checkers())
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
