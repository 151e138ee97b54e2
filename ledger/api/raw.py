"""Request bodies as the bytes that were sent: signatures cover bytes, not parsed values."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel


async def _body(request: Request) -> bytes:
    return await request.body()


Raw = Annotated[bytes, Depends(_body)]


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


ENVELOPE = takes("application/json", {"type": "object", "description": "a signed event envelope"})
ENVELOPES = takes("application/jsonl", {"type": "string", "description": "one envelope a line"})
LOGIN = takes("application/json", {"type": "object", "description": "a signed login request"})
BYTES = takes("application/octet-stream", {"type": "string", "format": "binary"})
