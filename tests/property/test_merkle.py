"""Small trees exhausted, large ones sampled, and an independent implementation as the oracle:
every leaf of every tree and every pair of sizes to 128, every hash of every proof altered.

pymerkle is GPL and stays a test tool: its roots and inclusion paths (less the leading leaf hash)
are those of RFC 9162; its consistency proofs are of another kind and are not compared.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.errors import Inconsistent, NotIncluded, VerificationError
from ledger.log import tree
from ledger.verify import merkle

MAX_LEAVES = 128
DATA = [b"leaf %d" % n for n in range(MAX_LEAVES)]
LEAVES = [merkle.leaf_hash(data) for data in DATA]


def mth(leaves: Sequence[bytes]) -> bytes:
    """RFC 9162 section 2.1.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def subproof(m: int, leaves: Sequence[bytes], whole: bool) -> list[bytes]:
    """RFC 9162 section 2.1.4.1, word for word."""
    n = len(leaves)
    if m == n:
        return [] if whole else [mth(leaves)]
    k = 1
    while k * 2 < n:
        k *= 2
    if m <= k:
        return [*subproof(m, leaves[:k], whole), mth(leaves[k:])]
    return [*subproof(m - k, leaves[k:], False), mth(leaves[:k])]


ROOTS = [mth(LEAVES[:n]) for n in range(MAX_LEAVES + 1)]


def read(wanted: Sequence[tree.TileId]) -> Mapping[tree.TileId, bytes]:
    return {(0, 0): b"".join(LEAVES)}


def inclusion(index: int, size: int) -> list[bytes]:
    return tree.range_hashes(tree.inclusion_ranges(index, size), read)


def consistency(size1: int, size2: int) -> list[bytes]:
    return tree.range_hashes(tree.consistency_ranges(size1, size2), read)


class Flips:
    """Which bit of the next hash to flip: over many hashes, each of the 256 in turn."""

    def __init__(self) -> None:
        self.count = 0

    def bit(self) -> int:
        self.count += 1
        return self.count * 37 % 256  # 37 is odd: 256 flips in a row flip 256 different bits


def altered(hashes: Sequence[bytes], flips: Flips) -> list[list[bytes]]:
    """Every hash flipped in one bit, left out, or doubled; and a stranger at either end."""
    found = []
    for n, node in enumerate(hashes):
        bit = flips.bit()
        flipped = bytearray(node)
        flipped[bit // 8] ^= 1 << bit % 8
        found.append([*hashes[:n], bytes(flipped), *hashes[n + 1 :]])
        found.append([*hashes[:n], *hashes[n + 1 :]])
        found.append([*hashes[: n + 1], *hashes[n:]])
    found += [[*hashes, bytes(32)], [bytes(32), *hashes]]
    return found


def test_every_leaf_of_every_tree() -> None:
    flips = Flips()
    for size in range(1, MAX_LEAVES + 1):
        assert merkle.tree_root(LEAVES[:size]) == ROOTS[size] == tree.root(size, read)
        for index in range(size):
            proof, leaf = inclusion(index, size), LEAVES[index]
            root = ROOTS[size]
            merkle.verify_inclusion(index=index, size=size, leaf=leaf, proof=proof, root=root)
            for bad in altered(proof, flips):
                with pytest.raises(NotIncluded):
                    merkle.verify_inclusion(index=index, size=size, leaf=leaf, proof=bad, root=root)
            for other in {index ^ 1, index + 1, size - 1 - index} - {index}:
                with pytest.raises(NotIncluded):
                    merkle.verify_inclusion(
                        index=other, size=size, leaf=leaf, proof=proof, root=root
                    )
            for wrong_leaf, wrong_root in ((LEAVES[index - 1], root), (leaf, ROOTS[size - 1])):
                if (wrong_leaf, wrong_root) != (leaf, root):
                    with pytest.raises(NotIncluded):
                        merkle.verify_inclusion(
                            index=index, size=size, leaf=wrong_leaf, proof=proof, root=wrong_root
                        )
    assert flips.count > 50_000


def test_every_pair_of_sizes() -> None:
    flips = Flips()
    for size2 in range(MAX_LEAVES + 1):
        for size1 in range(size2 + 1):
            proof = consistency(size1, size2)
            assert proof == (subproof(size1, LEAVES[:size2], True) if size1 else [])
            trees: dict[str, Any] = {
                "size1": size1, "size2": size2, "root1": ROOTS[size1], "root2": ROOTS[size2],
            }  # fmt: skip
            merkle.verify_consistency(**trees, proof=proof)
            for bad in altered(proof, flips):
                with pytest.raises(Inconsistent):
                    merkle.verify_consistency(**trees, proof=bad)
            wrong = merkle.leaf_hash(b"other")
            # From the empty tree everything follows: there root2 is not in question.
            for name in ("root1", "root2") if size1 else ("root1",):
                with pytest.raises(Inconsistent):
                    merkle.verify_consistency(**{**trees, name: wrong}, proof=proof)
    assert flips.count > 40_000


def test_a_smaller_tree_never_follows_a_larger_one() -> None:
    for size2 in range(1, 12):
        for size1 in range(size2):
            with pytest.raises(Inconsistent):
                merkle.verify_consistency(
                    size1=size2,
                    size2=size1,
                    root1=ROOTS[size2],
                    root2=ROOTS[size1],
                    proof=consistency(size1, size2),
                )


def test_pymerkle_agrees_on_roots_and_paths() -> None:
    pymerkle = pytest.importorskip("pymerkle", reason="the oracle pymerkle is not installed")
    oracle = pymerkle.InmemoryTree(algorithm="sha256")
    for size, data in enumerate(DATA, start=1):
        oracle.append_entry(data)
        assert oracle.get_root() == ROOTS[size]
        for index in range(size):
            path = [
                bytes.fromhex(node)
                for node in oracle.prove_inclusion(index + 1).serialize()["path"]
            ]
            assert path[0] == LEAVES[index]
            assert path[1:] == inclusion(index, size)


@settings(max_examples=25, deadline=None)
@given(
    batches=st.lists(st.integers(1, 700), min_size=1, max_size=8),
    seed=st.integers(0, 2**32),
)
def test_integration_in_any_batches_is_the_same_tree(batches: list[int], seed: int) -> None:
    rng = random.Random(seed)
    leaves = [rng.randbytes(32) for _ in range(sum(batches))]
    stored: dict[tree.TileId, bytes] = {}
    size = 0
    for count in batches:
        changed = tree.integrate(size, leaves[size : size + count], lambda wanted: stored)
        assert all(new.startswith(stored.get(id, b"")) for id, new in changed.items())
        stored.update(changed)
        size += count
        assert tree.root(size, lambda wanted: stored) == merkle.tree_root(leaves[:size])
    for _ in range(10):
        index, old = rng.randrange(size), rng.randrange(1, size + 1)
        some = rng.randrange(index + 1, size + 1)
        merkle.verify_inclusion(
            index=index,
            size=some,
            leaf=leaves[index],
            proof=tree.range_hashes(tree.inclusion_ranges(index, some), lambda wanted: stored),
            root=merkle.tree_root(leaves[:some]),
        )
        merkle.verify_consistency(
            size1=old,
            size2=size,
            root1=merkle.tree_root(leaves[:old]),
            root2=merkle.tree_root(leaves),
            proof=tree.range_hashes(tree.consistency_ranges(old, size), lambda wanted: stored),
        )


def test_three_levels_of_tiles_and_few_reads() -> None:
    size = 70_000
    leaves = [hashlib.sha256(b"%d" % n).digest() for n in range(size)]
    stored = tree.integrate(0, leaves, lambda wanted: {})
    assert {level for level, _ in stored} == {0, 1, 2}
    assert tree.root(size, lambda wanted: stored) == merkle.tree_root(leaves)
    reads: list[int] = []

    def counted(wanted: Sequence[tree.TileId]) -> Mapping[tree.TileId, bytes]:
        reads.append(len(wanted))
        return {id: stored[id] for id in wanted}

    for index in (0, 255, 256, 65_535, 65_536, 69_999):
        proof = tree.range_hashes(tree.inclusion_ranges(index, size), counted)
        merkle.verify_inclusion(
            index=index, size=size, leaf=leaves[index], proof=proof, root=merkle.tree_root(leaves)
        )
    assert len(reads) == 6
    assert max(reads) <= 6


hashes = st.lists(st.binary(min_size=0, max_size=40), max_size=70)
numbers = st.integers(-3, 2**65)


@given(index=numbers, size=numbers, leaf=st.binary(max_size=40), proof=hashes)
def test_hostile_inclusion_only_fails_as_designed(
    index: int, size: int, leaf: bytes, proof: list[bytes]
) -> None:
    with pytest.raises(VerificationError):
        merkle.verify_inclusion(index=index, size=size, leaf=leaf, proof=proof, root=bytes(32))


@given(size1=numbers, size2=numbers, proof=hashes, root=st.binary(max_size=40))
def test_hostile_consistency_only_fails_as_designed(
    size1: int, size2: int, proof: list[bytes], root: bytes
) -> None:
    with pytest.raises(VerificationError):
        merkle.verify_consistency(
            size1=size1, size2=size2, root1=root, root2=bytes(32), proof=proof
        )
