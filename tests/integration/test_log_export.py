"""The static export: what a reader sees at any moment verifies, whatever fails or dies."""

import errno
import filecmp
import functools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ledger.errors import (
    BadSignature,
    Conflict,
    Inconsistent,
    MalformedProof,
    NotFound,
    StorageError,
)
from ledger.log.audit import audit_log
from ledger.log.audit_files import FilesOpener
from ledger.log.export import FolderWriter, export_log
from ledger.log.signer import LogSigner
from ledger.log.sources import FolderSource
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.note import vkey_of
from ledger.verify.tiles import Tile, decode_entries, encode_entries, tile_path
from tests.audit_world import Ledger, event, tell
from tests.integration.test_log_audit import served
from tests.pg import fresh_database
from tests.unit.lineage_world import ORIGIN, key

KEY = vkey_of(ORIGIN, key("log"))
SIZES = (300, 600, 800)
"""Three states of one log: a bundle that fills between them, and one that grows."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """One log at three sizes, each exported afresh."""

    folders: dict[int, Path]
    signer: LogSigner

    def source(self, size: int) -> FolderSource:
        return FolderSource(self.folders[size])


@pytest.fixture(scope="module")
def story(
    pg_server: str, pg_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    at = tmp_path_factory.mktemp("export")
    with fresh_database(pg_server, template=pg_template) as url:
        ledger = Ledger(url, at / "memory.json")
        tell(ledger, SIZES[0])
        folders = {}
        for before, size in zip((SIZES[0], *SIZES), SIZES, strict=False):
            ledger.grow(before, size)
            folders[size] = at / str(size)
            with ledger.source() as source:
                export_log(source, folders[size], KEY)
        ledger.close()
        yield Story(folders=folders, signer=ledger.signer)


def served_size(folder: Path) -> int:
    """What a reader sees now; it must verify, to the byte."""
    opener = FilesOpener(open_source=functools.partial(FolderSource, folder))
    report = audit_log(opener, KEY, signatures=False, pymerkle=False)
    assert report.ok, [str(finding) for finding in report.findings]
    return report.size


def same_tree(left: Path, right: Path, *, but_partials: bool = False) -> bool:
    """Every file of `right` is in `left`, to the byte; and nothing else, older partials aside."""

    def files(folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}

    ours, theirs = files(left), files(right)
    extra = {name for name in ours - theirs if not (but_partials and ".p/" in name)}
    match, wrong, errors = filecmp.cmpfiles(left, right, theirs, shallow=False)
    return not extra and not wrong and not errors and len(match) == len(theirs)


# --- good runs --------------------------------------------------------------------------------


def test_what_it_writes(story: Story) -> None:
    folder = story.folders[800]
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "checkpoint", "vkey", "checkpoints/000",
        "tile/0/000", "tile/0/001", "tile/0/002", "tile/0/003.p/32", "tile/1/000.p/3",
        "tile/entries/000", "tile/entries/001", "tile/entries/002", "tile/entries/003.p/32",
    }  # fmt: skip
    assert served_size(folder) == 800
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in folder.rglob("*") if p.is_file())


def test_the_second_run_writes_only_what_is_new(story: Story, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    for size, before in ((300, 0), (600, 300), (800, 600), (800, 800)):
        kept = {p: p.stat().st_mtime_ns for p in folder.rglob("tile/*/[0-9][0-9][0-9]")}
        done = export_log(story.source(size), folder, KEY)
        assert (done.size, done.previous_size) == (size, before)
        assert {p: p.stat().st_mtime_ns for p in kept} == kept
        assert served_size(folder) == size
        if size == before:
            assert done.written == done.bytes_written == 0
        elif before:
            # Two bundles and two tiles at the edge, the one above; records, checkpoint.
            assert done.written <= 9
    assert same_tree(folder, story.folders[800], but_partials=True)


def test_partial_tiles_go_when_the_full_one_is_there(story: Story, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    export_log(story.source(300), folder, KEY)
    assert (folder / "tile/entries/001.p/44").exists()
    export_log(story.source(600), folder, KEY)
    assert not (folder / "tile/entries/001.p").exists()
    assert not (folder / "tile/0/001.p").exists()
    assert (folder / "tile/1/000.p/1").exists()  # no full one yet


def test_a_mirror_over_http_is_the_same(story: Story, tmp_path: Path) -> None:
    from ledger.remote import HttpSource

    with served(story.folders[800]) as url, HttpSource(url) as source:
        export_log(source, tmp_path / "log", KEY)
    assert same_tree(tmp_path / "log", story.folders[800])


def test_a_log_without_records_is_mirrored_too(story: Story, tmp_path: Path) -> None:
    class Plain(FolderSource):
        def read(self, path: str) -> bytes:
            if path.startswith("checkpoints/"):
                raise NotFound(path)
            return super().read(path)

    export_log(Plain(story.folders[600]), tmp_path / "log", KEY)
    assert not (tmp_path / "log/checkpoints").exists()
    assert served_size(tmp_path / "log") == 600


# --- refusals ---------------------------------------------------------------------------------


def test_an_older_source_is_refused(story: Story, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    export_log(story.source(600), folder, KEY)
    with pytest.raises(Inconsistent, match="older"):
        export_log(story.source(300), folder, KEY)
    assert served_size(folder) == 600


@pytest.mark.parametrize("size", [600, 700])
def test_a_fork_is_refused_before_anything_is_written(
    story: Story, pg_url: str, tmp_path: Path, size: int
) -> None:
    folder = tmp_path / "log"
    export_log(story.source(600), folder, KEY)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    fork = Ledger(pg_url, tmp_path / "other-memory.json")
    fork.grow(10_000, 10_000 + size)
    with fork.source() as source, pytest.raises(Inconsistent, match="fork"):
        export_log(source, folder, KEY)
    fork.close()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_another_log_and_another_key(story: Story, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    export_log(story.source(300), folder, KEY)
    with pytest.raises(Conflict, match="another folder"):
        export_log(story.source(300), folder, vkey_of("other.example/log", key("log")))
    with pytest.raises(BadSignature):
        export_log(story.source(300), tmp_path / "new", vkey_of(ORIGIN, key("stranger")))


def test_one_export_at_a_time(story: Story, tmp_path: Path) -> None:
    folder = tmp_path / "log"

    class Second(FolderSource):
        def read(self, path: str) -> bytes:
            with pytest.raises(Conflict, match="another export"):
                export_log(story.source(300), folder, KEY)
            return super().read(path)

    export_log(Second(story.folders[300]), folder, KEY)
    assert served_size(folder) == 300


def lying(folder: Path, lie: Callable[[str, bytes], bytes]) -> FolderSource:
    class Lying(FolderSource):
        def read(self, path: str) -> bytes:
            return lie(path, super().read(path))

    return Lying(folder)


def changed_entry(path: str, data: bytes) -> bytes:
    return data[:500] + bytes([data[500] ^ 1]) + data[501:] if "entries/001" in path else data


def moved_entry(path: str, data: bytes) -> bytes:
    if "entries/001" not in path:
        return data
    entries = decode_entries(data, 256)
    return encode_entries([entries[1], entries[0], *entries[2:]])


def broken_bundle(path: str, data: bytes) -> bytes:
    return data[:-1] if "entries/001" in path else data


@pytest.mark.parametrize("lie", [changed_entry, moved_entry, broken_bundle])
def test_what_was_not_signed_is_not_published(
    story: Story, tmp_path: Path, lie: Callable[[str, bytes], bytes]
) -> None:
    folder = tmp_path / "log"
    export_log(story.source(300), folder, KEY)
    with pytest.raises((Inconsistent, MalformedProof)):
        export_log(lying(story.folders[800], lie), folder, KEY)
    assert served_size(folder) == 300
    # The honest source mends what the lying one left.
    export_log(story.source(800), folder, KEY)
    assert served_size(folder) == 800
    assert same_tree(folder, story.folders[800], but_partials=True)


def test_a_damaged_folder_is_not_built_upon(story: Story, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    export_log(story.source(300), folder, KEY)
    path = folder / "tile/0/001.p/44"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(Inconsistent, match="audit"):
        export_log(story.source(600), folder, KEY)


# --- failing writes ---------------------------------------------------------------------------


class Faulty(FolderWriter):
    """Fails call number `at`: `lost` does nothing and raises, `kept` does it and raises."""

    def __init__(self, folder: Path, at: int, *, kept: bool) -> None:
        super().__init__(folder=folder)
        self.calls, self._at, self._kept = 0, at, kept

    def _call(self, do: Callable[[], None]) -> None:
        self.calls += 1
        if self.calls != self._at:
            do()
            return
        if self._kept:
            do()
        raise OSError(errno.EIO, "Input/output error")

    def put(self, path: str, data: bytes) -> None:
        self._call(lambda: super(Faulty, self).put(path, data))

    def flush(self) -> None:
        self._call(super().flush)

    def remove_tree(self, path: str) -> None:
        self._call(lambda: super(Faulty, self).remove_tree(path))


def calls_of(story: Story, folder: Path, old: int, new: int) -> int:
    counting = Faulty(folder, 0, kept=False)
    if old:
        export_log(story.source(old), folder, KEY)
    export_log(story.source(new), folder, KEY, writer=counting)
    return counting.calls


@pytest.mark.parametrize("kept", [False, True], ids=["lost", "kept"])
@pytest.mark.parametrize(("old", "new"), [(0, 300), (300, 800)])
def test_each_write_fails_once_lost_and_once_kept(
    story: Story, tmp_path: Path, old: int, new: int, kept: bool
) -> None:
    calls = calls_of(story, tmp_path / "counted", old, new)
    assert calls > 8
    for at in range(1, calls + 1):
        folder = tmp_path / str(at)
        if old:
            export_log(story.source(old), folder, KEY)
        with pytest.raises(StorageError, match="cannot write"):
            export_log(story.source(new), folder, KEY, writer=Faulty(folder, at, kept=kept))
        if (folder / "checkpoint").exists():
            assert served_size(folder) in {old, new}
        else:
            assert not old
        export_log(story.source(new), folder, KEY)
        assert served_size(folder) == new
        assert same_tree(folder, story.folders[new], but_partials=True)


CALLS = ("open", "fsync", "replace")


@pytest.mark.parametrize(("old", "new"), [(0, 300), (300, 800)])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_each_system_call(
    story: Story, tmp_path: Path, old: int, new: int, after: bool
) -> None:
    """SIGKILL before or after every open, fsync and rename of the export."""
    step, finished = 0, False
    while not finished:
        step += 1
        folder = tmp_path / str(step)
        if old:
            export_log(story.source(old), folder, KEY)
        work = functools.partial(export_log, story.source(new), folder, KEY)
        finished = not killed(work, step, after=after)
        if (folder / "checkpoint").exists():
            assert served_size(folder) in {old, new}
        else:
            assert not old
        export_log(story.source(new), folder, KEY)
        assert served_size(folder) == new
        assert same_tree(folder, story.folders[new], but_partials=True), step
    assert step > 20


def killed(work: Callable[[], Any], step: int, *, after: bool) -> bool:
    """Run `work` in a child that SIGKILLs itself at its `step`-th call; whether it came to that."""
    child = os.fork()
    if child == 0:
        try:
            _arm(step, after)
            work()
            os._exit(0)
        except BaseException:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _arm(step: int, after: bool) -> None:
    from ledger import files

    left = [step]

    class Armed:
        def __getattr__(self, name: str) -> Any:
            real = getattr(os, name)
            if name not in CALLS:
                return real

            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0 and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = real(*args, **kwargs)
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

    vars(files)["os"] = Armed()


def test_a_full_disk(story: Story, tmp_path: Path) -> None:
    """A real one: 200 KiB of tmpfs. The old tree stays; with room the same call completes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs needs root; the same fault is injected above")
    try:
        folder = disk / "log"
        export_log(story.source(300), folder, KEY)
        with pytest.raises(StorageError, match="No space left"):
            export_log(story.source(800), folder, KEY)
        assert served_size(folder) == 300
        resize = ["mount", "-o", "remount,size=4m", str(disk)]
        subprocess.run(resize, check=True, capture_output=True)
        export_log(story.source(800), folder, KEY)
        assert served_size(folder) == 800
        assert not list(folder.rglob("*.new"))
    finally:
        subprocess.run(["umount", str(disk)], check=False, capture_output=True)


def test_a_reader_during_the_export_sees_a_log_that_verifies(story: Story, tmp_path: Path) -> None:
    """After every single write."""
    folder = tmp_path / "log"
    export_log(story.source(300), folder, KEY)
    seen = []

    class Watched(FolderWriter):
        def put(self, path: str, data: bytes) -> None:
            super().put(path, data)
            seen.append(served_size(folder))

        def remove_tree(self, path: str) -> None:
            super().remove_tree(path)
            seen.append(served_size(folder))

    export_log(story.source(800), folder, KEY, writer=Watched(folder=folder))
    assert set(seen) == {300, 800}
    assert seen == sorted(seen)


def test_an_old_reader_finds_the_full_tile_where_the_partial_one_went(
    story: Story, tmp_path: Path
) -> None:
    folder = tmp_path / "log"
    export_log(story.source(300), folder, KEY)
    old = (folder / "checkpoint").read_bytes()
    export_log(story.source(800), folder, KEY)
    (folder / "checkpoint").write_bytes(old)
    assert open_checkpoint(old, KEY).checkpoint.size == 300
    assert not (folder / tile_path(Tile(level=0, n=1, width=44))).exists()
    assert served_size(folder) == 300


def test_events_are_the_ones_that_were_appended(story: Story) -> None:
    data = (story.folders[800] / "tile/entries/002").read_bytes()
    assert decode_entries(data, 256)[100][16:] == event(612)
