"""Our proofs and checkpoints under the verifier of sigstore-python, its own code, unmodified.

It is a test tool: its checks are private functions of another project, so a version of it that has
moved them skips these tests. Go's client is in tests/integration/test_go_client.py.
"""

from types import SimpleNamespace
from typing import Any

import pytest
from nacl.signing import SigningKey

from ledger.domain.envelope import leaf_hash
from ledger.log import tree
from ledger.verify.checkpoint import Checkpoint, format_checkpoint
from ledger.verify.merkle import tree_root
from ledger.verify.note import COSIGNATURE, cosign_text, format_note, sign_text, vkey_of

merkle = pytest.importorskip("sigstore._internal.merkle", reason="sigstore is not installed")
rekor = pytest.importorskip("sigstore._internal.rekor.checkpoint")
trust = pytest.importorskip("sigstore._internal.trust")
errors = pytest.importorskip("sigstore.errors")

MAX_LEAVES = 40
ORIGIN = "log.example/others"
KEY = SigningKey(b"o" * 32)
VKEY = vkey_of(ORIGIN, KEY)
DATA = [b"entry %d" % n for n in range(MAX_LEAVES)]
LEAVES = [leaf_hash(data) for data in DATA]


def keyring() -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = Ed25519PublicKey.from_public_bytes(VKEY.public_key)
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    models = trust.common_v1
    details = models.PublicKeyDetails.PKIX_ED25519
    return trust.Keyring([models.PublicKey.model_construct(raw_bytes=der, key_details=details)])


def entry(index: int, size: int, **changed: Any) -> Any:
    """What its functions read of a log entry, from our proof and our signed note."""
    ranges = tree.inclusion_ranges(index, size)
    root = tree_root(LEAVES[:size])
    text = format_checkpoint(Checkpoint(origin=ORIGIN, size=size, root=root))
    witness = SigningKey(b"w" * 32)
    signatures = [sign_text(text, ORIGIN, KEY), cosign_text(text, "witness.example", witness, 1)]
    assert vkey_of("witness.example", witness, COSIGNATURE).id != VKEY.id
    proof = {
        "log_index": index,
        "tree_size": size,
        "root_hash": root,
        "hashes": tree.range_hashes(ranges, lambda wanted: {(0, 0): b"".join(LEAVES)}),
        "checkpoint": SimpleNamespace(envelope=format_note(text, signatures).decode()),
        **changed,
    }
    return SimpleNamespace(
        _inner=SimpleNamespace(
            canonicalized_body=DATA[index],
            log_id=SimpleNamespace(key_id=VKEY.id + bytes(28)),
            inclusion_proof=SimpleNamespace(**proof),
        )
    )


def test_it_accepts_every_leaf_of_every_tree() -> None:
    for size in range(1, MAX_LEAVES + 1):
        for index in range(size):
            merkle.verify_merkle_inclusion(entry(index, size))


def test_it_accepts_our_checkpoints_with_cosignatures() -> None:
    keys = keyring()
    for size in (1, 2, 3, MAX_LEAVES):
        rekor.verify_checkpoint(keys, entry(size - 1, size))


def test_it_refuses_what_was_altered() -> None:
    true = entry(5, 11)
    hashes = true._inner.inclusion_proof.hashes
    for n in range(len(hashes)):
        flipped = [*hashes[:n], bytes([hashes[n][0] ^ 1]) + hashes[n][1:], *hashes[n + 1 :]]
        with pytest.raises(errors.VerificationError):
            merkle.verify_merkle_inclusion(entry(5, 11, hashes=flipped))
    with pytest.raises(errors.VerificationError):
        rekor.verify_checkpoint(keyring(), entry(5, 11, root_hash=bytes(32)))
    envelope = true._inner.inclusion_proof.checkpoint.envelope.replace("\n11\n", "\n12\n")
    with pytest.raises(errors.VerificationError):
        rekor.verify_checkpoint(
            keyring(), entry(5, 11, checkpoint=SimpleNamespace(envelope=envelope))
        )
