"""A log's promise in a form that a contract can judge: EIP-712, signed by the chain key.

The EVM has no Ed25519, so a receipt carries a second signature over the same promise, bound to one
chain and one CheckpointAnchor. `leavesHash` is keccak256 of the leaf hashes back to back: a
contract that holds them as bytes32[] gets it by abi.encodePacked. `contracts/test/Receipt.t.sol`
recovers the signer from the same typed data; a contract that slashes for it has to know that the
signer is the log's (the anchor's committer, say), since the receipt only claims it.

RFC 6979 nonces: the same promise gives the same bytes. Encoding is written out here (EIP-712,
`hashStruct`), since a receipt goes with every append and the general encoder costs milliseconds;
a test holds it against eth_account's.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from coincurve import PrivateKey, PublicKey
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak

from ledger.errors import BadSignature, MalformedProof

DOMAIN_NAME = "Tributary"
DOMAIN_VERSION = "1"
SIGNATURE_BYTES = 65
_FIELDS = (
    ("log", "string"),
    ("firstIndex", "uint64"),
    ("count", "uint64"),
    ("leavesHash", "bytes32"),
    ("recordedAt", "uint64"),
    ("includedBy", "uint64"),
)
_STRUCT = "Receipt(" + ",".join(f"{kind} {name}" for name, kind in _FIELDS) + ")"
_DOMAIN = "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
_RECEIPT_TYPE = keccak(text=_STRUCT)
_DOMAIN_TYPE = keccak(text=_DOMAIN)
# Half of the curve's order: of the two valid s of a signature only the lower is accepted (EIP-2).
_MAX_S = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0


class Promised(Protocol):
    """`ledger.verify.receipt.Promise`, which this room does not import."""

    @property
    def log(self) -> str: ...
    @property
    def first_index(self) -> int: ...
    @property
    def leaf_hashes(self) -> Sequence[bytes]: ...
    @property
    def recorded_at(self) -> int: ...
    @property
    def included_by(self) -> int: ...


def receipt_typed_data(promise: Promised, *, chain_id: int, contract: str) -> dict[str, Any]:
    """The EIP-712 document as wallets take it (`eth_signTypedData_v4`)."""
    return {
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "chainId", "type": "uint256"},
                {"name": "verifyingContract", "type": "address"},
            ],
            "Receipt": [{"name": name, "type": kind} for name, kind in _FIELDS],
        },
        "primaryType": "Receipt",
        "domain": {
            "name": DOMAIN_NAME,
            "version": DOMAIN_VERSION,
            "chainId": chain_id,
            "verifyingContract": to_checksum_address(contract),
        },
        "message": {
            "log": promise.log,
            "firstIndex": promise.first_index,
            "count": len(promise.leaf_hashes),
            "leavesHash": "0x" + keccak(b"".join(promise.leaf_hashes)).hex(),
            "recordedAt": promise.recorded_at,
            "includedBy": promise.included_by,
        },
    }


class ReceiptDomain:
    """One chain and one anchor contract; the digest of a promise in it."""

    def __init__(self, *, chain_id: int, contract: str) -> None:
        self.chain_id = chain_id
        self.contract = contract.lower()
        self._separator = keccak(
            _DOMAIN_TYPE
            + keccak(text=DOMAIN_NAME)
            + keccak(text=DOMAIN_VERSION)
            + _word(chain_id)
            + bytes.fromhex(self.contract[2:]).rjust(32, b"\0")
        )

    def digest(self, promise: Promised) -> bytes:
        """keccak256(0x1901 || domain separator || hashStruct(promise)): 32 bytes."""
        struct = keccak(
            _RECEIPT_TYPE
            + _hash_of_name(promise.log)
            + _word(promise.first_index)
            + _word(len(promise.leaf_hashes))
            + keccak(b"".join(promise.leaf_hashes))
            + _word(promise.recorded_at)
            + _word(promise.included_by)
        )
        return keccak(b"\x19\x01" + self._separator + struct)


class ReceiptSigner:
    """Signs promises for contracts. `secret` are the 32 bytes of the chain key. Thread-safe."""

    def __init__(self, secret: bytes, domain: ReceiptDomain) -> None:
        self._key = PrivateKey(secret)
        self.domain = domain
        self.address = address_of(self._key.public_key)

    def sign(self, promise: Promised) -> bytes:
        """r || s || v, v 27 or 28, s the lower one."""
        raw = self._key.sign_recoverable(self.domain.digest(promise), hasher=None)
        return raw[:64] + bytes([27 + raw[64]])


def verify_evm_signature(
    promise: Promised, *, chain_id: int, contract: str, signer: str, sig: bytes
) -> None:
    """That `signer` signed `promise` for that contract. Whose address it is, is not said here.

    Raises MalformedProof for what is no signature, BadSignature when another key signed.
    """
    if len(sig) != SIGNATURE_BYTES or sig[64] not in (27, 28):
        raise MalformedProof("an EVM signature is r, s, and v of 27 or 28", field="evm.sig")
    if int.from_bytes(sig[32:64], "big") > _MAX_S:
        raise MalformedProof("the signature's s is not the lower one (EIP-2)", field="evm.sig")
    digest = ReceiptDomain(chain_id=chain_id, contract=contract).digest(promise)
    try:
        key = PublicKey.from_signature_and_message(
            sig[:64] + bytes([sig[64] - 27]), digest, hasher=None
        )
    except Exception as error:  # coincurve raises bare Exception for points off the curve
        raise BadSignature("no key can have made this signature", field="evm.sig") from error
    recovered = address_of(key)
    if recovered != signer.lower():
        raise BadSignature(
            f"the promise was signed by {recovered}, not by {signer}: it, or its EVM signature, "
            "was altered",
            field="evm.sig",
        )


def address_of(key: PublicKey) -> str:
    """The EVM address of a public key, lower-case."""
    return "0x" + keccak(key.format(compressed=False)[1:])[12:].hex()


@lru_cache(maxsize=16)
def _hash_of_name(log: str) -> bytes:
    """The same for every receipt of a log."""
    return bytes(keccak(text=log))


def _word(number: int) -> bytes:
    return number.to_bytes(32, "big")
