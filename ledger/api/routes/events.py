"""Appending signed events, and reading them back."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request

from ledger.api.auth import Anyone, Box, Caller
from ledger.api.raw import ENVELOPE, ENVELOPES, LOGIN, Raw
from ledger.api.services import Services
from ledger.domain.envelope import MAX_ENVELOPE_BYTES, decode_entry, leaf_hash
from ledger.domain.login import MAX_LOGIN_BYTES, verify_login
from ledger.errors import InvalidEvent, NotFound, TooLarge

router = APIRouter(tags=["events"])

MAX_BATCH_BYTES = 8 * 2**20


@router.post(
    "/v1/events", status_code=201, summary="Append one signed event", openapi_extra=ENVELOPE
)
def append(raw: Raw, who: Anyone, box: Box) -> dict[str, Any]:
    """The body is the envelope, canonical JSON to the byte (docs/FORMATS.md). The signature is the
    authentication. Answers with the leaf index; the next checkpoint includes it."""
    if len(raw) > MAX_ENVELOPE_BYTES:
        raise TooLarge(f"an envelope is at most MAX_ENVELOPE_BYTES = {MAX_ENVELOPE_BYTES} bytes")
    appended = box.ledger.append(raw)
    return describe(box, appended.index)


@router.post(
    "/v1/events/batch",
    status_code=201,
    summary="Append events, all or none",
    openapi_extra=ENVELOPES,
)
def append_batch(raw: Raw, who: Anyone, box: Box) -> dict[str, Any]:
    """One envelope a line. They are stored together, in this order, or not at all."""
    if len(raw) > MAX_BATCH_BYTES:
        raise TooLarge(f"a batch is at most MAX_BATCH_BYTES = {MAX_BATCH_BYTES} bytes")
    appended = box.ledger.append_all([line for line in raw.split(b"\n") if line])
    return {"indexes": [one.index for one in appended]}


@router.get("/v1/events/{event}", summary="An event by id or leaf index")
def read(event: str, who: Anyone, box: Box) -> dict[str, Any]:
    return describe(box, index_of(box, event))


@router.get("/v1/events", summary="Events in log order")
def listing(
    box: Box,
    who: Anyone,
    after: Annotated[int, Query(ge=-1)] = -1,
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
def login(raw: Raw, request: Request, box: Box) -> dict[str, str]:
    """The body is a signed login request (docs/FORMATS.md). The token is shown once."""
    box.rate_limit.hit(f"login:{request.client.host if request.client else 'unknown'}")
    if len(raw) > MAX_LOGIN_BYTES:
        raise InvalidEvent(f"a login request is at most MAX_LOGIN_BYTES = {MAX_LOGIN_BYTES}")
    now = box.clock()
    actor, label, nonce = verify_login(raw, log=box.settings.log_origin, now=now)
    return {"token": box.credentials.issue(actor, label, nonce, now), "actor": actor}


@router.delete("/v1/credentials", status_code=204, summary="Revoke the credential you send")
def logout(request: Request, actor: Caller, box: Box) -> None:
    box.credentials.revoke(request.headers["authorization"].partition(" ")[2], box.clock())


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
    entries = box.entries.entries(index, index + 1)
    if not entries:
        raise NotFound(f"no entry {index} yet")
    return _view(entries[0])


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
