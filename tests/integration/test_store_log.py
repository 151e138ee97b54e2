"""EntryLog and TileStore when PostgreSQL goes away: reconnects, and a lock that was lost."""

import threading
import time
from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from eventsourcing.persistence import StoredEvent

from ledger.errors import StorageError
from ledger.ports import StoredCheckpoint
from ledger.store.postgres import Pool, PostgresEntryLog, connect
from ledger.store.recorder import GapFreeFactory
from ledger.store.tiles import PostgresTileStore


@pytest.fixture
def pool(pg_url: str) -> Iterator[Pool]:
    with connect(pg_url) as pool:
        yield pool


def _append(url: str) -> None:
    factory = GapFreeFactory.on(url, event_id_of=lambda event: None)
    factory.application_recorder().insert_events([StoredEvent(uuid4(), 1, "t", b"x")])
    factory.close()


def _end_other_sessions(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def _checkpoint(size: int) -> StoredCheckpoint:
    return StoredCheckpoint(size=size, root=bytes([size]) * 32, note=b"note", signed_at=size)


def test_wait_survives_a_lost_connection(pg_url: str, pool: Pool) -> None:
    log = PostgresEntryLog(pool)
    assert log.wait(0, 0.05) == 0  # starts the listener
    sizes: list[int] = []
    waiter = threading.Thread(target=lambda: sizes.append(log.wait(0, 30.0)))
    waiter.start()
    time.sleep(0.1)
    _end_other_sessions(pg_url)
    _append(pg_url)
    waiter.join()
    assert sizes == [1]
    assert log.size() == 1
    log.close()


def test_wait_is_woken_by_the_notification_not_by_the_poll(
    pg_url: str, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ledger.store.postgres.POLL_S", 60.0)
    log = PostgresEntryLog(pool)
    log.wait(0, 0.3)
    started = time.monotonic()
    threading.Timer(0.2, _append, [pg_url]).start()
    assert log.wait(0, 30.0) == 1
    assert time.monotonic() - started < 20
    waker = threading.Timer(0.2, _append, [pg_url])  # the listener then sees that it is closed
    waker.start()
    log.close()
    waker.join()


def test_close_frees_waiters(pool: Pool) -> None:
    log = PostgresEntryLog(pool)
    waiter = threading.Thread(target=log.wait, args=(0, 60.0))
    waiter.start()
    time.sleep(0.1)
    log.close()
    waiter.join(timeout=5)
    assert not waiter.is_alive()


def test_a_lost_sequencer_lock_stops_its_publisher(pg_url: str, pool: Pool) -> None:
    mine, theirs = PostgresTileStore(pool), PostgresTileStore(pool)
    with mine.sequencer_lock() as obtained:
        assert obtained
        mine.publish({(0, 0): bytes(32)}, _checkpoint(1), expected_size=0)
        _end_other_sessions(pg_url)
        with theirs.sequencer_lock() as now_theirs:
            assert now_theirs
            with pytest.raises(StorageError, match="lock was lost"):
                mine.publish({(0, 0): bytes(64)}, _checkpoint(2), expected_size=1)
            theirs.publish({(0, 0): bytes(64)}, _checkpoint(2), expected_size=1)
            with mine.sequencer_lock() as again:
                assert not again
    with mine.sequencer_lock() as again:
        assert again
        mine.publish({}, _checkpoint(3), expected_size=2)


def test_a_signed_checkpoint_is_never_withdrawn(pg_url: str, pool: Pool) -> None:
    PostgresTileStore(pool).publish({}, _checkpoint(1), expected_size=0)
    with psycopg.connect(pg_url, autocommit=True) as connection:
        for statement in (
            "UPDATE log_checkpoints SET root = sha256('other')",
            "UPDATE log_checkpoints SET size = 2",
            "DELETE FROM log_checkpoints",
        ):
            with pytest.raises(psycopg.errors.RestrictViolation):
                connection.execute(statement)


def test_messages_say_what_to_do_and_no_password(pg_empty_url: str) -> None:
    with pytest.raises(StorageError, match="DATABASE_URL") as away:
        connect("postgresql://me:hunter2@127.0.0.1:1/ledger?connect_timeout=1")
    assert "hunter2" not in str(away.value)
    assert "127.0.0.1" in str(away.value)
    with connect(pg_empty_url) as pool, pytest.raises(StorageError, match="tributary migrate"):
        PostgresEntryLog(pool).size()
