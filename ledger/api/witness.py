"""A witness over HTTP: c2sp.org/tlog-witness, and a page that says who it is. All rules are in
`ledger.log.witness`; here are limits, media types and metrics.

| route | what |
|---|---|
| `POST /add-checkpoint` | cosign a checkpoint |
| `GET /<SHA-256 of the origin>/checkpoint` | what was cosigned last of a log, for monitors |
| `GET /` | the witness's key and the logs it knows, as JSON |
| `GET /livez` | the process runs |
| `GET /metrics` | Prometheus |
"""

import logging
from collections.abc import Awaitable, Callable

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ledger.errors import LedgerError, NotFound
from ledger.log.add_checkpoint import MAX_REQUEST_BYTES, TEXT_TYPE
from ledger.log.witness import Witness

REQUESTS_PER_MINUTE = 3_000
"""Per address. A log that signs 20 checkpoints a second stays below it."""
NO_STORE = {"cache-control": "no-store"}
_ADD = "add-checkpoint"

logger = logging.getLogger(__name__)


def create_witness_app(
    witness: Witness, *, requests_per_minute: int = REQUESTS_PER_MINUTE
) -> Starlette:
    """The ASGI app of an open witness."""
    routes = _Routes(witness, requests_per_minute)
    return Starlette(
        routes=[
            Route("/", routes.about, methods=["GET"]),
            Route("/livez", _livez, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
            Route(f"/{_ADD}", routes.add_checkpoint, methods=["POST"]),
            Route("/{hashed}/checkpoint", routes.checkpoint, methods=["GET"]),
        ]
    )


class _Routes:
    def __init__(self, witness: Witness, requests_per_minute: int) -> None:
        self._witness = witness
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._limit = RateLimitItemPerMinute(requests_per_minute)
        # Each app counts for itself: the library's global registry would drop a second one's.
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._answers = Counter(
            "tributary_witness_answers", "Requests by route and status.", ["route", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._sizes = Gauge(
            "tributary_witness_cosigned_size", "Largest tree cosigned, by log.", ["log"],
            registry=self._registry,
        )  # fmt: skip
        Gauge(
            "tributary_witness_evidence_files", "Evidence kept against logs: must be 0.",
            registry=self._registry,
        ).set_function(witness.evidence.count)  # fmt: skip

    async def add_checkpoint(self, request: Request) -> Response:
        return await self._guarded(_ADD, request, self._add)

    async def checkpoint(self, request: Request) -> Response:
        return await self._guarded("checkpoint", request, self._latest)

    async def about(self, request: Request) -> Response:
        return await self._guarded("about", request, self._about)

    async def metrics(self, request: Request) -> Response:
        for origin in self._witness.log_vkeys:
            latest = await run_in_threadpool(self._witness.latest, origin)
            self._sizes.labels(origin).set(latest.head.size if latest else 0)
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _guarded(
        self, route: str, request: Request, handle: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        who = request.client.host if request.client else "unknown"
        if not self._limiter.hit(self._limit, who):
            response: Response = _text(429, f"at most {self._limit.amount} requests a minute")
            response.headers["retry-after"] = "5"
        else:
            try:
                response = await handle(request)
            except LedgerError as error:
                if not isinstance(error, NotFound):
                    logger.error("%s failed: %s", route, error.message)
                response = _text(error.status, error.message)
        self._answers.labels(route, str(response.status_code)).inc()
        return response

    async def _add(self, request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_REQUEST_BYTES:
                # The rest is not read: the connection is closed under whoever sends it.
                refusal = _text(413, f"at most MAX_REQUEST_BYTES = {MAX_REQUEST_BYTES} bytes")
                refusal.headers["connection"] = "close"
                return refusal
        # On a thread: it waits for the disk, and for others who ask about the same log.
        answer = await run_in_threadpool(self._witness.add_checkpoint, bytes(body))
        headers = {**NO_STORE, "content-type": answer.type}
        return Response(answer.body, status_code=answer.status, headers=headers)

    async def _latest(self, request: Request) -> Response:
        note = await run_in_threadpool(self._witness.checkpoint, request.path_params["hashed"])
        return Response(note, headers={**NO_STORE, "content-type": TEXT_TYPE})

    async def _about(self, request: Request) -> Response:
        logs = await run_in_threadpool(self._known)
        return JSONResponse({"vkey": self._witness.vkey_text, "logs": logs}, headers=NO_STORE)

    def _known(self) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        for origin, vkeys in self._witness.log_vkeys.items():
            latest = self._witness.latest(origin)
            found.append(
                {
                    "origin": origin,
                    "vkeys": vkeys,
                    "size": latest.head.size if latest else 0,
                    "root": latest.head.root.hex() if latest else None,
                    "cosigned_at": latest.timestamp if latest else None,
                }
            )
        return found


async def _livez(request: Request) -> Response:
    return JSONResponse({"status": "alive"})


def _text(status: int, message: str) -> PlainTextResponse:
    return PlainTextResponse(f"{message}\n", status_code=status, headers=NO_STORE)
