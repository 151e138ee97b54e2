"""The OpenAI-compatible endpoint: /v1/models and /v1/chat/completions, streaming too.

A request holds its highest possible fee, streams from OpenLoRA, and is recorded *before* the last
chunk leaves: transcript blob, then `inference.recorded` and `fee.charged` in one append. A crash
before that append leaves an answer that nobody pays for, and no half-recorded one. A client that
goes away mid-stream is charged for the tokens that were produced.
"""

import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from uuid import uuid4

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ledger.aggregates.governance import Governance
from ledger.aggregates.inferences import fee_event_id
from ledger.api.auth import Anyone, Box, Caller
from ledger.api.problems import problem_document
from ledger.api.raw import Raw, schema_of, takes
from ledger.api.services import Services
from ledger.domain.canonical import canonical_json
from ledger.domain.fees import fee_wei
from ledger.domain.ids import sha256_hex
from ledger.domain.money import PPM_WHOLE
from ledger.errors import (
    ComputeError,
    Forbidden,
    InvalidEvent,
    LedgerError,
    NotFound,
    Unavailable,
)
from ledger.ports import ChatDelta, ChatRequest

router = APIRouter(tags=["openai"])

MAX_MESSAGES = 64
MAX_CONTENT_CHARS = 32_000
MAX_STOPS = 4


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(max_length=MAX_CONTENT_CHARS)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class ChatBody(BaseModel):
    """The fields of OpenAI's chat completion that are honoured; others are ignored."""

    model_config = ConfigDict(extra="ignore")
    model: Annotated[str, Field(max_length=200)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int | None, Field(ge=0, le=2**53 - 1)] = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1


@router.get("/v1/models", summary="The published adapters, as OpenAI models")
def models(who: Anyone, box: Box) -> dict[str, Any]:
    found = box.queries.adapters(status="published")
    return {"object": "list", "data": [_model(a) for a in found]}


@router.get("/v1/models/{model:path}", summary="One model")
def model(model: str, who: Anyone, box: Box) -> dict[str, Any]:
    return _model(_adapter(box, model))


@router.get("/v1/serving", summary="What the serving engine does: rows, queue, steps, adapters")
async def serving(who: Anyone, box: Box) -> dict[str, Any]:
    return dict(await box.engine().stats())


@router.post(
    "/v1/chat/completions",
    summary="Ask a model; pays whose data shaped the answer",
    openapi_extra=takes("application/json", schema_of(ChatBody)),
)
async def chat(raw: Raw, request: Request, response: Response, consumer: Caller, box: Box) -> Any:
    body = _parse(raw)
    answer = await _begin(box, consumer, body)
    headers = {"x-inference-id": answer.inference}
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        stream = _stream(box, answer, include_usage=include_usage)
        try:
            first = await anext(stream)
        except StopAsyncIteration:  # the generator always yields before it ends
            raise ComputeError("the engine gave no answer; retry") from None
        # Errors before the first token still get a proper status; later ones become an event.
        return StreamingResponse(
            _joined(first, stream), media_type="text/event-stream", headers=headers
        )
    response.headers.update(headers)
    return await _complete(box, answer, request)


def _parse(raw: bytes) -> ChatBody:
    """Pydantic's own parser bounds nesting. The standard library's does not where a library has
    raised the interpreter's recursion limit (py_ecc, under eth-account, does): it would crash."""
    try:
        return ChatBody.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise InvalidEvent(f"{where}: {first['msg']}", field=where) from error


@dataclass(kw_only=True)
class Answer:
    """One answer under way."""

    inference: str
    consumer: str
    adapter: Mapping[str, Any]
    request: ChatRequest
    created: int
    prompt_tokens: int
    held_wei: int
    text: str = ""
    completion_tokens: int = 0
    finish_reason: str | None = None

    @property
    def fee_wei(self) -> int:
        return fee_wei(
            self.prompt_tokens,
            self.completion_tokens,
            input_wei_per_token=int(self.adapter["input_wei_per_token"]),
            output_wei_per_token=int(self.adapter["output_wei_per_token"]),
        )

    def take(self, delta: ChatDelta) -> None:
        self.text += delta.text
        self.completion_tokens = max(self.completion_tokens, delta.completion_tokens)
        self.prompt_tokens = delta.prompt_tokens or self.prompt_tokens
        self.finish_reason = delta.finish_reason or self.finish_reason


async def _begin(box: Services, consumer: str, body: ChatBody) -> Answer:
    """Resolve the model, count the prompt, hold the highest fee."""
    adapter = await anyio.to_thread.run_sync(_adapter, box, body.model)
    limit = box.settings.max_tokens_per_answer
    max_tokens = body.max_completion_tokens or body.max_tokens or limit
    if max_tokens > limit:
        raise InvalidEvent(f"max_tokens is at most {limit} here (TRIBUTARY_MAX_TOKENS_PER_ANSWER)")
    messages = [m.model_dump() for m in body.messages]
    prompt_tokens = await box.engine().count_tokens(messages)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    inference = str(uuid4())
    answer = Answer(
        inference=inference,
        consumer=consumer,
        adapter=adapter,
        created=box.clock() // 1_000_000,
        prompt_tokens=prompt_tokens,
        held_wei=0,
        request=ChatRequest(
            request_id=inference,
            adapter=str(adapter["adapter"]),
            messages=messages,
            max_tokens=max_tokens,
            temperature=round(body.temperature, 6),
            top_p=round(body.top_p, 6),
            seed=secrets.randbelow(2**53) if body.seed is None else body.seed,
            stop=stop,
        ),
    )
    answer.completion_tokens = max_tokens
    held = answer.fee_wei
    answer.completion_tokens = 0
    prepaid = await anyio.to_thread.run_sync(box.prepaid_wei, consumer)
    box.reservations.hold(consumer, held, prepaid)
    answer.held_wei = held
    return answer


async def _complete(box: Services, answer: Answer, request: Request) -> dict[str, Any]:
    try:
        async for delta in box.engine().stream(answer.request):
            answer.take(delta)
        _must_be_finished(answer)
        index = await anyio.to_thread.run_sync(_record, box, answer)
    finally:
        box.reservations.release(answer.consumer, answer.held_wei)
    return {
        **_head(answer, "chat.completion"),
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": answer.finish_reason,
                "logprobs": None,
            }
        ],
        "usage": _usage(answer),
        "tributary": _receipt(answer, index),
    }


async def _stream(box: Services, answer: Answer, *, include_usage: bool) -> AsyncIterator[str]:
    attempted = failed = False
    try:
        started = False
        async for delta in box.engine().stream(answer.request):
            answer.take(delta)
            if not started:
                started = True
                yield _chunk(answer, {"role": "assistant", "content": ""}, None)
            if delta.text:
                yield _chunk(answer, {"content": delta.text}, None)
        _must_be_finished(answer)
        # The thread is not abandoned when the client goes away during it: one attempt, no second.
        attempted = True
        index = await anyio.to_thread.run_sync(_record, box, answer)
        last = {"tributary": _receipt(answer, index)}
        yield _chunk(answer, {}, answer.finish_reason, **last)
        if include_usage:
            usage = {**_head(answer, "chat.completion.chunk"), "choices": []}
            yield _event({**usage, "usage": _usage(answer)})
        yield "data: [DONE]\n\n"
    except LedgerError:
        failed = True
        raise
    finally:
        # Also reached when the client goes away (GeneratorExit or cancellation).
        with anyio.CancelScope(shield=True):
            if failed:
                pass  # our fault: what was delivered of this answer costs nothing
            elif answer.finish_reason is None:
                await _abandon(box, answer)
            elif not attempted:
                await anyio.to_thread.run_sync(_record, box, answer)
            box.reservations.release(answer.consumer, answer.held_wei)


async def _joined(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    try:
        async for chunk in rest:
            yield chunk
    except LedgerError as error:
        # The status line is gone already; OpenAI clients raise on an `error` member.
        problem = problem_document(error)
        yield _event({"error": {"message": error.message, "type": error.slug}, **problem})


async def _abandon(box: Services, answer: Answer) -> None:
    """The client went away: stop the engine and charge what was produced."""
    with contextlib.suppress(Unavailable):
        await box.engine().cancel(answer.request.request_id)
    if answer.completion_tokens:
        answer.finish_reason = "cancelled"
        await anyio.to_thread.run_sync(_record, box, answer)


def _must_be_finished(answer: Answer) -> None:
    if answer.finish_reason is None:
        raise ComputeError("the engine stopped in the middle of the answer; nothing was charged")


def _record(box: Services, answer: Answer) -> int:
    """Store the transcript, then inference and fee in one append; the inference's leaf index."""
    salts = {"prompt_salt": secrets.token_hex(16), "output_salt": secrets.token_hex(16)}
    messages = [dict(m) for m in answer.request.messages]
    transcript = canonical_json({"v": 1, "messages": messages, "output": answer.text, **salts})
    prompt = canonical_json({"messages": messages, "salt": salts["prompt_salt"]})
    output = canonical_json({"output": answer.text, "salt": salts["output_salt"]})
    sha256 = box.blobs.put(transcript)
    fee = answer.fee_wei
    inference = {
        "inference": answer.inference,
        "adapter": answer.adapter["adapter"],
        "consumer": answer.consumer,
        "prompt_commitment": sha256_hex(prompt),
        "output_commitment": sha256_hex(output),
        "transcript_sha256": sha256,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "max_tokens": answer.request.max_tokens,
        "seed": answer.request.seed,
        "temperature_ppm": round(answer.request.temperature * PPM_WHOLE),
        "top_p_ppm": round(answer.request.top_p * PPM_WHOLE),
        "finish_reason": answer.finish_reason,
        "fee_wei": str(fee),
    }
    policy = box.ledger.need(Governance).policy
    if policy is None:
        raise NotFound("no fee policy is in force; governance sets one with fee_policy.set")
    charge = {
        "account": answer.consumer,
        "inference": answer.inference,
        "adapter": answer.adapter["adapter"],
        "policy_version": policy.version,
        "amount_wei": str(fee),
        "owner": answer.adapter["owner"],
        **{f"{part}_wei": str(wei) for part, wei in policy.split(fee).items()},
    }
    origin = box.settings.log_origin
    appended = box.ledger.append_all(
        [
            box.sign("inference.recorded", inference, uuid4()),
            box.sign("fee.charged", charge, fee_event_id(origin, answer.inference)),
        ]
    )
    return appended[0].index


def _adapter(box: Services, name: str) -> Mapping[str, Any]:
    """A published adapter by model name or id. Ids resolve through the ledger, never to a path."""
    found = box.queries.adapter_by_model(name) or box.queries.adapter(name)
    if found is None:
        raise NotFound(f"no model {name[:200]!r} is published here; GET /v1/models lists them")
    if found["status"] != "published":
        raise Forbidden(f"model {name[:200]!r} is retired")
    return found


def _model(adapter: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": adapter["model"],
        "object": "model",
        "created": int(adapter["at"]) // 1_000_000,
        "owned_by": adapter["owner"],
        "root": adapter["model"],
        "parent": adapter["base_model"],
        "adapter": adapter["adapter"],
        "input_wei_per_token": str(adapter["input_wei_per_token"]),
        "output_wei_per_token": str(adapter["output_wei_per_token"]),
    }


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{answer.inference}",
        "object": kind,
        "created": answer.created,
        "model": answer.adapter["model"],
        "system_fingerprint": str(answer.adapter["adapter_sha256"])[:16],
    }


def _chunk(answer: Answer, delta: dict[str, Any], finish: str | None, **more: Any) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    return _event({**_head(answer, "chat.completion.chunk"), "choices": [choice], **more})


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def _receipt(answer: Answer, index: int) -> dict[str, Any]:
    """What a consumer needs to see whom they paid."""
    return {
        "inference": answer.inference,
        "index": index,
        "fee_wei": str(answer.fee_wei),
        "attribution": f"/v1/inferences/{answer.inference}",
    }
