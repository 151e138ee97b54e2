"""Signed notes: who signed this text. Pure.

A note is text, an empty line, and signature lines, byte for byte as c2sp.org/signed-note has it
(the format of Go's golang.org/x/mod/sumdb/note)::

    This is an example message.

    — example.com/foo Uw2QOkn8srV1yJGh2VYRLl1Tnagv1YEq6TfXppzi2OnncAlTgK7Ztg1QRYNZXsYjOBH3m...

Keys travel as text: a vkey `name+keyid+base64(type || public key)` to verify, an skey
`PRIVATE+KEY+name+keyid+base64(type || seed)` to sign. Two types are known: ED25519 over the text
(0x01), and COSIGNATURE (0x04, c2sp.org/tlog-cosignature), by which a witness says at what time it
saw the text as the largest consistent tree. Signatures of other keys are carried and ignored, as
the specification demands; a signature by a known key that does not check refuses the whole note.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from nacl.exceptions import BadSignatureError, CryptoError
from nacl.signing import SigningKey, VerifyKey

from ledger.errors import BadSignature, MalformedProof
from ledger.verify.encoding import decode_base64, encode_base64, printable

ED25519 = 0x01
COSIGNATURE = 0x04
MAX_NOTE_BYTES = 1_000_000
MAX_SIGNATURES = 100
MAX_KEY_CHARS = 1_000
KEY_ID_BYTES = 4
_TIMESTAMP_BYTES = 8
_SIGNATURE_BYTES = 64
_DASH = "— "
_PRIVATE = "PRIVATE+KEY+"
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")
_PLAIN_NAME = re.compile(r"[!-*,-~]+")


@dataclass(frozen=True, kw_only=True)
class VerifierKey:
    """A public key that may sign notes. `type` is ED25519 or COSIGNATURE."""

    name: str
    type: int
    public_key: bytes

    @property
    def id(self) -> bytes:
        """4 bytes that name the key in a signature line. Short on purpose: no secret, no proof."""
        return key_id(self.name, self.type, self.public_key)


@dataclass(frozen=True, kw_only=True)
class SignatureLine:
    """One line under a note: claimed key name and id, and the bytes behind them. Unverified."""

    name: str
    key_id: bytes
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class Note:
    """A parsed note. Nothing in it may be believed before `verify_note`."""

    text: str
    signatures: tuple[SignatureLine, ...]


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A signature that checks. `timestamp` (POSIX seconds) is a witness's, else None."""

    key: VerifierKey
    timestamp: int | None


@dataclass(frozen=True, kw_only=True)
class OpenedNote:
    """Text that at least one known key signed, and the lines of keys nobody knows here."""

    text: str
    verified: tuple[Verified, ...]
    unverified: tuple[SignatureLine, ...]


def key_id(name: str, type: int, public_key: bytes) -> bytes:
    """SHA-256(name || 0x0A || type || public key)[:4]."""
    return sha256(name.encode() + b"\n" + bytes([type]) + public_key).digest()[:KEY_ID_BYTES]


# --- keys as text ---


def parse_vkey(text: str) -> VerifierKey:
    """`name+keyid+base64` as a key; MalformedProof when it is none, or its id is another key's."""
    name, claimed, material = _split_key(text, what="a verifier key")
    if len(material) != 33 or material[0] not in (ED25519, COSIGNATURE):
        raise MalformedProof(
            f"the key {printable(name)} is of an unknown type: expected 0x01 (Ed25519) or 0x04 "
            "(cosignature) and 32 bytes"
        )
    key = VerifierKey(name=name, type=material[0], public_key=material[1:])
    if key.id.hex() != claimed:
        raise MalformedProof(
            f"the key {printable(name)} claims the id {printable(claimed)}, its bytes give "
            f"{key.id.hex()}: it was mistyped or altered"
        )
    return key


def format_vkey(key: VerifierKey) -> str:
    return f"{key.name}+{key.id.hex()}+{encode_base64(bytes([key.type]) + key.public_key)}"


def vkey_of(name: str, key: SigningKey, type: int = ED25519) -> VerifierKey:
    assert valid_name(name)
    return VerifierKey(name=name, type=type, public_key=bytes(key.verify_key))


def parse_skey(text: str) -> tuple[str, SigningKey]:
    """Name and Ed25519 key of `PRIVATE+KEY+name+keyid+base64(0x01 || seed)`."""
    if not text.startswith(_PRIVATE):
        raise MalformedProof(f"a signer key starts with {_PRIVATE}")
    name, claimed, material = _split_key(text.removeprefix(_PRIVATE), what="a signer key")
    if len(material) != 33 or material[0] != ED25519:
        raise MalformedProof("a signer key is of type 0x01 (Ed25519) with a 32-byte seed")
    key = SigningKey(material[1:])
    if vkey_of(name, key).id.hex() != claimed:
        raise MalformedProof(f"the signer key {printable(name)} does not match its key id")
    return name, key


def format_skey(name: str, key: SigningKey) -> str:
    """The secret as text: whoever reads it can sign for `name`."""
    material = encode_base64(bytes([ED25519]) + bytes(key))
    return f"{_PRIVATE}{name}+{vkey_of(name, key).id.hex()}+{material}"


def _split_key(text: str, *, what: str) -> tuple[str, str, bytes]:
    parts = text.split("+", 2)  # the base64 may hold a plus sign, the name may not
    if len(text) > MAX_KEY_CHARS or len(parts) != 3 or not valid_name(parts[0]):
        raise MalformedProof(f"{what} has the form name+keyid+base64")
    return parts[0], parts[1], decode_base64(parts[2], f"the third part of {what}")


def valid_name(name: str) -> bool:
    """Key names are non-empty UTF-8 without Unicode spaces and plus signs (c2sp.org/signed-note).

    A lone surrogate ("Cs", possible in a command line argument) is no UTF-8.
    """
    if _PLAIN_NAME.fullmatch(name):  # printable ASCII, as nearly all are
        return True
    banned = ("Zs", "Zl", "Zp", "Cs")
    bad = any(c.isspace() or c == "+" or unicodedata.category(c) in banned for c in name)
    return bool(name) and not bad


# --- reading ---


def parse_note(data: bytes) -> Note:
    """Text and signature lines; nothing is verified. Raises MalformedProof."""
    if len(data) > MAX_NOTE_BYTES:
        raise MalformedProof(f"a note has at most MAX_NOTE_BYTES = {MAX_NOTE_BYTES} bytes")
    try:
        note = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedProof("a note is UTF-8 text, these bytes are not") from error
    if _CONTROL.search(note):
        raise MalformedProof("a note holds no control character but the newline")
    text, blank, lines = note.rpartition("\n\n")
    if not blank or not lines.endswith("\n"):
        raise MalformedProof("a note is text, an empty line, and signature lines; this one is not")
    rows = lines[:-1].split("\n")
    if len(rows) > MAX_SIGNATURES:
        raise MalformedProof(f"a note has at most MAX_SIGNATURES = {MAX_SIGNATURES} signatures")
    return Note(text=text + "\n", signatures=tuple(_signature_line(row) for row in rows))


def _signature_line(row: str) -> SignatureLine:
    name, _, encoded = row.removeprefix(_DASH).partition(" ")
    if not row.startswith(_DASH) or not valid_name(name):
        raise MalformedProof(
            f"the line {printable(row)!r} is no signature: expected '— <key name> <base64>'"
        )
    blob = decode_base64(encoded, f"the signature of {printable(name)}")
    if len(blob) <= KEY_ID_BYTES:
        raise MalformedProof(f"the signature of {printable(name)} is too short to be one")
    return SignatureLine(name=name, key_id=blob[:KEY_ID_BYTES], signature=blob[KEY_ID_BYTES:])


def verify_note(note: Note, keys: Iterable[VerifierKey]) -> OpenedNote:
    """Check every signature of a known key; at least one must be there. Raises BadSignature.

    A second line of the same key is ignored. Lines of unknown keys come back unverified.
    """
    known = {(key.name, key.id): key for key in keys}
    verified: dict[tuple[str, bytes], Verified] = {}
    unverified: list[SignatureLine] = []
    for line in note.signatures:
        identity = (line.name, line.key_id)
        if identity not in known:
            unverified.append(line)
        elif identity not in verified:
            verified[identity] = _check_line(note.text, line, known[identity])
    if not verified:
        names = ", ".join(sorted({printable(key.name) for key in known.values()})) or "none"
        raise BadSignature(f"the note has no signature by a known key; known: {names}")
    return OpenedNote(
        text=note.text, verified=tuple(verified.values()), unverified=tuple(unverified)
    )


def open_note(data: bytes, keys: Iterable[VerifierKey]) -> OpenedNote:
    return verify_note(parse_note(data), keys)


def _check_line(text: str, line: SignatureLine, key: VerifierKey) -> Verified:
    message, signature, timestamp = text.encode(), line.signature, None
    if key.type == COSIGNATURE:
        timestamp = int.from_bytes(signature[:_TIMESTAMP_BYTES], "big")
        signature = signature[_TIMESTAMP_BYTES:]
        message = cosigned_message(text, timestamp)
    whole = len(signature) == _SIGNATURE_BYTES and (timestamp or 0) < 2**63
    if not whole or not _ed25519_ok(key.public_key, message, signature):
        raise BadSignature(
            f"the signature of {printable(key.name)} ({key.id.hex()}) does not verify: the note or "
            "its signature was altered",
            key=key.name,
        )
    return Verified(key=key, timestamp=timestamp)


def _ed25519_ok(public_key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        VerifyKey(public_key).verify(message, signature)
    except (BadSignatureError, CryptoError, ValueError):
        return False
    return True


# --- writing ---


def cosigned_message(text: str, timestamp: int) -> bytes:
    """What a witness signs: c2sp.org/tlog-cosignature, Ed25519."""
    return f"cosignature/v1\ntime {timestamp}\n{text}".encode()


def sign_text(text: str, name: str, key: SigningKey) -> SignatureLine:
    """An Ed25519 (0x01) signature line over `text`, which must end in a newline."""
    assert text.endswith("\n")
    return SignatureLine(
        name=name,
        key_id=vkey_of(name, key).id,
        signature=key.sign(text.encode()).signature,
    )


def cosign_text(text: str, name: str, key: SigningKey, timestamp: int) -> SignatureLine:
    """A witness's cosignature (0x04) line over `text` at `timestamp`, POSIX seconds."""
    signature = key.sign(cosigned_message(text, timestamp)).signature
    return SignatureLine(
        name=name,
        key_id=vkey_of(name, key, COSIGNATURE).id,
        signature=timestamp.to_bytes(_TIMESTAMP_BYTES, "big") + signature,
    )


def format_note(text: str, signatures: Sequence[SignatureLine]) -> bytes:
    """The note as bytes: text, empty line, signature lines."""
    assert text.endswith("\n")
    assert signatures
    lines = (f"{_DASH}{s.name} {encode_base64(s.key_id + s.signature)}\n" for s in signatures)
    return f"{text}\n{''.join(lines)}".encode()
