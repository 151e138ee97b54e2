"""The signer signs one history: whatever its caller, its memory or its disk does."""

import json
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from ledger.errors import ConfigError, Inconsistent, StorageError
from ledger.log import tree
from ledger.log.signer import LogSigner, SignedTree
from ledger.ports import StoredCheckpoint
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.merkle import leaf_hash, tree_root
from ledger.verify.note import format_skey, parse_vkey

ORIGIN = "log.example/one"


def leaves(size: int, fork: int = 1_000) -> list[bytes]:
    """A history; from leaf `fork` on it is another one."""
    return [leaf_hash(b"%d %d" % (n, n >= fork)) for n in range(size)]


class History:
    def __init__(self, size: int, fork: int = 1_000) -> None:
        self.leaves = leaves(size, fork)
        self.tree = SignedTree(size=size, root=tree_root(self.leaves))

    def prove_from(self, old: int) -> Sequence[bytes]:
        stored = tree.integrate(0, self.leaves, lambda wanted: {})
        ranges = tree.consistency_ranges(old, self.tree.size)
        return tree.range_hashes(ranges, lambda wanted: stored)

    def signed_by(
        self, signer: LogSigner, published: StoredCheckpoint | None = None
    ) -> StoredCheckpoint:
        note = signer.sign(self.tree, published=published, prove_from=self.prove_from)
        return StoredCheckpoint(size=self.tree.size, root=self.tree.root, note=note, signed_at=0)


def opened(folder: Path, origin: str = ORIGIN) -> LogSigner:
    return LogSigner.open(
        origin=origin, key_path=folder / "log.key", state_path=folder / "state" / "signer.json"
    )


def test_the_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    assert first.vkey_text == second.vkey_text
    assert parse_vkey(first.vkey_text).name == ORIGIN
    assert stat.S_IMODE((tmp_path / "log.key").stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["log.key"]


def test_a_checkpoint_that_anyone_can_open(tmp_path: Path) -> None:
    signer = opened(tmp_path)
    stored = History(9).signed_by(signer)
    head = open_checkpoint(stored.note, parse_vkey(signer.vkey_text)).checkpoint
    assert (head.size, head.root) == (9, stored.root)
    assert stored.note == History(9).signed_by(opened(tmp_path)).note
    assert stat.S_IMODE((tmp_path / "state" / "signer.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("spoil", ["chmod", "text", "name", "binary"])
def test_a_key_file_that_is_not_ours(tmp_path: Path, spoil: str) -> None:
    signer = opened(tmp_path)
    file = tmp_path / "log.key"
    if spoil == "chmod":
        file.chmod(0o644)
    elif spoil == "text":
        file.write_text("no key")
    elif spoil == "name":
        file.write_text(format_skey("log.example/two", SigningKey.generate()))
    else:
        file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError):
        opened(tmp_path)
    assert signer.origin == ORIGIN


def test_an_origin_with_spaces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        opened(tmp_path, "my log")


def test_it_signs_what_extends(tmp_path: Path) -> None:
    published = None
    for size in (0, 1, 1, 5, 300):
        published = History(size).signed_by(opened(tmp_path), published)
        memory = opened(tmp_path).remembered()
        assert memory == SignedTree(size=size, root=published.root)


@pytest.mark.parametrize(("size", "fork"), [(4, 1_000), (5, 2), (8, 4), (8, 0)])
@pytest.mark.parametrize("lost", ["memory", "store", "neither"])
def test_it_refuses_a_smaller_or_different_tree(
    tmp_path: Path, size: int, fork: int, lost: str
) -> None:
    """Either memory, its own or the store's, is enough."""
    published: StoredCheckpoint | None = History(5).signed_by(opened(tmp_path))
    if lost == "memory":
        (tmp_path / "state" / "signer.json").unlink()
    if lost == "store":
        published = None
    signer = opened(tmp_path)
    before = signer.remembered()
    with pytest.raises(Inconsistent, match="refused to sign"):
        History(size, fork).signed_by(signer, published)
    assert signer.remembered() == before


def test_the_memory_may_be_ahead_of_the_store(tmp_path: Path) -> None:
    """A crash between signing and publishing."""
    signer = opened(tmp_path)
    published = History(5).signed_by(signer)
    History(9).signed_by(signer, published)
    assert signer.floor(published) == 9
    with pytest.raises(Inconsistent):
        History(7).signed_by(signer, published)
    History(12).signed_by(signer, published)


def test_the_store_may_be_ahead_of_the_memory(tmp_path: Path) -> None:
    """Another server with this key was the sequencer for a while."""
    signer = opened(tmp_path)
    History(5).signed_by(signer)
    elsewhere = LogSigner(origin=ORIGIN, key=signer._key, state_path=tmp_path / "elsewhere.json")
    published = History(9).signed_by(elsewhere)
    with pytest.raises(Inconsistent):
        History(9, fork=6).signed_by(signer, published)
    assert signer.floor(published) == 9
    History(10).signed_by(signer, published)


def test_a_lying_store_row_is_not_believed(tmp_path: Path) -> None:
    """The store's columns are not signed; its note is."""
    signer = opened(tmp_path)
    honest = History(5).signed_by(signer)
    (tmp_path / "state" / "signer.json").unlink()
    fork = History(5, fork=2)
    lying = StoredCheckpoint(size=5, root=fork.tree.root, note=honest.note, signed_at=0)
    with pytest.raises(Inconsistent):
        fork.signed_by(signer, lying)


def test_a_memory_that_cannot_be_read_now_is_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files, a failing disk: to be tried again, where a damaged one is not."""
    signer = opened(tmp_path)
    History(5).signed_by(signer)

    def fails(*_: object) -> bytes:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", fails)
        with pytest.raises(StorageError, match="nothing was signed"):
            History(6).signed_by(signer)
    History(6).signed_by(signer)


@pytest.mark.parametrize("spoilt", ["", "{}", "[]", '{"format":"tributary/signer-state/v1"}', "x"])
def test_a_damaged_memory_is_not_forgotten(tmp_path: Path, spoilt: str) -> None:
    signer = opened(tmp_path)
    History(5).signed_by(signer)
    (tmp_path / "state" / "signer.json").write_text(spoilt)
    with pytest.raises(ConfigError, match="memory"):
        History(6).signed_by(signer)


def test_the_memory_of_another_log(tmp_path: Path) -> None:
    signer = opened(tmp_path)
    History(5).signed_by(signer)
    file = tmp_path / "state" / "signer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "origin": "other"}))
    with pytest.raises(ConfigError):
        signer.remembered()


def test_nothing_is_signed_when_the_memory_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = opened(tmp_path)
    History(5).signed_by(signer)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ledger.files.os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        History(6).signed_by(signer)
    monkeypatch.undo()
    assert signer.remembered() == History(5).tree
    History(6).signed_by(signer)


def test_a_memory_kept_though_reported_failed_is_made_durable_before_signing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was replaced, its folder not synced: a power cut could bring the old one back."""
    signer = opened(tmp_path)
    History(5).signed_by(signer)
    synced: list[Path] = []
    failing = [True]

    def sync(folder: Path) -> None:
        if failing:
            failing.pop()
            raise OSError(5, "Input/output error")
        synced.append(folder)

    monkeypatch.setattr("ledger.files.sync_folder", sync)
    with pytest.raises(StorageError, match="nothing was signed"):
        History(6).signed_by(signer)
    assert signer.remembered() == History(6).tree
    History(6).signed_by(signer)
    assert synced == [tmp_path / "state"]
