"""Consent and its limits: what a run may not use any more, whom a withdrawal reaches, appeals."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query

from ledger.api.auth import Anyone, Box
from ledger.api.services import Services
from ledger.api.shapes import found, page, plain
from ledger.domain.events import MAX_INTEGER
from ledger.errors import NotFound, VerificationError

router = APIRouter(tags=["consent"])

MAX_SEEN = 500
"""Candidates that one page of a listing looks at: each may cost the reading of a manifest."""

After = Annotated[int | None, Query(ge=-1, le=MAX_INTEGER)]
Status = Annotated[str | None, Query(pattern="^(open|split|upheld)$")]


@router.get("/v1/runs/{run}/terms", summary="What the ledger says now about a run's rows")
def terms(run: str, who: Anyone, box: Box) -> dict[str, Any]:
    """Of the contributions that the run might use: which are withdrawn, which are held, and which
    of their rows stand for themselves again; all as of `log_size` entries of the log."""
    found(box.queries.run(run), f"run {run}")
    return box.queries.run_terms(run)


@router.get(
    "/v1/contributions/{contribution}/adapters", summary="Adapters that used a contribution"
)
def adapters_of(contribution: str, who: Anyone, box: Box, after: After = None) -> dict[str, Any]:
    """By leaf index; `rows` is how many of its rows the run trained on, by the run's manifest, or
    null where that cannot be read."""
    found(box.queries.contribution(contribution), f"contribution {contribution}")
    start = -1 if after is None else after
    rows = box.queries.adapters_of(contribution, after=start, limit=MAX_SEEN)
    items = [
        {**_shown(row), "reason": row["reason"], "rows": used}
        for row in rows
        if (used := used_rows(box, row)) != 0
    ]
    return {"items": items, "next": rows[-1]["index"] if len(rows) == MAX_SEEN else None}


@router.get("/v1/appeals", summary="Rows whose merge with another's was appealed")
def appeals(
    who: Anyone,
    box: Box,
    datanet: str | None = None,
    contribution: str | None = None,
    status: Status = None,
    after: After = None,
) -> dict[str, Any]:
    """In the order of the log, the newest appeal of each row."""
    rows = box.queries.appeals(
        datanet=datanet,
        contribution=contribution,
        status=status,
        after=-1 if after is None else after,
        limit=MAX_SEEN,
    )
    return page(rows, limit=MAX_SEEN, cursor="appealed_index")


def recalls_due(box: Services, after: str | None) -> dict[str, Any]:
    """Adapters that `adapter.recalled` would retire now, and because of which contribution."""
    index, _, contribution = (after or "-1.").partition(".")
    rows = box.queries.recalls(after=(int(index), contribution), limit=MAX_SEEN)
    items = [
        {**_shown(row), "withdrawn_index": row["decided_index"], "withdrawal": row["note"]}
        for row in rows
        if used_rows(box, row)
    ]
    full = len(rows) == MAX_SEEN
    cursor = f"{rows[-1]['index']}.{rows[-1]['contribution']}" if full else None
    return {"items": items, "next": cursor}


def used_rows(box: Services, row: Mapping[str, Any]) -> int | None:
    """Rows of the contribution in the manifest of the adapter's run; None where it is not there,
    or is none."""
    try:
        return box.trained.rows(row["manifest_sha256"]).get(row["contribution"], 0)
    except (NotFound, VerificationError):
        return None


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    hidden = ("note", "decided_index", "reason")
    return plain({name: value for name, value in row.items() if name not in hidden})
