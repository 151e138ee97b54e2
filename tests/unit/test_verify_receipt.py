"""Receipts: one spelling, every altered field refused, and a verdict that frames nobody."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from ledger.domain.canonical import canonical_json
from ledger.errors import (
    BadSignature,
    ConfigError,
    Inconsistent,
    MalformedProof,
    NotIncluded,
    VerificationError,
)
from ledger.log.signer import LogSigner
from ledger.verify.evidence import Evidence, check_evidence, format_evidence, parse_evidence
from ledger.verify.note import COSIGNATURE, format_vkey, vkey_of
from ledger.verify.receipt import (
    CONTEXT,
    FORMAT,
    MAX_RECEIPT_BYTES,
    EvmSignature,
    Receipt,
    format_receipt,
    parse_receipt,
    verify_receipt,
)
from ledger.verify.receipt_verdict import ReceiptVerdict, Shown, judge, recheck_broken
from tests.unit.receipt_world import (
    IN_TIME,
    INCLUDED_BY,
    KEY,
    LATE,
    LOG,
    PROMISE_S,
    RECORDED_AT,
    VKEY,
    History,
    cosigned,
    entries,
    policy,
)

EVM = EvmSignature(
    chain_id=1, contract="0x" + "ab" * 20, signer="0x" + "cd" * 20, sig=bytes(range(65))
)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> History:
    return History(tmp_path_factory.mktemp("honest"), entries(9))


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> History:
    return History(tmp_path_factory.mktemp("forked"), entries(9, other=5))


@pytest.fixture(scope="module")
def data(honest: History) -> bytes:
    return format_receipt(honest.receipt(5))


def changed(data: bytes, **fields: Any) -> bytes:
    return canonical_json({**json.loads(data), **fields})


def evidence_of(verdict: ReceiptVerdict) -> Evidence:
    assert verdict.evidence is not None
    evidence = Evidence(
        kind="broken-receipt", log=LOG, vkey=format_vkey(VKEY), found_at=1, says=verdict.says,
        items=verdict.evidence,
    )  # fmt: skip
    return parse_evidence(format_evidence(evidence))


# --- bytes and signature ----------------------------------------------------------------------


def test_the_signed_bytes_are_those_of_the_format(data: bytes) -> None:
    """As docs/FORMATS.md says it, without our own functions."""
    value = json.loads(data)
    sig, evm = value.pop("sig"), value.pop("evm")
    message = (
        b"tributary/receipt/v1\n"
        + json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    )
    import base64

    KEY.verify_key.verify(message, base64.b64decode(sig))
    assert evm is None
    assert value["included_by"] == value["recorded_at"] + PROMISE_S * 1_000_000


def test_one_spelling(data: bytes, honest: History) -> None:
    assert format_receipt(parse_receipt(data)) == data
    with_evm = format_receipt(Receipt(promise=honest.receipt(5).promise, sig=bytes(64), evm=EVM))
    assert parse_receipt(with_evm).evm == EVM
    assert format_receipt(parse_receipt(with_evm)) == with_evm


@pytest.mark.parametrize(
    "fields",
    [
        {"first_index": 6},
        {"leaf_hashes": ["ab" * 32]},
        {"recorded_at": RECORDED_AT - 1},
        {"included_by": INCLUDED_BY + 1},
        {"sig": "A" * 86 + "=="},
    ],
)
def test_each_field_is_signed(data: bytes, fields: dict[str, Any]) -> None:
    verify_receipt(data, VKEY)
    with pytest.raises(BadSignature):
        verify_receipt(changed(data, **fields), VKEY)


def test_another_log_and_other_keys(data: bytes) -> None:
    with pytest.raises(Inconsistent, match="of log"):
        verify_receipt(changed(data, log="other.example/log"), VKEY)
    with pytest.raises(BadSignature):
        verify_receipt(data, vkey_of(LOG, SigningKey(b"M" * 32)))
    with pytest.raises(Inconsistent):
        verify_receipt(data, vkey_of(LOG, KEY, COSIGNATURE))


def test_any_flipped_bit_fails(data: bytes) -> None:
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(VerificationError):
            verify_receipt(bytes(flipped), VKEY)


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "tributary/receipt/v2"},
        {"log": "with space"}, {"log": "with+plus"}, {"log": ""}, {"log": "x" * 129}, {"log": 1},
        {"leaf_hashes": []}, {"leaf_hashes": ["ab" * 32] * 501}, {"leaf_hashes": "ab" * 32},
        {"leaf_hashes": ["AB" * 32]}, {"leaf_hashes": ["ab" * 31]}, {"leaf_hashes": [None]},
        {"first_index": -1}, {"first_index": True}, {"first_index": 2**53 - 1},
        {"first_index": "5"}, {"included_by": RECORDED_AT - 1}, {"recorded_at": None},
        {"sig": "AAAA"}, {"sig": "!"}, {"sig": None}, {"evm": {}}, {"evm": 0}, {"evm": []},
        {"more": 1},
    ],
)  # fmt: skip
def test_what_is_no_receipt(data: bytes, fields: dict[str, Any]) -> None:
    with pytest.raises(MalformedProof):
        parse_receipt(changed(data, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"chain_id": 0}, {"chain_id": "1"}, {"contract": "0x" + "AB" * 20}, {"contract": "ab" * 20},
        {"signer": "0x" + "ab" * 21}, {"sig": "0x" + "ab" * 64}, {"sig": "ab" * 65}, {"more": 1},
        {"contract": "0x" + "ab" * 20 + "\n"},
    ],
)  # fmt: skip
def test_what_is_no_evm_part(data: bytes, fields: dict[str, Any]) -> None:
    good = {
        "chain_id": 1, "contract": "0x" + "ab" * 20, "signer": "0x" + "ab" * 20,
        "sig": "0x" + "ab" * 65,
    }  # fmt: skip
    parse_receipt(changed(data, evm=good))
    with pytest.raises(MalformedProof):
        parse_receipt(changed(data, evm={**good, **fields}))


def test_spaces_missing_fields_and_size(data: bytes) -> None:
    value = json.loads(data)
    for field in value:
        with pytest.raises(MalformedProof):
            parse_receipt(canonical_json({k: v for k, v in value.items() if k != field}))
    for bad in (b"", b" " + data, data + b"\n", json.dumps(value).encode(), b"[" * 100_000):
        with pytest.raises(MalformedProof):
            parse_receipt(bad)
    with pytest.raises(MalformedProof, match="MAX_RECEIPT_BYTES"):
        parse_receipt(b'"' + b"a" * MAX_RECEIPT_BYTES + b'"')


def test_the_largest_receipt_fits(honest: History) -> None:
    promise = honest.receipt(5).promise
    largest = Receipt(
        promise=type(promise)(
            log="x" * 128,
            first_index=2**53 - 1 - 500,
            leaf_hashes=(b"\xff" * 32,) * 500,
            recorded_at=2**53 - 1,
            included_by=2**53 - 1,
        ),
        sig=bytes(64),
        evm=EVM,
    )
    assert parse_receipt(format_receipt(largest)) == largest


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_hostile_bytes(raw: bytes) -> None:
    with pytest.raises(VerificationError):
        verify_receipt(raw, VKEY)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(field=st.sampled_from(("log", "first_index", "leaf_hashes", "recorded_at", "included_by",
                              "sig", "evm", "format", "else")), value=VALUES)  # fmt: skip
def test_hostile_fields(data: bytes, field: str, value: Any) -> None:
    try:
        raw = changed(data, **{field: value})
    except Exception:  # a lone surrogate has no canonical form
        return
    if raw == data:
        return
    with pytest.raises(VerificationError):
        verify_receipt(raw, VKEY)


def test_no_log_signs_checkpoints_that_start_as_receipts_do(tmp_path: Path) -> None:
    assert FORMAT.encode() + b"\n" == CONTEXT
    with pytest.raises(ConfigError, match="origin must not be"):
        LogSigner.open(
            origin=FORMAT, key_path=tmp_path / "log.key", state_path=tmp_path / "signed.json"
        )
    assert not (tmp_path / "log.key").exists()


# --- verdicts ---------------------------------------------------------------------------------


def test_kept_at_every_index_of_every_tree(tmp_path: Path) -> None:
    history = History(tmp_path, [])
    notes = []
    for n, entry in enumerate(entries(13)):
        history.append(entry)
        notes.append(history.newest.note)
        for index in range(n + 1):
            verdict = history.judge(history.receipt(index))
            assert verdict.state == "kept"
            assert not verdict.facts["in_time"]
            assert any("in time" in line for line in verdict.trusted)
    for size, note in enumerate(notes, 1):
        for first in range(13):
            for stop in range(first + 1, 14):
                expected = "kept" if stop <= size else "pending"
                assert history.judge(history.receipt(first, stop), note=note).state == expected


def test_pending_and_overdue(tmp_path: Path, honest: History) -> None:
    short = History(tmp_path, entries(5))
    for now, overdue in ((INCLUDED_BY, False), (INCLUDED_BY + 1, True)):
        verdict = short.judge(honest.receipt(5), now=now)
        assert verdict.state == "pending"
        assert verdict.facts["overdue"] is overdue
        assert verdict.evidence is None
        assert ("this machine's clock" in verdict.says) is overdue


@pytest.mark.parametrize(("first", "stop"), [(5, 6), (3, 8), (5, 9), (0, 9), (4, 20)])
def test_another_entry_in_its_place_breaks_it_for_everyone(
    honest: History, forked: History, first: int, stop: int
) -> None:
    longer = honest.receipt(first, min(stop, 9))
    verdict = forked.judge(longer)
    assert verdict.state == "broken"
    assert verdict.facts["index"] == 5
    checked = check_evidence(evidence_of(verdict), format_vkey(VKEY))
    assert checked.facts["conclusive"]
    for state in (honest, forked):
        assert state.judge(state.receipt(first, min(stop, 9))).state == "kept"


def test_evidence_against_an_honest_log_cannot_be_made(honest: History, forked: History) -> None:
    items = dict(forked.judge(honest.receipt(5)).evidence or {})
    good = dict(honest.judge(honest.receipt(5)).facts)
    assert good["size"] == 9
    recheck_broken(items, VKEY)
    for name, value in items.items():
        for bit in range(0, len(value) * 8, 7):
            flipped = bytearray(value)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(VerificationError):
                recheck_broken({**items, name: bytes(flipped)}, VKEY)
    # The receipt of the fork itself: nothing is broken.
    with pytest.raises(Inconsistent, match="nothing broken"):
        recheck_broken({**items, "receipt": format_receipt(forked.receipt(5))}, VKEY)
    # Another index than promised.
    with pytest.raises(NotIncluded):
        recheck_broken({**items, "receipt": format_receipt(honest.receipt(4))}, VKEY)
    for missing in items:
        with pytest.raises(MalformedProof):
            recheck_broken({k: v for k, v in items.items() if k != missing}, VKEY)
    with pytest.raises(MalformedProof):
        recheck_broken({**items, "leaf": b"short"}, VKEY)


def test_proofs_that_lead_nowhere_prove_nothing(honest: History, forked: History) -> None:
    receipt, note = honest.receipt(5), honest.newest.note
    shown = honest.shown(receipt)
    bad: dict[str, list[Shown]] = {
        "another tree's": forked.shown(receipt),
        "none": [],
        "not promised": honest.shown(honest.receipt(4)),
        "cut": [Shown(index=5, leaf=shown[0].leaf, proof=shown[0].proof[:-1])],
        "moved": [Shown(index=4, leaf=shown[0].leaf, proof=shown[0].proof)],
    }
    for what, leaves in bad.items():
        with pytest.raises(VerificationError):
            print(what, judge(receipt, VKEY, note=note, shown=leaves, now=0))


@pytest.mark.parametrize(
    ("k", "cosignatures", "state"),
    [
        (1, {"a": LATE}, "pending"),  # b or c may have seen the larger tree in time
        (1, {"a": LATE, "b": LATE}, "pending"),
        (1, {"a": LATE, "b": LATE, "c": LATE}, "broken"),
        (2, {"a": LATE}, "pending"),
        (2, {"a": LATE, "b": LATE}, "broken"),  # c alone is no quorum
        (2, {"a": LATE, "b": IN_TIME}, "pending"),
        (3, {"c": LATE}, "broken"),
        (3, {"c": IN_TIME}, "pending"),
        (3, {"stranger": LATE}, "pending"),
        (3, {}, "pending"),
    ],
)
def test_lateness_needs_enough_witnesses(
    tmp_path: Path, honest: History, k: int, cosignatures: dict[str, int], state: str
) -> None:
    short = History(tmp_path, entries(5))
    note = cosigned(short.newest.note, **cosignatures)
    verdict = short.judge(honest.receipt(5), note=note, policy=policy(k, "a", "b", "c"))
    assert verdict.state == state
    if state == "broken":
        checked = check_evidence(evidence_of(verdict), format_vkey(VKEY))
        assert not checked.facts["conclusive"], "whose witnesses they are, the file cannot prove"
        assert any("clock" in line for line in checked.trusted)
        items = dict(verdict.evidence or {})
        weaker = cosigned(short.newest.note, **dict.fromkeys(cosignatures, IN_TIME))
        with pytest.raises(Inconsistent, match="nothing broken"):
            recheck_broken({**items, "checkpoint": weaker}, VKEY)


def test_a_late_cosignature_of_a_tree_that_covers_it_says_nothing(honest: History) -> None:
    known = policy(1, "a")
    late = cosigned(honest.newest.note, a=LATE)
    verdict = honest.judge(honest.receipt(5), note=late, policy=known)
    assert (verdict.state, verdict.facts["in_time"]) == ("kept", False)
    early = cosigned(honest.newest.note, a=IN_TIME)
    verdict = honest.judge(honest.receipt(5), note=early, policy=known)
    assert (verdict.state, verdict.facts["in_time"]) == ("kept", True)
    assert any("The clock of the witness a.example" in line for line in verdict.trusted)


def test_hostile_times_are_said_and_do_not_crash(tmp_path: Path, honest: History) -> None:
    short = History(tmp_path, entries(5))
    note = cosigned(short.newest.note, a=2**63 - 1)
    verdict = short.judge(honest.receipt(5), note=note, policy=policy(1, "a"))
    assert verdict.state == "broken"
    assert "microsecond" in verdict.says


@pytest.mark.parametrize("make", [lambda v: v.to_text(), lambda v: json.dumps(v.to_json())])
def test_a_verdict_is_shown(honest: History, make: Callable[[ReceiptVerdict], str]) -> None:
    text = make(honest.judge(honest.receipt(5)))
    assert "kept" in text.lower()
    assert "2023-11-14 22:14:20 UTC" in text
