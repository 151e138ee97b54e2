"""The audit on a database, a folder and a web server; and every stored thing spoilt in turn."""

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from ledger.domain.envelope import leaf_hash
from ledger.log import audit as audit_room
from ledger.log import second_opinion
from ledger.log import tree as tree_room
from ledger.log.audit import audit_log
from ledger.log.audit_files import FilesOpener
from ledger.log.audit_report import Report
from ledger.log.audit_rows import RowsOpener
from ledger.log.export import export_log
from ledger.log.sources import FolderSource
from ledger.remote import HttpSource
from ledger.store.archive import ArchiveOpener
from ledger.verify.note import VerifierKey, vkey_of
from ledger.verify.tiles import Tile, decode_entries, encode_entries, tile_path
from tests.audit_world import Ledger, anchored, event, tell, unsigned
from tests.pg import fresh_database
from tests.unit.lineage_world import ORIGIN, key

SIZE = 1_500
"""Five full tiles and a partial one; one partial tile above them; four checkpoints, two anchors."""
TALL = 66_000
"""More than 256 full tiles: tiles of level 2, and a second file of checkpoints."""
KEY = vkey_of(ORIGIN, key("log"))


@dataclass(frozen=True, kw_only=True)
class Made:
    """One large log, made once: its database and its export."""

    database: str
    folder: Path


@contextmanager
def making(
    server: str, template: str, at: Path, size: int, make: Callable[[int], bytes]
) -> Iterator[Made]:
    with fresh_database(server, template=template) as url:
        ledger = Ledger(url, at / "memory.json")
        tell(ledger, size, make)
        with ledger.source() as source:
            export_log(source, at / "export", ledger.signer.vkey)
        ledger.close()
        yield Made(database=url, folder=at / "export")


@pytest.fixture(scope="module")
def made(
    pg_server: str, pg_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Made]:
    at = tmp_path_factory.mktemp("audit")
    with making(pg_server, pg_template, at, SIZE, event) as found:
        yield found


@pytest.fixture(scope="module")
def tall(
    pg_server: str, pg_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Made]:
    at = tmp_path_factory.mktemp("tall")
    with making(pg_server, pg_template, at, TALL, unsigned) as found:
        yield found


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made.folder, tmp_path / "log"))


@pytest.fixture(scope="module")
def tall_folder(tall: Made) -> Path:
    """To spoil, and to mend again."""
    return tall.folder


@pytest.fixture
def small(pg_url: str, tmp_path: Path) -> Iterator[Ledger]:
    """A database to spoil: 700 entries, a level-1 tile, four checkpoints."""
    ledger = Ledger(pg_url, tmp_path / "memory.json")
    tell(ledger, 700)
    yield ledger
    ledger.close()


def audit_folder(folder: Path, *, signatures: bool = False, jobs: int = 1) -> Report:
    opener = FilesOpener(open_source=functools.partial(FolderSource, folder))
    return audit_log(opener, KEY, signatures=signatures, pymerkle=signatures, jobs=jobs)


def audit_database(url: str, *, signatures: bool = False) -> Report:
    opener = RowsOpener(open_archive=ArchiveOpener(url=url))
    return audit_log(opener, KEY, signatures=signatures, pymerkle=signatures)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Any web server: here Python's own."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def states(report: Report) -> dict[str, str]:
    return {step.name: step.state for step in report.steps}


def all_ok(report: Report) -> bool:
    return report.ok and set(states(report).values()) == {"ok"}


# --- a good log -------------------------------------------------------------------------------


def test_a_good_log_in_a_folder_with_everything_on(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_room, "SMALL_SIGNED", 0)
    for jobs in (1, 2):
        report = audit_folder(made.folder, signatures=True, jobs=jobs)
        assert all_ok(report), report.steps
        assert report.entries == report.size == SIZE
        says = {step.name: step.says for step in report.steps}
        assert f"{SIZE} signatures" in says["entries"]
        assert says["checkpoints"].startswith("4 stored")
        assert says["anchors"].startswith("3 anchored")
        assert says["tiles"].startswith("7 stored")


def test_a_tall_log(tall: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_room, "SMALL", 0)
    for report in (audit_folder(tall.folder, jobs=2), audit_database(tall.database)):
        assert report.ok
        assert report.entries == report.size == TALL
        says = {step.name: step.says for step in report.steps}
        assert says["checkpoints"].startswith("4 stored")
        # 258 of level 0, 2 of level 1, 1 of level 2.
        assert says["tiles"].startswith("261 stored")


def test_a_good_log_in_a_database(made: Made) -> None:
    report = audit_database(made.database)
    assert report.ok
    assert states(report) == {
        **dict.fromkeys(
            ("checkpoint", "entries", "tree", "tiles", "checkpoints", "anchors", "tables"), "ok"
        ),
        "second opinion": "skipped",
    }
    assert json.dumps(report.json())


def test_a_good_log_over_http(made: Made) -> None:
    with served(made.folder) as url:
        opener = FilesOpener(open_source=functools.partial(HttpSource, url))
        report = audit_log(opener, KEY, signatures=False, pymerkle=True)
    assert all_ok(report), report.steps


@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 257, 512, 513])
def test_small_sizes(pg_url: str, tmp_path: Path, size: int) -> None:
    ledger = Ledger(pg_url, tmp_path / "memory.json")
    ledger.checkpoint()  # of nothing
    ledger.grow(0, size)
    with ledger.source() as source:
        done = export_log(source, tmp_path / "log", KEY)
    ledger.close()
    assert done.size == size
    assert all_ok(audit_folder(tmp_path / "log", signatures=True))
    assert all_ok(audit_database(pg_url, signatures=True))


def test_entries_that_are_not_signed_for_yet(small: Ledger) -> None:
    small.append([event(n) for n in range(1_000, 1_400)])
    report = audit_database(small.url, signatures=True)
    assert all_ok(report)
    assert (report.size, report.entries) == (700, 1_100)
    assert "400 entries are not signed for yet" in report.steps[-1].says


def test_without_pymerkle_it_says_so(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_opinion, "installed", lambda: False)
    opener = FilesOpener(open_source=functools.partial(FolderSource, made.folder))
    report = audit_log(opener, KEY, signatures=False, pymerkle=True)
    step = report.steps[3]
    assert (step.name, step.state) == ("second opinion", "skipped")
    assert "not installed" in step.says


def test_the_second_opinion_is_asked(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were pymerkle's root another one, the audit would not be ok."""
    monkeypatch.setattr(second_opinion, "root_of_roots", lambda roots: b"\x07" * 32)
    opener = FilesOpener(open_source=functools.partial(FolderSource, made.folder))
    report = audit_log(opener, KEY, signatures=False, pymerkle=True)
    assert not report.ok
    assert states(report)["second opinion"] == "wrong"
    assert states(report)["tree"] == "ok"


# --- a spoilt folder --------------------------------------------------------------------------


def flip(path: Path, offset: int, mask: int = 0x01) -> int:
    """Change one byte; its right value."""
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)
    return data[offset] ^ mask


def entry_at(folder: Path, index: int) -> tuple[str, int, bytes]:
    """Path of the bundle, offset of the entry in it, its bytes."""
    n, position = divmod(index, 256)
    width = min(256, SIZE - n * 256)
    path = tile_path(Tile(level=None, n=n, width=width))
    entries = decode_entries((folder / path).read_bytes(), width)
    at = sum(2 + len(e) for e in entries[:position]) + 2
    return path, at, entries[position]


def first(report: Report) -> tuple[str, int | None, str]:
    assert not report.ok
    found = report.findings[0]
    return found.where, found.offset, found.expected[:4]


@pytest.mark.parametrize("index", [0, 255, 256, SIZE - 1])
@pytest.mark.parametrize("within", [0, 7, 12, 16, 100, -1])
@pytest.mark.parametrize("mask", [0x01, 0x81])
def test_a_flipped_byte_of_an_entry(folder: Path, index: int, within: int, mask: int) -> None:
    """In its index, its time, its envelope; one bit or more of the byte."""
    path, at, entry = entry_at(folder, index)
    offset = at + within % len(entry)
    right = flip(folder / path, offset, mask)
    report = audit_folder(folder)
    assert first(report) == (path, offset, f"0x{right:02x}")
    assert len(report.findings) == 1, [str(f) for f in report.findings]
    assert states(report)["checkpoint"] == "ok"


@pytest.mark.parametrize("index", [0, 255, 300, SIZE - 1])
@pytest.mark.parametrize("byte", [0, 1])
def test_a_flipped_byte_of_a_length(folder: Path, index: int, byte: int) -> None:
    path, at, _ = entry_at(folder, index)
    right = flip(folder / path, at - 2 + byte)
    assert first(audit_folder(folder)) == (path, at - 2 + byte, f"0x{right:02x}")


@pytest.mark.parametrize(
    ("path", "offsets"),
    [
        ("tile/0/000", (0, 31, 32 * 77 + 5, 32 * 256 - 1)),
        (f"tile/0/005.p/{SIZE % 256}", (0, 32 * 200)),
        ("tile/1/000.p/5", (0, 32 * 4 + 31)),
    ],
)
def test_a_flipped_byte_of_a_tile(folder: Path, path: str, offsets: tuple[int, ...]) -> None:
    for offset in offsets:
        check_flipped_tile(folder, path, offset)
    assert audit_folder(folder).ok


@pytest.mark.parametrize(
    ("path", "offset"),
    [
        ("tile/0/200", 70),
        ("tile/0/257.p/208", 32 * 207),
        ("tile/1/000", 32 * 255 + 31),
        ("tile/1/001.p/1", 3),
        ("tile/2/000.p/1", 17),
    ],
)
def test_a_flipped_byte_at_each_level_of_a_tall_log(
    tall_folder: Path, path: str, offset: int
) -> None:
    check_flipped_tile(tall_folder, path, offset)
    assert audit_folder(tall_folder).ok


def check_flipped_tile(folder: Path, path: str, offset: int) -> None:
    right = flip(folder / path, offset)
    try:
        report = audit_folder(folder)
    finally:
        flip(folder / path, offset)
    assert first(report) == (path, offset, f"0x{right:02x}")
    assert len(report.findings) == 1
    assert states(report)["tree"] == "ok"


def test_a_flipped_byte_of_an_entry_of_a_tall_log(tall_folder: Path) -> None:
    path = "tile/entries/201"
    right = flip(tall_folder / path, 30_000)
    try:
        report = audit_folder(tall_folder)
    finally:
        flip(tall_folder / path, 30_000)
    assert first(report) == (path, 30_000, f"0x{right:02x}")
    assert len(report.findings) == 1


@pytest.mark.parametrize("path", ["tile/0/003", "tile/1/000.p/5"])
@pytest.mark.parametrize("cut", [1, 32, 33])
def test_a_tile_cut_short_or_lengthened(folder: Path, path: str, cut: int) -> None:
    whole = (folder / path).read_bytes()
    (folder / path).write_bytes(whole[:-cut])
    assert first(audit_folder(folder))[:2] == (path, max(len(whole) - cut, 0))
    (folder / path).write_bytes(whole + bytes(cut))
    assert first(audit_folder(folder))[:2] == (path, len(whole))


@pytest.mark.parametrize("path", ["tile/entries/004", "tile/0/004", "tile/1/000.p/5"])
def test_a_missing_file(folder: Path, path: str) -> None:
    (folder / path).unlink()
    report = audit_folder(folder)
    assert not report.ok
    assert "missing" in str(report.findings[0])


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_bundle(folder: Path, keep: int) -> None:
    path = folder / "tile/entries/004"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    report = audit_folder(folder)
    where, offset, _ = first(report)
    assert where == "tile/entries/004"
    # The first byte that is missing; of the last entry, the length before it that says too much.
    last = decode_entries(data, 256)[-1]
    assert offset in {len(data[:keep]), len(data) - len(last) - 2, len(data) - len(last) - 1}
    assert states(report)["tree"] == "skipped"


def test_an_entry_and_its_tile_changed_together(folder: Path) -> None:
    path, at, entry = entry_at(folder, 1_000)
    flip(folder / path, at + 40)
    changed = bytearray(entry)
    changed[40] ^= 1
    tile = folder / "tile/0/003"
    data = bytearray(tile.read_bytes())
    data[(1_000 % 256) * 32 :][:32] = b""
    data[(1_000 % 256) * 32 : (1_000 % 256) * 32 + 32] = leaf_hash(bytes(changed))
    tile.write_bytes(data)
    report = audit_folder(folder)
    assert not report.ok
    assert report.findings[0].where == "tile/entries/003"
    assert "entries 768 to 1023" in report.findings[0].says


def test_the_whole_tree_changed_and_only_the_checkpoint_left(folder: Path) -> None:
    """A forger without the key rebuilds everything below the checkpoint."""
    n, width = SIZE // 256, SIZE % 256
    path = folder / tile_path(Tile(level=None, n=n, width=width))
    entries = decode_entries(path.read_bytes(), width)
    forged = entries[5][:16] + entries[6][16:]
    entries[5] = forged
    path.write_bytes(encode_entries(entries))
    (folder / f"tile/0/005.p/{width}").write_bytes(b"".join(map(leaf_hash, entries)))
    report = audit_folder(folder)
    assert not report.ok
    kinds = {finding.kind for finding in report.findings}
    assert "root" in kinds
    root = next(f for f in report.findings if f.kind == "root")
    note = (folder / "checkpoint").read_bytes()
    assert root.where == "checkpoint"
    assert root.offset == note.index(b"\n", note.index(b"\n") + 1) + 1


@pytest.mark.parametrize("line", range(5))
def test_a_flipped_byte_of_the_checkpoint(folder: Path, line: int) -> None:
    note = (folder / "checkpoint").read_bytes()
    starts = [0, *(n + 1 for n, byte in enumerate(note[:-1]) if byte == 10)]
    offset = starts[line] + (8 if line == 4 else 1 if line != 3 else 0)
    right = flip(folder / "checkpoint", offset, 0x04)
    report = audit_folder(folder)
    assert first(report) == ("checkpoint", offset, f"0x{right:02x}")
    assert states(report)["entries"] == "skipped"


def test_a_checkpoint_of_another_key(made: Made) -> None:
    opener = FilesOpener(open_source=functools.partial(FolderSource, made.folder))
    stranger = VerifierKey(name=ORIGIN, type=1, public_key=bytes(key("stranger").verify_key))
    report = audit_log(opener, stranger, signatures=False, pymerkle=False)
    assert not report.ok
    assert report.findings[0].where == "checkpoint"


def test_a_spoilt_checkpoint_record(folder: Path) -> None:
    file = "checkpoints/000"
    data = (folder / file).read_bytes()
    offset = data.index(b"=\\n") - 4  # in the base64 of a root
    right = flip(folder / file, offset, 0x04)
    report = audit_folder(folder)
    where, at, expected = first(report)
    assert where == file
    assert expected == f"0x{right:02x}"
    # The offset is within the note as text; escapes before it count twice in the file.
    assert at is not None
    assert abs(at - offset) <= 4
    (folder / file).write_bytes(b"{}\n" + data)
    assert first(audit_folder(folder))[:2] == (file, 0)


def test_an_older_partial_tile_that_lies_about_still(folder: Path) -> None:
    full = (folder / "tile/0/000").read_bytes()
    older = folder / "tile/0/000.p/7"
    older.parent.mkdir()
    older.write_bytes(full[: 7 * 32])
    assert audit_folder(folder).ok
    flip(older, 33)
    assert first(audit_folder(folder))[:2] == ("tile/0/000.p/7", 33)
    older.unlink()
    bundle = (folder / "tile/entries/000").read_bytes()
    entries = decode_entries(bundle, 256)[:3]
    partial = folder / "tile/entries/000.p/3"
    partial.parent.mkdir()
    partial.write_bytes(encode_entries(entries))
    assert audit_folder(folder).ok
    flip(partial, 70)
    assert first(audit_folder(folder))[:2] == ("tile/entries/000.p/3", 70)


def test_a_file_that_is_no_tile(folder: Path) -> None:
    (folder / "tile/0/notes.txt").write_text("hello")
    assert first(audit_folder(folder))[:2] == ("tile/0/notes.txt", None)


# --- a spoilt database ------------------------------------------------------------------------


@contextmanager
def tampering(url: str) -> Iterator[psycopg.Connection]:
    """What a hand in the database can do: triggers off, any row changed."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER TABLE stored_events DISABLE TRIGGER USER")
        connection.execute("ALTER TABLE log_checkpoints DISABLE TRIGGER USER")
        yield connection


def change(url: str, query: str, *values: object) -> None:
    with tampering(url) as connection:
        assert connection.execute(query, values).rowcount > 0


FLIP = "set_byte({0}, %s, get_byte({0}, %s) # 1)"


@pytest.mark.parametrize(("id", "byte"), [(1, 0), (256, 40), (257, 200), (700, 100)])
def test_a_flipped_byte_of_a_state(small: Ledger, id: int, byte: int) -> None:
    query = f"UPDATE stored_events SET state = {FLIP.format('state')} WHERE notification_id = %s"
    change(small.url, query, byte, byte, id)
    for signatures in (False, True):
        report = audit_database(small.url, signatures=signatures)
        assert first(report)[:2] == (f"stored_events notification_id={id} column state", byte)
        assert len(report.findings) == 1, [str(f) for f in report.findings]


@pytest.mark.parametrize(
    ("set_", "column"),
    [
        ("recorded_at = recorded_at + 1", "recorded_at"),
        ("event_id = gen_random_uuid()", "event_id"),
        ("topic = 'datanet.created'", "topic"),
        ("originator_id = gen_random_uuid()", "originator_id"),
        (f"leaf_hash = {FLIP.format('leaf_hash').replace('%s', '9')}", "leaf_hash"),
    ],
)
def test_a_changed_column(small: Ledger, set_: str, column: str) -> None:
    change(small.url, f"UPDATE stored_events SET {set_} WHERE notification_id = 300")
    report = audit_database(small.url, signatures=True)
    where, offset, _ = first(report)
    assert where == f"stored_events notification_id=300 column {column}"
    assert offset is not None
    if column == "leaf_hash":
        assert offset == 9


def test_a_version_that_is_not_the_next(small: Ledger) -> None:
    change(small.url, "UPDATE stored_events SET originator_version = 9 WHERE notification_id = 5")
    assert "originator_id=" in first(audit_database(small.url))[0]


@pytest.mark.parametrize("id", [1, 300, 700])
def test_a_missing_row(small: Ledger, id: int) -> None:
    change(small.url, "DELETE FROM stored_events WHERE notification_id = %s", id)
    report = audit_database(small.url)
    assert first(report)[0] == f"stored_events notification_id={id}"
    assert states(report)["tree"] == "skipped"


def test_a_row_too_many(small: Ledger) -> None:
    with tampering(small.url) as connection:
        connection.execute("UPDATE log_head SET size = 650")
    report = audit_database(small.url)
    assert not report.ok
    places = {finding.where for finding in report.findings}
    assert places >= {"log_head column size", "stored_events notification_id=700"}


@pytest.mark.parametrize(("level", "n", "byte"), [(0, 0, 0), (0, 1, 100), (0, 2, 64), (1, 0, 40)])
def test_a_flipped_byte_of_a_stored_tile(small: Ledger, level: int, n: int, byte: int) -> None:
    query = f"UPDATE log_tiles SET hashes = {FLIP.format('hashes')} WHERE level = %s AND n = %s"
    change(small.url, query, byte, byte, level, n)
    report = audit_database(small.url)
    assert first(report)[:2] == (f"log_tiles level={level} n={n} column hashes", byte)
    assert len(report.findings) == 1


def test_a_tile_that_no_tree_has(small: Ledger) -> None:
    change(small.url, "INSERT INTO log_tiles VALUES (3, 0, sha256('x'))")
    assert first(audit_database(small.url))[0] == "log_tiles level=3 n=0"


@pytest.mark.parametrize("size", [175, 700])
def test_a_flipped_byte_of_a_stored_checkpoint(small: Ledger, size: int) -> None:
    query = f"UPDATE log_checkpoints SET note = {FLIP.format('note')} WHERE size = %s"
    change(small.url, query, 30, 30, size)
    report = audit_database(small.url)
    assert first(report)[:2] == (f"log_checkpoints size={size} column note", 30)


@pytest.mark.parametrize("size", [175, 700])
def test_a_checkpoints_columns_are_not_believed(small: Ledger, size: int) -> None:
    query = f"UPDATE log_checkpoints SET root = {FLIP.format('root')} WHERE size = %s"
    change(small.url, query, 3, 3, size)
    where, _, _ = first(audit_database(small.url))
    assert where == f"log_checkpoints size={size} column root"


def test_a_signed_checkpoint_of_another_tree(small: Ledger, tmp_path: Path) -> None:
    """Signed by the log's own key: a fork, in its own table."""
    from ledger.log.signer import LogSigner, SignedTree

    fork = SignedTree(size=350, root=b"\x05" * 32)
    forger = LogSigner(origin=ORIGIN, key=key("log"), state_path=tmp_path / "other.json")
    note = forger.sign(fork, published=None, prove_from=lambda old: [])
    change(
        small.url,
        "UPDATE log_checkpoints SET note = %s, root = %s WHERE size = 350",
        note,
        fork.root,
    )
    where, offset, _ = first(audit_database(small.url))
    assert where == "log_checkpoints size=350 column note"
    assert offset == note.index(b"\n", note.index(b"\n") + 1) + 1


# --- events that are in the log and should not be ---------------------------------------------


def spoilt(pg_url: str, tmp_path: Path, raws: Callable[[], list[bytes]]) -> Report:
    ledger = Ledger(pg_url, tmp_path / "memory.json")
    ledger.append([event(n) for n in range(300)])
    ledger.checkpoint()
    ledger.append(raws())
    ledger.checkpoint()
    try:
        return audit_database(pg_url, signatures=True)
    finally:
        ledger.close()


def test_an_anchor_with_a_wrong_root(pg_url: str, tmp_path: Path) -> None:
    raw = anchored(1, 200, b"\x09" * 32)
    report = spoilt(pg_url, tmp_path, lambda: [event(400), raw])
    where, offset, _ = first(report)
    assert where == "stored_events notification_id=302 column state"
    assert offset == raw.index(b"09" * 32)
    assert states(report)["anchors"] == "wrong"
    assert len(report.findings) == 1


def test_an_anchor_of_a_tree_larger_than_the_log_was(pg_url: str, tmp_path: Path) -> None:
    report = spoilt(pg_url, tmp_path, lambda: [anchored(1, 302, b"\x09" * 32), event(400)])
    assert "at most 300" in report.findings[0].expected


def test_an_event_with_a_wrong_signature(pg_url: str, tmp_path: Path) -> None:
    """In the log, in the tree, under the signed root: only the signature tells."""
    good = event(500)
    at = good.index(b'"sig":"') + 7
    bad = good[:at] + (b"B" if good[at : at + 1] != b"B" else b"C") + good[at + 1 :]
    report = spoilt(pg_url, tmp_path, lambda: [bad])
    assert first(report)[0] == "stored_events notification_id=301 column state"
    assert "not a valid event" in report.findings[0].says
    assert states(report)["tree"] == "ok"


def test_an_event_of_another_log(pg_url: str, tmp_path: Path) -> None:
    report = spoilt(pg_url, tmp_path, lambda: [event(500, origin="other.example/log")])
    assert first(report)[0] == "stored_events notification_id=301 column state"
    assert "no event of this log" in report.findings[0].says


def test_an_event_id_twice(small: Ledger, pg_url: str) -> None:
    """The database's own index would refuse it; a file's would not."""
    with psycopg.connect(pg_url, autocommit=True) as connection:
        connection.execute("DROP INDEX stored_events_event_id_idx")
    from tests.unit.lineage_world import name

    small.append([event(2_000, id=name("event 10"))])
    small.checkpoint()
    report = audit_database(pg_url, signatures=True)
    where, offset, _ = first(report)
    assert where == "stored_events notification_id=701 column state"
    assert offset is not None
    assert "the event id of entry 10" in report.findings[0].says


def test_a_clock_that_fell(small: Ledger) -> None:
    """append_events never lets it; a hand in the database would have to re-sign the tree."""
    with tampering(small.url) as connection:
        connection.execute("UPDATE log_head SET recorded_at = 5")
    small.clock = lambda: 7
    small.append([event(900)])
    small.checkpoint()
    report = audit_database(small.url)
    assert first(report)[:2] == ("stored_events notification_id=701 column recorded_at", 0)
    assert "before that of the entry before it" in report.findings[0].says


def test_the_tree_room_is_not_the_audits_own_word(made: Made) -> None:
    """The audit's levels and `ledger.log.tree` are two computations of the same hashes."""
    source = FolderSource(made.folder)
    from ledger.log.sources import tile_reader

    report = audit_folder(made.folder)
    assert tree_room.root(SIZE, tile_reader(source, SIZE)) == report.root
