"""One contract suite per store port, run against every implementation."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from eventsourcing.persistence import StoredEvent

from ledger.domain.envelope import encode_entry, leaf_hash
from ledger.errors import Conflict, NotFound, StorageError, TooLarge
from ledger.log.ancestry import EntryReader
from ledger.ports import BlobStore, EntryLog, StoredCheckpoint, TileStore
from ledger.store import blobs
from ledger.store.blobs import FsspecBlobStore
from ledger.store.postgres import PostgresEntryLog, connect
from ledger.store.recorder import GapFreeFactory
from ledger.store.tiles import PostgresTileStore
from tests.fakes import MemoryBlobStore, MemoryEntryLog, MemoryTileStore

AT = 1_700_000_000_000_000

# -- EntryLog ----------------------------------------------------------------------------------

Append = Callable[[Sequence[tuple[bytes, UUID]]], None]


@pytest.fixture(params=["memory", "postgres"])
def entry_log(request: pytest.FixtureRequest) -> Iterator[tuple[EntryLog, Append]]:
    if request.param == "memory":
        memory = MemoryEntryLog()

        def append_to_memory(events: Sequence[tuple[bytes, UUID]]) -> None:
            for raw, event_id in events:
                memory.append(raw, event_id=event_id, recorded_at=AT)

        yield memory, append_to_memory
        return
    url = request.getfixturevalue("pg_url")
    ids: dict[bytes, UUID] = {}
    factory = GapFreeFactory.on(url, clock=lambda: AT, event_id_of=lambda e: ids[e.state])
    recorder = factory.application_recorder()

    def append(events: Sequence[tuple[bytes, UUID]]) -> None:
        ids.update(events)
        recorder.insert_events([StoredEvent(uuid4(), 1, "t", raw) for raw, _ in events])

    with connect(url) as pool:
        log = PostgresEntryLog(pool)
        yield log, append
        log.close()
    factory.close()


def _events(start: int, stop: int) -> list[tuple[bytes, UUID]]:
    return [(b"event %d" % i, UUID(int=i)) for i in range(start, stop)]


def test_entry_log_empty(entry_log: tuple[EntryLog, Append]) -> None:
    log, _ = entry_log
    assert log.size() == 0
    assert log.entries(0, 10) == []
    assert log.leaf_hashes(0, 10) == []
    assert log.wait(0, 0.0) == 0


def test_entry_log_reads_what_was_appended(entry_log: tuple[EntryLog, Append]) -> None:
    log, append = entry_log
    append(_events(0, 3))
    append(_events(3, 5))
    expected = [encode_entry(i, AT, b"event %d" % i) for i in range(5)]
    assert log.size() == 5
    assert log.entries(0, 5) == expected
    assert log.entries(1, 3) == expected[1:3]
    assert log.entries(4, 100) == expected[4:]
    assert log.entries(5, 100) == []
    assert log.entries(3, 3) == []
    assert log.entries(4, 2) == []
    assert log.leaf_hashes(0, 5) == [leaf_hash(entry) for entry in expected]
    assert log.leaf_hashes(2, 4) == [leaf_hash(entry) for entry in expected[2:4]]


def test_entry_log_picks_entries_apart(entry_log: tuple[EntryLog, Append]) -> None:
    log, append = entry_log
    assert isinstance(log, EntryReader)
    append(_events(0, 5))
    assert log.pick([]) == []
    assert log.pick([0, 3, 4]) == [log.entries(n, n + 1)[0] for n in (0, 3, 4)]
    for wanted in ([5], [0, 7], [2, 10**12]):
        with pytest.raises(StorageError, match="lacks some"):
            log.pick(wanted)


def test_entry_log_finds_by_event_id(entry_log: tuple[EntryLog, Append]) -> None:
    log, append = entry_log
    append(_events(0, 3))
    assert log.index_of(str(UUID(int=2))) == 2
    assert log.index_of(str(uuid4())) is None
    assert log.index_of("not a uuid") is None
    one, two = UUID(int=1), UUID(int=2)
    [first], [second] = log.entries(1, 2), log.entries(2, 3)
    assert log.entries_of([two, uuid4(), one]) == {one: first, two: second}
    assert log.entries_of([]) == {}


def test_entry_log_wait_returns_at_once_when_longer(entry_log: tuple[EntryLog, Append]) -> None:
    log, append = entry_log
    append(_events(0, 2))
    assert log.wait(1, 5.0) == 2


def test_entry_log_wait_times_out(entry_log: tuple[EntryLog, Append]) -> None:
    log, append = entry_log
    append(_events(0, 1))
    started = time.monotonic()
    assert log.wait(1, 0.2) == 1
    assert 0.15 < time.monotonic() - started < 2


def test_entry_log_wait_wakes_all_waiters(entry_log: tuple[EntryLog, Append]) -> None:
    log, append = entry_log
    sizes: list[int] = []
    threads = [threading.Thread(target=lambda: sizes.append(log.wait(0, 20.0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    started = time.monotonic()
    append(_events(0, 1))
    for thread in threads:
        thread.join()
    assert sizes == [1] * 4
    assert time.monotonic() - started < 5


# -- TileStore ---------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "postgres"])
def tile_store(request: pytest.FixtureRequest) -> Iterator[TileStore]:
    if request.param == "memory":
        yield MemoryTileStore()
        return
    with connect(request.getfixturevalue("pg_url")) as pool:
        yield PostgresTileStore(pool)


def _hashes(count: int, seed: int = 0) -> bytes:
    return b"".join(hashlib.sha256(b"%d %d" % (seed, i)).digest() for i in range(count))


def _checkpoint(size: int, seed: int = 0, note: bytes = b"note") -> StoredCheckpoint:
    root = hashlib.sha256(b"root %d %d" % (size, seed)).digest()
    return StoredCheckpoint(size=size, root=root, note=note, signed_at=AT + size)


def test_tile_store_empty(tile_store: TileStore) -> None:
    assert tile_store.latest() is None
    assert tile_store.checkpoint(0) is None
    assert tile_store.tile(0, 0) is None
    assert tile_store.tiles([(0, 0), (1, 0)]) == {}
    assert tile_store.tiles([]) == {}


def test_tile_store_publishes_and_grows(tile_store: TileStore) -> None:
    tile_store.publish({(0, 0): _hashes(3)}, _checkpoint(3), expected_size=0)
    full = {(0, 0): _hashes(256), (0, 1): _hashes(4, 1), (1, 0): _hashes(1, 2)}
    tile_store.publish(full, _checkpoint(260), expected_size=3)
    assert tile_store.latest() == _checkpoint(260)
    assert tile_store.checkpoint(3) == _checkpoint(3)
    assert tile_store.checkpoint(4) is None
    assert tile_store.tile(0, 0) == _hashes(256)
    assert tile_store.tiles([(0, 1), (1, 0), (9, 9)]) == {
        (0, 1): _hashes(4, 1),
        (1, 0): _hashes(1, 2),
    }


def test_tile_store_size_zero_is_a_checkpoint(tile_store: TileStore) -> None:
    tile_store.publish({}, _checkpoint(0), expected_size=0)
    assert tile_store.latest() == _checkpoint(0)
    tile_store.publish({(0, 0): _hashes(1)}, _checkpoint(1), expected_size=0)


def test_tile_store_refuses_a_fork_and_stores_nothing(tile_store: TileStore) -> None:
    tile_store.publish({(0, 0): _hashes(3)}, _checkpoint(3), expected_size=0)
    more = {(0, 0): _hashes(5), (0, 7): _hashes(1)}
    with pytest.raises(Conflict, match="size 3, not 0"):
        tile_store.publish(more, _checkpoint(5), expected_size=0)
    with pytest.raises(Conflict, match="shrink"):
        tile_store.publish(more, _checkpoint(2), expected_size=3)
    with pytest.raises(Conflict, match="fork"):
        tile_store.publish(more, _checkpoint(3, seed=1), expected_size=3)
    with pytest.raises(Conflict, match="contradict"):
        tile_store.publish(
            {(0, 7): _hashes(1), (0, 0): _hashes(5, seed=1)}, _checkpoint(5), expected_size=3
        )
    with pytest.raises(Conflict, match="contradict"):
        tile_store.publish({(0, 0): _hashes(2)}, _checkpoint(5), expected_size=3)
    assert tile_store.latest() == _checkpoint(3)
    assert tile_store.tile(0, 0) == _hashes(3)
    assert tile_store.tile(0, 7) is None


def test_tile_store_takes_more_signatures_on_the_same_checkpoint(tile_store: TileStore) -> None:
    tile_store.publish({(0, 0): _hashes(3)}, _checkpoint(3), expected_size=0)
    cosigned = _checkpoint(3, note=b"note and cosignature")
    tile_store.publish({}, cosigned, expected_size=3)
    assert tile_store.latest() == cosigned


def test_tile_store_one_of_many_publishers_wins(tile_store: TileStore) -> None:
    outcomes: list[str] = []

    def publish(seed: int) -> None:
        try:
            tile_store.publish({(0, 0): _hashes(2)}, _checkpoint(2, seed), expected_size=0)
            outcomes.append("stored")
        except Conflict:
            outcomes.append("refused")

    threads = [threading.Thread(target=publish, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 5 + ["stored"]


def test_sequencer_lock_is_exclusive(tile_store: TileStore) -> None:
    with tile_store.sequencer_lock() as first:
        assert first
        tile_store.publish({(0, 0): _hashes(1)}, _checkpoint(1), expected_size=0)
        with tile_store.sequencer_lock() as second:
            assert not second
        with tile_store.sequencer_lock() as third:
            assert not third
    with tile_store.sequencer_lock() as again:
        assert again


# -- BlobStore ---------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "local", "fsspec"])
def blob_store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "memory":
        return MemoryBlobStore()
    if request.param == "local":
        return FsspecBlobStore(tmp_path / "blobs")
    return FsspecBlobStore(f"memory://{uuid4().hex}/blobs")


@pytest.mark.parametrize("data", [b"", b"a row of text", os.urandom(100_000)])
def test_blob_store_returns_what_was_put(blob_store: BlobStore, data: bytes) -> None:
    name = hashlib.sha256(data).hexdigest()
    assert not blob_store.has(name)
    assert blob_store.put(data) == name
    assert blob_store.put(data) == name
    assert blob_store.has(name)
    assert blob_store.get(name) == data


@pytest.mark.parametrize("name", ["0" * 64, "", "../../etc/passwd", "A" * 64, "0" * 63 + "\n"])
def test_blob_store_not_found(blob_store: BlobStore, name: str) -> None:
    assert not blob_store.has(name)
    with pytest.raises(NotFound):
        blob_store.get(name)


def test_blob_store_limit(blob_store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "MAX_BLOB_BYTES", 10)
    monkeypatch.setattr("tests.fakes.MAX_BLOB_BYTES", 10)
    blob_store.put(b"0123456789")
    with pytest.raises(TooLarge, match="MAX_BLOB_BYTES"):
        blob_store.put(b"0123456789a")


def test_local_blobs_are_private_and_verified(tmp_path: Path) -> None:
    store = FsspecBlobStore(tmp_path / "blobs")
    name = store.put(b"precious")
    path = tmp_path / "blobs" / name[:2] / name[2:4] / name
    assert path.stat().st_mode & 0o777 == 0o600
    for folder in (path.parent, path.parent.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    path.write_bytes(b"Precious")
    with pytest.raises(StorageError, match="delete that file"):
        store.get(name)
    path.write_bytes(b"torn")
    store.put(b"precious")
    assert store.get(name) == b"precious"


def test_local_blob_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FsspecBlobStore(tmp_path / "blobs")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(StorageError, match="No space left"):
        store.put(b"precious")
    monkeypatch.undo()
    assert not store.has(hashlib.sha256(b"precious").hexdigest())
    assert [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()] == []


def test_a_local_blob_is_durable_when_put_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of file and folders are synced, too; by the next `put` if the first one failed."""
    store = FsspecBlobStore(tmp_path / "blobs")
    synced: list[Path] = []
    real = blobs._sync_folder

    def sync(folder: Path) -> None:
        if not synced:
            synced.append(folder)
            raise OSError(5, "Input/output error")
        synced.append(folder)
        real(folder)

    monkeypatch.setattr(blobs, "_sync_folder", sync)
    with pytest.raises(StorageError, match="Input/output"):
        store.put(b"precious")
    name = store.put(b"precious")
    assert synced[1:] == [
        tmp_path / "blobs" / name[:2] / name[2:4], tmp_path / "blobs" / name[:2], tmp_path / "blobs"
    ]  # fmt: skip
