"""Content-addressed blobs: rows, manifests, adapters, indexes, payout trees, L1 sections.

Who may read a blob follows from the events that name it: what an auditor needs is public; rows are
for their contributor, the datanet's reviewers and workers; transcripts for who paid.
"""

from typing import Any

from fastapi import APIRouter, Response

from ledger.api.auth import Anyone, Box, Caller
from ledger.api.raw import BYTES, BlobBytes
from ledger.api.services import Services
from ledger.domain.ids import check_hash
from ledger.errors import Forbidden, NotFound

router = APIRouter(tags=["blobs"])


@router.post(
    "/v1/blobs", status_code=201, summary="Store bytes under their SHA-256", openapi_extra=BYTES
)
def put(data: BlobBytes, caller: Caller, box: Box) -> dict[str, Any]:
    sha256 = box.blobs.put(data)
    box.credentials.record_upload(sha256, caller, len(data), box.clock())
    return {"sha256": sha256, "size": len(data)}


@router.get("/v1/blobs/{sha256}", summary="Bytes by SHA-256")
def get(sha256: str, who: Anyone, box: Box) -> Response:
    check_hash(sha256, "sha256")
    if not may_read(box, who, sha256):
        raise (Forbidden if box.blobs.has(sha256) and who else NotFound)(
            f"no blob {sha256} that you may read; sign in if it is yours"
        )
    headers = {"cache-control": "private, max-age=31536000, immutable"}
    return Response(box.blobs.get(sha256), media_type="application/octet-stream", headers=headers)


def may_read(box: Services, who: str | None, sha256: str) -> bool:
    if box.queries.is_public_blob(sha256):
        return True
    if who is None:
        return False
    if box.has_role(who, "worker") or box.has_role(who, "operator"):
        return True
    return box.credentials.uploaded(sha256, who) or who in box.queries.blob_readers(sha256)
