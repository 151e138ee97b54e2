"""Identifiers: actors (Ed25519 keys), UUIDs, hashes, EVM addresses. Pure.

An actor is `ed25519:<64 hex digits>`. Ids that must be the same whoever computes them (the
aggregate of an identity, an event that a worker may send twice) are UUIDv5 under NAMESPACE
(RFC 9562 section 5.5).
"""

import hashlib
import re
from uuid import UUID, uuid5

from ledger.errors import InvalidEvent

NAMESPACE = UUID("6f1d0c1e-5d0b-5f6e-9d58-0a7c1b2e3f40")
HASH_BYTES = 32

_ACTOR = re.compile(r"ed25519:[0-9a-f]{64}")
_HASH = re.compile(r"[0-9a-f]{64}")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def actor_of(public_key: bytes) -> str:
    """`ed25519:<hex>` of a 32-byte public key."""
    assert len(public_key) == 32
    return "ed25519:" + public_key.hex()


def public_key_of(actor: str) -> bytes:
    """The 32-byte public key that an actor id names."""
    return bytes.fromhex(check_actor(actor)[8:])


def check_actor(text: object, field: str = "actor") -> str:
    if not isinstance(text, str) or not _ACTOR.fullmatch(text):
        raise InvalidEvent(f"{field} must be ed25519: and 64 lower-case hex digits", field=field)
    return text


def check_hash(text: object, field: str) -> str:
    if not isinstance(text, str) or not _HASH.fullmatch(text):
        raise InvalidEvent(f"{field} must be a SHA-256 as 64 lower-case hex digits", field=field)
    return text


def check_address(text: object, field: str) -> str:
    if not isinstance(text, str) or not _ADDRESS.fullmatch(text):
        raise InvalidEvent(f"{field} must be an EVM address, 0x and 40 hex digits", field=field)
    return text


def check_uuid(text: object, field: str) -> UUID:
    if not isinstance(text, str) or not _UUID.fullmatch(text):
        raise InvalidEvent(f"{field} must be a lower-case UUID with dashes", field=field)
    return UUID(text)


def derived_id(*parts: object) -> UUID:
    """UUIDv5 of the parts joined by a zero byte: the same parts give the same id, always."""
    return uuid5(NAMESPACE, "\0".join(map(str, parts)))


def sender_id(*parts: object) -> UUID:
    """The same as a UUIDv8 (RFC 9562 section 5.8): for senders without a role, whom the ledger
    refuses version 5. Its worth is the same: a repeated append is recognised."""
    raw = bytearray(derived_id(*parts).bytes)
    raw[6] = (raw[6] & 0x0F) | 0x80
    return UUID(bytes=bytes(raw))


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
