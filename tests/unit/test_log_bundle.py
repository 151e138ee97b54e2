"""What the assembler gathers, and what it refuses to."""

import json
from pathlib import Path
from uuid import UUID

import pytest

from ledger.errors import NotFound, StorageError, TooLarge
from ledger.log import bundle as room
from ledger.log.bundle import ScannedIndex
from ledger.verify.bundle import verify_bundle
from tests.unit.lineage_world import World, name


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.add("stranger", "identity.registered", {"name": "unrelated"})
    world.tell()
    world.add("stranger", "identity.registered", {"name": "unrelated"})
    world.checkpoint()
    return world


def indexes(data: bytes) -> list[int]:
    return [entry["index"] for entry in json.loads(data)["entries"]]


def test_only_what_the_subject_rests_on(world: World) -> None:
    labels = ["stranger", *list(world.ids)[1:]]
    everything = list(range(1, 12))
    assert indexes(world.bundle("inference.recorded")) == everything
    assert indexes(world.bundle("recorded ann")) == [
        labels.index("datanet.created"),
        labels.index("recorded ann"),
        labels.index("approved ann"),
    ]
    assert indexes(world.bundle("adapter.published")) == everything[:8]
    assert json.loads(world.bundle("recorded ann"))["blobs"] == {}
    verify_bundle(world.bundle("recorded ann"))


def test_what_is_stored_but_not_signed_for_stays_out(tmp_path: Path) -> None:
    world = World(tmp_path).tell({"attribution.recorded": None})
    world.checkpoint()
    complete = World(tmp_path / "b")
    complete.tell()
    world.log.append(complete.log.entries(10, 11)[0][16:], event_id=UUID(int=7))
    assert indexes(world.bundle()) == list(range(10))
    with pytest.raises(NotFound, match="not in a signed checkpoint yet"):
        world.bundler().bundle(str(UUID(int=7)))


def test_unknown_events(world: World) -> None:
    for id in (name("nothing"), "no uuid"):
        with pytest.raises(NotFound, match="is recorded"):
            world.bundler().bundle(id)


def test_before_the_first_checkpoint(tmp_path: Path) -> None:
    world = World(tmp_path).tell()
    with pytest.raises(NotFound, match="not in a signed checkpoint yet"):
        world.bundle()


def test_limits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_BUNDLE_BYTES", 100)
    with pytest.raises(TooLarge, match="MAX_BUNDLE_BYTES"):
        world.bundle()
    monkeypatch.setattr(room, "MAX_ENTRIES", 5)
    with pytest.raises(TooLarge, match="MAX_ENTRIES"):
        world.bundle()


def test_a_store_that_lost_things(world: World, tmp_path: Path) -> None:
    incomplete = World(tmp_path / "b").tell({"recorded ben": None})
    incomplete.checkpoint()
    with pytest.raises(StorageError, match=r"no contribution\.recorded"):
        incomplete.bundle()
    world.blobs.blobs.clear()
    with pytest.raises(NotFound):
        world.bundle()


def test_the_index_reads_the_log_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ScannedIndex(world.log)
    assert index.first("run.completed", "run", name("run")) == 7
    assert index.first("run.completed", "run", name("no run")) is None
    honest, starts = world.log.entries, []

    def counted(start: int, stop: int) -> list[bytes]:
        starts.append(start)
        return honest(start, stop)

    monkeypatch.setattr(world.log, "entries", counted)
    assert index.first("run.completed", "inference", name("run")) is None
    assert starts == [world.log.size()]
