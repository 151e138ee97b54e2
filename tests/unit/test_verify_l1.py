"""The L1 section without a chain: a frozen one, every field in turn, and tries made by py-trie."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rlp
from eth_hash.auto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st
from trie.hexary import HexaryTrie

from ledger.errors import AnchorMismatch, MalformedProof, VerificationError
from ledger.verify.l1 import MAX_NODES, _compact, _walk, verify_l1

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "l1_section.json").read_text())
SIZE, ROOT = VECTOR["size"], bytes.fromhex(VECTOR["root"])


def section(**changed: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(VECTOR["section"])), **changed}


def test_the_frozen_section_verifies() -> None:
    assert verify_l1(section(), size=SIZE, root=ROOT) == VECTOR["facts"]


def test_another_checkpoint_is_not_what_the_block_holds() -> None:
    with pytest.raises(AnchorMismatch, match="size 13, the checkpoint has 14"):
        verify_l1(section(), size=SIZE + 1, root=ROOT)
    with pytest.raises(AnchorMismatch, match="holds root"):
        verify_l1(section(), size=SIZE, root=bytes(32))


def test_another_contract_is_not_in_the_proof() -> None:
    with pytest.raises(AnchorMismatch, match="account_proof"):
        verify_l1(section(contract="0x" + "12" * 20), size=SIZE, root=ROOT)


def test_swapped_slots_are_noticed() -> None:
    proofs = VECTOR["section"]["storage_proofs"]
    swapped = {"size": proofs["root"], "root": proofs["size"]}
    with pytest.raises(VerificationError):
        verify_l1(section(storage_proofs=swapped), size=SIZE, root=ROOT)


def test_the_block_number_is_that_of_the_header() -> None:
    with pytest.raises(AnchorMismatch, match="block_number"):
        verify_l1(section(block_number=VECTOR["section"]["block_number"] + 1), size=SIZE, root=ROOT)


def test_the_chain_id_is_only_claimed() -> None:
    # A header does not name its chain: this is what the verdict lists as still to be trusted.
    assert verify_l1(section(chain_id=1), size=SIZE, root=ROOT)["chain_id"] == 1


@pytest.mark.parametrize("extra", ["0x80", "0xc0", VECTOR["section"]["account_proof"][-1]])
def test_nothing_may_follow_a_proof(extra: str) -> None:
    nodes = [*VECTOR["section"]["account_proof"], extra]
    with pytest.raises(MalformedProof, match="nodes follow"):
        verify_l1(section(account_proof=nodes), size=SIZE, root=ROOT)


MALFORMED: list[tuple[str, Any]] = [
    ("chain_id", "1"),
    ("chain_id", True),
    ("block_number", -1),
    ("block_number", 2**53),
    ("contract", "0x12"),
    ("contract", "ab" * 20),
    ("contract", "0x" + "AB" * 20),
    ("block_hash", None),
    ("header_rlp", "0x" + "00" * 5000),
    ("account_proof", []),
    ("account_proof", ["0x80"] * (MAX_NODES + 1)),
    ("account_proof", {"0": "0x80"}),
    ("account_proof", [7]),
    ("storage_proofs", []),
    ("storage_proofs", {"size": ["0x80"]}),
    ("storage_proofs", {"size": [], "root": []}),
]


@pytest.mark.parametrize(("field", "value"), MALFORMED)
def test_a_malformed_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(MalformedProof, match=field):
        verify_l1(section(**{field: value}), size=SIZE, root=ROOT)


@pytest.mark.parametrize("field", sorted(VECTOR["section"]))
def test_a_missing_or_unknown_field_is_refused(field: str) -> None:
    short = section()
    del short[field]
    hostile: list[Any] = [short, section(note="x"), [], None, "section"]
    for value in hostile:
        with pytest.raises(MalformedProof):
            verify_l1(value, size=SIZE, root=ROOT)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("0xc0"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(field=st.sampled_from(sorted(VECTOR["section"])), value=json_values)
def test_hostile_values_raise_nothing_else(field: str, value: Any) -> None:
    try:
        facts = verify_l1(section(**{field: value}), size=SIZE, root=ROOT)
    except VerificationError:
        return
    assert field == "chain_id" or facts == VECTOR["facts"]


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_hostile_bytes_as_header_or_node(data: bytes) -> None:
    text = "0x" + data.hex()
    honest_hash = "0x" + keccak(data).hex()
    for changed in (
        section(header_rlp=text, block_hash=honest_hash),
        section(account_proof=[text]),
        section(storage_proofs={"size": [text], "root": [text]}),
    ):
        with pytest.raises(VerificationError):
            verify_l1(changed, size=SIZE, root=ROOT)


def nested(depth: int) -> bytes:
    data = b""
    for _ in range(depth):
        data = rlp.codec.length_prefix(len(data), 0xC0) + data
    return data


def test_deeply_nested_lists_are_refused_not_crashed_on() -> None:
    data = nested(600)
    with pytest.raises(MalformedProof):
        verify_l1(
            section(header_rlp="0x" + data.hex(), block_hash="0x" + keccak(data).hex()),
            size=SIZE,
            root=ROOT,
        )


@pytest.mark.parametrize(
    ("path", "expected"),
    [("00", ("", False)), ("0012", ("12", False)), ("1a", ("a", False)), ("3a12", ("a12", True))],
)
def test_compact_paths(path: str, expected: tuple[str, bool]) -> None:
    assert _compact(bytes.fromhex(path), "f") == expected


@pytest.mark.parametrize("path", ["", "01", "2f12", "40", "ff"])
def test_one_path_has_one_encoding(path: str) -> None:
    with pytest.raises(MalformedProof):
        _compact(bytes.fromhex(path), "f")


def by_name(length: int) -> Callable[[bytes], bytes]:
    """keccak that leaves keys of `length` bytes alone, so that tries can be made shallow and
    their leaves short enough to be embedded in their parents."""
    return lambda data: data if len(data) == length else keccak(data)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.binary(min_size=2, max_size=2), st.binary(min_size=1, max_size=40), min_size=1
    )
)
def test_walks_what_py_trie_builds(content: dict[bytes, bytes]) -> None:
    trie = HexaryTrie({})
    for key, value in content.items():
        trie[key] = value
    for key, value in content.items():
        # An embedded node has no place of its own in a proof (EIP-1186); py-trie lists it.
        shown = [rlp.encode(node) for node in trie.get_proof(key)]
        nodes = [node for i, node in enumerate(shown) if i == 0 or len(node) >= 32]
        assert _walk(nodes, trie.root_hash, key, by_name(2), "f") == value
        for k in range(len(nodes)):
            broken = [*nodes]
            broken[k] = broken[k][:-1] + bytes([broken[k][-1] ^ 1])
            with pytest.raises(VerificationError):
                _walk(broken, trie.root_hash, key, by_name(2), "f")
    for key in (b"\x00\x00", b"\xff\xfe", b"\x12\x34"):
        if key in content:
            continue
        shown = [rlp.encode(node) for node in trie.get_proof(key)]
        with pytest.raises(VerificationError):
            _walk(shown, trie.root_hash, key, by_name(2), "f")
