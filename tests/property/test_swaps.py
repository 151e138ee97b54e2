"""Index and size swaps: what RFC 9162 proofs alone accept, and what refuses it.

A proof binds the leaf's path, and several (index, size) pairs share one. Here every pair to
MAX_LEAVES is held against every other: a log that lies about the size it signs, or a courier who
rewrites a proof's index, gets past the RFC's algorithm hundreds of times, and past the index that
stands inside the entry never.
"""

from collections.abc import Iterator
from functools import cache
from uuid import UUID

import pytest
from nacl.signing import SigningKey

from ledger.domain.envelope import encode_entry, leaf_hash, sign_event
from ledger.errors import BadSignature, Inconsistent, NotIncluded, VerificationError
from ledger.log import tree
from ledger.verify.bundle import _check_place
from ledger.verify.bundle_format import BundledEntry
from ledger.verify.checkpoint import Checkpoint, format_checkpoint
from ledger.verify.merkle import tree_root, verify_inclusion
from ledger.verify.note import format_note, sign_text, vkey_of
from ledger.verify.tlog_proof import (
    TlogProof,
    format_tlog_proof,
    verify_entry_proof,
    verify_tlog_proof,
)

MAX_LEAVES = 32
LOG = "log.example/swaps"
LOG_KEY = SigningKey(b"l" * 32)
VKEY = vkey_of(LOG, LOG_KEY)
ENTRIES = [
    encode_entry(
        n,
        1_700_000_000_000_000 + n,
        sign_event(
            SigningKey(b"a" * 32),
            type="identity.registered",
            log=LOG,
            body={"name": f"name {n}"},
            id=UUID(int=(n << 80) | (4 << 76) | (8 << 60)),
            at=1_700_000_000_000_000,
        ),
    )
    for n in range(MAX_LEAVES)
]
LEAVES = [leaf_hash(entry) for entry in ENTRIES]
ROOTS = [tree_root(LEAVES[:size]) for size in range(MAX_LEAVES + 1)]

Swap = tuple[int, int, int, int]
"""index and size as they are, index and size as claimed."""


@cache
def inclusion(index: int, size: int) -> tuple[bytes, ...]:
    ranges = tree.inclusion_ranges(index, size)
    return tuple(tree.range_hashes(ranges, lambda wanted: {(0, 0): b"".join(LEAVES)}))


@cache
def signed(size: int, root: bytes) -> bytes:
    text = format_checkpoint(Checkpoint(origin=LOG, size=size, root=root))
    return format_note(text, [sign_text(text, LOG, LOG_KEY)])


def rfc_accepts(index: int, size: int, claimed_index: int, claimed_size: int) -> bool:
    try:
        verify_inclusion(
            index=claimed_index,
            size=claimed_size,
            leaf=LEAVES[index],
            proof=inclusion(index, size),
            root=ROOTS[size],
        )
    except NotIncluded:
        return False
    return True


def places() -> Iterator[tuple[int, int]]:
    return ((index, size) for size in range(1, MAX_LEAVES + 1) for index in range(size))


@pytest.fixture(scope="module")
def swaps() -> list[Swap]:
    """Every claim that differs from the truth and that the RFC's algorithm accepts."""
    claims = list(places())
    by_length: dict[int, list[tuple[int, int]]] = {}
    for claim in claims:  # a proof of another length is refused by every size
        by_length.setdefault(len(inclusion(*claim)), []).append(claim)
    return [
        (*true, *claim)
        for true in claims
        for claim in by_length[len(inclusion(*true))]
        if claim != true and rfc_accepts(*true, *claim)
    ]


def test_the_rfc_alone_accepts_hundreds_of_swaps(swaps: list[Swap]) -> None:
    assert (2, 3, 1, 2) in swaps  # the last leaf of three, claimed as the last of two
    assert sum(index != claimed for index, _, claimed, _ in swaps) > 400
    assert sum(index == claimed for index, _, claimed, _ in swaps) > 400
    # Within one size, and so under one signed checkpoint, no index can stand for another.
    assert all(size != claimed_size for _, size, _, claimed_size in swaps)


def test_no_verifier_of_ours_accepts_a_moved_entry(swaps: list[Swap]) -> None:
    """The log itself lies here: it signed the root of one size under another size."""
    for index, size, claimed_index, claimed_size in swaps:
        if index == claimed_index:
            continue
        note = signed(claimed_size, ROOTS[size])
        path = inclusion(index, size)
        file = format_tlog_proof(TlogProof(index=claimed_index, proof=path, checkpoint=note))
        with pytest.raises(Inconsistent, match="says inside that it is entry"):
            verify_entry_proof(file, ENTRIES[index], VKEY)
        bundled = BundledEntry(index=claimed_index, entry=ENTRIES[index], proof=path)
        with pytest.raises(Inconsistent, match="says inside that it is entry"):
            _check_place(bundled, Checkpoint(origin=LOG, size=claimed_size, root=ROOTS[size]))
    # And what they were held against: the leaf's hash alone does not notice.
    index, size, claimed_index, claimed_size = 2, 3, 1, 2
    note = signed(claimed_size, ROOTS[size])
    path = inclusion(index, size)
    file = format_tlog_proof(TlogProof(index=claimed_index, proof=path, checkpoint=note))
    verify_tlog_proof(file, LEAVES[index], VKEY)


def test_the_true_place_is_accepted() -> None:
    for index, size in places():
        note = signed(size, ROOTS[size])
        path = inclusion(index, size)
        file = format_tlog_proof(TlogProof(index=index, proof=path, checkpoint=note))
        proof, opened = verify_entry_proof(file, ENTRIES[index], VKEY)
        assert (proof.index, opened.checkpoint.size) == (index, size)


def test_a_size_that_nobody_signed_is_refused(swaps: list[Swap]) -> None:
    for index, size, claimed_index, claimed_size in swaps[::50]:
        lines = signed(size, ROOTS[size]).split(b"\n")
        lines[1] = str(claimed_size).encode()
        file = format_tlog_proof(
            TlogProof(
                index=claimed_index, proof=inclusion(index, size), checkpoint=b"\n".join(lines)
            )
        )
        with pytest.raises(BadSignature):
            verify_entry_proof(file, ENTRIES[index], VKEY)


def test_the_proof_of_the_last_entry_binds_the_size() -> None:
    """A log that signs a wrong size cannot show the last entry of that size, whatever it tries."""
    for size in range(1, MAX_LEAVES + 1):
        for claimed in range(1, MAX_LEAVES + 1):
            if claimed == size:
                continue
            last, note = claimed - 1, signed(claimed, ROOTS[size])
            for index in range(size):
                for path in {inclusion(index, size), inclusion(last, claimed)}:
                    file = format_tlog_proof(TlogProof(index=last, proof=path, checkpoint=note))
                    with pytest.raises(VerificationError):
                        verify_entry_proof(file, ENTRIES[index], VKEY)


def test_an_entry_too_short_to_name_its_index_is_refused() -> None:
    file = format_tlog_proof(TlogProof(index=0, proof=(), checkpoint=signed(1, ROOTS[1])))
    for entry in (b"", ENTRIES[0][:8], ENTRIES[0][:16]):
        with pytest.raises(VerificationError, match="an entry has more than 16 bytes"):
            verify_entry_proof(file, entry, VKEY)
