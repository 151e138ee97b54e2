"""What the inner rooms ask of engines. Implementations live in `store`, `chain` and `workers`;
only `bootstrap` knows which one it hands out. Every port is small, and one contract suite per port
runs against each implementation."""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

Row = dict[str, Any]
Key = tuple[Any, ...]


class Clock(Protocol):
    """Microseconds since 1970, UTC."""

    def __call__(self) -> int: ...


class EntryLog(Protocol):
    """The event store read as a log: dense indexes from 0, never rewritten."""

    def size(self) -> int: ...

    def entries(self, start: int, stop: int) -> list[bytes]:
        """Entry bytes of indexes [start, stop), fewer where the log ends sooner."""
        ...

    def leaf_hashes(self, start: int, stop: int) -> list[bytes]:
        """Stored 32-byte leaf hashes of indexes [start, stop)."""
        ...

    def index_of(self, event_id: str) -> int | None:
        """Leaf index of the event with that id, or None."""
        ...

    def entries_of(self, event_ids: Sequence[UUID]) -> Mapping[UUID, bytes]:
        """Entry bytes of those events that are in the log, by their ids."""
        ...

    def wait(self, size: int, timeout_s: float) -> int:
        """Block until the log is longer than `size` or the time is over; the size then."""
        ...


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint this log has signed. `note` is the whole signed note (C2SP signed-note)."""

    size: int
    root: bytes
    note: bytes
    signed_at: int


class TileStore(Protocol):
    """Tiles and checkpoints. A tile (level, n) holds up to 256 hashes of 32 bytes, back to back.

    `publish` stores tiles and checkpoint in one transaction and refuses (Conflict) when the
    newest stored checkpoint is not `expected_size`, or is larger than the new one: two
    sequencers can never fork the log.
    """

    def tile(self, level: int, n: int) -> bytes | None: ...

    def tiles(self, wanted: Sequence[tuple[int, int]]) -> Mapping[tuple[int, int], bytes]: ...

    def latest(self) -> StoredCheckpoint | None: ...

    def checkpoint(self, size: int) -> StoredCheckpoint | None: ...

    def checkpoints(self, low: int, high: int) -> list[StoredCheckpoint]:
        """Those of sizes [low, high), ascending."""
        ...

    def publish(
        self,
        tiles: Mapping[tuple[int, int], bytes],
        checkpoint: StoredCheckpoint,
        *,
        expected_size: int,
    ) -> None: ...

    def sequencer_lock(self) -> AbstractContextManager[bool]:
        """Held by at most one process; yields whether it was obtained (no waiting)."""
        ...


class LogSource(Protocol):
    """Somebody's log as its C2SP files, wherever they lie: a folder, a database, a web server."""

    def read(self, path: str) -> bytes:
        """The file at a tlog-tiles path (`checkpoint`, `tile/...`, `tile/entries/...`).

        Raises NotFound when it is not there, Unavailable when the place does not answer.
        """
        ...


ArchivedRow = tuple[int, int, bytes, bytes, bytes | None, str | None]
"""notification_id, recorded_at, state, leaf_hash, event_id (16 bytes), topic: as stored."""
RestoredRow = tuple[UUID, int, str, bytes, int, int, bytes, UUID]
"""originator_id and version, topic, state, notification_id, recorded_at, leaf_hash, event_id."""


class Archive(Protocol):
    """A log's tables as they are, all of one moment; what lies in them may be damaged."""

    def head(self) -> tuple[int, int]:
        """Size and recorded_at of log_head."""
        ...

    def last_row(self) -> int:
        """The highest notification_id there is, 0 for none."""
        ...

    def rows(self, start: int, stop: int) -> list[ArchivedRow]:
        """Rows of leaf indexes [start, stop), those that are there, in order."""
        ...

    def streams(self, start: int, stop: int) -> list[tuple[bytes, int]]:
        """originator_id (16 bytes) and version of the same rows."""
        ...

    def broken_streams(self, *, limit: int) -> list[tuple[str, int, int]]:
        """(id, rows, highest version) of streams whose versions are not 1, 2, 3, ... in the
        order of the log."""
        ...

    def tiles(self, level: int, start: int, stop: int) -> Mapping[int, bytes]:
        """Tiles [start, stop) of a level, by number."""
        ...

    def tile_ids_from(self, limits: Mapping[int, int], *, limit: int) -> list[tuple[int, int]]:
        """(level, n) of tiles from `limits[level]` on; of a level that is not named, all."""
        ...

    def newest_checkpoint(self) -> StoredCheckpoint | None: ...

    def checkpoints(self, low: int, high: int) -> list[StoredCheckpoint]:
        """Those of sizes [low, high), ascending."""
        ...


class RestoreSession(Protocol):
    """Filling an empty store, all or nothing: whoever hands it out commits at the end."""

    def add_events(self, rows: Iterable[RestoredRow]) -> None: ...

    def add_tiles(self, tiles: Mapping[tuple[int, int], bytes]) -> None: ...

    def add_checkpoints(self, checkpoints: Sequence[StoredCheckpoint]) -> None: ...

    def set_head(self, size: int, recorded_at: int) -> None: ...


class BlobStore(Protocol):
    """Content-addressed bytes: the name is the lower-case hex SHA-256."""

    def put(self, data: bytes) -> str: ...

    def get(self, sha256: str) -> bytes:
        """Raises NotFound, or StorageError when the bytes no longer match their name."""
        ...

    def has(self, sha256: str) -> bool: ...


class Rows(Protocol):
    """What a fold may touch: rows by table and primary key. Amounts are Python ints."""

    def get(self, table: str, key: Key) -> Row | None: ...

    def put(self, table: str, key: Key, row: Row) -> None:
        """Insert or replace the row; `row` holds the non-key columns."""
        ...

    def delete(self, table: str, key: Key) -> None: ...

    def scan(self, table: str, prefix: Key = ()) -> Iterator[tuple[Key, Row]]:
        """Rows whose key starts with `prefix`, in key order."""
        ...


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """One generation for the serving engine. `adapter` is None for the base model itself.

    Either `messages`, laid out by the model's chat template, or `prompt`, taken as it is. `payer`
    is whose turn it takes: each payer and each adapter has a fair share. `logprobs` None asks for
    none, n for the chosen token's and the n likeliest. `timeout_s` counts from submission.
    """

    request_id: str
    adapter: str | None
    messages: Sequence[Mapping[str, str]] = ()
    prompt: str | None = None
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: Sequence[str] = ()
    logprobs: int | None = None
    payer: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class TokenChance:
    """A produced token, its log probability (natural), and the likeliest in its place with theirs.

    `text` alone may be half a character; `raw` are its bytes.
    """

    text: str
    raw: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ChatDelta:
    """A piece of an answer. The last one has `finish_reason` and counts.

    'stop' and 'length' are whole answers; 'deadline' and 'cancelled' were cut short.
    """

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: tuple[TokenChance, ...] = ()


class ServingEngine(Protocol):
    """OpenLoRA behind the API."""

    async def count_tokens(
        self, messages: Sequence[Mapping[str, str]], prompt: str | None = None
    ) -> int:
        """Prompt tokens of a request with these `messages`, or with this `prompt`."""
        ...

    def stream(self, request: ChatRequest) -> AsyncIterator[ChatDelta]:
        """Pieces of the answer; closing the iterator cancels the request. Raises NotFound,
        InvalidEvent, Backpressure before the first piece, ComputeError (retry) at any time."""
        ...

    async def cancel(self, request_id: str) -> None: ...

    async def stats(self) -> Mapping[str, Any]: ...

    async def aclose(self) -> None:
        """Leave the engines; answers under way raise ComputeError. Last in its event loop."""
        ...


@dataclass(frozen=True, kw_only=True)
class L1Section:
    """Proof, captured at commit time, that an EVM block holds (size, root). JSON-able."""

    value: Mapping[str, Any] = field(default_factory=dict)


class Credentials(Protocol):
    """API credentials, and who uploaded which blob."""

    def issue(self, actor: str, label: str, nonce: str, now: int) -> str: ...

    def actor_of(self, token: str) -> str | None: ...

    def revoke(self, token: str, now: int) -> None: ...

    def record_upload(self, sha256: str, actor: str, size_bytes: int, now: int) -> None: ...

    def uploaded(self, sha256: str, actor: str) -> bool: ...

    def uploads_among(self, claims: Set[tuple[str, str]]) -> set[tuple[str, str]]:
        """Those (sha256, actor) of the claims where that actor has uploaded that blob."""
        ...
