"""Routes that take a request and give a response, with nothing between.

FastAPI resolves dependencies, validates and encodes for every request, and finds the route twice,
once for the metrics; that takes longer than an append's own work. A `DirectRoute` has an endpoint
`async (Request) -> Response` that does for itself what dependencies do elsewhere (`refuse_nul`,
the body's limit, the rate limit); parameters and answers are told to /openapi.json by hand. The
`DirectLane` before the app calls those endpoints by method and path alone. A request that misses
it (another spelling of the path, another method) finds the same route in the app.
"""

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from timeit import default_timer
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from prometheus_fastapi_instrumentator.metrics import Info
from starlette.types import ASGIApp, Receive, Scope, Send

from ledger.api import problems
from ledger.errors import InvalidEvent

Endpoint = Callable[[Request], Awaitable[Response]]


class DirectRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


class DirectLane:
    """ASGI middleware. `measure` counts a request, as the instrumentator does for the others."""

    def __init__(
        self, app: ASGIApp, *, routes: Sequence[APIRoute], measure: Callable[[Info], None]
    ) -> None:
        self._app = app
        self._measure = measure
        self._endpoints: Mapping[tuple[str, str], Endpoint] = {
            (method, route.path): route.endpoint
            for route in routes
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = None
        if scope["type"] == "http":
            endpoint = self._endpoints.get((scope["method"], scope["path"]))
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        started = default_timer()
        request = Request(scope, receive)
        try:
            response = await endpoint(request)
        except Exception as error:
            response = problems.respond(request, error)
        await response(scope, receive, send)
        duration = default_timer() - started
        self._measure(
            Info(
                request=request,
                response=response,
                method=request.method,
                modified_handler=scope["path"],
                modified_status=f"{response.status_code // 100}xx",
                modified_duration=duration,
                modified_duration_without_streaming=duration,
            )
        )


def refuse_nul(request: Request) -> None:
    """No id holds NUL, and PostgreSQL's text cannot: one check for every path and query."""
    if "\0" in request.scope["path"] or b"%00" in request.scope["query_string"]:
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
