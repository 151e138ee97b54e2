"""Issuing promises that never move, and reading from a log what they are held against."""

import json
from pathlib import Path

import pytest

from ledger.domain.canonical import canonical_json
from ledger.errors import ConfigError, Inconsistent, NotFound, StorageError, VerificationError
from ledger.log.receipts import Promises, ReceiptIssuer, hold_against, shown_by
from ledger.log.sources import FolderSource
from ledger.verify.checkpoint import open_checkpoint
from ledger.verify.receipt import EvmSignature, Promise, parse_receipt, verify_receipt
from tests.unit.receipt_world import (
    INCLUDED_BY,
    LOG,
    PROMISE_S,
    RECORDED_AT,
    VKEY,
    History,
    cosigned,
    entries,
    policy,
)

SECOND = 1_000_000
MANY = 600  # full and partial tiles on two levels


def terms(path: Path) -> list[list[int]]:
    found: list[list[int]] = json.loads(path.read_bytes())["terms"]
    return found


def test_a_receipt_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    history = History(tmp_path, entries(3))
    issued = [
        canonical_json(
            history.issuer.issue(
                first_index=1, leaf_hashes=history.log.leaf_hashes(1, 3), recorded_at=RECORDED_AT
            )
        )
        for _ in range(2)
    ]
    assert issued[0] == issued[1]
    promise = verify_receipt(issued[0], VKEY).promise
    assert promise.leaf_hashes == tuple(history.log.leaf_hashes(1, 3))
    assert promise.included_by == INCLUDED_BY


def test_the_evm_part_is_over_the_same_promise(tmp_path: Path) -> None:
    seen: list[Promise] = []

    def sign(promise: Promise) -> EvmSignature:
        seen.append(promise)
        return EvmSignature(
            chain_id=5, contract="0x" + "0c" * 20, signer="0x" + "05" * 20, sig=bytes(65)
        )

    history = History(tmp_path, entries(1))
    issuer = ReceiptIssuer(
        origin=LOG, sign=history.signer.sign_receipt, promises=Promises([(0, 1)]), evm=sign
    )
    issued = issuer.issue(first_index=0, leaf_hashes=[b"\x01" * 32], recorded_at=7)
    receipt = verify_receipt(canonical_json(issued), VKEY)
    assert seen == [receipt.promise]
    assert receipt.evm is not None
    assert receipt.evm.chain_id == 5


def test_no_promise_about_an_index_that_was_signed_before_this_start(tmp_path: Path) -> None:
    """What an older backup of the database would make the log say."""
    history = History(tmp_path, entries(5))
    issuer = ReceiptIssuer(
        origin=LOG, sign=history.signer.sign_receipt, promises=Promises([(0, 1)]), signed_size=5
    )
    leaf = [b"\x01" * 32]
    issuer.issue(first_index=4, leaf_hashes=leaf, recorded_at=0)  # asked for again
    issuer.issue(first_index=5, leaf_hashes=leaf, recorded_at=0, fresh=True)
    with pytest.raises(Inconsistent, match="the database is older"):
        issuer.issue(first_index=4, leaf_hashes=leaf, recorded_at=0, fresh=True)


def test_a_promise_never_moves(tmp_path: Path) -> None:
    path = tmp_path / "log" / "promises.json"
    first = Promises.open(path, 60, 1_000 * SECOND)
    assert first.included_by(0) == 60 * SECOND
    assert terms(path) == [[0, 60]]
    shorter = Promises.open(path, 5, 2_000 * SECOND)
    assert shorter.included_by(1_999 * SECOND) == (1_999 + 60) * SECOND
    assert shorter.included_by(2_000 * SECOND) == (2_000 + 5) * SECOND
    again = Promises.open(path, 5, 3_000 * SECOND)
    assert terms(path) == [[0, 60], [2_000 * SECOND, 5]], "the same setting adds nothing"
    longer = Promises.open(path, 600, 3_000 * SECOND)
    for promises in (again, longer):
        assert promises.included_by(2_500 * SECOND) == (2_500 + 5) * SECOND
    assert longer.included_by(3_000 * SECOND) == (3_000 + 600) * SECOND


def test_a_clock_that_jumped_back_keeps_the_terms_in_order(tmp_path: Path) -> None:
    path = tmp_path / "promises.json"
    Promises.open(path, 60, 1_000 * SECOND)
    Promises.open(path, 5, 2_000 * SECOND)
    back = Promises.open(path, 60, 1_500 * SECOND)
    since = [since for since, _ in terms(path)]
    assert since == sorted(since)
    assert back.included_by(1_900 * SECOND) == (1_900 + 60) * SECOND


@pytest.mark.parametrize(
    "text", ["", "{}", '{"format":"x","terms":[[0,1]]}', '{"format":"tributary/promises/v1",'
             '"terms":[[5,1]]}', '{"format":"tributary/promises/v1","terms":[]}', "[1]"]
)  # fmt: skip
def test_a_damaged_memory_of_promises_is_not_guessed_at(tmp_path: Path, text: str) -> None:
    path = tmp_path / "promises.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="restore it from a backup"):
        Promises.open(path, 60, 0)
    assert path.read_text() == text


def test_a_memory_that_cannot_be_written_promises_nothing(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file where a folder is needed")
    with pytest.raises(StorageError, match="cannot read"):
        Promises.open(tmp_path / "log" / "promises.json", 60, 0)


# --- against a served log ----------------------------------------------------------------------


def test_a_served_log_keeps_its_promises(tmp_path: Path) -> None:
    history = History(tmp_path / "memory", entries(MANY))
    source = FolderSource(history.folder(tmp_path / "log"))
    checkpoint = open_checkpoint(source.read("checkpoint"), VKEY).checkpoint
    for first, stop in ((0, 1), (255, 257), (100, 600), (599, 600)):
        receipt = history.receipt(first, stop)
        shown = shown_by(source, receipt, checkpoint)
        assert [leaf.index for leaf in shown] == list(range(first, stop))
        verdict = hold_against(source, receipt, VKEY, now=INCLUDED_BY)
        assert (verdict.state, verdict.facts["size"]) == ("kept", MANY)


def test_a_log_that_replaced_or_dropped_an_entry_is_caught(tmp_path: Path) -> None:
    honest = History(tmp_path / "a", entries(MANY))
    replaced = History(tmp_path / "b", entries(MANY, other=300))
    dropped = History(tmp_path / "c", [e for n, e in enumerate(entries(MANY)) if n != 300])
    receipt = honest.receipt(300)
    for n, fork in enumerate((replaced, dropped)):
        source = FolderSource(fork.folder(tmp_path / f"fork{n}"))
        verdict = hold_against(source, receipt, VKEY, now=INCLUDED_BY)
        assert verdict.state == "broken"
        assert verdict.facts["index"] == 300


def test_a_log_that_stopped_is_pending_and_a_late_witness_convicts_it(tmp_path: Path) -> None:
    short, whole = History(tmp_path / "a", entries(3)), History(tmp_path / "b", entries(4))
    folder = short.folder(tmp_path / "log")
    receipt = whole.receipt(3)
    source = FolderSource(folder)
    verdict = hold_against(source, receipt, VKEY, now=INCLUDED_BY + 1)
    assert (verdict.state, verdict.facts["overdue"]) == ("pending", True)
    late = INCLUDED_BY // SECOND + 1
    (folder / "checkpoint").write_bytes(cosigned(short.newest.note, w=late))
    known = policy(1, "w")
    assert hold_against(source, receipt, VKEY, now=0, policy=known).state == "broken"
    assert hold_against(source, receipt, VKEY, now=0).state == "pending"


def test_files_that_do_not_fit_the_checkpoint_prove_nothing(tmp_path: Path) -> None:
    history = History(tmp_path / "memory", entries(MANY))
    receipt = history.receipt(300)
    folder = history.folder(tmp_path / "log")
    source = FolderSource(folder)
    tile = folder / "tile" / "0" / "001"
    whole = tile.read_bytes()
    for bad in (whole[:100], b"", bytes(len(whole))):
        tile.write_bytes(bad)
        with pytest.raises(VerificationError):
            hold_against(source, receipt, VKEY, now=0)
    tile.unlink()
    with pytest.raises(NotFound):
        hold_against(source, receipt, VKEY, now=0)


def test_partial_tiles_that_the_log_dropped_are_read_from_the_full_ones(tmp_path: Path) -> None:
    old = History(tmp_path / "a", entries(300))
    new = History(tmp_path / "b", entries(MANY))
    folder = new.folder(tmp_path / "log")
    (folder / "checkpoint").write_bytes(old.newest.note)
    # Of tile 0/001 (44 wide then) only the full one is left; level 1 is partial in both.
    narrow = old.folder(tmp_path / "old") / "tile" / "1" / "000.p" / "1"
    (folder / "tile" / "1" / "000.p" / "1").write_bytes(narrow.read_bytes())
    assert not (folder / "tile" / "0" / "001.p").exists()
    verdict = hold_against(FolderSource(folder), new.receipt(299), VKEY, now=0)
    assert (verdict.state, verdict.facts["size"]) == ("kept", 300)


def test_the_promise_in_the_receipt_is_the_one_in_force(tmp_path: Path) -> None:
    history = History(tmp_path, entries(1))
    receipt = parse_receipt(
        canonical_json(
            history.issuer.issue(first_index=0, leaf_hashes=[b"\x01" * 32], recorded_at=17)
        )
    )
    assert receipt.promise.included_by == 17 + PROMISE_S * SECOND
