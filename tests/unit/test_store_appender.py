"""Group commit over a recorder that a test can hold up, refuse and count."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest
from eventsourcing.persistence import IntegrityError, OperationalError, StoredEvent
from eventsourcing.popo import POPOApplicationRecorder

from ledger.errors import Backpressure, StorageError
from ledger.log.appender import GroupCommit


class _Recorder(POPOApplicationRecorder):
    """The library's in-memory recorder, with a gate, and a list of the batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.batches: list[int] = []
        self.failure: Exception | None = None

    def insert_events(
        self, stored_events: Sequence[StoredEvent], **kwargs: Any
    ) -> Sequence[int] | None:
        self.entered.release()
        assert self.gate.wait(10)
        self.batches.append(len(stored_events))
        if self.failure is not None:
            raise self.failure
        return super().insert_events(stored_events, **kwargs)


@pytest.fixture
def recorder() -> _Recorder:
    return _Recorder()


@pytest.fixture
def group(recorder: _Recorder) -> Iterator[GroupCommit]:
    with GroupCommit(recorder, max_batch_events=100, max_queue_calls=50) as group:
        yield group
        recorder.gate.set()


def _event(stream: UUID | None = None, version: int = 1, size: int = 5) -> StoredEvent:
    return StoredEvent(stream or uuid4(), version, "topic", b"s" * size)


def _queue_behind_the_gate(
    group: GroupCommit, recorder: _Recorder, calls: Sequence[Sequence[StoredEvent]]
) -> list["Future[Sequence[int] | None]"]:
    """All of `calls` wait while one other append is being stored; then let go."""
    recorder.gate.clear()
    first = group.submit([_event()])
    assert recorder.entered.acquire(timeout=5)
    futures = [group.submit(events) for events in calls]
    recorder.gate.set()
    first.result(5)
    return futures


def test_a_single_caller_waits_for_nobody(group: GroupCommit, recorder: _Recorder) -> None:
    assert group.insert_events([_event(), _event()]) == [1, 2]
    assert not group.insert_events([])
    assert group.insert_events([_event()]) == [3]
    assert recorder.batches == [2, 0, 1]


def test_waiting_callers_share_one_transaction(group: GroupCommit, recorder: _Recorder) -> None:
    calls = [[_event() for _ in range(n)] for n in (1, 3, 2)]
    futures = _queue_behind_the_gate(group, recorder, calls)
    assert [future.result(5) for future in futures] == [[2], [3, 4, 5], [6, 7]]
    assert recorder.batches == [1, 6]
    assert [n.state for n in group.select_notifications(1, 10)] == [b"sssss"] * 7


def test_only_the_guilty_call_fails(group: GroupCommit, recorder: _Recorder) -> None:
    taken = uuid4()
    group.insert_events([_event(taken)])
    calls = [[_event(), _event()] for _ in range(9)]
    calls[4] = [_event(), _event(taken)]
    futures = _queue_behind_the_gate(group, recorder, calls)
    with pytest.raises(IntegrityError):
        futures[4].result(5)
    ids = [i for n, future in enumerate(futures) if n != 4 for i in future.result(5) or ()]
    assert ids == list(range(3, 19))  # dense, and in the order of the queue
    assert group.max_notification_id() == 18


def test_of_two_calls_for_one_version_the_first_wins(
    group: GroupCommit, recorder: _Recorder
) -> None:
    stream = uuid4()
    first, second = _queue_behind_the_gate(group, recorder, [[_event(stream)], [_event(stream)]])
    assert first.result(5) == [2]
    with pytest.raises(IntegrityError):
        second.result(5)


def test_limits_split_batches(recorder: _Recorder) -> None:
    with GroupCommit(recorder, max_batch_events=4, max_batch_bytes=100) as group:
        calls = [[_event(), _event()], [_event(), _event()], [_event()]]
        calls += [[_event() for _ in range(6)], [_event(size=60)], [_event(size=60)]]
        futures = _queue_behind_the_gate(group, recorder, calls)
        for future in futures:
            future.result(5)
    assert recorder.batches == [1, 4, 1, 6, 1, 1]


def test_a_full_queue_is_backpressure(group: GroupCommit, recorder: _Recorder) -> None:
    recorder.gate.clear()
    group.submit([_event()])
    assert recorder.entered.acquire(timeout=5)
    futures = [group.submit([_event()]) for _ in range(50)]
    with pytest.raises(Backpressure, match="MAX_QUEUE_CALLS = 50"):
        group.insert_events([_event()])
    recorder.gate.set()
    assert [future.result(5) for future in futures] == [[n] for n in range(2, 52)]


def test_an_outage_reaches_every_caller_once(group: GroupCommit, recorder: _Recorder) -> None:
    recorder.failure = OperationalError("away")
    futures = _queue_behind_the_gate_of_failures(group, recorder, 5)
    errors = [future.exception(5) for future in futures]
    assert all(isinstance(error, OperationalError) for error in errors)
    assert len({id(error) for error in errors}) == 5
    assert recorder.batches == [1, 5]  # not split: that would not help
    recorder.failure = None
    assert group.insert_events([_event()]) == [1]


def _queue_behind_the_gate_of_failures(
    group: GroupCommit, recorder: _Recorder, count: int
) -> list["Future[Sequence[int] | None]"]:
    recorder.gate.clear()
    first = group.submit([_event()])
    assert recorder.entered.acquire(timeout=5)
    futures = [group.submit([_event()]) for _ in range(count)]
    recorder.gate.set()
    assert isinstance(first.exception(5), OperationalError)
    return futures


def test_close_stores_what_is_queued_and_refuses_more(recorder: _Recorder) -> None:
    group = GroupCommit(recorder)
    recorder.gate.clear()
    futures = [group.submit([_event()]) for _ in range(20)]
    closer = threading.Thread(target=group.close)
    closer.start()
    recorder.gate.set()
    closer.join(5)
    assert sorted(i for future in futures for i in future.result(0) or ()) == list(range(1, 21))
    with pytest.raises(StorageError, match="stopping"):
        group.insert_events([_event()])
    group.close()


def test_a_cancelled_call_is_not_stored(group: GroupCommit, recorder: _Recorder) -> None:
    recorder.gate.clear()
    group.submit([_event()])
    assert recorder.entered.acquire(timeout=5)
    cancelled, kept = group.submit([_event()]), group.submit([_event()])
    assert cancelled.cancel()
    recorder.gate.set()
    assert kept.result(5) == [2]
    assert group.max_notification_id() == 2


def test_many_threads_with_conflicts(group: GroupCommit) -> None:
    """Every version of a contested stream is stored once; ids are dense."""
    stream = uuid4()

    def write(version: int) -> Sequence[int] | None:
        try:
            return group.insert_events([_event(stream, version), _event()])
        except IntegrityError:
            return None

    with ThreadPoolExecutor(16) as threads:
        results = list(threads.map(write, [v for v in range(40) for _ in range(3)]))
    stored = [ids for ids in results if ids is not None]
    assert len(stored) == 40
    assert sorted(i for ids in stored for i in ids) == list(range(1, 81))
    assert len(group.select_events(stream)) == 40
