"""Notes, checkpoints and proofs that other implementations made: Go's sumdb, Rekor v2, C2SP."""

import base64
from hashlib import sha256
from typing import Any

import pytest

from ledger.errors import BadSignature, MalformedProof, VerificationError
from ledger.verify import checkpoint, merkle, note, tlog_proof
from tests.vectors.shared import b64, cases, load, needs_vectors

pytestmark = needs_vectors

WANTED_ERRORS = {
    "error: malformed": MalformedProof,
    "error: no verifiable signature": BadSignature,
    "error: invalid signature": BadSignature,
}


@pytest.mark.parametrize("case", cases("signed-note.json"))
def test_signed_note(case: dict[str, Any]) -> None:
    keys = [note.parse_vkey(vkey) for vkey in case["vkeys"]]
    assert [note.format_vkey(key) for key in keys] == case["vkeys"]
    data = b64(case["note_b64"])
    if case["want"] != "ok":
        with pytest.raises(WANTED_ERRORS[case["want"]]):
            note.open_note(data, keys)
        return
    opened = note.open_note(data, keys)
    assert [v.key.name for v in opened.verified] == case["verified"]
    assert [s.name for s in opened.unverified] == case["unverified"]
    parsed = note.parse_note(data)
    assert note.format_note(parsed.text, parsed.signatures) == data


def test_bad_vkeys_are_refused() -> None:
    bad = load("signed-note.json")["bad_vkeys"]
    assert bad
    for vkey in bad:
        with pytest.raises(MalformedProof):
            note.parse_vkey(vkey)


def test_signing_reproduces_the_published_note() -> None:
    sign = load("signed-note.json")["sign"]
    name, key = note.parse_skey(sign["skey"])
    assert note.format_skey(name, key) == sign["skey"]
    made = note.format_note(sign["text"], [note.sign_text(sign["text"], name, key)])
    assert made == sign["want_note"].encode()


def test_go_checksum_database_checkpoint() -> None:
    case = load("sum-golang-org-checkpoint.json")
    key = note.parse_vkey(case["vkey"])
    opened = checkpoint.open_checkpoint(b64(case["note_b64"]), key, origin=case["origin"])
    assert opened.checkpoint == checkpoint.Checkpoint(
        origin=case["origin"], size=case["size"], root=b64(case["root_b64"])
    )


@pytest.mark.parametrize("case", cases("checkpoint-parse.json"))
def test_checkpoint_lines(case: dict[str, Any]) -> None:
    # Upstream's roots are words, not hashes; C2SP wants 32 bytes, so the third line is made one.
    lines = case["text"].split("\n")
    lines[2] = base64.b64encode(sha256(lines[2].encode()).digest()).decode()
    text = "\n".join(lines)
    if case["want_err"] or case["name"] == "valid with trailing newlines":  # C2SP: none empty
        with pytest.raises(MalformedProof):
            checkpoint.parse_checkpoint(text)
    else:
        parsed = checkpoint.parse_checkpoint(text)
        assert parsed.size == int(lines[1])
        assert checkpoint.format_checkpoint(parsed) == text


@pytest.mark.parametrize("case", cases("tlog-proof.json", "ok"))
def test_tlog_proof_both_ways(case: dict[str, Any]) -> None:
    extra = case["extra"]
    proof = tlog_proof.TlogProof(
        index=case["index"],
        proof=tuple(sha256(name.encode()).digest() for name in case["hash_names"]),
        checkpoint=case["checkpoint"].encode(),
        extra=None if extra is None else extra.encode(),
    )
    assert tlog_proof.format_tlog_proof(proof) == case["text"].encode()
    assert tlog_proof.parse_tlog_proof(case["text"].encode()) == proof


def test_rekor_v2_first_entry() -> None:
    entry = load("rekor2-example-size1.json")
    envelope = entry["inclusionProof"]["checkpoint"]["envelope"].encode()
    parsed = note.parse_note(envelope)
    head = checkpoint.parse_checkpoint(parsed.text)
    leaf = merkle.leaf_hash(b64(entry["canonicalizedBody"]))
    merkle.verify_inclusion(index=0, size=head.size, leaf=leaf, proof=[], root=head.root)
    with pytest.raises(BadSignature, match="no signature by a known key"):
        note.verify_note(parsed, [])


@pytest.mark.parametrize("case", cases("rekor2-checkpoints.json"))
def test_rekor_v2_checkpoints(case: dict[str, Any]) -> None:
    key = note.parse_vkey(case["vkeys"][0])
    data = b64(case["checkpoint_b64"])
    if case["want"] != "ok":
        with pytest.raises(VerificationError):
            checkpoint.open_checkpoint(data, key)
        return
    head = checkpoint.open_checkpoint(data, key).checkpoint
    assert (head.size, head.root) == (case["claimed_size"], b64(case["claimed_root_b64"]))
    proof = tuple(map(b64, case["proof_b64"]))
    text = tlog_proof.format_tlog_proof(
        tlog_proof.TlogProof(index=case["index"], proof=proof, checkpoint=data)
    )
    leaf = merkle.leaf_hash(b64(case["entry_b64"]))
    tlog_proof.verify_tlog_proof(text, leaf, key)
    with pytest.raises(VerificationError):
        tlog_proof.verify_tlog_proof(text, merkle.leaf_hash(b"another"), key)
