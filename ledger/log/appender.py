"""Group commit: concurrent appends share one transaction.

Writers to the log queue on one row lock, so that indexes are dense and in commit order; that
defeats PostgreSQL's own group commit. Here one thread commits whatever has queued up while the
last commit ran: one caller alone waits for nothing, many share the cost. A decorator for any
`eventsourcing` ApplicationRecorder; it knows no database.

Calls bring events (`submit`), or something that a `Decider` turns into events at the last moment
(`ask`): on the committing thread, in order, each seeing the effects of those before it. So asks
of one process never collide. Their decisions hold for one size of the log; the recorder stores
them at that size or not at all, and after another process has appended they are made again.

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
from typing import Any, Protocol
from uuid import UUID

from eventsourcing.persistence import (
    ApplicationRecorder,
    InterfaceError,
    Notification,
    OperationalError,
    StoredEvent,
    Subscription,
)

from ledger.errors import Backpressure, Conflict, StorageError

MAX_DECISIONS = 32
"""How often one transaction is decided anew because another process appended meanwhile."""
MAX_BATCH_EVENTS = 1_000
MAX_BATCH_BYTES = 8 * 2**20
MAX_QUEUE_CALLS = 4_096

Ids = Sequence[int] | None


class Decider(Protocol):
    """Chooses events when their transaction is made up. Only the committing thread calls it."""

    def begin(self, asked: Sequence[Any]) -> int:
        """A new transaction for these asks, forgetting one that was not kept; the size of the log
        that decisions will hold for."""
        ...

    def decide(self, asked: Any) -> Sequence[StoredEvent]:
        """The events of one ask, or its own error; what is decided next sees their effects."""
        ...

    def keep(self, size: int) -> None:
        """All that was decided is stored, the log has `size` entries."""
        ...

    def catch_up(self) -> bool:
        """See what others have appended; whether there was anything."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """One caller's events, stored together or not at all. `asked`: they are yet to be chosen."""

    events: Sequence[StoredEvent] = ()
    asked: Any = None
    count: int
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
        self._decider: Decider | None = None
        self._committer = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._committer.start()

    def submit(self, stored_events: Sequence[StoredEvent]) -> "Future[Ids]":
        """Queue the events of one caller; the future gives their notification ids."""
        return self._queue_up(
            _Call(
                events=stored_events,
                count=len(stored_events),
                size_bytes=sum(len(event.state) for event in stored_events),
            )
        )

    def decide_with(self, decider: Decider) -> "GroupCommit":
        """Who turns asks into events; set once, before the first of them. From then on nobody
        calls `submit`: its events would be strange to the decider."""
        self._decider = decider
        return self

    def ask(self, asked: Any, *, count: int, size_bytes: int) -> "Future[Ids]":
        """Queue what the decider will turn into `count` events of that size together."""
        assert self._decider is not None
        return self._queue_up(_Call(asked=asked, count=count, size_bytes=size_bytes))

    def _queue_up(self, call: _Call) -> "Future[Ids]":
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

    def select_streams(self, streams: Sequence[UUID]) -> Sequence[StoredEvent]:
        """All events of several streams, each stream's in order."""
        select = getattr(self.recorder, "select_streams", None)
        if select is None:
            return [event for stream in streams for event in self.select_events(stream)]
        found: Sequence[StoredEvent] = select(streams)
        return found

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
                events += self._queue[0].count
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
            answers = self._store(batch)
        except (OperationalError, InterfaceError, StorageError) as error:
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
            for call, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Exception):
                    call.done.set_exception(answer)
                else:
                    call.done.set_result(answer)

    def _store(self, batch: Sequence[_Call]) -> "list[Ids | Exception]":
        """Store what can be stored of a batch; per call its ids, or why it was refused.

        A refusal counts once the transaction it was decided in is stored: it may rest on the
        effects of a call before it. Where nothing is stored it counts if the log has not grown.
        """
        decider = self._decider
        if decider is None:
            given = [call.events for call in batch]
            ids = self.recorder.insert_events([event for events in given for event in events])
            return _shares(given, ids) if ids is not None else [None] * len(batch)
        for _ in range(MAX_DECISIONS):
            size = decider.begin([call.asked for call in batch])
            chosen = [self._chosen(decider, call) for call in batch]
            events = [event for one in chosen if not isinstance(one, Exception) for event in one]
            if events:
                ids = self.recorder.insert_events(events, expected_size=size)
                if ids is not None:
                    decider.keep(size + len(events))
                    return _shares(chosen, ids)
                decider.catch_up()
            elif not decider.catch_up():
                return _shares(chosen, [])
        raise Conflict("other processes kept appending to this ledger; retry")

    def _chosen(self, decider: Decider, call: _Call) -> "Sequence[StoredEvent] | Exception":
        try:
            return decider.decide(call.asked)
        except Exception as refusal:
            return refusal


def _shares(
    chosen: "Sequence[Sequence[StoredEvent] | Exception]", ids: Sequence[int]
) -> "list[Ids | Exception]":
    """To each call the ids of its own events."""
    shares: list[Ids | Exception] = []
    start = 0
    for one in chosen:
        if isinstance(one, Exception):
            shares.append(one)
        else:
            shares.append(ids[start : start + len(one)])
            start += len(one)
    return shares
