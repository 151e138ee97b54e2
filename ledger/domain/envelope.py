"""The signed event envelope and the log entry that carries it: the bytes everything rests on.

Envelope, RFC 8785 JSON::

    {"actor":"ed25519:<hex>","at":<us>,"body":{...},"id":"<uuid>","log":"<origin>",
     "sig":"<base64>","type":"contribution.recorded","v":1}

`sig` is Ed25519 (RFC 8032) over SIGNING_CONTEXT followed by the same JSON without `sig`. `log`
binds the event to one ledger instance, so that it replays nowhere else. Bytes that are not
canonical are refused, never repaired; the bytes received are the bytes stored.

Log entry: u64 big-endian leaf index || u64 big-endian recorded_at (us) || envelope, at most
MAX_ENTRY_BYTES. The index inside the entry is what binds a proof to a position: RFC 9162 proofs
alone do not bind the tree size or the last index.
"""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.domain.ids import actor_of, check_actor, check_uuid, public_key_of
from ledger.errors import InvalidEvent, TooLarge

VERSION = 1
SIGNING_CONTEXT = b"tributary/event/v1\n"
MAX_ENTRY_BYTES = 65_535
ENTRY_HEADER_BYTES = 16
MAX_ENVELOPE_BYTES = MAX_ENTRY_BYTES - ENTRY_HEADER_BYTES
MAX_TYPE_CHARS = 64
MAX_ORIGIN_CHARS = 128

_FIELDS = frozenset({"v", "type", "id", "log", "at", "actor", "body", "sig"})


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A parsed envelope and the exact bytes it was parsed from. `at` is the signer's clock, us."""

    type: str
    id: UUID
    log: str
    at: int
    actor: str
    body: Mapping[str, Any]
    raw: bytes


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A log entry: where the event stands (`index`), when it was recorded (us), and the event."""

    index: int
    recorded_at: int
    envelope: Envelope


def sign_event(
    key: SigningKey, *, type: str, log: str, body: Mapping[str, Any], id: UUID, at: int
) -> bytes:
    """The canonical bytes of a signed envelope."""
    unsigned = {
        "v": VERSION,
        "type": type,
        "id": str(id),
        "log": log,
        "at": at,
        "actor": actor_of(bytes(key.verify_key)),
        "body": dict(body),
    }
    signature = key.sign(SIGNING_CONTEXT + canonical_json(unsigned)).signature
    raw = canonical_json({**unsigned, "sig": base64.b64encode(signature).decode()})
    if len(raw) > MAX_ENVELOPE_BYTES:
        raise TooLarge(
            f"the event is {len(raw)} bytes; MAX_ENVELOPE_BYTES = {MAX_ENVELOPE_BYTES}: "
            "put large payloads in a blob and name its SHA-256"
        )
    return raw


def parse_envelope(raw: bytes, *, log: str | None = None) -> Envelope:
    """Parse and verify an envelope: size, canonical form, fields, `log`, signature, in that order.

    With `log` given, an envelope made for another ledger is refused. Raises InvalidEvent.
    """
    envelope, signature, message = _read(raw)
    if log is not None and envelope.log != log:
        raise InvalidEvent(
            f"the event is signed for log {envelope.log!r}, this log is {log!r}", field="log"
        )
    try:
        VerifyKey(public_key_of(envelope.actor)).verify(message, signature)
    except (BadSignatureError, ValueError) as error:
        raise InvalidEvent(
            f"the signature does not verify under {envelope.actor}: sign "
            "'tributary/event/v1\\n' + the canonical JSON without sig",
            field="sig",
        ) from error
    return envelope


def decode_envelope(raw: bytes) -> Envelope:
    """Parse without checking the signature: for bytes that this ledger verified and stored."""
    return _read(raw)[0]


def _read(raw: bytes) -> tuple[Envelope, bytes, bytes]:
    if len(raw) > MAX_ENVELOPE_BYTES:
        raise TooLarge(f"an envelope is at most MAX_ENVELOPE_BYTES = {MAX_ENVELOPE_BYTES} bytes")
    value = parse_canonical(raw)
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise InvalidEvent(f"an envelope has exactly the fields {', '.join(sorted(_FIELDS))}")
    if value["v"] != VERSION or isinstance(value["v"], bool):
        raise InvalidEvent(f"unknown envelope version; this ledger reads v = {VERSION}", field="v")
    for field, limit in (("type", MAX_TYPE_CHARS), ("log", MAX_ORIGIN_CHARS)):
        if not isinstance(value[field], str) or not 0 < len(value[field]) <= limit:
            raise InvalidEvent(f"{field} must be 1 to {limit} characters", field=field)
    at = value["at"]
    if not isinstance(at, int) or isinstance(at, bool) or at < 0:
        raise InvalidEvent("at must be microseconds since 1970 UTC, an integer", field="at")
    if not isinstance(value["body"], dict):
        raise InvalidEvent("body must be an object", field="body")
    signature = _signature(value["sig"])
    envelope = Envelope(
        type=value["type"],
        id=check_uuid(value["id"], "id"),
        log=value["log"],
        at=at,
        actor=check_actor(value["actor"]),
        body=value["body"],
        raw=raw,
    )
    return envelope, signature, SIGNING_CONTEXT + _without_sig(raw, value["sig"])


def _without_sig(raw: bytes, sig: str) -> bytes:
    """The canonical bytes of the same envelope without `sig`, cut out instead of written again.

    `raw` is canonical, so the member stands once in it and only `type` and `v` come after; quotes
    inside strings are escaped, so the last place that reads like the member is the member.
    """
    member = b',"sig":"%b"' % sig.encode("ascii")
    start = raw.rindex(member)
    return raw[:start] + raw[start + len(member) :]


def _signature(text: object) -> bytes:
    try:
        signature = base64.b64decode(text if isinstance(text, str) else "", validate=True)
    except (binascii.Error, ValueError):
        signature = b""
    if len(signature) != 64 or base64.b64encode(signature).decode() != text:
        raise InvalidEvent("sig must be a 64-byte Ed25519 signature in padded base64", field="sig")
    return signature


def encode_entry(index: int, recorded_at: int, envelope_raw: bytes) -> bytes:
    """Entry bytes; the envelope must fit MAX_ENVELOPE_BYTES."""
    assert len(envelope_raw) <= MAX_ENVELOPE_BYTES
    return index.to_bytes(8, "big") + recorded_at.to_bytes(8, "big") + envelope_raw


def decode_entry(entry: bytes, *, log: str | None = None, verify: bool = True) -> Entry:
    """Parse entry bytes, and verify the envelope's signature unless told not to."""
    if not ENTRY_HEADER_BYTES < len(entry) <= MAX_ENTRY_BYTES:
        raise InvalidEvent(f"an entry has {ENTRY_HEADER_BYTES + 1} to {MAX_ENTRY_BYTES} bytes")
    raw = entry[ENTRY_HEADER_BYTES:]
    return Entry(
        index=int.from_bytes(entry[:8], "big"),
        recorded_at=int.from_bytes(entry[8:16], "big"),
        envelope=parse_envelope(raw, log=log) if verify else decode_envelope(raw),
    )


def leaf_hash(entry: bytes) -> bytes:
    """SHA-256(0x00 || entry): the RFC 9162 section 2.1.1 leaf hash."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right): the RFC 9162 section 2.1.1 inner node."""
    return hashlib.sha256(b"\x01" + left + right).digest()
