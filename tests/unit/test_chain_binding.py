"""The EVM identity binding: bound to key, log and address, and to one encoding."""

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data

from ledger.chain.evm_binding import binding_typed_data, sign_binding, verify_binding
from ledger.errors import BadSignature, InvalidEvent, MalformedProof

ACTOR = "ed25519:" + "5a" * 32
LOG = "log.example/one"
KEY = Account.from_key("0x" + "42" * 32)
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def test_round_trip_in_either_letter_case() -> None:
    signature = sign_binding(KEY, actor=ACTOR, log=LOG)
    verify_binding(signature, actor=ACTOR, log=LOG, address=KEY.address)
    verify_binding(signature, actor=ACTOR, log=LOG, address=KEY.address.lower())


@pytest.mark.parametrize(
    "changed",
    [
        {"actor": "ed25519:" + "5b" * 32},
        {"log": "log.example/two"},
        {"address": Account.from_key("0x" + "43" * 32).address},
    ],
)
def test_binds_key_log_and_address(changed: dict[str, str]) -> None:
    signature = sign_binding(KEY, actor=ACTOR, log=LOG)
    with pytest.raises(BadSignature, match="not by"):
        verify_binding(signature, **{"actor": ACTOR, "log": LOG, "address": KEY.address, **changed})


def test_any_flipped_bit_fails() -> None:
    raw = bytes.fromhex(sign_binding(KEY, actor=ACTOR, log=LOG)[2:])
    for bit in range(len(raw) * 8):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((BadSignature, MalformedProof)):
            verify_binding("0x" + flipped.hex(), actor=ACTOR, log=LOG, address=KEY.address)


def test_the_other_s_is_refused() -> None:
    raw = bytes.fromhex(sign_binding(KEY, actor=ACTOR, log=LOG)[2:])
    other = (ORDER - int.from_bytes(raw[32:64], "big")).to_bytes(32, "big")
    twin = raw[:32] + other + bytes([55 - raw[64]])
    document = binding_typed_data(actor=ACTOR, log=LOG, address=KEY.address)
    message = encode_typed_data(full_message=document)
    assert Account.recover_message(message, signature=twin) == KEY.address, "a valid twin"
    with pytest.raises(MalformedProof, match="lower"):
        verify_binding("0x" + twin.hex(), actor=ACTOR, log=LOG, address=KEY.address)


@pytest.mark.parametrize("text", ["", "0x", "0x" + "00" * 64, "zz", "0x" + "00" * 65, "00" * 65])
def test_what_is_no_signature(text: str) -> None:
    with pytest.raises(MalformedProof):
        verify_binding(text, actor=ACTOR, log=LOG, address=KEY.address)


def test_zeros_are_no_signature() -> None:
    with pytest.raises(BadSignature):
        verify_binding("0x" + "00" * 64 + "1b", actor=ACTOR, log=LOG, address=KEY.address)


def test_what_is_no_actor_or_address() -> None:
    with pytest.raises(InvalidEvent):
        binding_typed_data(actor="ed25519:12", log=LOG, address=KEY.address)
    with pytest.raises(InvalidEvent):
        binding_typed_data(actor=ACTOR, log=LOG, address="0x12")
