"""Waiting for inclusion: requests that want the proof of what they have just appended.

One watcher looks at the newest checkpoint while anybody waits, and hands out the proofs of all that
it covers from one read of the tiles. A request that waits holds a future: no thread of the pool, no
database connection.
"""

import asyncio
from collections.abc import Mapping, Sequence

import anyio
import anyio.to_thread
import structlog

from ledger.errors import Backpressure, LedgerError
from ledger.log.prover import Prover
from ledger.ports import TileStore

MAX_WAIT_S = 30
"""How long one request waits; the event is stored all the same."""
MAX_WAITING = 1_024
"""Requests that may wait at a time; more are refused before anything is stored."""
LOOK_EVERY_S = 0.02

log = structlog.get_logger(__name__)


class Inclusion:
    """Belongs to one event loop. Its watcher runs while somebody waits, and not otherwise."""

    def __init__(self, tiles: TileStore, prover: Prover, *, max_wait_s: float = MAX_WAIT_S) -> None:
        self.max_wait_s = max_wait_s
        self._tiles = tiles
        self._prover = prover
        self._waiting: dict[asyncio.Future[bytes], int] = {}
        self._watcher: asyncio.Task[None] | None = None

    def check_room(self) -> None:
        """Raises Backpressure when MAX_WAITING requests wait already."""
        if len(self._waiting) >= MAX_WAITING:
            raise Backpressure(
                f"{len(self._waiting)} requests wait for a checkpoint, MAX_WAITING = "
                f"{MAX_WAITING}: append without wait=included, or retry after a second"
            )

    async def proof_of(self, index: int) -> bytes | None:
        """The tlog-proof of the entry at `index`, once a checkpoint covers it; None if none does
        within `max_wait_s`."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[future] = index
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())
        try:
            return await asyncio.wait_for(future, self.max_wait_s)
        except TimeoutError:
            return None
        finally:
            del self._waiting[future]

    async def _watch(self) -> None:
        # A thread of its own: the pool's may all be busy with appends.
        own = anyio.CapacityLimiter(1)
        while self._waiting:
            indexes = sorted(set(self._waiting.values()))
            try:
                proofs = await anyio.to_thread.run_sync(self._look, indexes, limiter=own)
            except LedgerError as error:
                # The store is away: who waits goes on waiting, each to its own end.
                log.warning("inclusion_not_seen", why=error.message)
                proofs = {}
            except Exception as error:
                for future in self._waiting:
                    if not future.done():
                        future.set_exception(error)
                raise
            for future, index in self._waiting.items():
                if index in proofs and not future.done():
                    future.set_result(proofs[index])
            await asyncio.sleep(LOOK_EVERY_S)

    def _look(self, indexes: Sequence[int]) -> Mapping[int, bytes]:
        """Proofs of those that the newest checkpoint covers."""
        newest = self._tiles.latest()
        covered = [index for index in indexes if newest is not None and index < newest.size]
        return self._prover.tlog_proofs(covered, newest) if newest and covered else {}
