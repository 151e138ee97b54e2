"""Full disks, real ones: what the ledger keeps on disk, on a tmpfs without a free page.

Nothing is acknowledged that is not kept, nothing kept is spoilt, and with room again the same call
succeeds without anybody mending anything. (An export on a full disk: test_log_export.py.)
"""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from eventsourcing.persistence import StoredEvent

from ledger.errors import StorageError
from ledger.log.monitor_state import MonitorFolder
from ledger.log.receipts import Promises
from ledger.log.witness import Witness
from ledger.processes.supervisor import _revive
from ledger.store import recorder as recorder_module
from ledger.store.blobs import FsspecBlobStore
from ledger.store.embedded import EmbeddedPostgres
from ledger.store.migrate import migrate
from ledger.store.recorder import GapFreeFactory, GapFreeRecorder, ReplayedEvent
from tests.integration.test_log_postgres import Server, stranger_checks
from tests.pg import FAST, temporary_home
from tests.unit.monitor_world import LOG, VKEY, DictSource, entries, log_files, monitor
from tests.unit.test_log_signer import History, opened
from tests.witness_world import ORIGIN, Branch, witness_at

CHUNK = 1 << 20


class Disk:
    """A tmpfs of so many bytes."""

    def __init__(self, at: Path, size: str) -> None:
        self.at = at
        self._filler = at / "filler"
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(at)]
        try:
            subprocess.run(mount, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a tmpfs needs root; each room's unit tests inject the same fault")

    def fill(self) -> None:
        """To the last byte."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (CHUNK, 4096, 1):
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        assert os.statvfs(self.at).f_bavail == 0

    def make_room(self) -> None:
        self._filler.unlink()

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.at)], check=True, capture_output=True)


@contextmanager
def disk_at(at: Path, size: str) -> Iterator[Disk]:
    disk = Disk(at, size)
    try:
        yield disk
    finally:
        disk.unmount()


# --- files --------------------------------------------------------------------------------------


class Keeper:
    """Something that remembers the newest of a row of numbers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, n: int) -> None:
        raise NotImplementedError

    def kept(self) -> int:
        """As a new process reads it."""
        raise NotImplementedError


class SignerMemory(Keeper):
    def keep(self, n: int) -> None:
        History(n).signed_by(opened(self.folder))

    def kept(self) -> int:
        memory = opened(self.folder).remembered()
        assert memory == History(memory.size if memory else 0).tree
        return memory.size


class WitnessMemory(Keeper):
    def _with(self, do: Callable[[Witness], int]) -> int:
        with witness_at(self.folder) as witness:
            return do(witness)

    def keep(self, n: int) -> None:
        request = Branch().request(self.kept(), n)
        assert self._with(lambda witness: witness.add_checkpoint(request).status) == 200

    def kept(self) -> int:
        def size(witness: Witness) -> int:
            latest = witness.latest(ORIGIN)
            return latest.head.size if latest else 0

        return self._with(size)


class MonitorState(Keeper):
    def keep(self, n: int) -> None:
        assert monitor(DictSource(log_files(entries(n))), self.folder).poll().size == n

    def kept(self) -> int:
        state = MonitorFolder(self.folder, log=LOG, key=VKEY).load()
        return state.size if state else 0


class Blobs(Keeper):
    def keep(self, n: int) -> None:
        self._store.put(b"blob %d" % n)

    def kept(self) -> int:
        def has(n: int) -> bool:
            return self._store.has(hashlib.sha256(b"blob %d" % n).hexdigest())

        return max(n for n in range(20) if has(n))

    @property
    def _store(self) -> FsspecBlobStore:
        return FsspecBlobStore(self.folder)


class KeptPromises(Keeper):
    def keep(self, n: int) -> None:
        Promises.open(self._path, n, now=n)

    def kept(self) -> int:
        return int(json.loads(self._path.read_bytes())["terms"][-1][1])

    @property
    def _path(self) -> Path:
        return self.folder / "promises.json"


KEEPERS = (SignerMemory, WitnessMemory, MonitorState, Blobs, KeptPromises)


@pytest.mark.parametrize("kind", KEEPERS)
def test_files(tmp_path: Path, kind: type[Keeper]) -> None:
    at = tmp_path / "disk"
    at.mkdir()
    with disk_at(at, "256k") as disk:
        keeper = kind(at)
        keeper.keep(5)
        disk.fill()
        for _ in range(2):
            with pytest.raises(StorageError, match="No space left"):
                keeper.keep(9)
            disk.make_room()
            assert keeper.kept() == 5
            disk.fill()
        disk.make_room()
        assert not list(at.rglob("*.new")) + list(at.rglob(".put-*"))
        keeper.keep(9)
        assert keeper.kept() == 9


# --- PostgreSQL ---------------------------------------------------------------------------------

SMALL = {**FAST, "min_wal_size": "32MB", "max_wal_size": "32MB", "shared_buffers": "16MB"}
NO_SPACE = "No space left"


class Appends:
    """A sender that knows what was acknowledged."""

    def __init__(self, url: str) -> None:
        self._factory = GapFreeFactory.on(
            url, event_id_of=lambda event: UUID(bytes=event.state[:16])
        )
        found = self._factory.application_recorder()
        assert isinstance(found, GapFreeRecorder)
        self._recorder = found
        self.told: dict[int, bytes] = {}
        self.pending: StoredEvent | None = None

    def one(self, size: int = 16) -> None:
        """One event, the one that was refused last if there is one."""
        state = uuid4().bytes + bytes(size - 16)
        self.pending = self.pending or StoredEvent(uuid4(), 1, "t", state)
        try:
            placed = self._recorder.insert_events([self.pending])
            assert placed is not None
            id = placed[0]
        except ReplayedEvent as error:  # it was kept though reported failed
            id = int(str(error.detail["index"])) + 1
        assert id not in self.told
        self.told[id] = self.pending.state
        self.pending = None

    def until_refused(self) -> str:
        """The reason that was given."""
        try:
            for _ in range(5_000):
                self.one(size=60_000)
        except StorageError as error:
            return str(error)
        raise AssertionError("the disk was not full")

    def check(self, server: Server) -> None:
        entries = server.log.entries(0, server.log.size())
        assert {n: entry[16:] for n, entry in enumerate(entries, 1)} == self.told

    def close(self) -> None:
        self._factory.close()


@pytest.fixture
def database() -> Iterator[tuple[Disk, EmbeddedPostgres]]:
    with temporary_home() as home, disk_at(home, "192m") as disk:
        server = EmbeddedPostgres(home, settings=SMALL)
        if home not in server.data_dir.parents:
            pytest.skip("the server's user cannot reach a temporary folder here")
        with server:
            migrate(server.url)
            yield disk, server


def test_postgresql(
    database: tuple[Disk, EmbeddedPostgres], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First its tables have no room, then its write-ahead log, which ends the server."""
    monkeypatch.setattr(recorder_module, "MAX_OUTAGE_S", 0.5)
    disk, server = database
    appends, reader = Appends(server.url), Server(server.url, tmp_path / "signed.json")
    try:
        for _ in range(3):
            appends.one()
        while reader.sequencer.step():
            pass
        disk.fill()
        assert NO_SPACE in appends.until_refused()
        appends.check(reader)  # reading goes on
        disk.make_room()
        appends.one()
        while reader.sequencer.step():
            pass

        disk.fill()
        appends.until_refused()
        with pytest.raises(psycopg.Error):
            end_of_the_write_ahead_log(server.url)
        wait_until(lambda: server._guard is not None and server._guard.poll() is not None)
        with pytest.raises(StorageError):  # which the supervisor takes for: try again
            _revive(server)
        disk.make_room()
        _revive(server)
        appends.one()
        while reader.sequencer.step():
            pass
        appends.check(reader)
        assert stranger_checks(reader, server.url) == len(appends.told)
    finally:
        appends.close()
        reader.close()


def end_of_the_write_ahead_log(url: str) -> None:
    """Demand new files of it until there is no room for one."""
    with psycopg.connect(url, autocommit=True) as connection:
        for _ in range(10):
            connection.execute("SELECT pg_logical_emit_message(false, 'x', 'y', true)")
            connection.execute("SELECT pg_switch_wal()")


def wait_until(holds: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
