"""The log itself, in the C2SP tlog-tiles layout, under /log. Tiles never change; the checkpoint
does (https://c2sp.org/tlog-tiles)."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from ledger.api.auth import Anyone, Box
from ledger.api.routes.events import index_of
from ledger.errors import NotFound
from ledger.log.serving import TEXT

router = APIRouter(tags=["log"])

CHANGING = "no-cache"
IMMUTABLE = "public, max-age=31536000, immutable"


@router.get("/log/proof/{event}", summary="An inclusion proof, c2sp.org/tlog-proof@v1")
def proof(event: str, who: Anyone, box: Box) -> Response:
    index = index_of(box, event)
    text = box.prover.tlog_proof(index, box.checkpoint_covering(index))
    return Response(text, media_type=TEXT, headers={"cache-control": CHANGING})


@router.get("/log/consistency", summary="A consistency proof between two sizes")
def consistency(
    who: Anyone, box: Box, old: Annotated[int, Query(ge=0)], new: Annotated[int, Query(ge=0)]
) -> dict[str, Any]:
    """RFC 9162 section 2.1.4, for sizes up to the newest checkpoint's."""
    newest = box.tiles.latest()
    signed = newest.size if newest else 0
    if new > signed:
        raise NotFound(f"the newest checkpoint has size {signed}; there is none of size {new} yet")
    hashes = box.prover.consistency(old, new)
    return {"old": old, "new": new, "proof": [h.hex() for h in hashes]}


@router.get("/log/vkey", summary="The log's verifier key (C2SP signed-note)")
def vkey(who: Anyone, box: Box) -> Response:
    return Response(box.vkey + "\n", media_type=TEXT)


@router.get("/log/{path:path}", summary="checkpoint, tile/<L>/<N>[.p/<W>], tile/entries/...")
def file(path: str, who: Anyone, box: Box) -> Response:
    content, media_type, immutable = box.log_files.serve_path(path)
    headers = {"cache-control": IMMUTABLE if immutable else CHANGING}
    return Response(content, media_type=media_type, headers=headers)
