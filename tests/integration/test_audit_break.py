"""An audit that was fooled, or that fell over, once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ledger.log.audit import audit_log
from ledger.log.audit_files import FilesOpener
from ledger.log.audit_report import Report
from ledger.verify.tiles import Tile, tile_path
from tests.audit_world import Ledger, event, tell, unsigned
from tests.integration.test_log_audit import audit_database, change, first, states, tampering
from tests.unit.lineage_world import NOW, ORIGIN, name
from tests.unit.monitor_world import LOG, VKEY, DictSource, checkpoint, log_files


def of_monitored(n: int, *, id: int | None = None) -> bytes:
    """An entry's bytes, not signed, with the event id of another one."""
    raw = unsigned(n if id is None else id).replace(ORIGIN.encode(), LOG.encode())
    return n.to_bytes(8, "big") + NOW.to_bytes(8, "big") + raw


def audit(source: DictSource) -> Report:
    opener = FilesOpener(open_source=lambda: source)
    return audit_log(opener, VKEY, signatures=False, pymerkle=False)


@pytest.fixture
def small(pg_url: str, tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(pg_url, tmp_path / "memory.json")
    tell(ledger, 300)
    yield ledger
    ledger.close()


@pytest.mark.parametrize("more", [5, 800])
def test_a_row_that_is_missing_behind_the_signed_tree(small: Ledger, more: int) -> None:
    """It accuses no signature: what is signed was rebuilt, or said to be not."""
    small.append([event(n) for n in range(300, 300 + more)])
    change(small.url, "DELETE FROM stored_events WHERE notification_id = %s", 300 + more - 1)
    report = audit_database(small.url)
    assert first(report)[0] == f"stored_events notification_id={300 + more - 1}"
    assert states(report)["tree"] != "wrong", [str(f) for f in report.findings]


@pytest.mark.parametrize("lost", [300, 2_000])
def test_a_gap_behind_an_event_id_that_stands_twice(lost: int) -> None:
    """The second one stands in a later stretch, and the way to it leads over the gap."""
    entries = [of_monitored(n, id=10 if n == 16_690 else None) for n in range(16_700)]
    files = log_files(entries)
    del files[tile_path(Tile(level=None, n=lost // 256))]
    report = audit(DictSource(files))
    assert states(report)["tree"] == "skipped"
    assert any(f.where.startswith("tile/entries/") for f in report.findings)


@pytest.mark.parametrize("size", [2**40, 2**62])
def test_a_signed_size_that_nothing_stands_behind(size: int) -> None:
    """The log signs any number; the audit asks for some files, finds none, and ends."""
    note = checkpoint(size, b"\x11" * 32)
    source = DictSource({"checkpoint": note})
    report = audit(source)
    assert states(report)["tree"] == "skipped"
    assert len(source.reads) < 1_000


def test_versions_that_changed_places(small: Ledger) -> None:
    """Each stream holds 1, 2, 3, ..., but not in the order of the log."""
    small.append([event(10, id=name("once more"))])
    small.checkpoint()
    with tampering(small.url) as connection:
        for version, id in ((9, 11), (1, 301), (2, 11)):
            connection.execute(
                "UPDATE stored_events SET originator_version = %s WHERE notification_id = %s",
                [version, id],
            )
    report = audit_database(small.url, signatures=True)
    assert not report.ok


@pytest.mark.parametrize("set_", ["recorded_at = -1", "state = NULL"])
def test_columns_that_make_no_entry(small: Ledger, set_: str) -> None:
    change(small.url, f"UPDATE stored_events SET {set_} WHERE notification_id = 5")
    report = audit_database(small.url)
    assert first(report)[0].startswith("stored_events notification_id=5")
