"""A block that holds (size, root), made by py-trie and rlp: an L1 section without a chain."""

from typing import Any

import rlp
from eth_hash.auto import keccak
from trie.hexary import HexaryTrie

CONTRACT = bytes.fromhex("12" * 20)
BLOCK, CHAIN_ID = 7, 31337


def l1_section(size: int, root: bytes) -> dict[str, Any]:
    """The section of ledger/verify/l1.py for a CheckpointAnchor that holds (size, root)."""
    storage, state = HexaryTrie({}), HexaryTrie({})
    slots = [keccak(slot.to_bytes(32, "big")) for slot in (0, 1)]
    for slot, value in zip(slots, (size, int.from_bytes(root, "big")), strict=True):
        storage[slot] = rlp.encode(value)
    account = keccak(CONTRACT)
    state[account] = rlp.encode([1, 0, storage.root_hash, keccak(b"code")])
    state[keccak(b"another account")] = rlp.encode([1, 5, bytes(32), bytes(32)])
    header: list[Any] = [bytes(32)] * 15
    header[3], header[8], header[11] = state.root_hash, BLOCK, 1_700_000_000
    block = rlp.encode(header)
    return {
        "chain_id": CHAIN_ID,
        "contract": "0x" + CONTRACT.hex(),
        "block_number": BLOCK,
        "block_hash": "0x" + keccak(block).hex(),
        "header_rlp": "0x" + block.hex(),
        "account_proof": _proof(state, account),
        "storage_proofs": {
            name: _proof(storage, slot) for name, slot in zip(("size", "root"), slots, strict=True)
        },
    }


def _proof(trie: HexaryTrie, key: bytes) -> list[str]:
    nodes = [rlp.encode(node) for node in trie.get_proof(key)]
    return ["0x" + node.hex() for n, node in enumerate(nodes) if n == 0 or len(node) >= 32]
