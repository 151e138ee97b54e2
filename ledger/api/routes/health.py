"""/livez: the process runs. /readyz: it can do its work. /v1/info: which ledger this is."""

from typing import Any

from fastapi import APIRouter, Response

from ledger.api.auth import Box

router = APIRouter(tags=["health"])


@router.get("/livez", summary="Does the process run?")
def livez() -> dict[str, str]:
    return {"status": "alive"}


@router.get("/readyz", summary="Can it do its work?")
def readyz(response: Response, box: Box) -> dict[str, Any]:
    checks = box.health()
    ready = all(ok for _, ok, _ in checks)
    response.status_code = 200 if ready else 503
    return {
        "status": "ready" if ready else "not ready",
        "checks": [{"name": name, "ok": ok, "detail": detail} for name, ok, detail in checks],
    }


@router.get("/v1/info", summary="Which ledger this is, and its public keys")
def info(box: Box) -> dict[str, Any]:
    return {**box.info, "size": box.entries.size(), "projected": box.projected()}
