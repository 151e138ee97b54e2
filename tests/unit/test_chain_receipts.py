"""The promise for contracts: our short EIP-712 encoder against eth_account's general one, and
against the Solidity that recovers it (contracts/test/Receipt.t.sol, run by forge)."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import _hash_eip191_message, encode_typed_data
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.chain.receipts import (
    ReceiptDomain,
    ReceiptSigner,
    receipt_typed_data,
    verify_evm_signature,
)
from ledger.errors import BadSignature, MalformedProof
from ledger.verify.receipt import Promise

SOLIDITY = Path(__file__).parents[2] / "contracts" / "test" / "Receipt.t.sol"
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
SECRET = bytes.fromhex("42" * 32)
CHAIN_ID, CONTRACT = 31_337, "0x" + "a1" * 20
PROMISE = Promise(
    log="ledger.example/main",
    first_index=1_234,
    leaf_hashes=(b"\x11" * 32, b"\x22" * 32, b"\x33" * 32),
    recorded_at=1_700_000_000_000_000,
    included_by=1_700_000_060_000_000,
)
SIGNER = ReceiptSigner(SECRET, ReceiptDomain(chain_id=CHAIN_ID, contract=CONTRACT))
SIG = SIGNER.sign(PROMISE)


def verify(promise: Promise = PROMISE, **changes: Any) -> None:
    given = {"chain_id": CHAIN_ID, "contract": CONTRACT, "signer": SIGNER.address, "sig": SIG}
    verify_evm_signature(promise, **{**given, **changes})


UINT64 = st.integers(0, 2**64 - 1)


@settings(max_examples=100, deadline=None)
@given(
    log=st.text(min_size=1, max_size=128),
    first=UINT64,
    leaves=st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=4),
    at=UINT64,
    by=UINT64,
    chain_id=st.integers(1, 2**63),
    contract=st.binary(min_size=20, max_size=20),
)
def test_the_digest_is_that_of_typed_data(
    log: str, first: int, leaves: list[bytes], at: int, by: int, chain_id: int, contract: bytes
) -> None:
    try:
        log.encode()
    except UnicodeEncodeError:
        return
    promise = Promise(
        log=log, first_index=first, leaf_hashes=tuple(leaves), recorded_at=at, included_by=by
    )
    address = "0x" + contract.hex()
    document = receipt_typed_data(promise, chain_id=chain_id, contract=address)
    expected = _hash_eip191_message(encode_typed_data(full_message=document))
    assert ReceiptDomain(chain_id=chain_id, contract=address).digest(promise) == bytes(expected)


def test_eth_account_recovers_the_signer_and_signs_the_same_bytes() -> None:
    document = receipt_typed_data(PROMISE, chain_id=CHAIN_ID, contract=CONTRACT)
    message = encode_typed_data(full_message=document)
    account = Account.from_key(SECRET)
    assert SIGNER.address == account.address.lower()
    assert Account.recover_message(message, signature=SIG) == account.address
    assert bytes(account.sign_message(message).signature) == SIG == SIGNER.sign(PROMISE)
    verify()
    verify(signer=account.address)


@pytest.mark.parametrize(
    "fields",
    [
        {"log": "ledger.example/other"},
        {"first_index": 1_235},
        {"leaf_hashes": PROMISE.leaf_hashes[:2]},
        {"leaf_hashes": PROMISE.leaf_hashes[::-1]},
        {"recorded_at": 0},
        {"included_by": 2**63},
    ],
)
def test_every_field_is_bound(fields: dict[str, Any]) -> None:
    with pytest.raises(BadSignature, match="was signed by"):
        verify(replace(PROMISE, **fields))


@pytest.mark.parametrize(
    "fields", [{"chain_id": 1}, {"contract": "0x" + "a2" * 20}, {"signer": "0x" + "00" * 20}]
)
def test_chain_contract_and_signer_are_bound(fields: dict[str, Any]) -> None:
    with pytest.raises(BadSignature):
        verify(**fields)


def test_any_flipped_bit_and_the_other_s_fail() -> None:
    for bit in range(len(SIG) * 8):
        flipped = bytearray(SIG)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((BadSignature, MalformedProof)):
            verify(sig=bytes(flipped))
    twin = (ORDER - int.from_bytes(SIG[32:64], "big")).to_bytes(32, "big")
    with pytest.raises(MalformedProof, match="lower"):
        verify(sig=SIG[:32] + twin + bytes([55 - SIG[64]]))


@pytest.mark.parametrize(
    "sig", [b"", SIG[:64], SIG + b"\0", bytes(64) + b"\x1b", b"\xff" * 32 + SIG[32:]]
)
def test_what_is_no_signature(sig: bytes) -> None:
    with pytest.raises((MalformedProof, BadSignature)):
        verify(sig=sig)


def test_solidity_judges_this_very_promise() -> None:
    """Its constants are ours: what forge shows for them holds for what we sign."""
    text = SOLIDITY.read_text()
    digest = SIGNER.domain.digest(PROMISE)
    found = dict(re.findall(r"constant (\w+) =\s*(?:hex)?\"?([^;\"]+)\"?;", text))
    assert found["LOG"] == PROMISE.log
    assert int(found["FIRST_INDEX"].replace("_", "")) == PROMISE.first_index
    assert int(found["RECORDED_AT"].replace("_", "")) == PROMISE.recorded_at
    assert int(found["INCLUDED_BY"].replace("_", "")) == PROMISE.included_by
    assert int(found["CHAIN_ID"].replace("_", "")) == CHAIN_ID
    assert found["DIGEST"] == "0x" + digest.hex()
    assert found["SIGNATURE"] == SIG.hex()
    assert found["SIGNER"].lower() == f"address({SIGNER.address})"
    assert found["ANCHOR"].lower() == f"address({CONTRACT})"
