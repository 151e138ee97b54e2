"""Balances, statements line by line, inferences and whom they paid, periods and claims."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from ledger.aggregates.periods import Periods
from ledger.api.auth import Anyone, Box, Caller, Operator
from ledger.api.shapes import found, page, plain
from ledger.domain.ids import check_address, derived_id
from ledger.errors import Conflict, Forbidden, NotFound

router = APIRouter(tags=["money"])

Limit = Annotated[int, Query(ge=1, le=1_000)]


@router.get("/v1/accounts/{owner}/balances", summary="Balances in wei, by bucket")
def balances(owner: str, who: Anyone, box: Box) -> dict[str, str]:
    """prepaid (a consumer's), accrued, withheld (a contribution is held; its end accrues it), held
    (a payout root in its challenge window), available (claimable on chain), paid (what the chain
    shows)."""
    return {bucket: str(wei) for bucket, wei in box.queries.balances(owner).items()}


@router.get("/v1/accounts/{owner}/statement", summary="Every posting, line by line")
def statement(
    owner: str,
    who: Anyone,
    box: Box,
    after: Annotated[str | None, Query(pattern=r"^\d{1,18}\.\d{1,9}$")] = None,
    limit: Limit = 500,
) -> dict[str, Any]:
    """Each line names the event (leaf index) that made it; `after` is the cursor `next`."""
    index, n = (int(part) for part in after.split(".")) if after else (-1, -1)
    rows = box.queries.statement(owner, limit=limit, after=(index, n))
    items = [plain(row) for row in rows]
    cursor = f"{items[-1]['index']}.{items[-1]['n']}" if len(items) == limit else None
    return {"items": items, "next": cursor}


@router.get("/v1/contributors", summary="Who earned most")
def contributors(who: Anyone, box: Box, limit: Limit = 20) -> dict[str, Any]:
    return page(box.queries.top_contributors(limit=limit))


@router.get("/v1/totals", summary="Sums over all accounts; they balance to zero")
def totals(who: Anyone, box: Box) -> dict[str, str]:
    return {name: str(wei) for name, wei in box.queries.totals().items()}


@router.get("/v1/inferences", summary="Inferences; ?attribution=pending for workers")
def inferences(
    who: Anyone,
    box: Box,
    attribution: Annotated[str | None, Query(pattern="^pending$")] = None,
    adapter: str | None = None,
    consumer: str | None = None,
    limit: Limit = 100,
) -> dict[str, Any]:
    if attribution:
        return page(box.queries.pending_attributions(limit=limit))
    return page(box.queries.inferences(adapter=adapter, consumer=consumer, limit=limit))


@router.get("/v1/inferences/{inference}", summary="One answer: fee, attribution, whom it paid")
def inference(inference: str, who: Anyone, box: Box) -> dict[str, Any]:
    row = found(box.queries.inference(inference), f"inference {inference}")
    row["postings"] = [plain(p) for p in box.queries.postings(inference)]
    return row


@router.get("/v1/inferences/{inference}/transcript", summary="The answer's text, for its payer")
def transcript(inference: str, caller: Caller, box: Box) -> Any:
    """With the salts, so that the payer can check prompt and output against their commitments."""
    row = found(box.queries.inference(inference), f"inference {inference}")
    if caller != row["consumer"] and not box.has_role(caller, "operator"):
        raise Forbidden("only the consumer who paid reads a transcript")
    return box.read_json(row["transcript_sha256"])


@router.post("/v1/periods", status_code=202, summary="Cut off the running period (operator)")
def cut_off(caller: Operator, box: Box) -> dict[str, Any]:
    """Appends `period.cutoff`; the chain service then closes the period, publishes its payout root
    and activates it after the challenge window. Watch GET /v1/periods/{period}."""
    if not box.queries.payable():
        raise Conflict(
            "nobody with a bound EVM address has accrued anything: a period needs a line to pay"
        )
    periods = box.ledger.load(Periods)
    number = periods.period + 1 if periods else 1
    event_id = derived_id("period.cutoff", box.settings.log_origin, number)
    appended = box.ledger.append(box.sign("period.cutoff", {"period": number}, event_id))
    return {"period": number, "index": appended.index}


@router.get("/v1/periods", summary="Payout periods, newest first")
def periods(who: Anyone, box: Box) -> dict[str, Any]:
    return page(box.queries.periods())


@router.get("/v1/periods/{period}", summary="A period and its payout lines")
def period(period: int, who: Anyone, box: Box) -> dict[str, Any]:
    row = found(box.queries.period(period), f"period {period}")
    row["lines"] = [plain(line) for line in box.queries.payout_lines(period)]
    return row


@router.get("/v1/periods/{period}/claims/{address}", summary="What to send to claim on chain")
def claim(period: int, address: str, who: Anyone, box: Box) -> dict[str, Any]:
    """Cumulative amount and Merkle proof for `PayoutDistributor.claim`."""
    wanted = check_address(address, "address").lower()
    row = found(box.queries.period(period), f"period {period}")
    if row["tree_sha256"] is None:
        raise NotFound(f"period {period} is not closed yet")
    line = box.payout_claim(box.read_json(row["tree_sha256"]), wanted)
    return {"period": period, "root": row["root"], **line}
