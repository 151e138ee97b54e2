"""RFC 6962/9162 trees as transparency-dev/merkle has them: roots, inclusion, consistency."""

import json
from pathlib import Path

import pytest

from ledger.errors import VerificationError
from ledger.verify import merkle
from tests.vectors.shared import b64, files, load, needs_vectors

pytestmark = needs_vectors


@pytest.mark.parametrize("path", files("merkle/inclusion/*/*.json"))
def test_inclusion(path: Path) -> None:
    case = json.loads(path.read_bytes())

    def verify() -> None:
        merkle.verify_inclusion(
            index=case["leafIdx"],
            size=case["treeSize"],
            leaf=b64(case["leafHash"]),
            proof=[b64(node) for node in case["proof"] or []],
            root=b64(case["root"]),
        )

    if case["wantErr"]:
        with pytest.raises(VerificationError):
            verify()
    else:
        verify()


@pytest.mark.parametrize("path", files("merkle/consistency/*/*.json"))
def test_consistency(path: Path) -> None:
    case = json.loads(path.read_bytes())

    def verify() -> None:
        merkle.verify_consistency(
            size1=case["size1"],
            size2=case["size2"],
            root1=b64(case["root1"]),
            root2=b64(case["root2"]),
            proof=[b64(node) for node in case["proof"] or []],
        )

    if case["wantErr"]:
        with pytest.raises(VerificationError):
            verify()
    else:
        verify()


def test_there_are_all_the_files() -> None:
    assert len(files("merkle/inclusion/*/*.json")) >= 50
    assert len(files("merkle/consistency/*/*.json")) >= 35


def test_hasher_and_roots() -> None:
    tree = load("merkle/rfc6962-tree.json")
    hasher = tree["hasher"]
    assert merkle.EMPTY_ROOT.hex() == hasher["empty_root"]
    assert merkle.leaf_hash(b"").hex() == hasher["leaf_of_empty_bytes"]
    assert merkle.leaf_hash(b"L123456").hex() == hasher["leaf_of_ascii_L123456"]
    assert merkle.node_hash(b"N123", b"N456").hex() == hasher["node_of_ascii_N123_N456"]
    leaves = [merkle.leaf_hash(bytes.fromhex(text)) for text in tree["leaf_inputs_hex"]]
    for size, root in enumerate(tree["root_hash_hex_by_size"]):
        assert merkle.tree_root(leaves[:size]).hex() == root
    for level, hashes in enumerate(tree["perfect_subtree_hash_hex_by_level"]):
        for n, node in enumerate(hashes):
            assert merkle.tree_root(leaves[n << level : (n + 1) << level]).hex() == node
