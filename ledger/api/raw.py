"""Request bodies as the bytes that were sent: signatures cover bytes, not parsed values.

All bodies come in through here, so this is where their size is bounded: a body that is too long is
refused at its header, or at the first chunk beyond the limit, and never held in memory.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel

from ledger.api.services import Services
from ledger.domain.envelope import MAX_ENVELOPE_BYTES
from ledger.domain.login import MAX_LOGIN_BYTES
from ledger.errors import TooLarge

MAX_BATCH_BYTES = 8 * 2**20
MAX_CHAT_BYTES = 4 * 2**20
MAX_LENGTH_DIGITS = 19


def _body(name: str, limit: int | None = None) -> Callable[[Request], Awaitable[bytes]]:
    """A dependency that reads a body of at most `limit` bytes, and of `max_body_bytes` always."""

    async def read(request: Request) -> bytes:
        services = request.app.state.services
        assert isinstance(services, Services)
        most, named = services.settings.max_body_bytes, "TRIBUTARY_MAX_BODY_BYTES"
        if limit is not None and limit < most:
            most, named = limit, name
        told = request.headers.get("content-length", "0")
        body = bytearray()
        if not told.isdecimal() or (len(told) < MAX_LENGTH_DIGITS and int(told) <= most):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    break
            else:
                return bytes(body)
        raise TooLarge(f"this body is at most {named} = {most} bytes")

    return read


envelope_bytes = _body("MAX_ENVELOPE_BYTES", MAX_ENVELOPE_BYTES)
batch_bytes = _body("MAX_BATCH_BYTES", MAX_BATCH_BYTES)
LoginBytes = Annotated[bytes, Depends(_body("MAX_LOGIN_BYTES", MAX_LOGIN_BYTES))]
chat_bytes = _body("MAX_CHAT_BYTES", MAX_CHAT_BYTES)
BlobBytes = Annotated[bytes, Depends(_body("TRIBUTARY_MAX_BODY_BYTES"))]


def takes(media_type: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route with a raw body, so that /docs shows what to send."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": dict(schema)}}}}


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema without references, which would point into the OpenAPI document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, dict):
            name = str(value.get("$ref", "")).removeprefix("#/$defs/")
            return inline(definitions[name]) if name else {k: inline(v) for k, v in value.items()}
        return [inline(item) for item in value] if isinstance(value, list) else value

    return dict(inline(schema))


def _object(description: str, fields: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Schema of an object with exactly `fields`: name -> (JSON type, meaning)."""
    return {
        "type": "object",
        "description": description,
        "required": list(fields),
        "properties": {
            name: {"type": kind, "description": meaning} for name, (kind, meaning) in fields.items()
        },
        "additionalProperties": False,
    }


_SIGNER = {
    "log": ("string", "the origin that GET /v1/info names"),
    "at": ("integer", "your clock in microseconds since 1970, UTC"),
    "actor": ("string", "ed25519: and your public key in hex"),
}
_SIG = "in base64: Ed25519 over '{}\\n' followed by the same JSON without sig"
_ENVELOPE = _object(
    "A signed event envelope, RFC 8785 canonical JSON to the byte",
    {
        "v": ("integer", "1"),
        "type": ("string", "one of the catalogue, such as contribution.recorded"),
        "id": ("string", "a UUID of your choice; it is taken once"),
        "body": ("object", "exactly the fields of its type"),
        "sig": ("string", _SIG.format("tributary/event/v1")),
        **_SIGNER,
    },
)
_LOGIN = _object(
    "A signed login request, RFC 8785 canonical JSON to the byte",
    {
        "label": ("string", "what this credential is for; may be empty"),
        "nonce": ("string", "32 random bytes in hex, used once"),
        "sig": ("string", _SIG.format("tributary/login/v1")),
        **_SIGNER,
    },
)

ENVELOPE = takes("application/json", _ENVELOPE)
ENVELOPES = takes("application/jsonl", {"type": "string", "description": "one envelope a line"})
LOGIN = takes("application/json", _LOGIN)
BYTES = takes("application/octet-stream", {"type": "string", "format": "binary"})
