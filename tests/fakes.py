"""In-memory implementations of the store's ports, for tests of other rooms.

They pass the same contract suites as the real ones (tests/unit/test_store_contracts.py).
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from uuid import UUID

from ledger.domain.envelope import encode_entry, leaf_hash
from ledger.errors import Conflict, NotFound, StorageError, TooLarge
from ledger.ports import StoredCheckpoint
from ledger.store.blobs import MAX_BLOB_BYTES
from ledger.store.tiles import check_successor


class MemoryEntryLog:
    """EntryLog over a list. `append` is the test's writer: it takes envelope bytes (any bytes)."""

    def __init__(self) -> None:
        self._entries: list[bytes] = []
        self._indexes: dict[str, int] = {}
        self._grown = threading.Condition()

    def append(self, raw: bytes, *, event_id: UUID | None = None, recorded_at: int = 0) -> int:
        """Leaf index of the new entry."""
        with self._grown:
            index = len(self._entries)
            if event_id is not None:
                if str(event_id) in self._indexes:
                    raise Conflict(f"event {event_id} is recorded already")
                self._indexes[str(event_id)] = index
            self._entries.append(encode_entry(index, recorded_at, raw))
            self._grown.notify_all()
            return index

    def size(self) -> int:
        with self._grown:
            return len(self._entries)

    def entries(self, start: int, stop: int) -> list[bytes]:
        with self._grown:
            return self._entries[start : max(start, stop)]

    def pick(self, indexes: Sequence[int]) -> list[bytes]:
        found = [self.entries(index, index + 1) for index in indexes]
        if not all(found):
            raise StorageError(f"lacks some of {list(indexes)[:10]}")
        return [entry for (entry,) in found]

    def leaf_hashes(self, start: int, stop: int) -> list[bytes]:
        return [leaf_hash(entry) for entry in self.entries(start, stop)]

    def index_of(self, event_id: str) -> int | None:
        try:
            return self._indexes.get(str(UUID(event_id)))
        except ValueError:
            return None

    def entries_of(self, event_ids: Sequence[UUID]) -> Mapping[UUID, bytes]:
        indexes = {event: self.index_of(str(event)) for event in event_ids}
        return {e: self._entries[index] for e, index in indexes.items() if index is not None}

    def wait(self, size: int, timeout_s: float) -> int:
        with self._grown:
            self._grown.wait_for(lambda: len(self._entries) > size, max(0.0, timeout_s))
            return len(self._entries)


class MemoryTileStore:
    """TileStore over dicts, with the same guards as the PostgreSQL one."""

    def __init__(self) -> None:
        self._tiles: dict[tuple[int, int], bytes] = {}
        self._checkpoints: dict[int, StoredCheckpoint] = {}
        self._lock = threading.Lock()
        self._sequencer = threading.Lock()

    def tile(self, level: int, n: int) -> bytes | None:
        with self._lock:
            return self._tiles.get((level, n))

    def tiles(self, wanted: Sequence[tuple[int, int]]) -> Mapping[tuple[int, int], bytes]:
        with self._lock:
            return {key: self._tiles[key] for key in wanted if key in self._tiles}

    def latest(self) -> StoredCheckpoint | None:
        with self._lock:
            return self._latest()

    def checkpoint(self, size: int) -> StoredCheckpoint | None:
        with self._lock:
            return self._checkpoints.get(size)

    def checkpoints(self, low: int, high: int) -> list[StoredCheckpoint]:
        with self._lock:
            return [
                self._checkpoints[size] for size in sorted(self._checkpoints) if low <= size < high
            ]

    def publish(
        self,
        tiles: Mapping[tuple[int, int], bytes],
        checkpoint: StoredCheckpoint,
        *,
        expected_size: int,
    ) -> None:
        with self._lock:
            check_successor(self._latest(), checkpoint, expected_size)
            for key, hashes in tiles.items():
                if not hashes.startswith(self._tiles.get(key, b"")):
                    raise Conflict(f"tile {key} contradicts what is stored")
            self._tiles.update(tiles)
            self._checkpoints[checkpoint.size] = checkpoint

    @contextmanager
    def sequencer_lock(self) -> Iterator[bool]:
        obtained = self._sequencer.acquire(blocking=False)
        try:
            yield obtained
        finally:
            if obtained:
                self._sequencer.release()

    def _latest(self) -> StoredCheckpoint | None:
        return self._checkpoints[max(self._checkpoints)] if self._checkpoints else None


class MemoryBlobStore:
    """BlobStore over a dict; `blobs` may be tampered with by a test."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def put(self, data: bytes) -> str:
        if len(data) > MAX_BLOB_BYTES:
            raise TooLarge(f"MAX_BLOB_BYTES = {MAX_BLOB_BYTES}")
        name = hashlib.sha256(data).hexdigest()
        self.blobs[name] = bytes(data)
        return name

    def get(self, sha256: str) -> bytes:
        if sha256 not in self.blobs:
            raise NotFound(f"no blob {sha256}")
        data = self.blobs[sha256]
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(f"blob {sha256} does not match its name")
        return data

    def has(self, sha256: str) -> bool:
        return sha256 in self.blobs
