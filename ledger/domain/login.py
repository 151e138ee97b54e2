"""A signed request for an API credential. Pure.

`{"actor","at","label","log","nonce","sig"}` in canonical JSON; `sig` is Ed25519 over
LOGIN_CONTEXT followed by the same JSON without `sig`. Its context differs from an event's, so
neither can be passed off as the other; `log`, `at` and `nonce` keep it from being replayed.
"""

import base64
import binascii
import secrets

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from ledger.domain.canonical import canonical_json, parse_canonical
from ledger.domain.ids import actor_of, check_actor, check_hash, public_key_of
from ledger.errors import InvalidEvent, Unauthenticated

LOGIN_CONTEXT = b"tributary/login/v1\n"
MAX_LOGIN_BYTES = 2_048
MAX_LOGIN_AGE_US = 300 * 1_000_000
MAX_LABEL_CHARS = 80


def sign_login(key: SigningKey, *, log: str, at: int, label: str = "") -> bytes:
    """Bytes for POST /v1/credentials."""
    unsigned = {
        "actor": actor_of(bytes(key.verify_key)),
        "at": at,
        "label": label,
        "log": log,
        "nonce": secrets.token_hex(32),
    }
    signature = key.sign(LOGIN_CONTEXT + canonical_json(unsigned)).signature
    return canonical_json({**unsigned, "sig": base64.b64encode(signature).decode()})


def verify_login(raw: bytes, *, log: str, now: int) -> tuple[str, str, str]:
    """(actor, label, nonce) of a valid request; InvalidEvent or Unauthenticated otherwise."""
    if len(raw) > MAX_LOGIN_BYTES:
        raise InvalidEvent(f"a login request is at most MAX_LOGIN_BYTES = {MAX_LOGIN_BYTES}")
    value = parse_canonical(raw)
    fields = {"actor", "at", "label", "log", "nonce", "sig"}
    if not isinstance(value, dict) or value.keys() != fields:
        raise InvalidEvent(f"a login request has exactly the fields {', '.join(sorted(fields))}")
    actor = check_actor(value["actor"])
    nonce = check_hash(value["nonce"], "nonce")
    label, at = value["label"], value["at"]
    if not isinstance(label, str) or len(label) > MAX_LABEL_CHARS:
        raise InvalidEvent(f"label must be at most {MAX_LABEL_CHARS} characters", field="label")
    if value["log"] != log:
        raise Unauthenticated(f"the login request is for another ledger; this one is {log!r}")
    if not isinstance(at, int) or isinstance(at, bool) or abs(now - at) > MAX_LOGIN_AGE_US:
        raise Unauthenticated("the login request is older than 5 minutes; check the clock")
    try:
        signature = base64.b64decode(str(value.pop("sig")), validate=True)
        VerifyKey(public_key_of(actor)).verify(LOGIN_CONTEXT + canonical_json(value), signature)
    except (BadSignatureError, ValueError, binascii.Error) as error:
        raise Unauthenticated("the login request's signature does not verify") from error
    return actor, label, nonce
