"""Sequence, integrate, sign, publish: and every step failed, before and after it took effect."""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ledger.errors import Conflict, Inconsistent, NotFound, StorageError
from ledger.log import sequencer as room
from ledger.log.prover import Prover
from ledger.log.sequencer import Sequencer
from ledger.log.serving import BINARY, TEXT, LogFiles
from ledger.log.signer import LogSigner, SignedTree
from ledger.ports import StoredCheckpoint
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.merkle import leaf_hash, tree_root, verify_consistency, verify_inclusion
from ledger.verify.note import sign_text
from ledger.verify.tiles import decode_entries, tile_hashes, tile_path, tiles_of
from ledger.verify.tlog_proof import verify_tlog_proof
from tests.fakes import MemoryEntryLog, MemoryTileStore
from tests.unit.lineage_world import ORIGIN, key


class House:
    """A log and its sequencer; `restart` is what a crash leaves: disk and store, no memory."""

    def __init__(self, folder: Path, tiles: MemoryTileStore | None = None) -> None:
        self.folder = folder
        self.log = MemoryEntryLog()
        self.tiles = tiles or MemoryTileStore()
        self.restart()

    def restart(self) -> None:
        self.signer = LogSigner(origin=ORIGIN, key=key("log"), state_path=self.folder / "s.json")
        self.sequencer = Sequencer(
            log=self.log, tiles=self.tiles, signer=self.signer, clock=lambda: 5
        )

    def grow(self, count: int) -> None:
        for _ in range(count):
            self.log.append(b"entry %d" % self.log.size())

    def audit(self) -> None:
        """The newest checkpoint is signed, its tiles are complete, and all of it is the log."""
        latest = self.tiles.latest()
        assert latest
        head = open_checkpoint(latest.note, self.signer.vkey).checkpoint
        assert (head.size, head.root) == (latest.size, latest.root)
        leaves = self.log.leaf_hashes(0, head.size)
        assert len(leaves) == head.size
        assert tree_root(leaves) == head.root
        level = leaves
        for edge in tiles_of(head.size):
            stored = [self.tiles.tile(edge.level or 0, n) or b"" for n in range(edge.n + 1)]
            widths = [256] * edge.n + [edge.width]
            hashes = [h for t, w in zip(stored, widths, strict=True) for h in tile_hashes(t, w)]
            assert hashes == level
            level = [tree_root(level[n : n + 256]) for n in range(0, len(level) - 255, 256)]


def test_an_empty_log_has_a_checkpoint(tmp_path: Path) -> None:
    house = House(tmp_path)
    first = house.sequencer.step()
    assert first
    assert first.size == 0
    assert first.signed_at == 5
    assert house.sequencer.step() is None


def test_it_follows_the_log(tmp_path: Path) -> None:
    house = House(tmp_path)
    for count in (1, 1, 253, 1, 1, 700, 255):
        house.grow(count)
        checkpoint = house.sequencer.step()
        assert checkpoint
        assert checkpoint.size == house.log.size()
        house.audit()
    assert house.sequencer.step() is None


def test_batches_and_steps_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BATCH_LEAVES", 10)
    monkeypatch.setattr(room, "MAX_LEAVES_PER_CHECKPOINT", 300)
    house = House(tmp_path)
    house.grow(700)
    asked: list[int] = []
    honest = house.log.leaf_hashes

    def counted(start: int, stop: int) -> list[bytes]:
        asked.append(stop - start)
        return honest(start, stop)

    house.log.leaf_hashes = counted  # type: ignore[method-assign]
    sizes = [c.size for c in iter(house.sequencer.step, None)]
    assert sizes == [300, 600, 700]
    assert max(asked) == 10
    house.audit()


class Faulty(MemoryTileStore):
    """A tile store whose next call of a method fails, before or after it took effect."""

    def __init__(self) -> None:
        super().__init__()
        self.fail: tuple[str, str] | None = None

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        when = self.fail[1] if self.fail and self.fail[0] == method else None
        if when:
            self.fail = None
        if when == "lost":
            raise StorageError("lost")
        result = getattr(MemoryTileStore, method)(self, *args, **kwargs)
        if when == "kept":
            raise StorageError("kept, though reported failed")
        return result

    def publish(self, *args: Any, **kwargs: Any) -> None:
        self._call("publish", *args, **kwargs)

    def tiles(self, wanted: Sequence[tuple[int, int]]) -> Mapping[tuple[int, int], bytes]:
        found: Mapping[tuple[int, int], bytes] = self._call("tiles", wanted)
        return found

    def latest(self) -> StoredCheckpoint | None:
        found: StoredCheckpoint | None = self._call("latest")
        return found


@pytest.mark.parametrize("grown", [0, 40])
@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("when", ["lost", "kept"])
@pytest.mark.parametrize("method", ["publish", "tiles", "latest"])
def test_every_store_call_fails_twice(
    tmp_path: Path, method: str, when: str, restart: bool, grown: int
) -> None:
    tiles = Faulty()
    house = House(tmp_path, tiles)
    house.grow(300)
    house.sequencer.step()
    for _ in range(2):
        house.grow(300)
        tiles.fail = (method, when)
        with pytest.raises(StorageError):
            house.sequencer.step()
        house.grow(grown)  # writers go on meanwhile
        if restart:
            house.restart()
        while house.sequencer.step():
            pass
        house.audit()
        assert tiles.latest().size == house.log.size()  # type: ignore[union-attr]


@pytest.mark.parametrize("point", ["_remember", "sign_text"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_the_signature(
    tmp_path: Path, point: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is ahead of the store, or is not: the next run signs an extension of both."""
    house = House(tmp_path)
    house.grow(10)
    house.sequencer.step()
    house.grow(300)
    target: Any = LogSigner if point == "_remember" else "ledger.log.signer"
    honest = LogSigner._remember if point == "_remember" else sign_text

    def killed(*args: Any, **kwargs: Any) -> Any:
        if when == "after":
            honest(*args, **kwargs)
        raise KeyboardInterrupt

    if point == "_remember":
        monkeypatch.setattr(target, point, killed)
    else:
        monkeypatch.setattr(f"{target}.{point}", killed)
    with pytest.raises(KeyboardInterrupt):
        house.sequencer.step()
    monkeypatch.undo()
    house.restart()
    ahead = house.signer.remembered()
    assert ahead
    assert ahead.size == (10 if (point, when) == ("_remember", "before") else 310)
    house.grow(5)
    while house.sequencer.step():
        pass
    house.audit()


def test_it_integrates_as_far_as_was_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is far ahead: one small step must not end below it."""
    house = House(tmp_path)
    house.grow(500)
    house.sequencer.step()
    empty = MemoryTileStore()  # an older copy of the tiles
    monkeypatch.setattr(room, "MAX_LEAVES_PER_CHECKPOINT", 10)
    house.tiles = empty
    house.restart()
    checkpoint = house.sequencer.step()
    assert checkpoint
    assert checkpoint.size == 500
    house.audit()


def test_a_restored_older_backup_is_refused(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.grow(20)
    house.sequencer.step()
    older = House(tmp_path)  # log and tiles are gone, the signer's memory is not
    older.grow(19)
    with pytest.raises(Inconsistent, match="older backup"):
        older.sequencer.step()
    older.grow(1)
    older.log._entries[3] = b"another history"
    with pytest.raises(Inconsistent, match="refused to sign"):
        older.sequencer.step()
    stop = threading.Event()
    with pytest.raises(Inconsistent):
        older.sequencer.run(stop)
    assert isinstance(older.sequencer.failure, Inconsistent)


def test_entries_lost_below_the_checkpoint(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.grow(20)
    house.sequencer.step()
    (tmp_path / "s.json").unlink()
    del house.log._entries[15:]
    with pytest.raises(Inconsistent, match="holds 15 entries"):
        house.sequencer.step()


def test_a_tile_that_was_altered_is_not_signed_over(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.grow(20)
    house.sequencer.step()
    tile = bytearray(house.tiles.tile(0, 0) or b"")
    tile[40] ^= 1
    house.tiles._tiles[0, 0] = bytes(tile)
    house.grow(1)
    with pytest.raises(Inconsistent, match="refused to sign"):
        house.sequencer.step()
    house.tiles._tiles.clear()
    with pytest.raises(StorageError, match="missing"):
        house.sequencer.step()


def test_two_sequencers_cannot_fork(tmp_path: Path) -> None:
    """The second lost its lock without notice: publish refuses it, then it follows."""
    house = House(tmp_path)
    house.grow(5)
    house.sequencer.step()
    second = Sequencer(
        log=house.log,
        tiles=house.tiles,
        signer=LogSigner(origin=ORIGIN, key=key("log"), state_path=tmp_path / "other.json"),
        clock=lambda: 6,
    )
    house.grow(5)
    honest = house.tiles.publish

    def slow(*args: Any, **kwargs: Any) -> None:
        house.tiles.publish = honest  # type: ignore[method-assign]
        second.step()
        honest(*args, **kwargs)

    house.tiles.publish = slow  # type: ignore[method-assign]
    with pytest.raises(Conflict):
        house.sequencer.step()
    house.grow(1)
    assert house.sequencer.step()
    house.audit()


def test_run_keeps_up_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "RETRY_S", 0.02)
    tiles = Faulty()
    house = House(tmp_path, tiles)
    stop = threading.Event()
    thread = threading.Thread(target=house.sequencer.run, args=(stop,))
    with tiles.sequencer_lock() as held:  # somebody else sequences
        assert held
        thread.start()
        house.grow(3)
        time.sleep(0.1)
        assert tiles.latest() is None
    try:
        for n in range(4):
            began = time.monotonic()
            house.grow(50)
            if n == 2:
                tiles.fail = ("publish", "lost")
            while (tiles.latest() or StoredCheckpoint(size=0, root=b"", note=b"", signed_at=0)
                   ).size < house.log.size():  # fmt: skip
                assert time.monotonic() - began < 5
                time.sleep(0.005)
            assert time.monotonic() - began < 1
    finally:
        stop.set()
        thread.join(5)
    assert not thread.is_alive()
    assert house.sequencer.failure is None
    house.audit()


# --- proofs and files ---


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    house = House(tmp_path_factory.mktemp("house"))
    for size in (3, 300, 70_000):
        house.grow(size - house.log.size())
        house.sequencer.step()
    house.grow(7)  # stored, not yet signed for
    return house


def test_proofs_from_tiles(house: House) -> None:
    prover = Prover(house.tiles)
    latest = house.tiles.latest()
    assert latest
    for index in (0, 2, 255, 256, 65_535, 65_536, 69_999):
        leaf = house.log.leaf_hashes(index, index + 1)[0]
        text = prover.tlog_proof(index, latest)
        proof, _ = verify_tlog_proof(text, leaf, house.signer.vkey)
        assert proof.index == index
    small = house.tiles.checkpoint(300)
    assert small
    assert prover.root(300) == small.root
    leaf = house.log.leaf_hashes(299, 300)[0]
    verify_inclusion(
        index=299, size=300, leaf=leaf, proof=prover.inclusion(299, 300), root=small.root
    )
    verify_consistency(
        size1=300,
        size2=latest.size,
        root1=small.root,
        root2=latest.root,
        proof=prover.consistency(300, latest.size),
    )


def test_many_proofs_are_one_read(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    honest = house.tiles.tiles

    def counted(wanted: Sequence[tuple[int, int]]) -> Mapping[tuple[int, int], bytes]:
        reads.append(len(wanted))
        return honest(wanted)

    monkeypatch.setattr(house.tiles, "tiles", counted)
    Prover(house.tiles).inclusions(range(256, 512), 70_000)
    assert len(reads) == 1
    assert reads[0] <= 6


def test_no_proof_of_what_is_not_there(house: House) -> None:
    prover = Prover(house.tiles)
    for index, size in ((5, 5), (-1, 5)):
        with pytest.raises(NotFound):
            prover.inclusion(index, size)
    with pytest.raises(NotFound):
        prover.consistency(6, 5)
    with pytest.raises(StorageError):
        prover.root(80_000)


def test_a_stranger_walks_the_whole_log_by_its_files(house: House) -> None:
    files = LogFiles(log=house.log, tiles=house.tiles)
    note, kind, immutable = files.serve_path("checkpoint")
    assert (kind, immutable) == (TEXT, False)
    head = open_checkpoint(note, house.signer.vkey).checkpoint
    leaves: list[bytes] = []
    hashes: dict[int, list[bytes]] = {}
    for edge in tiles_of(head.size):
        for n in range(edge.n + 1):
            tile = edge if n == edge.n else type(edge)(level=edge.level, n=n)
            data, kind, immutable = files.serve_path(tile_path(tile))
            assert (kind, immutable) == (BINARY, True)
            hashes.setdefault(edge.level or 0, []).extend(tile_hashes(data, tile.width))
            if edge.level == 0:
                entries = type(edge)(level=None, n=n, width=tile.width)
                bundle = files.serve_path(tile_path(entries))[0]
                leaves += map(leaf_hash, decode_entries(bundle, tile.width))
    assert leaves == hashes[0]
    assert tree_root(leaves) == head.root
    for level in (1, 2):
        below = hashes[level - 1]
        full = range(0, len(below) - 255, 256)
        assert hashes[level] == [tree_root(below[n : n + 256]) for n in full]


def test_partial_tiles_of_earlier_checkpoints(house: House) -> None:
    files = LogFiles(log=house.log, tiles=house.tiles)
    small = files.serve_path("tile/0/000.p/3")[0]
    assert tile_hashes(small, 3) == house.log.leaf_hashes(0, 3)
    assert decode_entries(files.serve_path("tile/entries/001.p/44")[0], 44) == house.log.entries(
        256, 300
    )


@pytest.mark.parametrize(
    "path",
    [
        "",
        "tile/0/273",
        "tile/0/273.p/113",
        "tile/0/274.p/1",
        "tile/entries/273.p/113",
        "tile/1/001",
        "tile/2/000",
        "tile/2/000.p/2",
        "tile/3/000.p/1",
        "tile/63/x001/000",
        "../checkpoint",
        "checkpoint/",
    ],
)
def test_what_is_not_signed_for_is_not_served(house: House, path: str) -> None:
    with pytest.raises(NotFound):
        LogFiles(log=house.log, tiles=house.tiles).serve_path(path)


def test_before_the_first_checkpoint() -> None:
    files = LogFiles(log=MemoryEntryLog(), tiles=MemoryTileStore())
    with pytest.raises(NotFound, match="not signed a checkpoint yet"):
        files.serve_path("checkpoint")


def test_signed_tree_is_a_value() -> None:
    assert SignedTree(size=1, root=b"x") == SignedTree(size=1, root=b"x")
