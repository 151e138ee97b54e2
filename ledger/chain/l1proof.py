"""Capture of the L1 section: the proof that a block holds an anchored (size, root).

The format, and what it proves, is defined where it is checked: `ledger.verify.l1`. This module
asks a node for the block and for `eth_getProof` (EIP-1186), rebuilds the header's RLP from the
fields that JSON-RPC shows, and hands nothing out that the offline verifier does not accept. That
verifier is passed in, since this room may not import it.

anvil wants storage keys of `eth_getProof` as 32 bytes; so every key is written in full.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import rlp
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak

from ledger.chain.client import ChainClient
from ledger.errors import ChainError, VerificationError

# Fixed by contracts/src/interfaces/ICheckpointAnchor.sol.
SIZE_SLOT = 0
ROOT_SLOT = 1

# Header fields in RLP order, yellow paper 4.3, then one line per fork that added some. A field
# that a node does not show ends the list: forks only ever appended.
_BYTES = (
    "parentHash",
    "sha3Uncles",
    "miner",
    "stateRoot",
    "transactionsRoot",
    "receiptsRoot",
    "logsBloom",
)
_NUMBERS = ("difficulty", "number", "gasLimit", "gasUsed", "timestamp")
_TAIL = ("extraData", "mixHash", "nonce")
_LATER = (
    ("baseFeePerGas", int),  # London, EIP-1559
    ("withdrawalsRoot", bytes),  # Shanghai, EIP-4895
    ("blobGasUsed", int),  # Cancun, EIP-4844
    ("excessBlobGas", int),
    ("parentBeaconBlockRoot", bytes),  # Cancun, EIP-4788
    ("requestsHash", bytes),  # Prague, EIP-7685
)


class L1Verifier(Protocol):
    """`ledger.verify.l1.verify_l1`: raises VerificationError unless the section proves the pair."""

    def __call__(self, section: Mapping[str, Any], *, size: int, root: bytes) -> object: ...


def header_rlp(block: Mapping[str, Any]) -> bytes:
    """RLP of the header in a JSON-RPC block. ChainError unless it hashes to the block's hash."""
    fields: list[bytes] = [
        *(_bytes(block[name]) for name in _BYTES),
        *(_integer(block[name]) for name in _NUMBERS),
        *(_bytes(block[name]) for name in _TAIL),
    ]
    for name, kind in _LATER:
        if block.get(name) is None:
            break
        fields.append(_integer(block[name]) if kind is int else _bytes(block[name]))
    encoded: bytes = rlp.encode(fields)
    if keccak(encoded) != _bytes(block["hash"]):
        raise ChainError(
            f"the header of block {int(block['number'], 16)} does not hash to the block's hash: "
            "the chain's fork adds header fields that this version does not know",
            method="eth_getBlockByNumber",
        )
    return encoded


def capture_l1(
    client: ChainClient,
    contract: str,
    *,
    size: int,
    root: bytes,
    block_number: int,
    verify: L1Verifier,
) -> dict[str, Any]:
    """The section for block `block_number`, already verified.

    Raises AnchorMismatch when the block holds another pair, ChainError when the node no longer
    has that block's state (full nodes keep 128 blocks, anvil only the last across a restart).
    """
    block = client.block(block_number)
    address = to_checksum_address(contract)
    keys = [f"0x{slot:064x}" for slot in (SIZE_SLOT, ROOT_SLOT)]
    answer = client.rpc("eth_getProof", address, keys, hex(block_number))
    proofs = {int(proof["key"], 16): proof["proof"] for proof in answer["storageProof"]}
    section = {
        "chain_id": client.chain_id,
        "contract": address.lower(),
        "block_number": block_number,
        "block_hash": block["hash"].lower(),
        "header_rlp": "0x" + header_rlp(block).hex(),
        "account_proof": [node.lower() for node in answer["accountProof"]],
        "storage_proofs": {
            "size": [node.lower() for node in proofs[SIZE_SLOT]],
            "root": [node.lower() for node in proofs[ROOT_SLOT]],
        },
    }
    verify(section, size=size, root=root)
    return section


def capture_recent(
    client: ChainClient,
    contract: str,
    *,
    size: int,
    root: bytes,
    committed_in: int,
    verify: L1Verifier,
) -> dict[str, Any]:
    """The section for the commit's own block, or for the newest confirmed block where the node
    has dropped the older state. Raises ChainError when neither proves the pair."""
    failures = []
    for number in dict.fromkeys((committed_in, client.confirmed_head())):
        try:
            return capture_l1(
                client, contract, size=size, root=root, block_number=number, verify=verify
            )
        except (ChainError, VerificationError) as error:
            failures.append(f"block {number}: {error}")
    raise ChainError(
        f"the node gives no proof that {contract} holds size {size}: {'; '.join(failures)}. "
        "Anchor a newer checkpoint, or ask an archive node",
        method="eth_getProof",
    )


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text[2:])


def _integer(text: str) -> bytes:
    number = int(text, 16)
    return number.to_bytes((number.bit_length() + 7) // 8, "big")
