"""Group commit: concurrent appends share one transaction.

Writers to the log queue on one row lock, so that indexes are dense and in commit order; that
defeats PostgreSQL's own group commit. Here one thread commits whatever has queued up while the
last commit ran: one caller alone waits for nothing, many share the cost. A decorator for any
`eventsourcing` ApplicationRecorder; it knows no database.

State: the queue belongs to `_changed`. A call is in the queue, or in the committer's hands, or its
future is resolved. A crash leaves each call either stored or not, as one transaction did; the
store recognises a repeated one by its event ids.
"""

import copy
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from uuid import UUID

from eventsourcing.persistence import (
    ApplicationRecorder,
    InterfaceError,
    Notification,
    OperationalError,
    StoredEvent,
    Subscription,
)

from ledger.errors import Backpressure, StorageError

MAX_BATCH_EVENTS = 1_000
MAX_BATCH_BYTES = 8 * 2**20
MAX_QUEUE_CALLS = 4_096

Ids = Sequence[int] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """One caller's events, stored together or not at all."""

    events: Sequence[StoredEvent]
    size_bytes: int
    done: "Future[Ids]" = field(default_factory=Future)


class GroupCommit(ApplicationRecorder):
    """Batches `insert_events` of concurrent callers; everything else goes straight through.

    Each caller gets its own notification ids or its own error: when a batch conflicts, halves of
    it are tried again, down to the guilty calls, which fail alone. Raises Backpressure when
    `max_queue_calls` callers wait already. `close` stores what is queued, then ends the thread.
    """

    def __init__(
        self,
        recorder: ApplicationRecorder,
        *,
        max_batch_events: int = MAX_BATCH_EVENTS,
        max_batch_bytes: int = MAX_BATCH_BYTES,
        max_queue_calls: int = MAX_QUEUE_CALLS,
    ) -> None:
        self.recorder = recorder
        self._max_batch_events = max_batch_events
        self._max_batch_bytes = max_batch_bytes
        self._max_queue_calls = max_queue_calls
        self._queue: deque[_Call] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._committer = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._committer.start()

    def submit(self, stored_events: Sequence[StoredEvent]) -> "Future[Ids]":
        """Queue the events of one caller; the future gives their notification ids."""
        call = _Call(events=stored_events, size_bytes=sum(len(e.state) for e in stored_events))
        with self._changed:
            if self._closing:
                raise StorageError("the ledger is stopping and takes no more events; retry later")
            if len(self._queue) >= self._max_queue_calls:
                raise Backpressure(
                    f"{len(self._queue)} appends wait already, MAX_QUEUE_CALLS = "
                    f"{self._max_queue_calls}: retry after a second",
                )
            self._queue.append(call)
            self._changed.notify()
        return call.done

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Ids:
        if not stored_events or kwargs:  # nothing to batch, or more than events to store
            return self.recorder.insert_events(stored_events, **kwargs)
        return self.submit(stored_events).result()

    def select_events(
        self,
        originator_id: UUID | str,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> Sequence[StoredEvent]:
        return self.recorder.select_events(originator_id, gt=gt, lte=lte, desc=desc, limit=limit)

    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> Sequence[Notification]:
        return self.recorder.select_notifications(
            start, limit, stop, topics, inclusive_of_start=inclusive_of_start
        )

    def max_notification_id(self) -> int | None:
        return self.recorder.max_notification_id()

    def subscribe(
        self, gt: int | None = None, topics: Sequence[str] = ()
    ) -> Subscription[ApplicationRecorder]:
        return self.recorder.subscribe(gt, topics)

    def close(self) -> None:
        """Refuse new calls, store the queued ones, end the thread. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._committer.join()

    def __enter__(self) -> "GroupCommit":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- the committer's thread ----------------------------------------------------------------

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._commit(batch)

    def _next_batch(self) -> list[_Call] | None:
        """Block for work; None when closing and drained. A call over the limits goes alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return None
            batch: list[_Call] = []
            events = size_bytes = 0
            while self._queue:
                events += len(self._queue[0].events)
                size_bytes += self._queue[0].size_bytes
                if batch and (
                    events > self._max_batch_events or size_bytes > self._max_batch_bytes
                ):
                    break
                call = self._queue.popleft()
                if call.done.set_running_or_notify_cancel():
                    batch.append(call)
            return batch

    def _commit(self, batch: Sequence[_Call]) -> None:
        """Store a batch in one transaction, or find the calls in it that cannot be stored.

        With g guilty calls among n this takes at most 2 g (1 + log2 n) further transactions.
        """
        if not batch:
            return
        try:
            ids = self.recorder.insert_events([event for call in batch for event in call.events])
        except (OperationalError, InterfaceError) as error:
            # The store is away: nobody's fault, and splitting is no cure. A copy each, since a
            # raised exception carries the traceback of whoever raised it.
            for call in batch:
                own = copy.copy(error)
                own.__cause__ = error
                call.done.set_exception(own)
        except BaseException as error:
            if len(batch) == 1:
                batch[0].done.set_exception(error)
            else:
                middle = len(batch) // 2
                self._commit(batch[:middle])
                self._commit(batch[middle:])
        else:
            start = 0
            for call in batch:
                stop = start + len(call.events)
                call.done.set_result(None if ids is None else ids[start:stop])
                start = stop
