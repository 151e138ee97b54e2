"""The HTTP service: routes, limits, problem details, metrics. Wiring is in `ledger.bootstrap`.

Routes are plain functions and run on a pool of THREADS threads, where they may wait for PostgreSQL
or a file; a route or dependency that is `async` never waits for either on the event loop. Appends
are `async` and go past all of this (`ledger.api.direct`, `ledger.api.appending`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import Depends, FastAPI, Request
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_fastapi_instrumentator import Instrumentator, metrics

from ledger.api import problems
from ledger.api.answers.settling import keep_settled
from ledger.api.direct import DirectLane, refuse_nul
from ledger.api.routes import (
    attribution,
    blobs,
    catalogue,
    consent,
    events,
    health,
    lineage,
    log,
    money,
    openai,
    serving,
    verifier,
)
from ledger.api.services import Services
from ledger.api.serving_metrics import ServingCollector
from ledger.api.serving_view import message
from ledger.api.serving_watch import ServingWatch

# More than the database has connections for: fees and gates wait for commits and files, too.
THREADS = 96
STOP_S = 5.0

DESCRIPTION = """Every dataset contribution, training run and answer is a signed event in one
append-only log that anyone can check. Appends authenticate by signature; reading what is public
needs no credential. Errors are problem details (RFC 9457)."""


def create_app(services: Services) -> FastAPI:
    app = FastAPI(
        title="Tributary",
        version=str(services.info.get("version", "")),
        description=DESCRIPTION,
        lifespan=_lifespan,
        dependencies=[Depends(_refuse_nul)],
        responses=problems.RESPONSES,
    )
    app.state.services = services
    app.state.serving_watch = _watch_of(services)
    problems.install(app)
    for module in (
        health, events, blobs, catalogue, consent, attribution, money, lineage, openai, log,
        verifier, serving,
    ):  # fmt: skip
        app.include_router(module.router)
    _measure(app)
    return app


def _measure(app: FastAPI) -> None:
    """/metrics: requests by route, serving, and this process. Each app counts for itself: the
    library's global registry keeps the first app's counters and silently drops those of a second.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    registry.register(ServingCollector(app.state.serving_watch))
    measure = metrics.default(registry=registry)
    assert measure is not None, "another app has this registry"
    measured = Instrumentator(
        excluded_handlers=["/metrics", "/livez", "/serving/events"], registry=registry
    )
    measured.add(measure).instrument(app).expose(app, include_in_schema=False)
    app.add_middleware(DirectLane, routes=[*events.DIRECT, *openai.DIRECT], measure=measure)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    beside = [
        asyncio.create_task(app.state.serving_watch.run()),
        asyncio.create_task(keep_settled(app.state.services)),
    ]
    try:
        yield
    finally:
        for task in beside:
            task.cancel()
        await asyncio.wait(beside, timeout=STOP_S)
        await _leave_engines(app.state.services)


async def _leave_engines(services: Services) -> None:
    """Last, when no request is served any more. Nothing depends on it but a clean end."""
    if services.serving is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await services.serving.aclose()


def _watch_of(services: Services) -> ServingWatch:
    def name_of(adapter: str) -> str | None:
        found = services.queries.adapter(adapter)
        return str(found["model"]) if found else None

    return ServingWatch(engine=lambda: services.serving, name_of=name_of, message=message)


async def _refuse_nul(request: Request) -> None:
    refuse_nul(request)
