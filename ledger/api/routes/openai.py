"""The OpenAI-compatible endpoint: /v1/models, /v1/chat/completions, /v1/completions, streaming too.

What happens to an answer is in `ledger.api.answers`. The two routes that give answers are direct
(`ledger.api.direct`): a stream's pieces pass through nothing of the framework.
"""

import re
from typing import Any
from uuid import uuid4

import anyio.to_thread
from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from ledger.api.answers import wire
from ledger.api.answers.asking import adapter_row, begin
from ledger.api.answers.bodies import Asked, ChatBody, CompletionBody, parse
from ledger.api.answers.delivery import UNBUFFERED, in_one_piece, names, streamed
from ledger.api.answers.desk import Running
from ledger.api.answers.repeats import New, Repeated, find
from ledger.api.answers.sitting import Sitting, attribution_of, receipt_of
from ledger.api.auth import Anyone, Box, optional_caller
from ledger.api.direct import DirectRoute, refuse_nul
from ledger.api.problems import MEDIA_TYPE, SCHEMA
from ledger.api.raw import chat_bytes, schema_of, takes
from ledger.api.services import Services, services
from ledger.errors import Unauthenticated

MAX_ATTRIBUTION_WAIT_S = 10
_PREFER_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,4})\"?(?=$|[,;\s])", re.IGNORECASE)


async def _name(response: Response) -> None:
    """Every answer has `x-request-id`; errors get theirs in `problems`."""
    response.headers["x-request-id"] = uuid4().hex


Named = Depends(_name)
router = APIRouter(tags=["openai"])


@router.get("/v1/models", summary="The published adapters, as OpenAI models", dependencies=[Named])
def models(who: Anyone, box: Box) -> dict[str, Any]:
    names_ = sorted({a["model"] for a in box.queries.adapters(status="published")})
    resolved = [box.queries.adapter_by_model(name) for name in names_]
    return {"object": "list", "data": [_model(box, a) for a in resolved if a]}


@router.get("/v1/models/{model:path}", summary="One model", dependencies=[Named])
def model(model: str, who: Anyone, box: Box) -> dict[str, Any]:
    return _model(box, adapter_row(box, model))


@router.get("/v1/serving", summary="What the serving engine does: rows, queue, steps, adapters")
async def serving(who: Anyone, box: Box) -> dict[str, Any]:
    return dict(await box.engine().stats())


async def chat(request: Request) -> Response:
    """The answer of one adapter to a conversation, as OpenAI's chat completion; its owner and
    those whose data shaped it are paid. `Idempotency-Key` makes it safe to repeat."""
    return await _answer(request, ChatBody)


async def completion(request: Request) -> Response:
    """One prompt, taken as it is, continued; as OpenAI's older completion."""
    return await _answer(request, CompletionBody)


_HEADERS = [
    ("Idempotency-Key", "The same key and body again: the answer that is recorded, not a new one."),
    ("Prefer", "`wait=N`: the receipt may wait N seconds (at most 10) for the attribution."),
]
_PARAMETERS = [
    {"name": n, "in": "header", "required": False, "description": d, "schema": {"type": "string"}}
    for n, d in _HEADERS
]
for path, endpoint, body, summary in (
    ("/v1/chat/completions", chat, ChatBody, "Ask a model; pays whose data shaped the answer"),
    ("/v1/completions", completion, CompletionBody, "Let a model continue a prompt"),
):
    router.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        summary=summary,
        openapi_extra={**takes("application/json", schema_of(body)), "parameters": _PARAMETERS},
        responses={"4XX": {"description": "", "content": {MEDIA_TYPE: {"schema": dict(SCHEMA)}}}},
        route_class_override=DirectRoute,
    )
DIRECT = [route for route in router.routes if isinstance(route, DirectRoute)]


async def _answer(request: Request, body: type[ChatBody] | type[CompletionBody]) -> Response:
    box = await services(request)
    refuse_nul(request)
    consumer = await run_in_threadpool(optional_caller, request, box)
    if consumer is None:
        raise Unauthenticated(
            "this needs a credential: Authorization: Bearer <token>; get one with `tributary login`"
        )
    raw = await chat_bytes(request)
    asked = parse(raw, body)
    found = await find(box, consumer, request.scope["path"], raw, request.headers)
    wait_s = _wait_s(request)
    if isinstance(found, Repeated):
        response = await _again(box, asked, found)
    else:
        response = await _give(box, consumer, asked, found, request, wait_s)
    if wait_s:
        response.headers["preference-applied"] = f"wait={wait_s}"
    return response


async def _give(
    box: Services, consumer: str, asked: Asked, new: New, request: Request, wait_s: int
) -> Response:
    running = Running(request_sha256=new.sha256)
    box.answers.running[new.inference] = running
    try:
        answer, intent = await begin(
            box,
            consumer,
            asked,
            inference=new.inference,
            request_sha256=new.sha256 if new.keyed else None,
        )
    except BaseException:
        del box.answers.running[new.inference]
        running.over.set()
        raise
    sitting = Sitting(box, answer, intent, running, wait_s=wait_s)
    if asked.stream:
        return await streamed(sitting, request.receive, include_usage=asked.include_usage)
    return await in_one_piece(sitting, request.receive)


async def _again(box: Services, asked: Asked, found: Repeated) -> Response:
    """What was recorded, in one piece also where a stream is asked for."""
    answer = found.answer
    receipt = receipt_of(answer, found.recorded)
    attributed = await anyio.to_thread.run_sync(attribution_of, box, answer)
    if attributed is not None:
        receipt["attribution"] = attributed
    headers = {**names(answer), "idempotency-replayed": "true"}
    if not asked.stream:
        return JSONResponse(wire.whole(answer, receipt), headers=headers)
    pieces = wire.Pieces(answer, include_usage=asked.include_usage)
    said = pieces.piece(wire.text_json(answer.text)) if answer.text else b""
    content = pieces.opening() + said + pieces.closing(receipt)
    return Response(content, headers={**headers, **UNBUFFERED}, media_type="text/event-stream")


def _wait_s(request: Request) -> int:
    """Seconds of `Prefer: wait=N` (RFC 7240 section 4.3), at most MAX_ATTRIBUTION_WAIT_S."""
    found = _PREFER_WAIT.search(request.headers.get("prefer", ""))
    return min(int(found[1]), MAX_ATTRIBUTION_WAIT_S) if found else 0


def _model(box: Services, adapter: Any) -> dict[str, Any]:
    """As vLLM describes a LoRA model (`root`, `parent`, `max_model_len`, `permission`), and its
    prices."""
    base = box.info["base_model"]
    created = int(adapter["at"]) // 1_000_000
    return {
        "id": adapter["model"],
        "object": "model",
        "created": created,
        "owned_by": adapter["owner"],
        "root": adapter["adapter"],
        "parent": base["id"] if adapter["base_model"] == base["digest"] else adapter["base_model"],
        "max_model_len": base.get("max_model_len"),
        "permission": [_permission(adapter, created)],
        "adapter": adapter["adapter"],
        "base_model": adapter["base_model"],
        "input_wei_per_token": str(adapter["input_wei_per_token"]),
        "output_wei_per_token": str(adapter["output_wei_per_token"]),
    }


def _permission(adapter: Any, created: int) -> dict[str, Any]:
    """OpenAI's older record of what may be done with a model; some clients read it."""
    return {
        "id": f"modelperm-{adapter['adapter']}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
