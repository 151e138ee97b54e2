"""Evidence of every kind: it proves what it says, altered it proves nothing, and no arrangement of
a good log's own bytes proves anything against it."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from ledger.domain.canonical import canonical_json
from ledger.domain.envelope import leaf_hash
from ledger.errors import BadSignature, MalformedProof, VerificationError
from ledger.log import tree
from ledger.verify.evidence import (
    SHAPES,
    Evidence,
    check_evidence,
    format_evidence,
    parse_evidence,
    prefix_roots,
)
from ledger.verify.evidence_format import MAX_EVIDENCE_BYTES, MAX_SAYS_CHARS
from ledger.verify.merkle import tree_root
from ledger.verify.note import format_vkey, vkey_of
from ledger.verify.tlog_proof import TlogProof, format_tlog_proof
from tests.unit.monitor_world import (
    LOG,
    NOW_US,
    OTHER_KEY,
    VKEY,
    checkpoint,
    entries,
    entry,
    witness_key,
)

HELD = entries(20)
FORKED = [entry(0, name="another"), *HELD[1:]]
L1 = json.loads((Path(__file__).parents[1] / "vectors" / "l1_section.json").read_bytes())
POLICY = f"witness w {format_vkey(witness_key(0)[1])}\nquorum w\n".encode()
WITNESS = format_vkey(witness_key(0)[1]).encode()


def hashes(held: list[bytes], ranges: list[tuple[int, int]]) -> list[bytes]:
    leaves = [leaf_hash(e) for e in held]
    tiles = tree.integrate(0, leaves, lambda wanted: {})
    return tree.range_hashes(ranges, lambda wanted: tiles)


def head(held: list[bytes], **options: object) -> bytes:
    root = tree_root([leaf_hash(e) for e in held])
    return checkpoint(len(held), root, **options)  # type: ignore[arg-type]


def nodes(old: int, held: list[bytes]) -> bytes:
    ranges = tree.consistency_ranges(old, len(held))
    whole = [(0, old)] if old & (old - 1) == 0 else []
    return b"".join(hashes(held, [*whole, *ranges]))


def proof(index: int, held: list[bytes]) -> bytes:
    path = hashes(held, tree.inclusion_ranges(index, len(held)))
    return format_tlog_proof(TlogProof(index=index, proof=tuple(path), checkpoint=head(held)))


def evidence(kind: str, /, **items: bytes) -> Evidence:
    return Evidence(
        kind=kind,
        log=LOG,
        vkey=format_vkey(VKEY),
        found_at=NOW_US,
        says="Something is wrong.",
        items=items,
    )


def anchor(size: int, root: bytes, section: Mapping[str, object] | None = None) -> bytes:
    contract = str(section["contract"]) if section else "0x" + "ab" * 20
    chain_id = section["chain_id"] if section else 1
    value = {"chain_id": chain_id, "contract": contract, "size": size, "root": root.hex()}
    return canonical_json({**value, "section": section})


SWAPPED = [*HELD[:3], HELD[4], HELD[3], *HELD[5:]]
HIDDEN = [*HELD[:18], HELD[19]]
UNSIGNED = [*HELD[:3], HELD[3][:16] + HELD[4][16:].replace(b"name 4", b"name 5"), *HELD[4:]]
EARLY = [*HELD[:3], entry(3, at=NOW_US + 1), *HELD[4:]]
L1_ROOT = bytes.fromhex(L1["root"])

GOOD = {
    "split-view": evidence("split-view", checkpoint_1=head(HELD), checkpoint_2=head(FORKED)),
    "rollback": evidence("rollback", checkpoint_1=head(HELD), checkpoint_2=head(HELD[:9])),
    "fork": evidence(
        "inconsistent",
        checkpoint_1=head(HELD[:13]),
        checkpoint_2=head(FORKED),
        nodes=nodes(13, FORKED),
    ),
    "fork-at-16": evidence(
        "inconsistent",
        checkpoint_1=head(HELD[:16]),
        checkpoint_2=head(FORKED),
        nodes=nodes(16, FORKED),
    ),
    "proof-of-another-beginning": evidence(
        "inconsistent",
        checkpoint_1=head(HELD[:13]),
        checkpoint_2=head(FORKED),
        consistency=nodes(13, FORKED),
    ),
    "failed-proof": evidence(
        "inconsistent",
        checkpoint_1=head(HELD[:13]),
        checkpoint_2=head(HELD),
        consistency=nodes(13, FORKED),
    ),
    "no-way": evidence("inconsistent", checkpoint_1=head(HELD[:13]), checkpoint_2=head(HELD)),
    "no-tree": evidence("inconsistent", checkpoint=head(HELD)),
    "other-tile": evidence(
        "inconsistent",
        checkpoint=head(HELD),
        path=b"tile/0/000.p/20",
        served=b"\0" * 640,
        computed=b"\1" * 640,
    ),
    "other-entry": evidence(
        "inconsistent", entry=FORKED[0], leaf=leaf_hash(HELD[0]), proof=proof(0, HELD)
    ),
    "wrong-size": evidence("wrong-size", entry=HIDDEN[-1], proof=proof(18, HIDDEN)),
    "missing": evidence("wrong-size", checkpoint=head(HELD), path=b"tile/entries/000.p/20"),
    "unsigned": evidence("bad-entry", entry=UNSIGNED[3], proof=proof(3, UNSIGNED)),
    "early": evidence(
        "bad-entry",
        entry=EARLY[3],
        proof=proof(3, EARLY),
        before=EARLY[2],
        before_proof=proof(2, EARLY),
    ),
    "misplaced": evidence("misplaced-entry", entry=SWAPPED[3], proof=proof(3, SWAPPED)),
    "anchor": evidence(
        "anchor-mismatch",
        checkpoint=head(HELD),
        anchor=anchor(13, L1_ROOT, L1["section"]),
        nodes=nodes(13, HELD),
    ),
    "anchor-unproven": evidence(
        "anchor-mismatch", checkpoint=head(HELD), anchor=anchor(20, L1_ROOT)
    ),
    "anchor-ahead": evidence(
        "anchor-mismatch",
        checkpoint=head(HELD[:5]),
        anchor=anchor(13, L1_ROOT, L1["section"]),
    ),
    "witness-split": evidence(
        "witness-conflict",
        checkpoint_1=head(HELD, cosigned=[(0, 5)]),
        checkpoint_2=head(FORKED, cosigned=[(0, 6)]),
        witness=WITNESS,
    ),
    "witness-fork": evidence(
        "witness-conflict",
        checkpoint_1=head(HELD[:13], cosigned=[(0, 5)]),
        checkpoint_2=head(FORKED, cosigned=[(0, 6)]),
        witness=WITNESS,
        nodes=nodes(13, FORKED),
    ),
    "witness-back": evidence(
        "witness-conflict",
        checkpoint_1=head(HELD, cosigned=[(0, 5)]),
        checkpoint_2=head(HELD[:9], cosigned=[(0, 6)]),
        witness=WITNESS,
    ),
    "policy": evidence("witness-conflict", checkpoint=head(HELD), policy=POLICY),
    "bad-checkpoint": evidence("bad-checkpoint", checkpoint=head(HELD, key=OTHER_KEY)),
}
"""By shape; receipts are tested where they are made (test_verify_receipt.py)."""

CONCLUSIVE = {
    "split-view", "fork", "fork-at-16", "proof-of-another-beginning", "wrong-size", "unsigned",
    "early", "misplaced", "witness-split", "witness-fork",
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_each_shape_proves_what_it_says(name: str) -> None:
    again = parse_evidence(format_evidence(GOOD[name]))
    assert again == GOOD[name]
    for trusted in (None, format_vkey(VKEY), f" {format_vkey(VKEY)}\n"):
        verdict = check_evidence(again, trusted)
        assert verdict.facts["conclusive"] == (name in CONCLUSIVE)
        assert verdict.proven
        testimony = [line for line in verdict.trusted if line.startswith("Testimony: ")]
        assert bool(testimony) == (name not in CONCLUSIVE)
        assert [step.number for step in verdict.steps] == [1, 2, 3]
        assert verdict.to_text().isprintable() or "\n" in verdict.to_text()


def test_every_shape_is_here() -> None:
    made = {(e.kind, frozenset(e.items)) for e in GOOD.values()}
    known = {
        (kind, shape)
        for kind, shapes in SHAPES.items()
        for shape in shapes
        if "receipt" not in shape
    }
    assert made == known


@pytest.mark.parametrize("name", GOOD)
def test_under_another_key_it_proves_nothing(name: str) -> None:
    other = format_vkey(vkey_of(LOG, OTHER_KEY))
    with pytest.raises(BadSignature, match="another log's"):
        check_evidence(GOOD[name], other)
    if name != "bad-checkpoint":
        with pytest.raises(VerificationError):
            check_evidence(replace(GOOD[name], vkey=other))
        with pytest.raises(VerificationError):
            check_evidence(replace(GOOD[name], log="log.example/other"))


SIGNED = {
    "checkpoint", "checkpoint_1", "checkpoint_2", "entry", "proof", "nodes", "leaf", "before",
    "before_proof", "anchor",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CONCLUSIVE | {"rollback", "other-entry", "missing"}))
def test_any_altered_byte_of_a_proof_is_refused(name: str) -> None:
    """Flipped, cut or followed by more; a signature line of an unknown key may be there, or not."""
    good = GOOD[name]
    for item, data in good.items.items():
        if item not in SIGNED or (name, item) == ("other-entry", "entry"):
            continue
        step = 1 if len(data) < 700 else 3
        altered = [
            data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(0, len(data), step)
        ]
        for bad in (*altered, data[:-1], data + b"\n", b""):
            with pytest.raises(VerificationError):
                check_evidence(replace(good, items={**good.items, item: bad}))


def test_an_altered_l1_section_is_refused() -> None:
    good = GOOD["anchor"]
    for field in ("block_hash", "header_rlp", "contract", "chain_id", "block_number"):
        section = dict(L1["section"])
        if isinstance(section[field], int):
            section[field] += 1
        else:
            section[field] = section[field][:-1] + ("0" if section[field][-1] != "0" else "1")
        item = anchor(13, L1_ROOT, section)
        if field in ("contract", "chain_id"):  # what the anchor says apart from its section
            item = anchor(13, L1_ROOT, L1["section"]).replace(
                str(L1["section"][field]).encode(), str(section[field]).encode(), 1
            )
        with pytest.raises(VerificationError):
            check_evidence(replace(good, items={**good.items, "anchor": item}))


# --- a good log cannot be framed ---


def test_no_two_checkpoints_of_a_good_log_contradict_each_other() -> None:
    heads = {size: head(HELD[:size], cosigned=[(0, size)]) for size in range(1, 21)}
    for one in heads:
        for two in heads:
            pair = {"checkpoint_1": heads[one], "checkpoint_2": heads[two]}
            tries = [
                evidence("split-view", **pair),
                evidence("witness-conflict", **pair, witness=WITNESS),
            ]
            small, large = sorted((one, two))
            for held in (HELD[:large], FORKED[:large]) if small < large else ():
                found = nodes(small, held)
                tries += [
                    evidence("inconsistent", **pair, nodes=found),
                    evidence("witness-conflict", **pair, witness=WITNESS, nodes=found),
                ]
                # A proof that does not check may come from anybody.
                served = evidence("inconsistent", **pair, consistency=found)
                with suppress(VerificationError):
                    assert not check_evidence(served).facts["conclusive"]
            for attempt in tries:
                with pytest.raises(VerificationError):
                    check_evidence(attempt)


def test_a_proof_made_up_by_the_finder_is_testimony_at_most() -> None:
    pair = {"checkpoint_1": head(HELD[:13]), "checkpoint_2": head(HELD)}
    for bad in (b"", bytes(32), nodes(13, FORKED), nodes(13, HELD)[:-32], nodes(12, HELD)):
        verdict = check_evidence(evidence("inconsistent", **pair, consistency=bad))
        assert not verdict.facts["conclusive"]


@pytest.mark.parametrize("index", range(20))
def test_no_entry_of_a_good_log_is_out_of_place(index: int) -> None:
    right = proof(index, HELD)
    for kind in ("bad-entry", "misplaced-entry", "wrong-size"):
        for other in (index, (index + 1) % 20):
            with pytest.raises(VerificationError):
                check_evidence(evidence(kind, entry=HELD[other], proof=right))
    moved = right.replace(b"index %d\n" % index, b"index %d\n" % ((index + 1) % 20))
    with pytest.raises(VerificationError):
        check_evidence(evidence("misplaced-entry", entry=HELD[index], proof=moved))
    if index:
        before = {"before": HELD[index - 1], "before_proof": proof(index - 1, HELD)}
        with pytest.raises(VerificationError):
            check_evidence(evidence("bad-entry", entry=HELD[index], proof=right, **before))


def test_times_of_entries_that_do_not_follow_each_other_prove_nothing() -> None:
    later = {"before": HELD[9], "before_proof": proof(9, HELD)}
    with pytest.raises(VerificationError, match="right behind"):
        check_evidence(evidence("bad-entry", entry=HELD[3], proof=proof(3, HELD), **later))


def test_times_of_two_trees_prove_nothing() -> None:
    other = [*HELD[:2], entry(2, at=NOW_US + 100)]
    before = {"before": other[2], "before_proof": proof(2, other)}
    with pytest.raises(VerificationError, match="of one tree"):
        check_evidence(evidence("bad-entry", entry=HELD[3], proof=proof(3, HELD), **before))


def test_what_nothing_authenticates_is_refused() -> None:
    good = GOOD["misplaced"]
    extra = good.items["proof"].replace(b"index ", b"extra YQ==\nindex ")
    with pytest.raises(MalformedProof, match="extra line"):
        check_evidence(replace(good, items={**good.items, "proof": extra}))


def test_a_type_of_a_newer_version_is_no_fault() -> None:
    held = [*HELD[:3], entry(3, type="moon.landed", x=1)]
    with pytest.raises(VerificationError, match="well-formed"):
        check_evidence(evidence("bad-entry", entry=held[3], proof=proof(3, held)))


def test_files_that_fit_prove_nothing() -> None:
    tile = {"checkpoint": head(HELD), "path": b"tile/0/000.p/20"}
    with pytest.raises(VerificationError, match="nothing is wrong"):
        check_evidence(evidence("inconsistent", **tile, served=b"same", computed=b"same"))
    for path in (
        b"tile/0/001",
        b"tile/0/000.p/21",
        b"tile/1/000.p/1",
        b"tile/entries/000",
        b"\xff",
    ):
        with pytest.raises(VerificationError):
            check_evidence(evidence("wrong-size", checkpoint=head(HELD), path=path))
    with pytest.raises(VerificationError, match="opens"):
        check_evidence(evidence("bad-checkpoint", checkpoint=head(HELD)))
    with pytest.raises(VerificationError, match="as the policy demands"):
        check_evidence(
            evidence("witness-conflict", checkpoint=head(HELD, cosigned=[(0, 1)]), policy=POLICY)
        )


def test_an_anchor_of_the_logs_own_tree_is_no_mismatch() -> None:
    for size in range(1, 21):
        root = tree_root([leaf_hash(e) for e in HELD[:size]])
        items = {"checkpoint": head(HELD), "anchor": anchor(size, root)}
        more = {"nodes": nodes(size, HELD)} if size < 20 else {}
        with pytest.raises(VerificationError):
            check_evidence(evidence("anchor-mismatch", **items, **more))


# --- the maths behind `nodes` ---


def test_nodes_yield_both_roots_for_every_pair_of_sizes_to_64() -> None:
    leaves = [leaf_hash(b"%d" % n) for n in range(64)]
    roots = [tree_root(leaves[:n]) for n in range(65)]
    tiles = tree.integrate(0, leaves, lambda wanted: {})
    for new in range(2, 65):
        for old in range(1, new):
            ranges = tree.consistency_ranges(old, new)
            whole = [(0, old)] if old & (old - 1) == 0 else []
            found = tree.range_hashes([*whole, *ranges], lambda wanted: tiles)
            assert prefix_roots(old, new, found) == (roots[old], roots[new])
            for wrong in (found[:-1], [*found, bytes(32)], found[1:]):
                with pytest.raises(MalformedProof):
                    prefix_roots(old, new, wrong)
    for old, new in ((0, 5), (5, 5), (6, 5), (-1, 5)):
        with pytest.raises(MalformedProof):
            prefix_roots(old, new, [bytes(32)])


# --- bytes ---


def test_limits_and_spelling() -> None:
    data = format_evidence(GOOD["split-view"])
    value = json.loads(data)
    bad: list[object] = [
        {**value, "format": "tributary/evidence/v2"},
        {**value, "kind": "gossip"},
        {**value, "kind": "rollback", "items": {"checkpoint": ""}},
        {**value, "log": ""},
        {**value, "log": "x" * 129},
        {**value, "says": ""},
        {**value, "says": "two\nlines"},
        {**value, "says": "\x1b[31mred"},
        {**value, "says": "x" * (MAX_SAYS_CHARS + 1)},
        {**value, "found_at": -1},
        {**value, "found_at": "1"},
        {**value, "more": 1},
        {name: part for name, part in value.items() if name != "vkey"},
        {**value, "items": {**value["items"], "note": ""}},
        {**value, "items": {**value["items"], "checkpoint_1": "a"}},
        {**value, "items": {**value["items"], "checkpoint_1": "YR=="}},
        [],
        None,
        7,
    ]
    for wrong in bad:
        with pytest.raises(MalformedProof):
            parse_evidence(canonical_json(wrong))
    for wrong_bytes in (b"", b" " + data, data + b"\n", json.dumps(value, indent=1).encode()):
        with pytest.raises(MalformedProof):
            parse_evidence(wrong_bytes)
    with pytest.raises(MalformedProof, match="MAX_EVIDENCE_BYTES"):
        parse_evidence(b'"' + b"a" * MAX_EVIDENCE_BYTES + b'"')
