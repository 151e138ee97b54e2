"""Merkle proofs: is this leaf in that tree, is this tree the beginning of that one. Pure.

The tree is RFC 9162 section 2.1 (the one of RFC 6962) over SHA-256. A verifier holds a root that
it trusts and recomputes it from a proof; nothing else about the tree is known to it.

What these proofs do not say: an inclusion proof binds the leaf's *path*, and several (index, size)
pairs share a path (index 2 of 3 and index 1 of 2, say). So `size` must come from the signed
checkpoint that the root came from, and `index` must be written inside the entry as well: `bundle`
and `tlog_proof.verify_entry_proof` check both. Then the proof of the last entry binds the size too.

`tests/property/test_merkle.py` proves every leaf of every tree to 128 leaves and every pair of
sizes, alters every hash of every proof, and holds roots and paths against an independent
implementation; `test_swaps.py` tries every pair of index and size in the place of every other.
"""

from collections.abc import Sequence
from hashlib import sha256

from ledger.domain.envelope import leaf_hash, node_hash
from ledger.domain.rows import tree_root
from ledger.errors import Inconsistent, MalformedProof, NotIncluded

__all__ = [
    "EMPTY_ROOT",
    "HASH_BYTES",
    "MAX_CONSISTENCY_HASHES",
    "MAX_INCLUSION_HASHES",
    "MAX_TREE_SIZE",
    "leaf_hash",
    "node_hash",
    "tree_root",
    "verify_consistency",
    "verify_inclusion",
]

HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()
MAX_TREE_SIZE = 2**63 - 1
MAX_INCLUSION_HASHES = 63
"""The depth of the largest tree."""
MAX_CONSISTENCY_HASHES = 64
"""One more: a consistency proof also carries the subtree it starts from."""


def verify_inclusion(
    *, index: int, size: int, leaf: bytes, proof: Sequence[bytes], root: bytes
) -> None:
    """Check that the leaf hash `leaf` stands at `index` of the tree of `size` leaves under `root`.

    `proof` runs from the leaf's sibling up to the root's child (RFC 9162 section 2.1.3.2). Raises
    MalformedProof when a hash is not 32 bytes or a number is out of range, NotIncluded otherwise.
    """
    _check_size(size)
    _check_hashes(proof, limit=MAX_INCLUSION_HASHES)
    _check_hashes((leaf, root), limit=2)
    if not 0 <= index < size:
        raise NotIncluded(f"index {index} is outside of a tree of {size} leaves", index=index)
    position, last, node = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise NotIncluded(
                f"the proof has {len(proof)} hashes: more than a leaf at {index} of {size} has",
                index=index,
            )
        if position & 1 or position == last:
            node = node_hash(sibling, node)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        position, last = position >> 1, last >> 1
    if last != 0:
        raise NotIncluded(
            f"the proof has {len(proof)} hashes: fewer than a leaf at {index} of {size} has",
            index=index,
        )
    if node != root:
        raise NotIncluded(
            f"the proof for index {index} of {size} leads to root {node.hex()}, expected "
            f"{root.hex()}: this leaf is not what that tree holds there",
            index=index,
        )


def verify_consistency(
    *, size1: int, size2: int, root1: bytes, root2: bytes, proof: Sequence[bytes]
) -> None:
    """Check that the tree (size1, root1) is the beginning of the tree (size2, root2).

    RFC 9162 section 2.1.4.2. Equal sizes need equal roots and an empty proof; so does the empty
    tree, whose root is SHA-256 of nothing. Raises MalformedProof or Inconsistent.
    """
    _check_size(size1)
    _check_size(size2)
    _check_hashes(proof, limit=MAX_CONSISTENCY_HASHES)
    _check_hashes((root1, root2), limit=2)
    if size1 > size2:
        raise Inconsistent(f"a tree of {size1} leaves cannot be the beginning of one of {size2}")
    for size, root in ((size1, root1), (size2, root2)):
        if size == 0 and root != EMPTY_ROOT:
            raise Inconsistent("the root of the empty tree is SHA-256 of nothing, not this one")
    if size1 in (0, size2):
        if proof:
            raise Inconsistent("between equal trees, or from the empty one, the proof is empty")
        if size1 == size2 and root1 != root2:
            raise Inconsistent(
                f"two roots for one size, {size1}: {root1.hex()} and {root2.hex()}: a fork"
            )
        return
    _verify_prefix(size1, size2, root1, root2, proof)


def _verify_prefix(
    size1: int, size2: int, root1: bytes, root2: bytes, proof: Sequence[bytes]
) -> None:
    # A size that is a power of two is one whole subtree, and its hash is root1 itself: the proof
    # leaves it out.
    path = [root1, *proof] if size1 & (size1 - 1) == 0 else list(proof)
    if not path:
        raise Inconsistent(f"the proof from {size1} to {size2} leaves is empty")
    position, last = size1 - 1, size2 - 1
    while position & 1:
        position, last = position >> 1, last >> 1
    old = new = path[0]
    for node in path[1:]:
        if last == 0:
            raise Inconsistent(f"the proof from {size1} to {size2} leaves has too many hashes")
        if position & 1 or position == last:
            old, new = node_hash(node, old), node_hash(node, new)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            new = node_hash(new, node)
        position, last = position >> 1, last >> 1
    if last != 0:
        raise Inconsistent(f"the proof from {size1} to {size2} leaves has too few hashes")
    for size, have, want in ((size1, old, root1), (size2, new, root2)):
        if have != want:
            raise Inconsistent(
                f"the proof from {size1} to {size2} leaves leads to root {have.hex()} at size "
                f"{size}, expected {want.hex()}: the log was not only appended to, or the proof "
                "is another one's"
            )


def _check_size(size: int) -> None:
    if not 0 <= size <= MAX_TREE_SIZE:
        raise MalformedProof(f"a tree has 0 to 2^63 - 1 leaves, not {size}")


def _check_hashes(hashes: Sequence[bytes], *, limit: int) -> None:
    if len(hashes) > limit:
        raise MalformedProof(f"a proof of {len(hashes)} hashes; no tree needs more than {limit}")
    for n, node in enumerate(hashes):
        if len(node) != HASH_BYTES:
            raise MalformedProof(f"hash {n} has {len(node)} bytes, expected {HASH_BYTES}")
