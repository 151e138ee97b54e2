"""What a log and a witness say to each other: c2sp.org/tlog-witness as bytes. Pure.

The log asks, by `POST <submission prefix>/add-checkpoint`::

    old 20852014
    PlRNCrwHpqhGrupue0L7gxbjbMiKA9temvuZZDDpkaw=
    jrJZDmY8Y7SyJE0MWLpLozkIVMSMZcD5kvuKxPC3swk=

    example.com/behind-the-sofa
    20852163
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

    — example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Z...

the size that the witness cosigned last, the RFC 9162 consistency proof from it, and the checkpoint
that is to be cosigned. The answer is one or more signature lines (200), or the size that the
witness did cosign last (409, `text/x.tlog.size`), or a refusal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from ledger.errors import MalformedProof
from ledger.verify.encoding import (
    decode_decimal,
    decode_hash_line,
    encode_base64,
)
from ledger.verify.note import (
    Note,
    SignatureLine,
    VerifierKey,
    format_note,
    parse_note,
    verify_note,
)

PATH = "add-checkpoint"
SIZE_TYPE = "text/x.tlog.size"
TEXT_TYPE = "text/plain; charset=utf-8"
MAX_REQUEST_BYTES = 65_536
"""Proof lines take under 3 KB; the rest is room for a checkpoint with many cosignatures."""
MAX_PROOF_LINES = 63
MAX_ANSWER_BYTES = 16_384
_OLD = "old "


@dataclass(frozen=True, kw_only=True)
class AddCheckpoint:
    """A request. `proof` is from `old_size` to the size that the signed note `checkpoint` names."""

    old_size: int
    proof: tuple[bytes, ...]
    checkpoint: bytes


def parse_request(body: bytes) -> AddCheckpoint:
    """The parts of a request; nothing is verified. Raises MalformedProof."""
    if len(body) > MAX_REQUEST_BYTES:
        raise MalformedProof(f"a request has at most MAX_REQUEST_BYTES = {MAX_REQUEST_BYTES} bytes")
    head, blank, checkpoint = body.partition(b"\n\n")
    try:
        first, *lines = head.decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        raise MalformedProof("the lines above the checkpoint are ASCII; these are not") from error
    if not blank or not checkpoint or not first.startswith(_OLD):
        raise MalformedProof(
            "a request is the line 'old <size>', proof lines, an empty line and a checkpoint"
        )
    if len(lines) > MAX_PROOF_LINES:
        raise MalformedProof(
            f"{len(lines)} proof lines; at most MAX_PROOF_LINES = {MAX_PROOF_LINES} are allowed"
        )
    return AddCheckpoint(
        old_size=decode_decimal(first.removeprefix(_OLD), "the old size"),
        proof=tuple(decode_hash_line(line, f"proof line {n + 1}") for n, line in enumerate(lines)),
        checkpoint=checkpoint,
    )


def format_request(request: AddCheckpoint) -> bytes:
    """The body of the POST."""
    assert len(request.proof) <= MAX_PROOF_LINES
    lines = [f"{_OLD}{request.old_size}", *map(encode_base64, request.proof)]
    return "\n".join(lines).encode() + b"\n\n" + request.checkpoint


def format_cosignature(line: SignatureLine) -> bytes:
    """The body of a 200: the signature line as it will stand under the note."""
    return format_note("\n", [line]).removeprefix(b"\n\n")


def parse_cosignature(body: bytes, text: str, key: VerifierKey) -> tuple[SignatureLine, int]:
    """The line of `key` in the body of a 200, verified over the checkpoint `text`, and its time.

    Lines of other keys are ignored, as the specification demands. Raises MalformedProof, or
    BadSignature when no line is of this key or its line does not verify.
    """
    if len(body) > MAX_ANSWER_BYTES:
        raise MalformedProof(f"an answer has at most MAX_ANSWER_BYTES = {MAX_ANSWER_BYTES} bytes")
    note: Note = parse_note(text.encode() + b"\n" + body)
    if note.text != text:
        raise MalformedProof("the answer holds more than signature lines")
    verified = verify_note(note, [key]).verified[0]
    assert verified.timestamp is not None  # the key's type is checked where it enters
    # verify_note checks the first line of a key and no other: take that one.
    line = next(s for s in note.signatures if (s.name, s.key_id) == (key.name, key.id))
    return line, verified.timestamp


def format_size(size: int) -> bytes:
    """The body of a 409: the size that the witness cosigned last."""
    return f"{size}\n".encode()


def parse_size(body: bytes) -> int:
    """Raises MalformedProof."""
    text = body[:MAX_ANSWER_BYTES].decode("utf-8", "replace")
    if not text.endswith("\n"):
        raise MalformedProof("the size that a witness names ends in a newline")
    return decode_decimal(text[:-1], "the size that the witness names")


def origin_hash(origin: str) -> str:
    """How a log is called in paths: `GET <monitoring prefix>/<this>/checkpoint`."""
    return sha256(origin.encode()).hexdigest()


def checkpoint_path(origin: str) -> str:
    """Where a witness shows the checkpoint of a log that it cosigned last."""
    return f"{origin_hash(origin)}/checkpoint"


def with_lines(note: Note, lines: Sequence[SignatureLine]) -> Note:
    """The note with more signature lines under it; one line a key, the one that was there first."""
    present = {(line.name, line.key_id) for line in note.signatures}
    more = tuple(line for line in lines if (line.name, line.key_id) not in present)
    return Note(text=note.text, signatures=note.signatures + more)
