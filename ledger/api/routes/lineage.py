"""Provenance: the ancestry of anything, and the bundle that proves it offline."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from ledger.api.auth import Anyone, Box
from ledger.api.routes.events import describe_all, index_of
from ledger.api.services import Services
from ledger.api.shapes import page
from ledger.errors import NotFound, TooLarge

router = APIRouter(tags=["provenance"])

MAX_LISTED = 5_000
KINDS = ("inference", "adapter", "run", "contribution", "datanet")

Account = Annotated[
    str | None, Query(max_length=64, description="An EVM address: its line of the payout tree.")
]
Earnings = Annotated[
    bool, Query(description="With a payout line: everything that its owner earned for it, too.")
]


@router.get("/v1/lineage/{subject}", summary="Everything that a thing rests on")
def lineage(subject: str, who: Anyone, box: Box) -> dict[str, Any]:
    """`subject` is an event id, a leaf index, or the id of an inference, adapter, run, ..."""
    indexes = box.queries.lineage_of(subject_index(box, subject))
    if len(indexes) > MAX_LISTED:
        raise TooLarge(
            f"the lineage has {len(indexes)} events, MAX_LISTED = {MAX_LISTED}: take its bundle"
        )
    return {
        "events": describe_all(box, indexes),
        "edges": box.queries.lineage_edges(indexes),
    }


@router.get("/v1/bundles/{subject}", summary="A lineage bundle, to verify offline")
def bundle(
    subject: str, who: Anyone, box: Box, account: Account = None, earnings: Earnings = True
) -> Response:
    """`python -m ledger.verify FILE` checks it with nothing else running. Of a claim, or of a
    period's events with `account`, it carries that line of the payout tree and what it rests on."""
    index = subject_index(box, subject)
    data = box.bundle(index, account=account, earnings=earnings)
    # Named by the index: what was asked for may be spelled in ways that no header takes.
    headers = {"content-disposition": f'attachment; filename="{index}.lineage.json"'}
    return Response(data, media_type="application/json", headers=headers)


@router.get("/v1/anchors", summary="Checkpoints that the L1 holds, largest first")
def anchors(who: Anyone, box: Box) -> dict[str, Any]:
    return page(box.queries.anchors())


def subject_index(box: Services, subject: str) -> int:
    """Things are tried first: an inference's id and its event's id are different UUIDs."""
    for kind in KINDS:
        index = box.queries.index_of(kind, subject)
        if index is not None:
            attributed = box.queries.inference(subject) if kind == "inference" else None
            if attributed and attributed["attribution_index"] is not None:
                # The attribution rests on the inference, and on all that the inference rests on.
                return int(attributed["attribution_index"])
            return index
    try:
        return index_of(box, subject)
    except NotFound:
        raise NotFound(f"nothing with the id {subject[:64]} is recorded in this ledger") from None
