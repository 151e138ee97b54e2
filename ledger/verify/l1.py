"""Does an EVM block hold (size, root)? Header -> account -> storage, offline. Pure.

The L1 section of a bundle, all bytes as 0x and lower-case hex, as the EVM writes them::

    {"chain_id": 26092,
     "contract": "0x<40>",            the CheckpointAnchor
     "block_number": 7,
     "block_hash": "0x<64>",
     "header_rlp": "0x...",           the block's header; its keccak256 is block_hash
     "account_proof": ["0x...", ...], trie nodes, root first, from the header's stateRoot
     "storage_proofs": {"size": ["0x...", ...], "root": ["0x...", ...]}}

`storage_proofs` lead from the account's storage root to slot 0 (size, a uint64) and slot 1 (root),
the layout that contracts/src/interfaces/ICheckpointAnchor.sol fixes. Captured by
ledger/chain/l1proof.py. Source: the Ethereum yellow paper, appendices B (RLP), C (nibble paths),
D (trie), and section 4.3 (header); EIP-1186 names the proofs.

What this proves: whoever accepts `block_hash` as a block of their chain must accept that `contract`
held (size, root) in it. What it does not: that the block is on any chain, that the chain is
`chain_id` (a header does not name it), that the contract is the log's anchor and what its code
does (`code_hash` in the result lets a reader compare). Those are asked of a node one trusts.

Strict: every node is used, in order, and nothing may follow, so no byte of a proof can change
unseen. rlp and eth-hash are imported when `verify_l1` runs, since the rest of a bundle is checked
without them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ledger.errors import AnchorMismatch, MalformedProof

MAX_HEADER_BYTES = 2_048
MAX_NODE_BYTES = 1_024
MAX_NODES = 64
SIZE_SLOT = 0
ROOT_SLOT = 1

_FIELDS = frozenset(
    {
        "chain_id",
        "contract",
        "block_number",
        "block_hash",
        "header_rlp",
        "account_proof",
        "storage_proofs",
    }
)
_HEX = re.compile(r"0x(?:[0-9a-f]{2})*")
# Positions in a header (yellow paper 4.3); later fields were only ever added at the end.
_STATE_ROOT, _NUMBER, _TIMESTAMP, _MIN_FIELDS, _MAX_FIELDS = 3, 8, 11, 15, 32
_STORAGE_ROOT, _CODE_HASH, _ACCOUNT_FIELDS = 2, 3, 4
_BRANCH_ITEMS = 17

Item = Any  # an RLP item: bytes, or a list of items
Keccak = Callable[[bytes], bytes]


def verify_l1(section: Mapping[str, Any], *, size: int, root: bytes) -> dict[str, Any]:
    """Check that the section's block holds (size, root). The facts it shows, JSON-able.

    1. Its shape and limits.
    2. The header hashes to `block_hash` and carries `block_number`.
    3. The account proof leads from the header's state root to the contract's account.
    4. The storage proofs lead from the account's storage root to slots 0 and 1.
    5. The slots hold `size` and `root`.

    Raises MalformedProof (1), AnchorMismatch (2-5), ImportError where rlp or eth-hash is missing.
    """
    from eth_hash.auto import keccak

    assert len(root) == 32
    # 1
    if not isinstance(section, Mapping) or section.keys() != _FIELDS:
        raise _malformed("l1", f"must have exactly the fields {', '.join(sorted(_FIELDS))}")
    chain_id, number = _count(section, "chain_id"), _count(section, "block_number")
    contract = _bytes(section["contract"], "contract", 20, exact=True)
    block_hash = _bytes(section["block_hash"], "block_hash", 32, exact=True)
    header_rlp = _bytes(section["header_rlp"], "header_rlp", MAX_HEADER_BYTES)
    account_nodes = _nodes(section["account_proof"], "account_proof")
    storage = section["storage_proofs"]
    if not isinstance(storage, Mapping) or storage.keys() != {"size", "root"}:
        raise _malformed("storage_proofs", "must have exactly the fields size and root")
    size_nodes = _nodes(storage["size"], "storage_proofs.size")
    root_nodes = _nodes(storage["root"], "storage_proofs.root")

    # 2
    if keccak(header_rlp) != block_hash:
        raise _mismatch("header_rlp", "the header does not hash to block_hash")
    header = _header(header_rlp)
    if header[_NUMBER] != _integer(number):
        raise _mismatch("block_number", f"the header is not that of block {number}")

    # 3
    account = _account(
        _walk(account_nodes, header[_STATE_ROOT], contract, keccak, "account_proof"),
    )

    # 4
    found_size = _slot(size_nodes, account, SIZE_SLOT, keccak, "storage_proofs.size")
    found_root = _slot(root_nodes, account, ROOT_SLOT, keccak, "storage_proofs.root")

    # 5
    if found_size != size:
        raise _mismatch(
            "storage_proofs.size", f"the block holds size {found_size}, the checkpoint has {size}"
        )
    if found_root.to_bytes(32, "big") != root:
        raise _mismatch(
            "storage_proofs.root",
            f"the block holds root {found_root:064x}, the checkpoint has {root.hex()}",
        )
    return {
        "chain_id": chain_id,
        "contract": section["contract"],
        "block_number": number,
        "block_hash": section["block_hash"],
        "block_time": int.from_bytes(header[_TIMESTAMP], "big"),
        "code_hash": "0x" + account[_CODE_HASH].hex(),
    }


def _header(header_rlp: bytes) -> list[bytes]:
    header = _decode(header_rlp, "header_rlp")
    if (
        not isinstance(header, list)
        or not _MIN_FIELDS <= len(header) <= _MAX_FIELDS
        or not all(isinstance(field, bytes) for field in header)
        or len(header[_STATE_ROOT]) != 32
        or len(header[_TIMESTAMP]) > 8
    ):
        raise _malformed("header_rlp", "is not a block header")
    return header


def _account(value: bytes) -> list[bytes]:
    account = _decode(value, "account_proof")
    if (
        not isinstance(account, list)
        or len(account) != _ACCOUNT_FIELDS
        or not all(isinstance(field, bytes) for field in account)
        or len(account[_STORAGE_ROOT]) != 32
        or len(account[_CODE_HASH]) != 32
    ):
        raise _malformed("account_proof", "does not end in an account")
    return account


def _slot(
    nodes: Sequence[bytes], account: Sequence[bytes], slot: int, keccak: Keccak, field: str
) -> int:
    value = _walk(nodes, account[_STORAGE_ROOT], slot.to_bytes(32, "big"), keccak, field)
    number = _decode(value, field)
    if not isinstance(number, bytes) or not 0 < len(number) <= 32 or number[0] == 0:
        raise _malformed(field, "does not end in a storage word")
    return int.from_bytes(number, "big")


def _walk(nodes: Sequence[bytes], root: bytes, key: bytes, keccak: Keccak, field: str) -> bytes:
    """The value under `key` in the secure trie `root`; `nodes` are the path, root first."""
    path = "".join(f"{byte:02x}" for byte in keccak(key))
    waiting = iter(nodes)
    reference: Item = root
    while True:
        node = _resolve(reference, waiting, keccak, field)
        if len(node) == _BRANCH_ITEMS:
            # Keys are hashes of one length, so a path never ends at a branch.
            if not path:
                raise _malformed(field, "a branch stands where a value should")
            reference, path = node[int(path[0], 16)], path[1:]
            continue
        nibbles, is_leaf = _compact(node[0], field)
        if not path.startswith(nibbles):
            raise _mismatch(field, "the trie holds nothing under that key")
        path = path[len(nibbles) :]
        if not is_leaf:
            if not nibbles:
                raise _malformed(field, "an extension of no length")
            reference = node[1]
            continue
        if path or not isinstance(node[1], bytes):
            raise _mismatch(field, "the trie holds nothing under that key")
        if next(waiting, None) is not None:
            raise _malformed(field, "nodes follow the last one that the proof needs")
        return node[1]


def _resolve(reference: Item, waiting: Any, keccak: Keccak, field: str) -> list[Item]:
    """The node behind a reference: embedded in its parent when under 32 bytes, else by hash."""
    node: Item = reference
    if isinstance(reference, bytes):
        if not reference:
            raise _mismatch(field, "the trie holds nothing under that key")
        encoded = next(waiting, None)
        if encoded is None:
            raise _malformed(field, "the proof ends before the value")
        if keccak(encoded) != reference:
            raise _mismatch(field, "a node does not hash to what its parent names")
        node = _decode(encoded, field)
    if not isinstance(node, list) or len(node) not in (2, _BRANCH_ITEMS):
        raise _malformed(field, "a node is no branch, extension or leaf")
    return node


def _compact(item: Item, field: str) -> tuple[str, bool]:
    """Yellow paper appendix C: (nibbles as hex digits, is it a leaf)."""
    digits = item.hex() if isinstance(item, bytes) else ""
    if not digits or digits[0] not in "0123" or (digits[0] in "02" and digits[1] != "0"):
        raise _malformed(field, "a node's path is not compact-encoded")
    return digits[1 if digits[0] in "13" else 2 :], digits[0] in "23"


def _decode(data: bytes, field: str) -> Item:
    import rlp

    try:
        return rlp.decode(data, strict=True)
    except (rlp.exceptions.RLPException, RecursionError, ValueError, TypeError) as error:
        raise _malformed(field, "is not RLP") from error


def _count(section: Mapping[str, Any], field: str) -> int:
    value = section[field]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise _malformed(field, "must be an integer from 0 to 2^53 - 1")
    return value


def _integer(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 7) // 8, "big")


def _nodes(value: object, field: str) -> list[bytes]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_NODES:
        raise _malformed(field, f"must be a list of 1 to MAX_NODES = {MAX_NODES} trie nodes")
    return [_bytes(node, field, MAX_NODE_BYTES) for node in value]


def _bytes(value: object, field: str, limit: int, *, exact: bool = False) -> bytes:
    if not isinstance(value, str) or len(value) > 2 + 2 * limit or not _HEX.fullmatch(value):
        raise _malformed(field, f"must be 0x and lower-case hex, at most {limit} bytes")
    data = bytes.fromhex(value[2:])
    if exact and len(data) != limit:
        raise _malformed(field, f"must be {limit} bytes")
    return data


def _malformed(field: str, what: str) -> MalformedProof:
    return MalformedProof(f"L1 section: {field}: {what}", field=field)


def _mismatch(field: str, what: str) -> AnchorMismatch:
    return AnchorMismatch(f"L1 section: {field}: {what}", field=field)
