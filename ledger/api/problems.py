"""Errors as problem details (RFC 9457): the one mapping from exceptions to HTTP.

Every document has `type` (`/problems/<slug>`), `title`, `status`, `detail` (what was wrong, what
was expected, what to do) and `extra` (named fields). An exception that nobody foresaw answers 500
without its text, which may hold anything: that stays in our log.
"""

import json
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ledger.errors import Backpressure, LedgerError, NotFound, Unauthenticated

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
OPENAI_PATHS = ("/v1/chat/", "/v1/models")
MAX_ERRORS_SHOWN = 10
CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it

Document = dict[str, Any]

SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "extra"],
    "properties": {
        "type": {"type": "string", "example": "/problems/conflict"},
        "title": {"type": "string", "example": "Conflict"},
        "status": {"type": "integer", "example": 409},
        "detail": {"type": "string"},
        "extra": {"type": "object"},
    },
}
_RESPONSE: Mapping[str, Any] = {
    "description": "A problem document (RFC 9457)",
    "content": {MEDIA_TYPE: {"schema": SCHEMA}},
}
RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": dict(_RESPONSE), "5XX": dict(_RESPONSE)}
"""For OpenAPI: what every route may answer instead."""


def install(app: FastAPI) -> None:
    for kind in (LedgerError, HTTPException, RequestValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, respond)


def problem_document(error: Exception) -> Document:
    """The document of any exception."""
    match error:
        case LedgerError():
            return _document(error.slug, error.title, error.status, error.message, error.detail)
        case HTTPException(status_code=404):
            return problem_document(NotFound("no such path here; /docs lists them"))
        case HTTPException(status_code=status):
            title = HTTPStatus(status).phrase
            return _document(title.lower().replace(" ", "-"), title, status, str(error.detail), {})
        case RequestValidationError():
            return _invalid_request(error)
    message = "the server made a mistake; its log names this request"
    return _document("internal", "Internal error", 500, message, {})


def openai_error(document: Document) -> Document:
    """The same error in the shape that OpenAI clients read."""
    slug = document["type"].rpartition("/")[2]
    field = document["extra"].get("field")
    return {"message": document["detail"], "type": slug, "code": slug, "param": field}


def log_failure(path: str, error: Exception) -> None:
    """Server faults only: what callers do wrong is theirs to see."""
    if not isinstance(error, LedgerError | HTTPException | RequestValidationError):
        # Not exc_info: some log renderers show local variables, and headers are among them.
        trace = "".join(traceback.format_exception(error))
        log.error("unforeseen", path=path, error=type(error).__name__, trace=trace)
    elif isinstance(error, LedgerError) and error.status >= 500:
        log.warning("request_failed", path=path, error=error.slug, why=error.message)


def respond(request: Request, error: Exception) -> Response:
    """The answer to a request that failed; server faults are logged."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    log_failure(request.url.path, error)
    document = problem_document(error)
    if request.url.path.startswith(OPENAI_PATHS):
        document = {**document, "error": openai_error(document)}
    # Pure ASCII: a message may quote a lone surrogate, which UTF-8 cannot carry.
    content = json.dumps(document, default=str).encode("ascii")
    return Response(content, document["status"], _headers(error), MEDIA_TYPE)


def _headers(error: Exception) -> dict[str, str]:
    # A cache may keep a plain 404 for a while: the tile that is not there yet is there in a second.
    kept = {"cache-control": "no-store"}
    match error:
        case Backpressure():
            return {**kept, "retry-after": str(error.retry_after_s)}
        case Unauthenticated():
            return {**kept, "www-authenticate": "Bearer"}
        case HTTPException(headers=headers):
            return {**kept, **(headers or {})}
    return kept


def _invalid_request(error: RequestValidationError) -> Document:
    """Where and why, but not what was sent: that may be a secret, and need not be JSON."""
    errors = [
        {"where": ".".join(map(str, found["loc"])), "message": str(found["msg"])}
        for found in error.errors()[:MAX_ERRORS_SHOWN]
    ]
    detail = "; ".join(f"{found['where']}: {found['message']}" for found in errors)
    return _document("invalid-request", "Invalid request", 422, detail, {"errors": errors})


def _document(
    slug: str, title: str, status: int, detail: str, extra: Mapping[str, object]
) -> Document:
    return {
        "type": f"/problems/{slug}",
        "title": title,
        "status": status,
        "detail": detail,
        "extra": json.loads(json.dumps(dict(extra), default=str)),
    }
