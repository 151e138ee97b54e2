"""The gap-free recorder on a real PostgreSQL: the library's own contract, and our promises."""

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from eventsourcing.persistence import (
    DataError,
    IntegrityError,
    OperationalError,
    StoredEvent,
    Subscription,
)
from eventsourcing.tests.persistence import (
    ApplicationRecorderTestCase,
    NonInterleavingNotificationIDsBaseCase,
)

from ledger.domain.envelope import MAX_ENVELOPE_BYTES, encode_entry, leaf_hash
from ledger.errors import Conflict, StorageError
from ledger.log.appender import GroupCommit
from ledger.store import recorder as recorder_module
from ledger.store.embedded import EmbeddedPostgres
from ledger.store.migrate import migrate
from ledger.store.postgres import PostgresEntryLog, connect
from ledger.store.recorder import (
    GapFreeFactory,
    GapFreeRecorder,
    ReplayedEvent,
    StaleVersion,
    StoreUnavailable,
)
from tests.pg import fresh_database


@pytest.fixture
def factory(pg_url: str) -> Iterator[GapFreeFactory]:
    factory = GapFreeFactory.on(pg_url, event_id_of=_state_id)
    yield factory
    factory.close()


@pytest.fixture
def recorder(factory: GapFreeFactory) -> GapFreeRecorder:
    recorder = factory.application_recorder()
    assert isinstance(recorder, GapFreeRecorder)
    return recorder


def _state_id(stored: StoredEvent) -> UUID | None:
    """Test events whose state is 16 bytes long are their own id."""
    return UUID(bytes=bytes(stored.state)) if len(stored.state) == 16 else None


def _event(
    stream: UUID | str | None = None, version: int = 1, state: bytes | None = None
) -> StoredEvent:
    return StoredEvent(stream or uuid4(), version, "topic", state or uuid4().bytes)


# -- the library's own contract ----------------------------------------------------------------


class _OnPostgres:
    """What the library's cases need; `use_database` is called by pytest before each of them."""

    @pytest.fixture(autouse=True)
    def _use_database(self, pg_url: str) -> Iterator[None]:
        self._factory = GapFreeFactory.on(pg_url, event_id_of=lambda stored: None)
        yield
        self._factory.close()


class TestLibraryContract(_OnPostgres, ApplicationRecorderTestCase):
    def create_recorder(self) -> GapFreeRecorder:
        return self._factory.application_recorder()  # type: ignore[return-value]


class TestLibraryContractWithGroupCommit(_OnPostgres, ApplicationRecorderTestCase):
    def create_recorder(self) -> GroupCommit:
        self._factory._decorate = GroupCommit
        return self._factory.application_recorder()  # type: ignore[return-value]


class TestNonInterleaving(_OnPostgres, NonInterleavingNotificationIDsBaseCase):
    insert_num = 1000

    def create_recorder(self) -> GapFreeRecorder:
        return self._factory.application_recorder()  # type: ignore[return-value]


class Ledgerlet(Aggregate):
    @event("Opened")
    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: list[str] = []

    @event("Written")
    def write(self, line: str) -> None:
        self.lines.append(line)


def test_an_application_runs_on_it_by_environment_alone(pg_url: str) -> None:
    env = {
        "PERSISTENCE_MODULE": "ledger.store.recorder:GapFreeFactory",
        "DATABASE_URL": pg_url,
        "IS_SNAPSHOTTING_ENABLED": "y",
    }
    application = Application[UUID](env)
    assert isinstance(application.recorder, GapFreeRecorder)
    application.recorder._event_id_of = lambda stored: None  # not envelopes
    aggregate = Ledgerlet("a")
    aggregate.write("one")
    recordings = application.save(aggregate)
    assert [recording.notification.id for recording in recordings] == [1, 2]
    application.take_snapshot(aggregate.id)
    loaded: object = application.repository.get(aggregate.id)
    assert isinstance(loaded, Ledgerlet)
    assert loaded.lines == ["one"]
    application.close()


# -- our own promises --------------------------------------------------------------------------


def test_leaf_hash_and_entry_are_the_formats(pg_url: str) -> None:
    factory = GapFreeFactory.on(pg_url, clock=lambda: 1234567, event_id_of=_state_id)
    events = [_event(state=b"x" * size) for size in (1, 17, MAX_ENVELOPE_BYTES)]
    factory.application_recorder().insert_events(events)
    with connect(pg_url) as pool:
        log = PostgresEntryLog(pool)
        entries = [encode_entry(i, 1234567, event.state) for i, event in enumerate(events)]
        assert log.entries(0, 3) == entries
        assert log.leaf_hashes(0, 3) == [leaf_hash(entry) for entry in entries]
        assert log.leaf_hashes(0, 1) == [hashlib.sha256(b"\0" + entries[0]).digest()]
    factory.close()


def test_recorded_at_never_decreases(pg_url: str) -> None:
    times = iter([50, 40, 60])
    factory = GapFreeFactory.on(pg_url, clock=lambda: next(times), event_id_of=_state_id)
    recorder = factory.application_recorder()
    for _ in range(3):
        recorder.insert_events([_event()])
    with connect(pg_url) as pool:
        entries = PostgresEntryLog(pool).entries(0, 3)
    assert [int.from_bytes(entry[8:16], "big") for entry in entries] == [50, 50, 60]
    factory.close()


def test_stale_version_and_replay_are_told_apart(recorder: GapFreeRecorder) -> None:
    first = _event()
    assert recorder.insert_events([first]) == [1]
    with pytest.raises(StaleVersion) as stale:
        recorder.insert_events([_event(first.originator_id, 1)])
    assert isinstance(stale.value, IntegrityError)
    assert isinstance(stale.value, Conflict)
    with pytest.raises(ReplayedEvent) as replayed:
        recorder.insert_events([_event(), _event(first.originator_id, 2, first.state)])
    assert replayed.value.detail["index"] == 0
    with pytest.raises(ReplayedEvent):  # the very same event: a replay too, though also stale
        recorder.insert_events([first])
    twin = _event()
    with pytest.raises(ReplayedEvent):
        recorder.insert_events([twin, _event(state=twin.state)])
    assert recorder.insert_events([_event(), _event()]) == [2, 3]  # no index was lost


def test_events_are_stored_at_the_expected_size_or_not_at_all(recorder: GapFreeRecorder) -> None:
    first = recorder.insert_events([_event(), _event()], expected_size=0)
    assert first == [1, 2]
    assert recorder.insert_events([_event()], expected_size=1) is None
    assert recorder.max_notification_id() == 2
    second = recorder.insert_events([_event()], expected_size=2)
    assert first is not None
    assert second is not None
    assert second == [3]
    assert second.recorded_at >= first.recorded_at > 1_700_000_000_000_000


def test_oversize_state_is_refused_by_the_database(recorder: GapFreeRecorder) -> None:
    with pytest.raises(DataError):
        recorder.insert_events([_event(state=b"x" * (MAX_ENVELOPE_BYTES + 1))])
    assert recorder.max_notification_id() is None


def test_a_large_append_does_not_hang(recorder: GapFreeRecorder) -> None:
    stream = uuid4()
    events = [_event(stream, v, os.urandom(20_000)) for v in range(1, 501)]  # 10 MB in one call
    assert recorder.insert_events(events) == list(range(1, 501))
    assert [e.state for e in recorder.select_events(stream)] == [e.state for e in events]


def test_the_log_cannot_be_rewritten(pg_url: str, recorder: GapFreeRecorder) -> None:
    recorder.insert_events([_event()])
    with psycopg.connect(pg_url, autocommit=True) as connection:
        for statement in (
            "UPDATE stored_events SET state = 'x'",
            "DELETE FROM stored_events",
            "TRUNCATE stored_events",
        ):
            with pytest.raises(psycopg.errors.RestrictViolation):
                connection.execute(statement)


def test_a_gap_is_reported_not_skipped(pg_url: str, recorder: GapFreeRecorder) -> None:
    recorder.insert_events([_event(), _event(), _event()])
    with psycopg.connect(pg_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE stored_events DISABLE TRIGGER ALL")
        connection.execute("DELETE FROM stored_events WHERE notification_id = 2")
    with connect(pg_url) as pool, pytest.raises(StorageError, match="gap"):
        PostgresEntryLog(pool).entries(0, 3)


def test_commits_survive_a_server_that_defaults_to_asynchronous_commit(pg_url: str) -> None:
    with psycopg.connect(pg_url, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    factory = GapFreeFactory.on(pg_url)
    with factory.datastore.get_connection() as connection:
        row = connection.execute("SHOW synchronous_commit").fetchone()
    assert row == {"synchronous_commit": "on"}
    factory.close()


# -- lost connections --------------------------------------------------------------------------


def _lose_after_commit(recorder: GapFreeRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next append is committed, but its answer never arrives."""
    real = recorder._append
    left = [1]

    def append(*args: object) -> Any:
        ids = real(*args)  # type: ignore[arg-type]
        if left:
            left.pop()
            raise OperationalError("server closed the connection unexpectedly")
        return ids

    monkeypatch.setattr(recorder, "_append", append)


def test_a_commit_whose_answer_was_lost_is_a_success(
    recorder: GapFreeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.insert_events([_event()])
    _lose_after_commit(recorder, monkeypatch)
    assert recorder.insert_events([_event(), _event()]) == [2, 3]
    assert recorder.max_notification_id() == 3


def test_a_lost_answer_is_no_stale_view(
    recorder: GapFreeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has grown since, by the very events that are sent again."""
    recorder.insert_events([_event()])
    _lose_after_commit(recorder, monkeypatch)
    stored = recorder.insert_events([_event(), _event()], expected_size=1)
    assert stored == [2, 3]
    assert recorder.insert_events([_event()], expected_size=3) == [4]


def test_after_a_lost_answer_a_real_conflict_is_still_one(
    recorder: GapFreeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = _event()
    recorder.insert_events([theirs])
    left = [1]
    real = recorder._append

    def lost_before_commit(*args: object) -> Any:
        if left:
            left.pop()
            raise OperationalError("connection reset")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(recorder, "_append", lost_before_commit)
    with pytest.raises(StaleVersion):
        recorder.insert_events([_event(theirs.originator_id, 1), _event()])
    assert recorder.max_notification_id() == 1


def test_an_outage_becomes_a_storage_error(
    recorder: GapFreeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> list[int]:
        raise OperationalError("connection refused")

    monkeypatch.setattr(recorder, "_append", away)
    monkeypatch.setattr(recorder_module, "MAX_OUTAGE_S", 0.3)
    with pytest.raises(StoreUnavailable, match="retry the same append") as error:
        recorder.insert_events([_event()])
    assert isinstance(error.value, StorageError)


def test_killed_backends_are_replaced(pg_url: str, recorder: GapFreeRecorder) -> None:
    recorder.insert_events([_event()])
    _end_other_sessions(pg_url)
    assert recorder.insert_events([_event()]) == [2]


def _end_other_sessions(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


# -- nobody misses an event --------------------------------------------------------------------

WRITERS = 4
EVENTS_PER_WRITER = 150


class _Writer:
    """Appends until EVENTS_PER_WRITER calls are acknowledged, every third one a conflict."""

    def __init__(self, url: str, contested: UUID, decorate: Callable[..., object]) -> None:
        self.factory = GapFreeFactory.on(
            url,
            event_id_of=_state_id,
            decorate=decorate,  # type: ignore[arg-type]
        )
        self.recorder = self.factory.application_recorder()
        self.contested = contested
        self.acknowledged: dict[int, bytes] = {}
        self.conflicts = 0

    def run(self) -> None:
        while len(self.acknowledged) < EVENTS_PER_WRITER:
            if len(self.acknowledged) % 3 == 0:
                self._conflict()
            events = [_event(), _event()]
            ids = self.recorder.insert_events(events)
            assert ids is not None
            self.acknowledged.update(zip(ids, (event.state for event in events), strict=True))
        self.factory.close()

    def _conflict(self) -> None:
        try:
            self.recorder.insert_events([_event(), _event(self.contested, 1)])
        except IntegrityError:
            self.conflicts += 1
        else:
            raise AssertionError("the contested version was stored twice")


@pytest.mark.parametrize("crash", ["none", "kill", "immediate", "restart"])
@pytest.mark.parametrize("decorate", [lambda r: r, GroupCommit], ids=["plain", "grouped"])
def test_no_event_is_missed(
    embedded: EmbeddedPostgres, crash: str, decorate: Callable[..., object]
) -> None:
    """4 writers with conflicts, two tailing readers, a server that dies in the middle.

    What was acknowledged is stored where it was said to be; indexes are dense; both readers have
    seen every index once, in order, with the bytes that are stored in the end.
    """
    with fresh_database(embedded.start().url) as url:
        migrate(url)
        _check_that_no_event_is_missed(embedded, url, crash, decorate)


def _check_that_no_event_is_missed(
    embedded: EmbeddedPostgres, url: str, crash: str, decorate: Callable[..., object]
) -> None:
    contested = uuid4()
    setup = GapFreeFactory.on(url, event_id_of=_state_id)
    recorder = setup.application_recorder()
    recorder.insert_events([_event(contested, 1)])
    writers = [_Writer(url, contested, decorate) for _ in range(WRITERS)]
    finished = threading.Event()
    tailed: list[tuple[int, bytes]] = []
    polled: list[bytes] = []
    pool = connect(url)
    log = PostgresEntryLog(pool)

    def tail(subscription: Subscription[Any]) -> None:
        tailed.extend((n.id, bytes(n.state)) for n in subscription)

    def poll() -> None:
        while not finished.is_set() or log.size() > len(polled):
            try:
                size = log.wait(len(polled), 0.5)
                polled.extend(log.entries(len(polled), size))
            except StorageError:
                time.sleep(0.05)

    with recorder.subscribe(gt=0) as subscription:
        readers = [
            threading.Thread(target=tail, args=(subscription,)),
            threading.Thread(target=poll),
        ]
        for reader in readers:
            reader.start()
        with ThreadPoolExecutor(WRITERS) as threads:
            running = [threads.submit(writer.run) for writer in writers]
            if crash != "none":
                while sum(len(w.acknowledged) for w in writers) < WRITERS * EVENTS_PER_WRITER // 3:
                    time.sleep(0.005)
                _crash(embedded, crash)
                embedded.start()
            for future in running:
                future.result(timeout=60)
        finished.set()
        readers[1].join(timeout=30)
        deadline = time.monotonic() + 30
        while len(tailed) < len(polled) and time.monotonic() < deadline:
            time.sleep(0.01)
        subscription.stop()
        readers[0].join(timeout=10)

    entries = log.entries(0, log.size())
    assert [int.from_bytes(entry[:8], "big") for entry in entries] == list(range(log.size()))
    assert log.leaf_hashes(0, log.size()) == [leaf_hash(entry) for entry in entries]
    assert polled == entries
    assert tailed == [(i + 1, entry[16:]) for i, entry in enumerate(entries)]
    for writer in writers:
        assert writer.conflicts >= 1
        for id, state in writer.acknowledged.items():
            assert entries[id - 1][16:] == state
    log.close()
    pool.close()
    setup.close()


def _crash(server: EmbeddedPostgres, how: str) -> None:
    pid = server.pid
    assert pid is not None
    signals = {"kill": signal.SIGKILL, "immediate": signal.SIGQUIT, "restart": signal.SIGINT}
    os.kill(pid, signals[how])
    while server.pid == pid:
        time.sleep(0.01)
