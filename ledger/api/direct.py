"""Routes that take a request and give a response, with nothing between.

FastAPI resolves dependencies, validates and encodes for every request, which takes longer than an
append's own work. A `DirectRoute` skips that: its endpoint is `async (Request) -> Response` and
does for itself what dependencies do elsewhere (`refuse_nul`, the body's limit, the rate limit). It
is in /openapi.json like every other route; parameters and answers are told there by hand.
"""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from ledger.errors import InvalidEvent


class DirectRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


def refuse_nul(request: Request) -> None:
    """No id holds NUL, and PostgreSQL's text cannot: one check for every path and query."""
    if "\0" in request.url.path or b"%00" in request.scope["query_string"]:
        raise InvalidEvent("a path or query holds a NUL character; no id here does")


def query(name: str, schema: Mapping[str, Any], description: str) -> dict[str, Any]:
    """An optional query parameter, as `openapi_extra` tells it."""
    return {
        "name": name,
        "in": "query",
        "required": False,
        "description": description,
        "schema": dict(schema),
    }
