"""One entry, one proof, one checkpoint, in one text file: c2sp.org/tlog-proof@v1. Pure.

::

    c2sp.org/tlog-proof@v1
    index 1
    rzFuy5Go7nrpkhBwKy1HWPMM3eO/YePY54fXRoH5Cm4=

    example.com/log
    2
    ...

An optional `extra` line carries base64 that nothing authenticates. The checkpoint follows verbatim
after the first empty line.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ledger.domain.envelope import ENTRY_HEADER_BYTES, leaf_hash
from ledger.errors import Inconsistent, MalformedProof
from ledger.verify.checkpoint import OpenedCheckpoint, open_checkpoint
from ledger.verify.encoding import (
    decode_base64,
    decode_decimal,
    decode_hash_line,
    encode_base64,
)
from ledger.verify.merkle import MAX_INCLUSION_HASHES, verify_inclusion
from ledger.verify.note import MAX_NOTE_BYTES, VerifierKey

MAX_PROOF_BYTES = 2 * MAX_NOTE_BYTES
_HEADER = "c2sp.org/tlog-proof@v1"


@dataclass(frozen=True, kw_only=True)
class TlogProof:
    """`proof` runs from the leaf's sibling to the root's child; `checkpoint` is a signed note."""

    index: int
    proof: tuple[bytes, ...]
    checkpoint: bytes
    extra: bytes | None = None


def parse_tlog_proof(data: bytes) -> TlogProof:
    """The parts of a `.tlog-proof` file; nothing is verified. Raises MalformedProof."""
    if len(data) > MAX_PROOF_BYTES:
        raise MalformedProof(f"a proof has at most MAX_PROOF_BYTES = {MAX_PROOF_BYTES} bytes")
    head, blank, checkpoint = data.partition(b"\n\n")
    try:
        lines = head.decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        raise MalformedProof("the lines above the checkpoint are ASCII; these are not") from error
    if not blank or not checkpoint or lines.pop(0) != _HEADER:
        raise MalformedProof(
            f"a proof is {_HEADER}, an index line, hash lines, an empty line and a checkpoint"
        )
    extra = None
    if lines and lines[0].startswith("extra "):
        extra = decode_base64(lines.pop(0).removeprefix("extra "), "the extra line")
    if not lines or not lines[0].startswith("index "):
        raise MalformedProof("the line 'index <number>' is missing")
    index = decode_decimal(lines.pop(0).removeprefix("index "), "the index")
    if len(lines) > MAX_INCLUSION_HASHES:
        raise MalformedProof(f"{len(lines)} hash lines; no tree needs over {MAX_INCLUSION_HASHES}")
    proof = tuple(decode_hash_line(line, f"hash line {n + 1}") for n, line in enumerate(lines))
    return TlogProof(index=index, proof=proof, checkpoint=checkpoint, extra=extra)


def format_tlog_proof(proof: TlogProof) -> bytes:
    lines = [_HEADER]
    if proof.extra is not None:
        lines.append(f"extra {encode_base64(proof.extra)}")
    lines.append(f"index {proof.index}")
    lines += [encode_base64(node) for node in proof.proof]
    return "\n".join(lines).encode() + b"\n\n" + proof.checkpoint


def verify_tlog_proof(
    data: bytes,
    leaf: bytes,
    key: VerifierKey,
    *,
    origin: str | None = None,
    witnesses: Iterable[VerifierKey] = (),
) -> tuple[TlogProof, OpenedCheckpoint]:
    """Check that the leaf hash `leaf` is in the log that `key` signs, at the proof's index.

    A leaf hash does not know its place, and another index may share the proof (see `merkle`):
    whoever holds the entry itself uses `verify_entry_proof`. Raises MalformedProof, BadSignature,
    Inconsistent or NotIncluded.
    """
    proof = parse_tlog_proof(data)
    opened = open_checkpoint(proof.checkpoint, key, origin=origin, witnesses=witnesses)
    verify_inclusion(
        index=proof.index,
        size=opened.checkpoint.size,
        leaf=leaf,
        proof=proof.proof,
        root=opened.checkpoint.root,
    )
    return proof, opened


def verify_entry_proof(
    data: bytes,
    entry: bytes,
    key: VerifierKey,
    *,
    origin: str | None = None,
    witnesses: Iterable[VerifierKey] = (),
) -> tuple[TlogProof, OpenedCheckpoint]:
    """Check that `entry` is in the log that `key` signs, at the index written inside the entry.

    The envelope in the entry is not looked at (`ledger.domain.envelope.decode_entry` does).
    Raises as `verify_tlog_proof`, and Inconsistent when proof and entry name different indexes.
    """
    if len(entry) <= ENTRY_HEADER_BYTES:
        raise MalformedProof(f"an entry has more than {ENTRY_HEADER_BYTES} bytes, not {len(entry)}")
    proof, opened = verify_tlog_proof(
        data, leaf_hash(entry), key, origin=origin, witnesses=witnesses
    )
    written = int.from_bytes(entry[:8], "big")
    if written != proof.index:
        raise Inconsistent(
            f"the proof is for index {proof.index}, the entry says inside that it is entry "
            f"{written}: it was moved, or the proof's index was altered",
            index=proof.index,
        )
    return proof, opened
