"""The batch runner: from the log to rows. The only impure file of this room besides `queries`.

Rows and position are committed in one transaction, so a crash at any point leaves the rows of some
prefix of the log and the number that says which: nothing is lost and nothing is folded twice.

- Crash while folding: the transaction is rolled back; the next runner starts at the old position.
- Crash after the commit, before anyone was told: the next runner reads the new position.

One projector at a time: a batch holds an advisory lock for its transaction, so a second runner (a
rolling restart, `tributary projections rebuild` beside a live server) finds it taken, waits, and
goes on from whatever position it then reads. Nothing is held between batches.

`rebuild` deletes every row and replays the whole log in one transaction. Readers go on seeing the
old rows until it commits, at once and without locks (PostgreSQL MVCC); the live projector waits.

It reaches the log by the port `EntryLog` and the rows by `RowStore`, which `ledger.store.rows`
implements for PostgreSQL.
"""

import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import structlog

from ledger.errors import StorageError, Unavailable
from ledger.ports import EntryLog, Key, Rows
from projections.registry import FOLDS_VERSION, digest_of, fold, read_entry, wants

MAX_BATCH_EVENTS = 500
POLL_S = 0.25
BUSY_S = 0.02
MAX_BACKOFF_S = 10.0

log = structlog.get_logger(__name__)


class Batch(Protocol):
    """One open transaction on the rows, holding the projector's lock."""

    @property
    def rows(self) -> Rows: ...

    @property
    def position(self) -> int:
        """How many events the rows hold: the index of the next one to fold."""
        ...

    @property
    def version(self) -> int:
        """FOLDS_VERSION of the program that made the rows; 0 when there are none."""
        ...

    def prefetch(self, wanted: Iterable[tuple[str, Key]]) -> None: ...

    def flush(self) -> None:
        """Write what is buffered, inside the transaction; for a replay of bounded memory."""
        ...

    def clear(self) -> None:
        """Delete every row and go back to position 0, inside the transaction."""
        ...

    def advance(self, position: int, version: int) -> None: ...


class RowStore(Protocol):
    """Where rows and position live together."""

    def batch(self) -> AbstractContextManager[Batch | None]:
        """A transaction that commits when left without an exception; None where another projector
        holds the lock."""
        ...

    def position(self) -> int:
        """The committed position."""
        ...

    def snapshot(self) -> AbstractContextManager[Rows]:
        """All committed rows at one moment, read-only."""
        ...


class Runner:
    """Keeps the rows of one ledger. Methods may be called from any thread."""

    def __init__(
        self, log: EntryLog, store: RowStore, *, batch_events: int = MAX_BATCH_EVENTS
    ) -> None:
        assert 0 < batch_events <= MAX_BATCH_EVENTS
        self._log, self._store, self._batch_events = log, store, batch_events
        self._committed = threading.Condition()

    def position(self) -> int:
        return self._store.position()

    def step(self) -> int:
        """Fold one batch and commit it; the number of events, 0 when none wait or another
        projector is at work. Rows of another FOLDS_VERSION are rebuilt first."""
        with self._store.batch() as batch:
            if batch is None:
                return 0
            if batch.version not in (0, FOLDS_VERSION):
                folded = self._replay(batch)
            else:
                folded = self._fold_next(batch)
        self._tell()
        return folded

    def catch_up(self) -> int:
        """Fold until the log as it is now is in the rows, by us or by another projector; the
        position then."""
        size = self._log.size()
        while (position := self.position()) < size:
            if not self.step():
                time.sleep(BUSY_S)
        return position

    def rebuild(self) -> int:
        """Delete every row and replay the log from zero, in one transaction; events folded.

        Readers see the old rows until it commits. Waits for a running batch to end.
        """
        while True:
            with self._store.batch() as batch:
                if batch is not None:
                    folded = self._replay(batch)
                    break
            time.sleep(BUSY_S)
        self._tell()
        log.info("projections rebuilt", events=folded, version=FOLDS_VERSION)
        return folded

    def run(self, stop: threading.Event) -> None:
        """Fold until `stop` is set. Engines that fail are retried; a failed assertion is ours and
        ends it."""
        backoff_s = POLL_S
        while not stop.is_set():
            try:
                position = self.position()
                if self._log.wait(position, POLL_S) > position and not self.step():
                    stop.wait(BUSY_S)
                backoff_s = POLL_S
            except Unavailable as error:
                log.warning("projector waits", error=error.message, retry_after_s=backoff_s)
                stop.wait(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def wait_for(self, index: int, timeout_s: float) -> bool:
        """Wait until the event at `index` is in the rows; False when the time is over first.

        For callers that read what they have just written. Told at once by a runner in this
        process, within BUSY_S by one in another.
        """
        deadline = time.monotonic() + timeout_s
        while self.position() <= index:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            with self._committed:
                self._committed.wait(min(left_s, BUSY_S))
        return True

    def digest(self) -> str:
        """SHA-256 (hex) over all rows of one moment: equal before and after a rebuild."""
        with self._store.snapshot() as rows:
            return digest_of(rows)

    def _fold_next(self, batch: Batch) -> int:
        start = batch.position
        stored = self._log.entries(start, start + self._batch_events)
        if not stored:
            return 0
        entries = [read_entry(data) for data in stored]
        batch.prefetch(wants(entries))
        for offset, entry in enumerate(entries):
            if entry.index != start + offset:
                raise StorageError(
                    f"the log holds entry {entry.index} at index {start + offset}: it is damaged; "
                    "run `tributary audit`"
                )
            fold(batch.rows, entry)
        batch.advance(start + len(entries), FOLDS_VERSION)
        return len(entries)

    def _replay(self, batch: Batch) -> int:
        batch.clear()
        folded = 0
        while count := self._fold_next(batch):
            folded += count
            batch.flush()
        return folded

    def _tell(self) -> None:
        with self._committed:
            self._committed.notify_all()
