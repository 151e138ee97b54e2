"""Receipts: what a log promised when it took an event, as bytes and under its signature. Pure.

A receipt says, under the log's own key: entry first_index + i has the leaf hash leaf_hashes[i], and
a checkpoint of at least first_index + count entries is published no later than included_by. It is
the log's word before there is a proof (the like of a signed certificate timestamp, RFC 6962 section
3.2). Whether the word was kept, `ledger.verify.receipt_verdict` says.

`evm` repeats the promise for contracts (EIP-712 over secp256k1); the Ed25519 signature does not
cover it. It is checked in `ledger.chain.receipts`, since this room knows no secp256k1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nacl.exceptions import CryptoError
from nacl.signing import VerifyKey

from ledger.domain.canonical import MAX_SAFE_INTEGER, canonical_json, parse_canonical
from ledger.domain.envelope import MAX_ORIGIN_CHARS
from ledger.errors import BadSignature, Inconsistent, InvalidEvent, MalformedProof
from ledger.verify.encoding import decode_base64, encode_base64, printable
from ledger.verify.fields import count_of, hash_of, list_of, object_of, text_of
from ledger.verify.note import ED25519, VerifierKey, valid_name

FORMAT = "tributary/receipt/v1"
CONTEXT = FORMAT.encode() + b"\n"
"""Before the signed JSON. No checkpoint starts with this line: the signer refuses that origin."""
MAX_LEAVES = 500
MAX_RECEIPT_BYTES = 65_536
_EVM_SIG_BYTES = 65
_SIG_BYTES = 64
_ADDRESS = re.compile(r"0x[0-9a-f]{40}")
_EVM_SIG = re.compile(r"0x[0-9a-f]{130}")


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What is signed. Times in microseconds; 1 to MAX_LEAVES hashes of 32 bytes."""

    log: str
    first_index: int
    leaf_hashes: tuple[bytes, ...]
    recorded_at: int
    included_by: int

    @property
    def size(self) -> int:
        """The smallest tree that holds all that is promised."""
        return self.first_index + len(self.leaf_hashes)


@dataclass(frozen=True, kw_only=True)
class EvmSignature:
    """The same promise for contracts. Addresses are 0x and lower-case hex, `sig` is r || s || v."""

    chain_id: int
    contract: str
    signer: str
    sig: bytes


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """`sig` is the log's Ed25519 signature over CONTEXT and `promise_bytes(promise)`."""

    promise: Promise
    sig: bytes
    evm: EvmSignature | None


# --- bytes ---


def promise_json(promise: Promise) -> dict[str, Any]:
    """The fields that the log's key signs, as canonical JSON takes them."""
    return {
        "format": FORMAT,
        "log": promise.log,
        "first_index": promise.first_index,
        "leaf_hashes": [leaf.hex() for leaf in promise.leaf_hashes],
        "recorded_at": promise.recorded_at,
        "included_by": promise.included_by,
    }


def promise_bytes(promise: Promise) -> bytes:
    """Canonical JSON of the promise; `CONTEXT` before it makes the signed message."""
    return canonical_json(promise_json(promise))


def receipt_json(receipt: Receipt) -> dict[str, Any]:
    evm = receipt.evm
    return {
        **promise_json(receipt.promise),
        "sig": encode_base64(receipt.sig),
        "evm": evm
        and {
            "chain_id": evm.chain_id,
            "contract": evm.contract,
            "signer": evm.signer,
            "sig": "0x" + evm.sig.hex(),
        },
    }


def format_receipt(receipt: Receipt) -> bytes:
    return canonical_json(receipt_json(receipt))


def parse_receipt(data: bytes) -> Receipt:
    """A receipt in its one spelling; nothing is verified. Raises MalformedProof."""
    if len(data) > MAX_RECEIPT_BYTES:
        raise MalformedProof(f"a receipt has at most MAX_RECEIPT_BYTES = {MAX_RECEIPT_BYTES} bytes")
    try:
        value = object_of(
            parse_canonical(data),
            ("format", "log", "first_index", "leaf_hashes", "recorded_at", "included_by", "sig",
             "evm"),
            "receipt",
        )  # fmt: skip
        if value["format"] != FORMAT:
            raise MalformedProof(f"this is no receipt: its format is not {FORMAT}")
        return Receipt(
            promise=_promise(value), sig=_signature(value["sig"]), evm=_evm(value["evm"])
        )
    except InvalidEvent as error:
        raise MalformedProof(f"this is no receipt: {error.message}", **error.detail) from error


def _promise(value: Mapping[str, Any]) -> Promise:
    log = text_of(value["log"], "log")
    if len(log) > MAX_ORIGIN_CHARS or not valid_name(log):
        raise MalformedProof(f"{printable(log)!r} is no log's origin", field="log")
    leaves = list_of(value["leaf_hashes"], MAX_LEAVES, "leaf_hashes")
    promise = Promise(
        log=log,
        first_index=count_of(value["first_index"], "first_index"),
        leaf_hashes=tuple(hash_of(leaf, f"leaf_hashes[{n}]") for n, leaf in enumerate(leaves)),
        recorded_at=count_of(value["recorded_at"], "recorded_at"),
        included_by=count_of(value["included_by"], "included_by"),
    )
    if not leaves or promise.size > MAX_SAFE_INTEGER:
        raise MalformedProof("a receipt is for 1 entry or more, below index 2^53")
    if promise.included_by < promise.recorded_at:
        raise MalformedProof("included_by lies before recorded_at", field="included_by")
    return promise


def _signature(value: Any) -> bytes:
    sig = decode_base64(text_of(value, "sig"), "sig")
    if len(sig) != _SIG_BYTES:
        raise MalformedProof(f"sig has {len(sig)} bytes, Ed25519 has {_SIG_BYTES}", field="sig")
    return sig


def _evm(value: Any) -> EvmSignature | None:
    if value is None:
        return None
    evm = object_of(value, ("chain_id", "contract", "signer", "sig"), "evm")
    for name, form in (("contract", _ADDRESS), ("signer", _ADDRESS), ("sig", _EVM_SIG)):
        if not form.fullmatch(text_of(evm[name], f"evm.{name}")):
            raise MalformedProof(
                f"evm.{name} must be 0x and lower-case hex digits, {form.pattern}",
                field=f"evm.{name}",
            )
    return EvmSignature(
        chain_id=count_of(evm["chain_id"], "evm.chain_id", low=1),
        contract=evm["contract"],
        signer=evm["signer"],
        sig=bytes.fromhex(evm["sig"][2:]),
    )


def verify_receipt(data: bytes, key: VerifierKey) -> Receipt:
    """The receipt, if `key` signed it. `evm` is left unchecked (see above).

    Raises MalformedProof, BadSignature, or Inconsistent for another log's receipt.
    """
    receipt = parse_receipt(data)
    if receipt.promise.log != key.name or key.type != ED25519:
        raise Inconsistent(
            f"the receipt is of log {printable(receipt.promise.log)!r}, the key is that of "
            f"{printable(key.name)!r}: check it with the key of its own log"
        )
    try:
        VerifyKey(key.public_key).verify(CONTEXT + promise_bytes(receipt.promise), receipt.sig)
    except (CryptoError, ValueError) as error:
        raise BadSignature(
            f"the log's key {printable(key.name)} ({key.id.hex()}) has not signed this receipt: it "
            "was altered, or made by somebody else"
        ) from error
    return receipt
