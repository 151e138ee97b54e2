"""A database again, from a folder that `tributary log export` wrote: `tributary log import`.

The folder is believed for nothing but its signature. One pass reads every entry, checks it (its
index, its signed envelope), computes its leaf hash and the tiles, and hands the rows to the store's
open transaction; at the end the computed root must be the signed one, and each stored checkpoint's
root that of the tree at its size. Only then does the transaction commit: whatever fails or is
killed before leaves the store empty, and the import is simply run again.

Restored byte for byte: entries with index and recorded_at, leaf hashes, streams and versions,
tiles, checkpoints. Not part of the log, and so not restored: blobs, keys and the signer's memory,
credentials. Projections are replayed by the projector.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ledger.domain.envelope import ENTRY_HEADER_BYTES, Envelope, decode_envelope, parse_envelope
from ledger.domain.events import check_body, stream_of
from ledger.errors import Inconsistent, InvalidEvent, MalformedProof, NotFound
from ledger.log import tree
from ledger.log.frontier import Frontier
from ledger.log.records import SIZES_PER_FILE, parse_records, record_files, record_path
from ledger.log.sources import CHECKPOINT, read_tile, width_at
from ledger.ports import LogSource, RestoredRow, RestoreSession, StoredCheckpoint
from ledger.verify.checkpoint import Checkpoint, open_checkpoint
from ledger.verify.merkle import HASH_BYTES, leaf_hash
from ledger.verify.note import VerifierKey
from ledger.verify.tiles import TILE_WIDTH, Tile, decode_entries, tile_path, tiles_of

BUNDLES_PER_STEP = 8
"""Bundles in memory at a time: at most 2,048 entries."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What is in the database now."""

    size: int
    root: bytes
    checkpoints: int


def import_log(
    source: LogSource,
    key: VerifierKey,
    restoring: AbstractContextManager[RestoreSession],
    *,
    signatures: bool = True,
    progress: Progress = lambda done, of: None,
) -> Imported:
    """Fill an empty store with the log that `key` signed.

    `restoring` commits when it is left without an error (`ledger.store.archive.restoring`). Raises
    a VerificationError or InvalidEvent that names the file when the folder is not what was signed,
    Conflict when the store is not empty; then the store is as it was.
    """
    note = source.read(CHECKPOINT)
    head = open_checkpoint(note, key).checkpoint
    with restoring as session:
        restore = _Restore(source, key, head, session, signatures=signatures)
        restore.entries(progress)
        checkpoints = restore.finish(note)
    return Imported(size=head.size, root=head.root, checkpoints=checkpoints)


class _Restore:
    def __init__(
        self,
        source: LogSource,
        key: VerifierKey,
        head: Checkpoint,
        session: RestoreSession,
        *,
        signatures: bool,
    ) -> None:
        self._source = source
        self._key = key
        self._head = head
        self._session = session
        self._signatures = signatures
        self._versions: dict[bytes, int] = {}  # by stream: 16 bytes and a counter each
        self._edge: dict[tree.TileId, bytes] = {}
        self._frontier = Frontier()
        self._checkpoints: list[StoredCheckpoint] = []
        self._restored = 0
        self._recorded_at = 0

    def entries(self, progress: Progress) -> None:
        size = 0
        self._load_records(0)
        while size < self._head.size:
            first, rows, leaves = size, list[RestoredRow](), list[bytes]()
            stop = min(size + BUNDLES_PER_STEP * TILE_WIDTH, self._head.size)
            for n in range(first // TILE_WIDTH, -(-stop // TILE_WIDTH)):
                tile = Tile(level=None, n=n, width=width_at(self._head.size, 0, n))
                for entry in self._bundle(tile):
                    rows.append(self._row(entry, first + len(rows), tile))
                    leaves.append(rows[-1][6])
                    self._next_leaf(rows[-1][6])
            self._session.add_events(rows)
            self._add_tiles(tree.integrate(size, leaves, self._read_edge))
            size = stop
            progress(size, self._head.size)

    def finish(self, note: bytes) -> int:
        """Root, right edge, newest checkpoint, head. The number of checkpoints."""
        if self._frontier.root() != self._head.root:
            raise Inconsistent(
                f"the entries lead to root {self._frontier.root().hex()} at size "
                f"{self._head.size}, the checkpoint is signed for {self._head.root.hex()}: "
                "`tributary audit` names the bad byte; nothing was imported"
            )
        edge = [(t.level, t.n) for t in tiles_of(self._head.size) if t.width < TILE_WIDTH]
        self._session.add_tiles({(lv, n): self._edge[lv, n] for lv, n in edge if lv is not None})
        last = self._checkpoints[-1] if self._checkpoints else None
        if last is None or last.size < self._head.size:
            # A mirror without records: the newest checkpoint is all there is.
            newest = StoredCheckpoint(
                size=self._head.size, root=self._head.root, note=note, signed_at=self._recorded_at
            )
            self._checkpoints.append(newest)
        self._session.add_checkpoints(self._checkpoints)
        self._session.set_head(self._head.size, self._recorded_at)
        return self._restored + len(self._checkpoints)

    # -- one entry ---------------------------------------------------------------------------------

    def _bundle(self, tile: Tile) -> list[bytes]:
        try:
            return decode_entries(read_tile(self._source, tile), tile.width)
        except (MalformedProof, NotFound) as error:
            raise MalformedProof(
                f"{tile_path(tile)}: {error}; `tributary audit` names the bad byte; nothing was "
                "imported"
            ) from error

    def _row(self, entry: bytes, index: int, tile: Tile) -> RestoredRow:
        recorded_at = int.from_bytes(entry[8:ENTRY_HEADER_BYTES], "big")
        if int.from_bytes(entry[:8], "big") != index or recorded_at < self._recorded_at:
            raise Inconsistent(
                f"{tile_path(tile)}: entry {index} carries index {int.from_bytes(entry[:8], 'big')}"
                f" and time {recorded_at}, after {self._recorded_at}; nothing was imported"
            )
        self._recorded_at = recorded_at
        event = self._event(entry[ENTRY_HEADER_BYTES:], index, tile)
        stream = stream_of(event.type, event.log, event.actor, event.body)
        version = self._versions.get(stream.bytes, 0) + 1
        self._versions[stream.bytes] = version
        leaf = leaf_hash(entry)
        return stream, version, event.type, event.raw, index + 1, recorded_at, leaf, event.id

    def _event(self, raw: bytes, index: int, tile: Tile) -> Envelope:
        try:
            if self._signatures:
                event = parse_envelope(raw, log=self._key.name)
            else:
                event = decode_envelope(raw)
            check_body(event.type, event.body)
        except InvalidEvent as error:
            raise InvalidEvent(
                f"{tile_path(tile)}: entry {index} is no event of this log: {error}; nothing was "
                "imported"
            ) from error
        return event

    # -- tree and checkpoints ----------------------------------------------------------------------

    def _next_leaf(self, leaf: bytes) -> None:
        self._frontier.append(leaf)
        size = self._frontier.size
        while self._checkpoints_due and self._checkpoints_due[-1].size == size:
            self._keep(self._checkpoints_due.pop())
        if size % SIZES_PER_FILE == SIZES_PER_FILE - 1 and size < self._head.size:
            self._flush_checkpoints()
            self._load_records(size // SIZES_PER_FILE + 1)

    def _load_records(self, number: int) -> None:
        """The checkpoints of the sizes that come next, the last one first."""
        self._checkpoints_due: list[StoredCheckpoint] = []
        if number not in record_files(self._head.size):
            return
        try:
            lines = parse_records(self._source.read(record_path(number)), number)
        except NotFound:
            return
        due = [line.checkpoint for line in lines if line.checkpoint.size <= self._head.size]
        self._checkpoints_due = due[::-1]
        if due and due[0].size == 0:
            self._keep(self._checkpoints_due.pop())

    def _keep(self, checkpoint: StoredCheckpoint) -> None:
        head = open_checkpoint(checkpoint.note, self._key).checkpoint
        if head.root != self._frontier.root():
            raise Inconsistent(
                f"{record_path(head.size // SIZES_PER_FILE)}: the checkpoint of size {head.size} "
                f"has root {head.root.hex()}, the entries give {self._frontier.root().hex()}: "
                "signed by this log, that is a fork: keep it; nothing was imported"
            )
        self._checkpoints.append(checkpoint)

    def _flush_checkpoints(self) -> None:
        self._session.add_checkpoints(self._checkpoints)
        self._restored += len(self._checkpoints)
        self._checkpoints.clear()

    def _add_tiles(self, changed: dict[tree.TileId, bytes]) -> None:
        full = {id: data for id, data in changed.items() if len(data) == TILE_WIDTH * HASH_BYTES}
        self._session.add_tiles(full)
        self._edge.update(changed)
        newest = {level: max(n for at, n in self._edge if at == level) for level, _ in self._edge}
        for level, n in [id for id in self._edge if id[1] < newest[id[0]]]:
            del self._edge[level, n]

    def _read_edge(self, wanted: Sequence[tree.TileId]) -> dict[tree.TileId, bytes]:
        return {id: self._edge[id] for id in wanted if id in self._edge}
