"""The log itself, in the C2SP tlog-tiles layout, under /log. Tiles never change; the checkpoint
does (https://c2sp.org/tlog-tiles).

Entry bundles are compressed for who accepts gzip, as that page asks for, and so are the records of
checkpoints; hash tiles are random bytes and are not.
"""

import gzip
import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response

from ledger.api.auth import Anyone, Box
from ledger.api.routes.events import index_of
from ledger.errors import NotFound
from ledger.log.serving import TEXT

router = APIRouter(tags=["log"])

CHANGING = "no-cache"
IMMUTABLE = "public, max-age=31536000, immutable"
GZIP_LEVEL = 1
_REFUSED = re.compile(r"q=0(\.0{0,3})?")


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
    return Response(box.vkey + "\n", media_type=TEXT, headers={"cache-control": CHANGING})


@router.head("/log/{path:path}", include_in_schema=False)
@router.get(
    "/log/{path:path}",
    summary="checkpoint, checkpoints/<K>, tile/<L>/<N>[.p/<W>], tile/entries/...",
)
def file(
    path: str, who: Anyone, box: Box, accept_encoding: Annotated[str, Header()] = ""
) -> Response:
    content, media_type, immutable = box.log_files.serve_path(path)
    headers = {"cache-control": IMMUTABLE if immutable else CHANGING}
    if path.startswith(("tile/entries/", "checkpoints/")):
        headers["vary"] = "accept-encoding"
        if accepts_gzip(accept_encoding):
            content = gzip.compress(content, GZIP_LEVEL, mtime=0)
            headers["content-encoding"] = "gzip"
    return Response(content, media_type=media_type, headers=headers)


def accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding header takes gzip (RFC 9110 section 12.5.3)."""
    codings = (part.partition(";") for part in header.lower().split(","))
    weights = {coding.strip(): weight.strip() for coding, _, weight in codings}
    weight = weights.get("gzip", weights.get("*"))
    return weight is not None and not _REFUSED.fullmatch(weight)
