"""Errors as problem details (RFC 9457): one mapping from `ledger.errors` to HTTP.

`type` is `/problems/<slug>`, `title` and `status` come from the class, `detail` is the message, and
`extra` carries the error's named fields. An unforeseen exception answers 500 without its text.
"""

import json

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_problem.error import Problem, ServerProblem
from fastapi_problem.handler import add_exception_handler, new_exception_handler
from starlette.exceptions import HTTPException

from ledger.errors import Backpressure, LedgerError, Unauthenticated

log = structlog.get_logger(__name__)


def install(app: FastAPI) -> None:
    handler = new_exception_handler(
        unhandled_wrappers={"default": Internal},
        pre_hooks=[_log_unforeseen],
        documentation_uri_template="/problems/{type}",
    )
    add_exception_handler(app, handler)
    app.add_exception_handler(LedgerError, _respond)


class Internal(ServerProblem):
    """An exception that nobody foresaw. Its text stays in our log: it may hold anything."""

    title = "Internal error"
    type_ = "internal"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__("the server made a mistake; its log names this request")


def _log_unforeseen(request: Request, error: Exception) -> None:
    if not isinstance(error, HTTPException | RequestValidationError | Problem):
        log.error("unforeseen", path=request.url.path, exc_info=error)


def _respond(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, LedgerError)
    if error.status >= 500:
        log.warning("request_failed", path=request.url.path, error=error.slug, why=error.message)
    headers = {"content-type": "application/problem+json"}
    if isinstance(error, Backpressure):
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    content = problem_document(error)
    if request.url.path.startswith(OPENAI_PATHS):
        content |= {"error": _openai_error(error)}
    return JSONResponse(content, status_code=error.status, headers=headers)


OPENAI_PATHS = ("/v1/chat/", "/v1/completions", "/v1/models")


def problem_document(error: LedgerError) -> dict[str, object]:
    return {
        "type": f"/problems/{error.slug}",
        "title": error.title,
        "status": error.status,
        "detail": error.message,
        "extra": json.loads(json.dumps(error.detail, default=str)),
    }


def _openai_error(error: LedgerError) -> dict[str, object]:
    """The same error once more in the shape that OpenAI clients read."""
    return {"message": error.message, "type": error.slug, "code": error.slug, "param": None}
