"""Counting a manifest's rows: read once, kept for a while, refused when it is none."""

import pytest

from ledger.errors import MalformedProof, NotFound
from ledger.log import trained
from ledger.log.trained import TrainedOn
from tests.fakes import MemoryBlobStore
from tests.unit.lineage_world import manifest, name


class Counted(MemoryBlobStore):
    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def get(self, sha256: str) -> bytes:
        self.reads += 1
        return super().get(sha256)


def test_rows_by_contribution_are_read_once() -> None:
    blobs = Counted()
    counts = TrainedOn(blobs)
    sha256 = blobs.put(manifest())
    for _ in range(3):
        assert counts.rows(sha256) == {name("ann"): 3, name("ben"): 3}
    assert blobs.reads == 1


def test_only_the_last_used_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "MAX_KEPT", 5)  # a manifest here is of two contributions
    blobs = Counted()
    counts = TrainedOn(blobs)
    first, second, third = (blobs.put(manifest(steps=n)) for n in (1, 2, 3))
    for sha256 in (first, second, first, third, first):
        counts.rows(sha256)
    assert blobs.reads == 3
    counts.rows(second)
    assert blobs.reads == 4


def test_one_that_is_larger_than_all_there_is_room_for_is_kept_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trained, "MAX_KEPT", 1)
    blobs = Counted()
    counts = TrainedOn(blobs)
    first, second = (blobs.put(manifest(steps=n)) for n in (1, 2))
    for sha256 in (first, first, second, second, first):
        assert len(counts.rows(sha256)) == 2
    assert blobs.reads == 3


def test_what_is_no_manifest_is_not_kept() -> None:
    blobs = Counted()
    counts = TrainedOn(blobs)
    sha256 = blobs.put(b"{}")
    for _ in range(2):
        with pytest.raises(MalformedProof):
            counts.rows(sha256)
    with pytest.raises(NotFound):
        counts.rows("0f" * 32)
    assert blobs.reads == 3
