"""Checkpoints: which tree a log has signed. Pure.

A checkpoint is a signed note whose text is origin, tree size and root hash, one line each
(c2sp.org/tlog-checkpoint)::

    example.com/behind-the-sofa
    20852163
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

    — example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zh...

Our logs write no extension lines; others may, and they are kept and otherwise ignored.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ledger.errors import BadSignature, Inconsistent, MalformedProof
from ledger.verify.encoding import decode_decimal, decode_hash_line, encode_base64, printable
from ledger.verify.merkle import EMPTY_ROOT, HASH_BYTES, MAX_TREE_SIZE
from ledger.verify.note import ED25519, OpenedNote, Verified, VerifierKey, open_note


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A tree head: `root` is 32 bytes, `extensions` are lines without their newline."""

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OpenedCheckpoint:
    """A tree head that the log's key signed, and the witnesses whose cosignatures check."""

    checkpoint: Checkpoint
    witnesses: tuple[Verified, ...]


def parse_checkpoint(text: str) -> Checkpoint:
    """The tree head in a note's text. Raises MalformedProof."""
    if not text.endswith("\n"):
        raise MalformedProof("a checkpoint's last line ends in a newline")
    lines = text[:-1].split("\n")
    if len(lines) < 3 or not all(lines):
        raise MalformedProof(
            f"a checkpoint has three or more lines (origin, size, root), none empty; this one has "
            f"{len(lines)}"
        )
    size = decode_decimal(lines[1], "the checkpoint's tree size")
    root = decode_hash_line(lines[2], "the checkpoint's root hash")
    if size == 0 and root != EMPTY_ROOT:
        raise MalformedProof("the root of the empty tree is SHA-256 of nothing")
    return Checkpoint(origin=lines[0], size=size, root=root, extensions=tuple(lines[3:]))


def format_checkpoint(checkpoint: Checkpoint) -> str:
    """The note text of a tree head."""
    assert len(checkpoint.root) == HASH_BYTES
    assert 0 <= checkpoint.size <= MAX_TREE_SIZE
    lines = (
        checkpoint.origin,
        str(checkpoint.size),
        encode_base64(checkpoint.root),
        *checkpoint.extensions,
    )
    assert all(line and "\n" not in line for line in lines)
    return "".join(f"{line}\n" for line in lines)


def open_checkpoint(
    note: bytes,
    key: VerifierKey,
    *,
    origin: str | None = None,
    witnesses: Iterable[VerifierKey] = (),
) -> OpenedCheckpoint:
    """The tree head of a note that `key` signed.

    `origin` is what the first line must say; by default the key's name, as in our logs. Known
    `witnesses` are checked too, but never replace the log's own signature. Raises MalformedProof
    (also for a `key` that is a witness's: a log signs by type 0x01), BadSignature, or Inconsistent
    when another log signed with this key.
    """
    if key.type != ED25519:
        raise MalformedProof(
            f"the key {printable(key.name)} is a witness's (0x04), expected a log's (0x01)",
            field="vkey",
        )
    opened: OpenedNote = open_note(note, [key, *witnesses])
    by_log = [v for v in opened.verified if v.key == key]
    if not by_log:
        raise BadSignature(
            f"the checkpoint is not signed by {printable(key.name)} ({key.id.hex()}), only by "
            "witnesses: a cosignature does not replace the log's own",
            key=key.name,
        )
    checkpoint = parse_checkpoint(opened.text)
    expected = key.name if origin is None else origin
    if checkpoint.origin != expected:
        raise Inconsistent(
            f"the checkpoint is of log {printable(checkpoint.origin)!r}, expected "
            f"{printable(expected)!r}: another log's proof"
        )
    return OpenedCheckpoint(
        checkpoint=checkpoint, witnesses=tuple(v for v in opened.verified if v.key != key)
    )
