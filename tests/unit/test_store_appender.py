"""Group commit over a recorder that a test can hold up, refuse and count."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from uuid import NAMESPACE_OID, UUID, uuid4, uuid5

import pytest
from eventsourcing.persistence import IntegrityError, OperationalError, StoredEvent
from eventsourcing.popo import POPOApplicationRecorder

from ledger.errors import Backpressure, Conflict, StorageError
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


# -- asks: decided where they are committed ------------------------------------------------------


class _Names:
    """A decider for asks that are names, each of which may be taken once. Knows of the recorder
    what it has caught up with."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder
        self._taken: set[str] = set()
        self._undecided: set[str] = set()
        self.size = 0
        self.began: list[list[str]] = []

    def begin(self, asked: Sequence[Any]) -> int:
        self.began.append(list(asked))
        self._undecided = set()
        return self.size

    def decide(self, asked: Any) -> list[StoredEvent]:
        if asked in self._taken | self._undecided:
            raise Conflict(f"{asked} is taken")
        self._undecided.add(asked)
        return [_name(asked)]

    def keep(self, size: int) -> None:
        self._taken |= self._undecided
        self.size = size

    def catch_up(self) -> bool:
        stored = self._recorder.select_notifications(1, 1_000)
        grown, self.size = len(stored) > self.size, len(stored)
        self._taken = {bytes(one.state).decode() for one in stored}
        return grown


def _name(name: str, *, stream: str = "") -> StoredEvent:
    return StoredEvent(uuid5(NAMESPACE_OID, stream or name), 1, "name", name.encode())


class _SizedRecorder(_Recorder):
    """Stores at the expected size or not at all, as the gap-free one."""

    def insert_events(
        self, stored_events: Sequence[StoredEvent], **kwargs: Any
    ) -> Sequence[int] | None:
        self.entered.release()
        assert self.gate.wait(10)
        if kwargs.get("expected_size") not in (None, self.max_notification_id() or 0):
            self.batches.append(-len(stored_events))
            return None
        return super().insert_events(stored_events)


@pytest.fixture
def asking() -> Iterator[tuple[GroupCommit, _SizedRecorder, _Names]]:
    recorder = _SizedRecorder()
    with GroupCommit(recorder) as group:
        names = _Names(recorder)
        group.decide_with(names)
        yield group, recorder, names
        recorder.gate.set()


Asking = tuple[GroupCommit, _SizedRecorder, _Names]


def _ask_behind_the_gate(asking: Asking, names: str) -> list["Future[Sequence[int] | None]"]:
    """All of `names`, a letter each, wait while `0` is being stored; then let go."""
    group, recorder, _ = asking
    while recorder.entered.acquire(blocking=False):
        pass
    recorder.gate.clear()
    first = group.ask("0", count=1, size_bytes=1)
    assert recorder.entered.acquire(timeout=5)
    futures = [group.ask(name, count=1, size_bytes=1) for name in names]
    recorder.gate.set()
    first.result(5)
    return futures


def test_asks_are_decided_in_order_each_on_the_effects_before_it(asking: Asking) -> None:
    group, recorder, names = asking
    futures = _ask_behind_the_gate(asking, "abac")
    assert [futures[n].result(5) for n in (0, 1, 3)] == [[2], [3], [4]]
    with pytest.raises(Conflict, match="a is taken"):
        futures[2].result(5)
    assert recorder.batches == [1, 3]
    assert names.size == 4
    with pytest.raises(Conflict, match="b is taken"):
        group.ask("b", count=1, size_bytes=1).result(5)


def test_what_another_process_stored_is_seen_before_anything_is_decided_for_good(
    asking: Asking,
) -> None:
    group, recorder, names = asking
    group.ask("a", count=1, size_bytes=1).result(5)
    recorder.insert_events([_name("x")])  # the other process
    futures = _ask_behind_the_gate(asking, "bx")
    assert futures[0].result(5) == [4]
    with pytest.raises(Conflict, match="x is taken"):
        futures[1].result(5)
    assert -1 in recorder.batches, "the first try was at the wrong size"
    assert names.began.count(["0"]) == 2


def test_a_refusal_from_an_old_view_is_no_refusal(asking: Asking) -> None:
    """The decider thinks that the name is taken; by now it is not. Nothing is to be stored, so no
    size is compared: the refusal itself makes it look."""
    group, recorder, names = asking
    names._taken.add("free")
    recorder.insert_events([_name("x")])
    assert group.ask("free", count=1, size_bytes=1).result(5) == [2]
    with pytest.raises(Conflict, match="free is taken"):
        group.ask("free", count=1, size_bytes=1).result(5)


def test_a_refusal_counts_only_with_the_effect_that_it_rests_on(asking: Asking) -> None:
    """The first `b` cannot be stored (its stream is taken, unknown to the decider); the second was
    refused because of it, and must not stay refused for an event that does not exist."""
    _, recorder, names = asking
    recorder.insert_events([_name("strange", stream="b")])
    names.catch_up()
    futures = _ask_behind_the_gate(asking, "abb")
    assert futures[0].result(5) == [3]
    for future in futures[1:]:
        with pytest.raises(IntegrityError):
            future.result(5)


def test_an_ask_that_breaks_the_decider_fails_alone(
    asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, names = asking
    decide = names.decide

    def breaks(asked: Any) -> list[StoredEvent]:
        if asked == "b":
            raise RuntimeError("a mistake of ours")
        return decide(asked)

    monkeypatch.setattr(names, "decide", breaks)
    futures = _ask_behind_the_gate(asking, "abc")
    assert [futures[n].result(5) for n in (0, 2)] == [[2], [3]]
    with pytest.raises(RuntimeError):
        futures[1].result(5)


def test_a_log_that_others_never_leave_alone_ends_in_a_conflict(
    asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, recorder, _ = asking
    monkeypatch.setattr(recorder, "insert_events", lambda events, expected_size: None)
    with pytest.raises(Conflict, match="other processes kept appending"):
        group.ask("a", count=1, size_bytes=1).result(5)
