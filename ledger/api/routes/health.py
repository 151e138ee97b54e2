"""/livez: the process runs. /readyz: it can do its work. /v1/info: which ledger this is."""

from typing import Any

from fastapi import APIRouter

from ledger.api.auth import Box
from ledger.errors import Unavailable

router = APIRouter(tags=["health"])


@router.get("/livez", summary="Does the process run?")
async def livez() -> dict[str, str]:
    # Not on a thread: while the database is away, all of them may be waiting for it.
    return {"status": "alive"}


@router.get("/readyz", summary="Can it do its work?")
def readyz(box: Box) -> dict[str, Any]:
    checks = [{"name": n, "ok": ok, "detail": detail} for n, ok, detail in box.health()]
    failed = [f"{check['name']}: {check['detail']}" for check in checks if not check["ok"]]
    if failed:
        raise Unavailable(f"not ready: {'; '.join(failed)}", checks=checks)
    return {"status": "ready", "checks": checks}


@router.get("/v1/info", summary="Which ledger this is, and its public keys")
def info(box: Box) -> dict[str, Any]:
    return {**box.info, "size": box.entries.size(), "projected": box.projected()}
