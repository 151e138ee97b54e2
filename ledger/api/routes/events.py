"""Appending signed events, and reading them back."""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError

from ledger.aggregates.application import Appended
from ledger.api.appending import append_all, place_for_a_batch
from ledger.api.auth import Anyone, Box, Caller, address_of, caller_of
from ledger.api.direct import DirectRoute, query, refuse_nul
from ledger.api.raw import (
    ENVELOPE,
    ENVELOPES,
    LOGIN,
    LoginBytes,
    batch_bytes,
    envelope_bytes,
)
from ledger.api.services import Services, services
from ledger.domain.envelope import decode_entry, leaf_hash
from ledger.domain.events import MAX_INTEGER
from ledger.domain.login import verify_login
from ledger.errors import InvalidEvent, NotFound, NotYetIncluded

router = APIRouter(tags=["events"])

WAIT = query(
    "wait",
    {"type": "string", "enum": ["included"]},
    "`included`: answer when a checkpoint covers the event",
)
REPEATED: dict[int | str, dict[str, Any]] = {
    200: {"description": "These very bytes were recorded before: the same answer again"}
}
READ_SPAN = 256
"""Entries read in one go where only some of them are wanted."""


async def append(request: Request) -> Response:
    """The body is the envelope, canonical JSON to the byte (docs/FORMATS.md). The signature is the
    authentication. Answers with the leaf index and a signed receipt; 201, or 200 where these very
    bytes were recorded before. With `wait=included` it answers when a checkpoint covers the event,
    with the proof."""
    box = await services(request)
    refuse_nul(request)
    wait = _waits(request)
    await caller_of(request, box)
    raw = await envelope_bytes(request)
    if wait:
        box.inclusion.check_room()
    [one] = await append_all(box.ledger, [raw])
    answer = _answer(one, _receipt(box, [one]))
    if wait:
        proof = await box.inclusion.proof_of(one.index)
        if proof is None:
            raise _not_yet(box, answer)
        answer["proof"] = proof.decode()
    return _json(answer, 200 if one.replayed else 201)


async def append_batch(request: Request) -> Response:
    """One envelope a line. They are stored together, in this order, or not at all, and have one
    receipt. Counts as that many requests."""
    box = await services(request)
    refuse_nul(request)
    who = await caller_of(request, box)
    async with place_for_a_batch():
        lines = [line for line in (await batch_bytes(request)).split(b"\n") if line]
        box.rate_limit.hit(who or address_of(request), cost=max(1, len(lines)))
        appended = await append_all(box.ledger, lines)
    answer = {
        "indexes": [one.index for one in appended],
        "receipt": _receipt(box, appended),
    }
    return _json(answer, 200 if appended[0].replayed else 201)


for path, endpoint, summary, told in (
    ("/v1/events", append, "Append one signed event", {**ENVELOPE, "parameters": [WAIT]}),
    ("/v1/events/batch", append_batch, "Append events, all or none", ENVELOPES),
):
    router.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        status_code=201,
        summary=summary,
        openapi_extra=told,
        responses=REPEATED,
        route_class_override=DirectRoute,
    )
DIRECT = [route for route in router.routes if isinstance(route, DirectRoute)]


def _waits(request: Request) -> bool:
    wait = request.query_params.get("wait") if request.scope["query_string"] else None
    if wait not in (None, "included"):
        raise RequestValidationError(
            [{"loc": ("query", "wait"), "msg": "must be 'included', or be left out"}]
        )
    return wait is not None


def _json(value: Mapping[str, Any], status: int) -> Response:
    # Pure ASCII, as everywhere else: a body may hold what only escapes can carry.
    content = json.dumps(value, separators=(",", ":")).encode("ascii")
    return Response(content, status, media_type="application/json")


def _answer(one: Appended, receipt: dict[str, Any] | None) -> dict[str, Any]:
    event = one.envelope
    return {
        "index": one.index,
        "recorded_at": one.recorded_at,
        "leaf_hash": one.leaf_hash.hex(),
        "event": str(event.id),
        "type": event.type,
        "actor": event.actor,
        "at": event.at,
        "body": event.body,
        "receipt": receipt,
    }


def _receipt(box: Services, appended: Sequence[Appended]) -> dict[str, Any] | None:
    """One receipt for what was stored together. A repeated batch may have been stored in pieces:
    then there is no such receipt, and each event's own is at /v1/receipts."""
    first = appended[0]
    together = all(
        (one.index, one.recorded_at) == (first.index + n, first.recorded_at)
        for n, one in enumerate(appended)
    )
    if not together:
        return None
    return box.receipts.issue(
        first_index=first.index,
        leaf_hashes=[one.leaf_hash for one in appended],
        recorded_at=first.recorded_at,
        fresh=not first.replayed,
    )


def _not_yet(box: Services, answer: dict[str, Any]) -> NotYetIncluded:
    index, event = answer["index"], answer["event"]
    return NotYetIncluded(
        f"event {event} is stored at index {index}, but no checkpoint covered it within "
        f"{box.inclusion.max_wait_s:g} s. Keep the receipt; GET /log/proof/{event} has the proof "
        "once there is one",
        index=index,
        event=event,
        receipt=answer["receipt"],
    )


@router.get("/v1/receipts/{event}", summary="The receipt of a recorded event, again")
def receipt(event: str, who: Anyone, box: Box) -> dict[str, Any]:
    """By id or leaf index. The same bytes as the first time, for an event that was appended alone;
    one of a batch gets a receipt of its own with the same promise."""
    index = index_of(box, event)
    entry = _entry(box, index)
    return box.receipts.issue(
        first_index=index,
        leaf_hashes=[leaf_hash(entry)],
        recorded_at=decode_entry(entry, verify=False).recorded_at,
    )


@router.get("/v1/events/{event}", summary="An event by id or leaf index")
def read(event: str, who: Anyone, box: Box) -> dict[str, Any]:
    return describe(box, index_of(box, event))


@router.get("/v1/events", summary="Events in log order")
def listing(
    box: Box,
    who: Anyone,
    after: Annotated[int, Query(ge=-1, le=MAX_INTEGER)] = -1,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> dict[str, Any]:
    entries = box.entries.entries(after + 1, after + 1 + limit)
    items = [_view(entry) for entry in entries]
    full = len(items) == limit
    return {"items": items, "next": items[-1]["index"] if full else None}


@router.post(
    "/v1/credentials",
    status_code=201,
    summary="Sign in: a credential for your key",
    openapi_extra=LOGIN,
)
def login(raw: LoginBytes, request: Request, box: Box) -> dict[str, str]:
    """The body is a signed login request (docs/FORMATS.md). The token is shown once."""
    box.rate_limit.hit(f"login:{address_of(request)}")
    now = box.clock()
    actor, label, nonce = verify_login(raw, log=box.settings.log_origin, now=now)
    if "\0" in label:
        raise InvalidEvent("label holds a NUL character", field="label")
    return {"token": box.credentials.issue(actor, label, nonce, now), "actor": actor}


@router.delete("/v1/credentials", status_code=204, summary="Revoke the credential you send")
def logout(request: Request, actor: Caller, box: Box) -> None:
    token = request.headers["authorization"].partition(" ")[2].strip()
    box.credentials.revoke(token, box.clock())


def index_of(box: Services, text: str) -> int:
    """Leaf index of an event named by its id or by its index."""
    if text.isascii() and text.isdigit() and len(text) < 19:
        if int(text) < box.entries.size():
            return int(text)
        raise NotFound(f"the log has {box.entries.size()} entries; there is no index {text}")
    try:
        index = box.entries.index_of(str(UUID(text)))
    except ValueError as error:
        raise InvalidEvent(f"{text[:60]!r} is neither an event id nor a leaf index") from error
    if index is None:
        raise NotFound(f"no event {text} is recorded in this ledger")
    return index


def describe(box: Services, index: int) -> dict[str, Any]:
    return _view(_entry(box, index))


def _entry(box: Services, index: int) -> bytes:
    entries = box.entries.entries(index, index + 1)
    if not entries:
        raise NotFound(f"no entry {index} yet")
    return entries[0]


def describe_all(box: Services, indexes: Sequence[int]) -> list[dict[str, Any]]:
    """Entries by ascending index; those that stand close together are read in one go."""
    found: list[dict[str, Any]] = []
    at = 0
    while at < len(indexes):
        start = indexes[at]
        wanted = indexes[at : bisect_left(indexes, start + READ_SPAN)]
        entries = box.entries.entries(start, wanted[-1] + 1)
        found += [_view(entries[index - start]) for index in wanted]
        at += len(wanted)
    return found


def _view(entry: bytes) -> dict[str, Any]:
    decoded = decode_entry(entry, verify=False)
    event = decoded.envelope
    return {
        "index": decoded.index,
        "recorded_at": decoded.recorded_at,
        "leaf_hash": leaf_hash(entry).hex(),
        "event": str(event.id),
        "type": event.type,
        "actor": event.actor,
        "at": event.at,
        "body": dict(event.body),
    }
