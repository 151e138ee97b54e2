"""The in-browser verifier, at /verifier: one HTML file that works without this server too."""

from fastapi import APIRouter, Response

from ledger.api.auth import Anyone
from ledger.console.pages import verifier_headers, verifier_page

router = APIRouter(tags=["console"])


@router.head("/verifier", include_in_schema=False)
@router.get("/verifier", summary="The lineage verifier, one self-contained HTML page")
def verifier(who: Anyone) -> Response:
    return Response(verifier_page(), media_type="text/html", headers=dict(verifier_headers()))
