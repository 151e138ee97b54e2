"""What there is: identities, datanets, contributions, runs, adapters. Read from projections."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from ledger.api.auth import Anyone, Box, Caller
from ledger.api.routes.consent import recalls_due
from ledger.api.shapes import found, page
from ledger.domain.events import MAX_INTEGER
from ledger.errors import Forbidden

router = APIRouter(tags=["catalogue"])

Limit = Annotated[int, Query(ge=1, le=1_000)]
After = Annotated[int | None, Query(ge=-1, le=MAX_INTEGER)]
RUN_STATUSES = ("requested", "started", "completed", "failed", "cancelled")


@router.get("/v1/identities/{actor}", summary="An identity")
def identity(actor: str, who: Anyone, box: Box) -> dict[str, Any]:
    row = found(box.queries.identity(actor), f"identity {actor}")
    row["roles"] = [r["role"] for r in box.queries.roles(actor)]
    return row


@router.get("/v1/identities", summary="Identities, in order of registration")
def identities(who: Anyone, box: Box) -> dict[str, Any]:
    return page(box.queries.identities())


@router.get("/v1/datanets", summary="Datanets")
def datanets(who: Anyone, box: Box, status: str | None = None) -> dict[str, Any]:
    return page(box.queries.datanets(status=status))


@router.get("/v1/datanets/{datanet}", summary="One datanet")
def datanet(datanet: str, who: Anyone, box: Box) -> dict[str, Any]:
    """With its policy: the limits in force, and what a withdrawal does to adapters."""
    row = found(box.queries.datanet(datanet), f"datanet {datanet}")
    return {**row, "policy": asdict(box.queries.policy(datanet))}


@router.get("/v1/contributions", summary="Contributions, in log order")
def contributions(
    who: Anyone,
    box: Box,
    datanet: str | None = None,
    status: str | None = None,
    contributor: str | None = None,
    after: After = None,
    limit: Limit = 500,
) -> dict[str, Any]:
    rows = box.queries.contributions(
        datanet=datanet,
        status=status,
        contributor=contributor,
        after=-1 if after is None else after,
        limit=limit,
    )
    return page(rows, limit=limit, cursor="index")


@router.get("/v1/contributions/{contribution}", summary="One contribution")
def contribution(contribution: str, who: Anyone, box: Box) -> dict[str, Any]:
    """With its newest hold, in force (`active`) or not, or null."""
    row = found(box.queries.contribution(contribution), f"contribution {contribution}")
    return {**row, "hold": box.queries.hold(contribution)}


@router.get("/v1/runs", summary="Training runs; several statuses may be given with commas")
def runs(who: Anyone, box: Box, status: str | None = None, limit: Limit = 500) -> dict[str, Any]:
    if status is None:
        return page(box.queries.runs(limit=limit))
    wanted = [s for s in status.split(",") if s in RUN_STATUSES]
    rows = [row for one in wanted for row in box.queries.runs(status=one, limit=limit)]
    return page(rows[:limit])


@router.get("/v1/runs/{run}", summary="One training run")
def run(run: str, who: Anyone, box: Box) -> dict[str, Any]:
    return found(box.queries.run(run), f"run {run}")


@router.get("/v1/runs/{run}/contributions", summary="What a run trains on (workers)")
def run_contributions(run: str, caller: Caller, box: Box) -> dict[str, Any]:
    """Approved when the run was requested, neither withdrawn nor held now, in log order."""
    if not box.has_role(caller, "worker"):
        raise Forbidden("only workers read the inputs of a run")
    found(box.queries.run(run), f"run {run}")
    rows = box.queries.run_inputs(run)
    rows = [row for row in rows if row["status"] != "withdrawn" and not row["held"]]
    return page(sorted(rows, key=lambda r: r["index"]))


@router.get("/v1/adapters", summary="Adapters, newest first; ?recall=due for workers")
def adapters(
    who: Anyone,
    box: Box,
    status: str | None = None,
    recall: Annotated[str | None, Query(pattern="^due$")] = None,
    after: Annotated[str | None, Query(pattern=r"^\d{1,18}\.[0-9a-f-]{36}$")] = None,
) -> dict[str, Any]:
    """With `recall=due`: the published ones that used a contribution which was withdrawn, of a
    datanet whose policy retires them; `after` is the cursor `next` of that listing."""
    if recall:
        return recalls_due(box, after)
    return page(box.queries.adapters(status=status))


@router.get("/v1/adapters/{adapter}", summary="One adapter, by id")
def adapter(adapter: str, who: Anyone, box: Box) -> dict[str, Any]:
    return found(box.queries.adapter(adapter), f"adapter {adapter}")
