"""The live page of serving, at /serving, and the events that renew it. Whoever may read
`/v1/serving` may look."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ledger.api.auth import Anyone, Box
from ledger.api.serving_view import figures
from ledger.api.serving_watch import ServingWatch
from ledger.console.serving import serving_headers, serving_page

router = APIRouter(tags=["console"])


async def watch_of(request: Request) -> ServingWatch:
    found = request.app.state.serving_watch
    assert isinstance(found, ServingWatch)
    return found


Watch = Annotated[ServingWatch, Depends(watch_of)]


@router.get("/serving", summary="What the serving engines do, as a live page")
async def page(who: Anyone, box: Box, watch: Watch) -> Response:
    # On the event loop, where looks are taken: what is read does not change meanwhile.
    html = serving_page(figures(watch), name=box.settings.name)
    return Response(html, media_type="text/html", headers=dict(serving_headers()))


@router.get("/serving/events", summary="The live page's numbers, once a second")
async def events(who: Anyone, watch: Watch) -> StreamingResponse:
    stream = watch.follow()
    first = await anext(stream)  # too many viewers: a proper status
    return _Events(first, stream)


class _Events(StreamingResponse):
    """However sending ends, the viewer's place is free when the request is over."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes]) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(self._joined(first, rest), headers=headers)
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._rest.aclose()

    async def _joined(self, first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield first
        async for event in rest:
            yield event
