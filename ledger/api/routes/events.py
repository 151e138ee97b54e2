"""Appending signed events, and reading them back."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request

from ledger.api.auth import Anyone, Box, Caller, address_of
from ledger.api.raw import ENVELOPE, ENVELOPES, LOGIN, BatchBytes, EnvelopeBytes, LoginBytes
from ledger.api.services import Services
from ledger.domain.envelope import decode_entry, leaf_hash
from ledger.domain.events import MAX_INTEGER
from ledger.domain.login import verify_login
from ledger.errors import InvalidEvent, NotFound

router = APIRouter(tags=["events"])

READ_SPAN = 256
"""Entries read in one go where only some of them are wanted."""


@router.post(
    "/v1/events", status_code=201, summary="Append one signed event", openapi_extra=ENVELOPE
)
def append(raw: EnvelopeBytes, who: Anyone, box: Box) -> dict[str, Any]:
    """The body is the envelope, canonical JSON to the byte (docs/FORMATS.md). The signature is the
    authentication. Answers with the leaf index; the next checkpoint includes it."""
    appended = box.ledger.append(raw)
    return describe(box, appended.index)


@router.post(
    "/v1/events/batch",
    status_code=201,
    summary="Append events, all or none",
    openapi_extra=ENVELOPES,
)
def append_batch(raw: BatchBytes, request: Request, who: Anyone, box: Box) -> dict[str, Any]:
    """One envelope a line. They are stored together, in this order, or not at all. Counts as that
    many requests."""
    lines = [line for line in raw.split(b"\n") if line]
    box.rate_limit.hit(who or address_of(request), cost=max(1, len(lines)))
    appended = box.ledger.append_all(lines)
    return {"indexes": [one.index for one in appended]}


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
    entries = box.entries.entries(index, index + 1)
    if not entries:
        raise NotFound(f"no entry {index} yet")
    return _view(entries[0])


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
