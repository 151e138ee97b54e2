"""The log as static files that any web server can serve: c2sp.org/tlog-tiles in a folder.

Beside the C2SP files lie `vkey` (the log's public key) and `checkpoints/<K>` (`records.py`). One
run brings the folder from the checkpoint it has to the source's newest one, and writes only what
is new, in this order:

1. prove, from the source's tiles, that its checkpoint extends the folder's (nothing written)
2. entry bundles, then tiles, step by step. The tiles are not copied: they are computed from the
   entries that were written, and each entry must carry its own index.
3. the computed root must be the signed one. Then the folders' names are made durable.
4. checkpoint records, then `checkpoint`, by rename. Only now does a reader see the new tree.
5. partial tiles whose full tile is there are removed (the specification allows it).

A file of a tree that was published is never changed, but for `checkpoint` and the newest records.
So a crash, a full disk or a failed write, wherever it comes, leaves the old tree whole, and beside
it files that nothing points at; the next run finds them right and keeps them, or writes them again.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ledger.errors import Conflict, Inconsistent, NotFound, StorageError, VerificationError
from ledger.files import PUBLIC, make_folder, sync_folder, write_durably
from ledger.log import tree
from ledger.log.records import SIZES_PER_FILE, format_records, parse_records, record_path
from ledger.log.sources import CHECKPOINT, VKEY, FolderSource, read_tile, tile_reader, width_at
from ledger.ports import LogSource
from ledger.verify.checkpoint import Checkpoint, open_checkpoint
from ledger.verify.merkle import EMPTY_ROOT, HASH_BYTES, leaf_hash, verify_consistency
from ledger.verify.note import VerifierKey, format_vkey
from ledger.verify.tiles import TILE_WIDTH, Tile, decode_entries, tile_path, tiles_of

BUNDLES_PER_STEP = 32
"""Entry bundles held in memory at a time: at most 8,192 entries."""
NOTHING = Checkpoint(origin="", size=0, root=EMPTY_ROOT)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What a run did. Files that were there already, to the byte, count as kept."""

    size: int
    root: bytes
    previous_size: int
    written: int
    kept: int
    bytes_written: int


@dataclass(kw_only=True)
class FolderWriter:
    """Puts files into the folder, durably. Tests put failures between its calls."""

    folder: Path
    written: int = 0
    kept: int = 0
    bytes_written: int = 0
    _unsynced: set[Path] = field(default_factory=set)

    def put(self, path: str, data: bytes) -> None:
        """Whole or not at all; the name is durable after `flush`. Equal bytes are left alone."""
        target = self.folder / path
        self._unsynced.add(target.parent)  # a run that was killed may not have come to its flush
        if _holds(target, data):
            self.kept += 1
            return
        write_durably(target, data, mode=PUBLIC, sync=False)
        self.written += 1
        self.bytes_written += len(data)

    def flush(self) -> None:
        while self._unsynced:
            sync_folder(self._unsynced.pop())

    def remove_tree(self, path: str) -> None:
        shutil.rmtree(self.folder / path, ignore_errors=True)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except (FileNotFoundError, NotADirectoryError):
        return False


def export_log(
    source: LogSource, folder: Path, key: VerifierKey, *, writer: FolderWriter | None = None
) -> Exported:
    """Bring `folder` up to the newest checkpoint of `source`, which must be signed by `key`.

    Raises Inconsistent (or another VerificationError) when the source does not extend what the
    folder holds or is not what was signed; StorageError when a write fails; Conflict when another
    export writes this folder or it holds another log. The folder then serves what it served.
    """
    writer = writer or FolderWriter(folder=folder)
    with _disk(folder):
        make_folder(folder)
        with _only_writer(folder):
            return _export(source, FolderSource(folder), key, writer)


def _export(
    source: LogSource, there: FolderSource, key: VerifierKey, writer: FolderWriter
) -> Exported:
    _refuse_another_log(there, key)
    old = _published(there, key)
    note = source.read(CHECKPOINT)
    new = open_checkpoint(note, key).checkpoint
    # 1. Nothing is written before this holds.
    _check_extends(source, old, new)
    # 2. Entries and tiles.
    edge = _edge(there, old)
    _grow(source, old, new, edge, writer)
    # 3. What was written is what was signed.
    root = tree.root(new.size, lambda wanted: {id: edge[id] for id in wanted if id in edge})
    if root != new.root:
        raise Inconsistent(
            f"the entries of the source lead to root {root.hex()} at size {new.size}, the "
            f"checkpoint is signed for {new.root.hex()}: `tributary audit` finds the bad entry. "
            f"The folder still serves size {old.size}"
        )
    writer.flush()
    # 4. Publish.
    _put_records(source, old, new, key, writer)
    writer.put(VKEY, f"{format_vkey(key)}\n".encode())
    writer.flush()
    writer.put(CHECKPOINT, note)
    writer.flush()
    # 5. Tidy. A crash before this leaves partial tiles that are right, and harmless.
    _drop_partials(old, new, writer)
    return Exported(
        size=new.size,
        root=new.root,
        previous_size=old.size,
        written=writer.written,
        kept=writer.kept,
        bytes_written=writer.bytes_written,
    )


# --- where the folder stands ---


def _refuse_another_log(there: FolderSource, key: VerifierKey) -> None:
    try:
        text = there.read(VKEY).decode("utf-8", "replace").strip()
    except NotFound:
        return
    if text != format_vkey(key):
        raise Conflict(
            f"{there.folder} holds the log of {text[:200]}, not of {format_vkey(key)}: export into "
            "another folder"
        )


def _published(there: FolderSource, key: VerifierKey) -> Checkpoint:
    """The tree that the folder serves; the empty one at first."""
    try:
        return open_checkpoint(there.read(CHECKPOINT), key).checkpoint
    except NotFound:
        return NOTHING


def _check_extends(source: LogSource, old: Checkpoint, new: Checkpoint) -> None:
    if new.size < old.size:
        raise Inconsistent(
            f"the source has signed {new.size} entries, the folder holds {old.size}: the source is "
            "older, or was restored from an older backup. Nothing was written"
        )
    read = tile_reader(source, new.size)
    try:
        proof = tree.range_hashes(tree.consistency_ranges(old.size, new.size), read)
        verify_consistency(
            size1=old.size, size2=new.size, root1=old.root, root2=new.root, proof=proof
        )
    except (VerificationError, NotFound) as error:
        raise Inconsistent(
            f"the source's checkpoint of size {new.size} does not extend the folder's of size "
            f"{old.size}: {error}. Both are signed by this log, so one of them is a fork (keep "
            "both), unless the source's tiles are damaged: `tributary audit` tells. Nothing was "
            "written"
        ) from error


def _edge(there: FolderSource, old: Checkpoint) -> dict[tree.TileId, bytes]:
    """The right edge of the folder's tree: what growing starts from. Checked against its root."""
    read = tile_reader(there, old.size)
    try:
        edge = dict(read([(t.level, t.n) for t in tiles_of(old.size) if t.level is not None]))
        root = tree.root(old.size, lambda wanted: edge)
    except (VerificationError, NotFound, StorageError) as error:
        root = error.message.encode()
    if root != old.root:
        raise Inconsistent(
            f"the tiles in {there.folder} do not lead to the checkpoint of size {old.size} that "
            f"lies beside them: `tributary audit {there.folder}` names the damage; export into a "
            "new folder"
        )
    return edge


# --- growing ---


def _grow(
    source: LogSource,
    old: Checkpoint,
    new: Checkpoint,
    edge: dict[tree.TileId, bytes],
    writer: FolderWriter,
) -> None:
    """Bundles and tiles of [old, new). `edge` ends as the right edge of the new tree."""
    size = old.size
    while size < new.size:
        first = size // TILE_WIDTH
        stop = min((first + BUNDLES_PER_STEP) * TILE_WIDTH, new.size)
        leaves: list[bytes] = []
        for n in range(first, -(-stop // TILE_WIDTH)):
            tile = Tile(level=None, n=n, width=width_at(new.size, 0, n))
            data = read_tile(source, tile)
            leaves += _leaves(decode_entries(data, tile.width), n * TILE_WIDTH, tile_path(tile))
            writer.put(tile_path(tile), data)
        known = leaves[: size % TILE_WIDTH]
        if b"".join(known) != edge.get((0, first), b"")[: len(known) * HASH_BYTES] and known:
            raise Inconsistent(
                f"entries before {size} are not those that the folder holds: the source was "
                "rewritten. The folder still serves its old tree"
            )
        _put_tiles(edge, tree.integrate(size, leaves[len(known) :], _reader(edge)), writer)
        size = stop
    for tile in tiles_of(new.size):
        if tile.width < TILE_WIDTH and tile.level is not None:
            writer.put(tile_path(tile), edge[tile.level, tile.n])


def _leaves(entries: list[bytes], first: int, path: str) -> list[bytes]:
    for index, entry in enumerate(entries, first):
        if int.from_bytes(entry[:8], "big") != index or len(entry) <= 16:
            raise Inconsistent(
                f"the source's {path} has an entry without its own index {index}: `tributary "
                "audit` finds out more. The folder still serves its old tree"
            )
    return [leaf_hash(entry) for entry in entries]


def _reader(edge: dict[tree.TileId, bytes]) -> tree.ReadTiles:
    return lambda wanted: {id: edge[id] for id in wanted if id in edge}


def _put_tiles(
    edge: dict[tree.TileId, bytes], changed: dict[tree.TileId, bytes], writer: FolderWriter
) -> None:
    """Full tiles are written, and forgotten but for the newest of each level."""
    for (level, n), hashes in changed.items():
        if len(hashes) == TILE_WIDTH * HASH_BYTES:
            writer.put(tile_path(Tile(level=level, n=n)), hashes)
    edge.update(changed)
    newest = {level: max(n for at, n in edge if at == level) for level, _ in edge}
    for level, n in [id for id in edge if id[1] < newest[id[0]]]:
        del edge[level, n]


# --- publishing ---


def _put_records(
    source: LogSource, old: Checkpoint, new: Checkpoint, key: VerifierKey, writer: FolderWriter
) -> None:
    """Records from the file on that the folder's newest checkpoint is in. Signatures that an older
    checkpoint gains later do not come over."""
    for number in range(old.size // SIZES_PER_FILE, new.size // SIZES_PER_FILE + 1):
        try:
            lines = parse_records(source.read(record_path(number)), number)
        except NotFound:
            continue  # a source that is no ledger of ours has none
        # The source may have signed more since its checkpoint was read.
        known = [line.checkpoint for line in lines if line.checkpoint.size <= new.size]
        for checkpoint in known:
            if checkpoint.size > old.size:
                open_checkpoint(checkpoint.note, key)
        if known:
            writer.put(record_path(number), format_records(known))


def _drop_partials(old: Checkpoint, new: Checkpoint, writer: FolderWriter) -> None:
    for tile in tiles_of(old.size):
        if tile.width < TILE_WIDTH and width_at(new.size, tile.level or 0, tile.n) == TILE_WIDTH:
            levels = (tile.level, None) if tile.level == 0 else (tile.level,)
            for level in levels:
                writer.remove_tree(f"{tile_path(Tile(level=level, n=tile.n))}.p")


# --- the disk ---


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """The kernel drops the lock when the process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"another export is writing {folder}: wait for it") from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or folder}: {error.strerror or error}. What the folder "
            "served before it serves still; free the disk or mend the rights, and run the same "
            "export again"
        ) from error
