"""A database restored from an export: the same to the byte, or not at all; and the log goes on."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from ledger.cli.app import app
from ledger.errors import Conflict, Inconsistent, InvalidEvent, LedgerError, NotFound
from ledger.log.audit import audit_log
from ledger.log.audit_rows import RowsOpener
from ledger.log.export import export_log
from ledger.log.prover import Prover
from ledger.log.restore import import_log
from ledger.log.sources import FolderSource
from ledger.store.archive import ArchiveOpener, restoring
from ledger.store.postgres import PostgresEntryLog, connect
from ledger.store.rows import PgRowStore
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.merkle import verify_consistency
from ledger.verify.note import format_skey, format_vkey, vkey_of
from projections.registry import TABLES
from projections.runner import Runner
from tests.audit_world import Ledger, event, tell
from tests.integration.test_log_export import same_tree
from tests.pg import create_database, drop_database, fresh_database
from tests.unit.lineage_world import ORIGIN, key

KEY = vkey_of(ORIGIN, key("log"))
SIZE = 3_000
ROWS = {
    "stored_events": "notification_id",
    "log_head": "size",
    "log_tiles": "level, n",
    "log_checkpoints": "size",
}


class Origin:
    """A ledger and what was exported of it, at SIZE and at an earlier moment."""

    def __init__(self, url: str, at: Path) -> None:
        self.url = url
        self.memory = at / "memory.json"
        self.ledger = Ledger(url, self.memory)
        tell(self.ledger, SIZE // 2)
        self.older = at / "older"
        with self.ledger.source() as source:
            export_log(source, self.older, KEY)
        self.ledger.grow(SIZE // 2, SIZE)
        self.folder = at / "export"
        with self.ledger.source() as source:
            export_log(source, self.folder, KEY)


@pytest.fixture(scope="module")
def origin(
    pg_server: str, pg_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Origin]:
    with fresh_database(pg_server, template=pg_template) as url:
        found = Origin(url, tmp_path_factory.mktemp("origin"))
        yield found
        found.ledger.close()


def rows(url: str) -> dict[str, list[Any]]:
    with psycopg.connect(url) as connection:
        return {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY {order}").fetchall()
            for table, order in ROWS.items()
        }


def is_empty(url: str) -> bool:
    found = rows(url)
    return [len(found[t]) for t in ROWS if t != "log_head"] == [0, 0, 0] and (
        found["log_head"][0][1] == 0
    )


def audited(url: str) -> bool:
    opener = RowsOpener(open_archive=ArchiveOpener(url=url))
    report = audit_log(opener, KEY, signatures=True, pymerkle=True)
    return report.ok and {step.state for step in report.steps} == {"ok"}


def test_export_import_export(origin: Origin, pg_url: str, tmp_path: Path) -> None:
    done = import_log(FolderSource(origin.folder), KEY, restoring(pg_url))
    assert (done.size, done.checkpoints) == (SIZE, 5)
    assert rows(pg_url) == rows(origin.url)
    assert audited(pg_url)
    restored = Ledger(pg_url, tmp_path / "memory.json")
    with restored.source() as source:
        export_log(source, tmp_path / "again", KEY)
    restored.close()
    assert same_tree(tmp_path / "again", origin.folder)


def test_the_log_goes_on(origin: Origin, pg_url: str, tmp_path: Path) -> None:
    """Same key, same memory, another database."""
    import_log(FolderSource(origin.folder), KEY, restoring(pg_url), signatures=False)
    memory = Path(shutil.copy(origin.memory, tmp_path / "memory.json"))
    restored = Ledger(pg_url, memory)
    old = open_checkpoint((origin.folder / "checkpoint").read_bytes(), KEY).checkpoint
    restored.grow(10_000, 10_300)
    newest = restored.tiles.latest()
    assert newest is not None
    assert newest.size == SIZE + 300
    verify_consistency(
        size1=old.size,
        size2=newest.size,
        root1=old.root,
        root2=newest.root,
        proof=Prover(restored.tiles).consistency(old.size, newest.size),
    )
    # A stream that was restored goes on at its next version, and an id stays taken.
    from eventsourcing.persistence import IntegrityError

    with pytest.raises(IntegrityError):
        restored.append([event(10)])
    with restored.source() as source:
        export_log(source, Path(shutil.copytree(origin.folder, tmp_path / "log")), KEY)
    restored.close()
    assert audited(pg_url)


def test_an_older_export_than_was_signed_is_not_signed_again(
    origin: Origin, pg_url: str, tmp_path: Path
) -> None:
    """The signer remembers more than the database holds: for good."""
    import_log(FolderSource(origin.older), KEY, restoring(pg_url), signatures=False)
    memory = Path(shutil.copy(origin.memory, tmp_path / "memory.json"))
    restored = Ledger(pg_url, memory)
    before = memory.read_bytes()
    with pytest.raises(Inconsistent, match="older backup"):
        restored.checkpoint()
    # Nor when it grew again beyond what was signed: it is another history.
    restored.append([event(n) for n in range(20_000, 20_000 + SIZE)])
    with pytest.raises(Inconsistent, match="refused to sign"):
        restored.checkpoint()
    newest = restored.tiles.latest()
    restored.close()
    assert newest is not None
    assert newest.size == SIZE // 2
    assert memory.read_bytes() == before


def test_projections_replay_to_the_same(origin: Origin, pg_url: str) -> None:
    import_log(FolderSource(origin.folder), KEY, restoring(pg_url), signatures=False)
    digests = []
    for url in (origin.url, pg_url):
        pool = connect(url)
        log = PostgresEntryLog(pool)
        runner = Runner(log, PgRowStore(pool, TABLES))
        while runner.position() < SIZE:
            runner.step()
        digests.append(runner.digest())
        log.close()
        pool.close()
    assert digests[0] == digests[1]


def test_a_mirror_without_records(origin: Origin, pg_url: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(origin.folder, tmp_path / "mirror"))
    shutil.rmtree(folder / "checkpoints")
    assert import_log(FolderSource(folder), KEY, restoring(pg_url)).checkpoints == 1
    assert audited(pg_url)


# --- refusals ---------------------------------------------------------------------------------


def test_only_into_an_empty_store(origin: Origin, pg_url: str, tmp_path: Path) -> None:
    ledger = Ledger(pg_url, tmp_path / "memory.json")
    ledger.checkpoint()  # a checkpoint of nothing is something
    with pytest.raises(Conflict, match="not empty"):
        import_log(FolderSource(origin.folder), KEY, restoring(pg_url))
    ledger.append([event(1)])
    with pytest.raises(Conflict, match="not empty"):
        import_log(FolderSource(origin.folder), KEY, restoring(pg_url))
    ledger.close()


def test_not_while_a_ledger_runs_on_it(origin: Origin, pg_url: str, tmp_path: Path) -> None:
    ledger = Ledger(pg_url, tmp_path / "memory.json")
    with ledger.tiles.sequencer_lock() as held:
        assert held
        with pytest.raises(Conflict, match="stop it"):
            import_log(FolderSource(origin.folder), KEY, restoring(pg_url))
    ledger.close()
    assert is_empty(pg_url)


@pytest.mark.parametrize(
    ("path", "offset", "signatures"),
    [
        ("tile/entries/000", 100, True),
        ("tile/entries/000", 100, False),
        ("tile/entries/005", 9, False),  # an index
        ("tile/entries/005", 0, False),  # a length
        ("tile/entries/011.p/184", -1, False),
        ("checkpoint", 25, False),
        ("checkpoints/000", 40, False),
    ],
)
def test_a_spoilt_folder_restores_nothing(
    origin: Origin, pg_url: str, tmp_path: Path, path: str, offset: int, signatures: bool
) -> None:
    folder = Path(shutil.copytree(origin.folder, tmp_path / "spoilt"))
    data = bytearray((folder / path).read_bytes())
    data[offset] ^= 1
    (folder / path).write_bytes(data)
    with pytest.raises(LedgerError) as caught:
        import_log(FolderSource(folder), KEY, restoring(pg_url), signatures=signatures)
    assert caught.value.exit_code in {1, 2}
    assert is_empty(pg_url)
    import_log(FolderSource(origin.folder), KEY, restoring(pg_url), signatures=False)
    assert rows(pg_url) == rows(origin.url)


def test_a_fork_among_the_records(origin: Origin, pg_url: str, tmp_path: Path) -> None:
    from ledger.domain.canonical import canonical_json
    from ledger.log.signer import LogSigner, SignedTree

    folder = Path(shutil.copytree(origin.folder, tmp_path / "forked"))
    forger = LogSigner(origin=ORIGIN, key=key("log"), state_path=tmp_path / "other.json")
    fork = SignedTree(size=375, root=b"\x05" * 32)
    note = forger.sign(fork, published=None, prove_from=lambda old: [])
    lines = (folder / "checkpoints/000").read_bytes().splitlines(keepends=True)
    assert json.loads(lines[0])["size"] == 375
    lines[0] = canonical_json({"note": note.decode(), "signed_at": 1, "size": 375}) + b"\n"
    (folder / "checkpoints/000").write_bytes(b"".join(lines))
    with pytest.raises(Inconsistent, match="fork"):
        import_log(FolderSource(folder), KEY, restoring(pg_url), signatures=False)
    assert is_empty(pg_url)


def test_a_folder_that_is_none(pg_url: str, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        import_log(FolderSource(tmp_path), KEY, restoring(pg_url))


def test_an_event_with_a_wrong_signature(pg_url: str, pg_server: str, tmp_path: Path) -> None:
    """Signed for by the log all the same: restored only where one says so."""
    good = event(5)
    at = good.index(b'"sig":"') + 7
    bad = good[:at] + (b"B" if good[at : at + 1] != b"B" else b"C") + good[at + 1 :]
    ledger = Ledger(pg_url, tmp_path / "memory.json")
    ledger.append([event(4), bad])
    ledger.checkpoint()
    with ledger.source() as source:
        export_log(source, tmp_path / "log", KEY)
    ledger.close()
    url = create_database(pg_server)
    try:
        from ledger.store.migrate import migrate

        migrate(url)
        with pytest.raises(InvalidEvent, match="entry 1"):
            import_log(FolderSource(tmp_path / "log"), KEY, restoring(url))
        assert is_empty(url)
        import_log(FolderSource(tmp_path / "log"), KEY, restoring(url), signatures=False)
    finally:
        drop_database(pg_server, url)


# --- killed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["add_events", "add_tiles", "add_checkpoints", "set_head"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_in_the_middle(origin: Origin, pg_url: str, call: str, after: bool) -> None:
    """SIGKILL in the open transaction: nothing is there, and the same import completes."""
    child = os.fork()
    if child == 0:
        try:
            _import_and_die(origin.folder, pg_url, call, after)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert is_empty(pg_url)
    import_log(FolderSource(origin.folder), KEY, _patiently(pg_url), signatures=False)
    assert rows(pg_url) == rows(origin.url)


def _import_and_die(folder: Path, url: str, call: str, after: bool) -> None:
    from ledger.store import archive

    real = getattr(archive._Restoring, call)

    def armed(self: Any, *arguments: Any) -> None:
        if after:
            real(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(archive._Restoring, call, armed)
    import_log(FolderSource(folder), KEY, restoring(url), signatures=False)


def _patiently(url: str) -> Any:
    """PostgreSQL notices within moments that its client is gone, and rolls back."""
    import time

    deadline = time.monotonic() + 10
    while True:
        with psycopg.connect(url) as connection:
            others = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tributary import'"
                " AND datname = current_database()"
            ).fetchone()
        if others == (0,) or time.monotonic() > deadline:
            return restoring(url)
        time.sleep(0.02)


# --- the commands -----------------------------------------------------------------------------


def test_the_commands(
    origin: Origin, pg_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """export -> audit -> import -> audit, as an operator types them."""
    home = tmp_path / "home"
    (home / "keys").mkdir(parents=True)
    log_key = home / "keys" / "log.key"
    log_key.touch(0o600)
    log_key.write_text(format_skey(ORIGIN, key("log")))
    monkeypatch.setenv("TRIBUTARY_HOME", str(home))
    monkeypatch.setenv("TRIBUTARY_LOG_ORIGIN", ORIGIN)
    monkeypatch.setenv("DATABASE_URL", origin.url)
    run = CliRunner().invoke

    folder = tmp_path / "log"
    done = run(app, ["log", "export", str(folder)])
    assert done.exit_code == 0, done.output
    assert f"serves {SIZE} entries" in done.output
    assert (
        run(app, ["log", "export", str(tmp_path / "mirror"), "--from", str(folder)]).exit_code == 0
    )
    assert same_tree(tmp_path / "mirror", folder)

    done = run(app, ["audit", str(folder), "--key", format_vkey(KEY), "--jobs", "1"])
    assert done.exit_code == 0, done.output
    assert "Nothing is wrong" in done.output
    done = run(app, ["audit", "--no-signatures", "--no-pymerkle", "--json"])
    assert json.loads(done.stdout)["ok"]

    url = create_database(pg_server)
    try:
        monkeypatch.setenv("DATABASE_URL", url)
        done = run(app, ["log", "import", str(folder)])
        assert done.exit_code == 0, done.output
        assert "Blobs, keys" in done.output
        assert run(app, ["audit", url, "--jobs", "1"]).exit_code == 0
        assert isinstance(run(app, ["log", "import", str(folder)]).exception, Conflict)
        assert rows(url) == rows(origin.url)
    finally:
        drop_database(pg_server, url)

    path = folder / "tile/entries/003"
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    done = run(app, ["audit", str(folder), "--jobs", "1"])
    assert done.exit_code == 1
    assert "tile/entries/003, byte 77" in " ".join(done.output.split())
