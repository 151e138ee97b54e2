"""The HTTP service: routes, limits, problem details, metrics. Wiring is in `ledger.bootstrap`."""

from fastapi import FastAPI
from prometheus_fastapi_instrumentator import Instrumentator

from ledger.api import problems
from ledger.api.routes import blobs, catalogue, events, health, lineage, log, money, openai
from ledger.api.services import Services

DESCRIPTION = """Every dataset contribution, training run and answer is a signed event in one
append-only log that anyone can check. Appends authenticate by signature; reading what is public
needs no credential. Errors are problem details (RFC 9457)."""


def create_app(services: Services) -> FastAPI:
    app = FastAPI(
        title="Tributary",
        version=str(services.info.get("version", "")),
        description=DESCRIPTION,
        max_body_size=services.settings.max_body_bytes,
    )
    app.state.services = services
    problems.install(app)
    for module in (health, events, blobs, catalogue, money, lineage, openai, log):
        app.include_router(module.router)
    Instrumentator(excluded_handlers=["/metrics", "/livez"]).instrument(app).expose(
        app, include_in_schema=False
    )
    return app
