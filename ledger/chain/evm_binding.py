"""An EVM address says that it belongs to an Ed25519 key: EIP-712, signed by the address.

`identity.evm_bound` carries this signature inside an event that the Ed25519 key signs, so both keys
have agreed. The message names the log, so a binding made for one ledger binds nowhere else; the
domain names no chain, since the address is one key on every EVM chain.

Not covered: contract wallets (ERC-1271), which need a chain to be asked.
"""

from typing import Any

from eth_account import Account
from eth_account.messages import encode_typed_data
from eth_account.signers.local import LocalAccount
from eth_utils.address import to_checksum_address

from ledger.domain.ids import check_address, public_key_of
from ledger.errors import BadSignature, MalformedProof

DOMAIN_NAME = "Tributary identity binding"
DOMAIN_VERSION = "1"
SIGNATURE_BYTES = 65
# Half of the curve's order: of the two valid s of a signature only the lower is accepted (EIP-2).
_MAX_S = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0


def binding_typed_data(*, actor: str, log: str, address: str) -> dict[str, Any]:
    """The EIP-712 document as wallets take it (`eth_signTypedData_v4`)."""
    return {
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
            ],
            "Binding": [
                {"name": "ed25519", "type": "bytes32"},
                {"name": "log", "type": "string"},
                {"name": "account", "type": "address"},
            ],
        },
        "primaryType": "Binding",
        "domain": {"name": DOMAIN_NAME, "version": DOMAIN_VERSION},
        "message": {
            "ed25519": "0x" + public_key_of(actor).hex(),
            "log": log,
            "account": to_checksum_address(check_address(address, "address")),
        },
    }


def sign_binding(account: LocalAccount, *, actor: str, log: str) -> str:
    """The signature by `account`'s key: 0x and 130 hex digits (r, s, v)."""
    document = binding_typed_data(actor=actor, log=log, address=str(account.address))
    signed = account.sign_message(encode_typed_data(full_message=document))
    return "0x" + bytes(signed.signature).hex()


def verify_binding(signature: str, *, actor: str, log: str, address: str) -> None:
    """Raises MalformedProof for what is no signature, BadSignature when another key signed."""
    try:
        raw = bytes.fromhex(signature.removeprefix("0x"))
    except ValueError:
        raw = b""
    if not signature.startswith("0x") or len(raw) != SIGNATURE_BYTES or raw[64] not in (27, 28):
        raise MalformedProof(
            "an EVM signature is 0x and 130 hex digits: r, s, and v of 27 or 28", field="signature"
        )
    if int.from_bytes(raw[32:64], "big") > _MAX_S:
        raise MalformedProof("the signature's s is not the lower one (EIP-2)", field="signature")
    document = binding_typed_data(actor=actor, log=log, address=address)
    try:
        signer = Account.recover_message(encode_typed_data(full_message=document), signature=raw)
    except Exception as error:  # eth-keys raises several types of its own for r and s off the curve
        raise BadSignature("no key can have made this signature", field="signature") from error
    if signer.lower() != address.lower():
        raise BadSignature(
            f"the binding was signed by {signer}, not by {address}: sign Tributary's typed data "
            f"for actor {actor} and log {log!r} with the key of that address",
            field="signature",
        )
