"""Errors as problem details (RFC 9457): the one mapping from exceptions to HTTP.

Every document has `type` (`/problems/<slug>`), `title`, `status`, `detail` (what was wrong, what
was expected, what to do) and `extra` (named fields). An exception that nobody foresaw answers 500
without its text, which may hold anything: that stays in our log.

On the paths that OpenAI clients call, the document has a member `error` besides, as they read it
(`message`, `type`, `param`, `code`), and headers that tell them whether to try again.
"""

import json
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ledger.errors import LedgerError, NotFound, Unauthenticated, Unavailable

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
OPENAI_PATHS = (
    "/v1/chat/", "/v1/completions", "/v1/models", "/v1/embeddings", "/v1/responses",
)  # fmt: skip
RETRY_UNAVAILABLE_S = 2
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


_OPENAI: Mapping[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    402: ("insufficient_quota", "insufficient_quota"),
    403: ("permission_error", None),
    404: ("invalid_request_error", "not_found"),
    409: ("invalid_request_error", "conflict"),
    413: ("invalid_request_error", "request_too_large"),
    422: ("invalid_request_error", None),
    429: ("rate_limit_error", "queue_full"),
    503: ("server_error", "service_unavailable"),
}


def openai_error(document: Document) -> Document:
    """The same error in the shape that OpenAI clients read. An unpaid account is 402, not 429:
    their clients try again after 429, and money does not come of that."""
    extra = document["extra"]
    type, code = _OPENAI.get(document["status"], ("server_error", "internal_error"))
    return {
        "message": document["detail"],
        "type": type,
        "param": extra.get("field"),
        "code": extra.get("code", code),
    }


def log_failure(path: str, error: Exception, request: str | None = None) -> None:
    """Server faults only: what callers do wrong is theirs to see. `request` is its x-request-id."""
    named = {"request": request} if request else {}
    if not isinstance(error, LedgerError | HTTPException | RequestValidationError):
        # Not exc_info: some log renderers show local variables, and headers are among them.
        trace = "".join(traceback.format_exception(error))
        log.error("unforeseen", path=path, error=type(error).__name__, trace=trace, **named)
    elif isinstance(error, LedgerError) and error.status >= 500:
        log.warning("request_failed", path=path, error=error.slug, why=error.message, **named)


def respond(request: Request, error: Exception) -> Response:
    """The answer to a request that failed; server faults are logged."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    for_openai = request.url.path.startswith(OPENAI_PATHS)
    name = uuid4().hex if for_openai else None
    log_failure(request.url.path, error, name)
    document, headers = problem_document(error), _headers(error)
    if name is not None:
        document = {**document, "error": openai_error(document)}
        headers = {**headers, **_openai_headers(error), "x-request-id": name}
    # Pure ASCII: a message may quote a lone surrogate, which UTF-8 cannot carry.
    content = json.dumps(document, default=str).encode("ascii")
    return Response(content, document["status"], headers, MEDIA_TYPE)


def _headers(error: Exception) -> dict[str, str]:
    # A cache may keep a plain 404 for a while: the tile that is not there yet is there in a second.
    kept = {"cache-control": "no-store"}
    match error:
        case LedgerError(detail={"retry_after_s": after_s}):
            return {**kept, "retry-after": str(after_s)}
        case Unauthenticated():
            return {**kept, "www-authenticate": "Bearer"}
        case HTTPException(headers=headers):
            return {**kept, **(headers or {})}
    return kept


def _openai_headers(error: Exception) -> dict[str, str]:
    """Their clients try 409, 429 and 5xx again by themselves, after `retry-after` seconds."""
    match error:
        case LedgerError(detail={"retry": False}):
            return {"x-should-retry": "false"}
        case Unavailable():
            return {"retry-after": str(error.detail.get("retry_after_s", RETRY_UNAVAILABLE_S))}
    return {}


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
