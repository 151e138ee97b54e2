"""The log itself, in the C2SP tlog-tiles layout, under /log. Tiles never change; the checkpoint
does (https://c2sp.org/tlog-tiles)."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from ledger.api.auth import Anyone, Box
from ledger.api.routes.events import index_of

router = APIRouter(tags=["log"])

IMMUTABLE = "public, max-age=31536000, immutable"


@router.get("/log/proof/{event}", summary="An inclusion proof, c2sp.org/tlog-proof@v1")
def proof(event: str, who: Anyone, box: Box) -> Response:
    checkpoint = box.checkpoint_covering(index_of(box, event))
    text = box.prover.tlog_proof(index_of(box, event), checkpoint)
    return Response(text, media_type="text/plain; charset=utf-8")


@router.get("/log/consistency", summary="A consistency proof between two sizes")
def consistency(
    who: Anyone, box: Box, old: Annotated[int, Query(ge=0)], new: Annotated[int, Query(ge=0)]
) -> dict[str, Any]:
    hashes = box.prover.consistency(old, new)
    return {"old": old, "new": new, "proof": [h.hex() for h in hashes]}


@router.get("/log/vkey", summary="The log's verifier key (C2SP signed-note)")
def vkey(who: Anyone, box: Box) -> Response:
    return Response(box.vkey + "\n", media_type="text/plain; charset=utf-8")


@router.get("/log/{path:path}", summary="checkpoint, tile/<L>/<N>[.p/<W>], tile/entries/...")
def file(path: str, who: Anyone, box: Box) -> Response:
    content, media_type, immutable = box.log_files.serve_path(path)
    cache = IMMUTABLE if immutable else "no-cache"
    return Response(content, media_type=media_type, headers={"cache-control": cache})
