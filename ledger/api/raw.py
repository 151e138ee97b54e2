"""Request bodies as the bytes that were sent: signatures cover bytes, not parsed values."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Request


async def _body(request: Request) -> bytes:
    return await request.body()


Raw = Annotated[bytes, Depends(_body)]


def takes(media_type: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route with a raw body, so that /docs shows what to send."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": dict(schema)}}}}


ENVELOPE = takes("application/json", {"type": "object", "description": "a signed event envelope"})
ENVELOPES = takes("application/jsonl", {"type": "string", "description": "one envelope a line"})
LOGIN = takes("application/json", {"type": "object", "description": "a signed login request"})
BYTES = takes("application/octet-stream", {"type": "string", "format": "binary"})
