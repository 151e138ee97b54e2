"""The OpenAI-compatible endpoint: /v1/models and /v1/chat/completions, streaming too.

A request holds its highest possible fee, streams from OpenLoRA, and is recorded *before* the last
chunk leaves: transcript blob, then `inference.recorded` and `fee.charged` in one append. A crash
before that append leaves an answer that nobody pays for, and no half-recorded one.

A client that goes away mid-stream is charged for the tokens that were produced until we noticed;
the event says `cancelled`, as it does for an answer that the engine cut short. An answer that fails
by our fault costs nothing, however much of it was delivered.
"""

import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from uuid import uuid4

import anyio
from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import Receive, Scope, Send

from ledger.aggregates.governance import Governance
from ledger.aggregates.inferences import fee_event_id
from ledger.api.auth import Anyone, Box, Caller
from ledger.api.problems import log_failure, openai_error, problem_document
from ledger.api.raw import ChatBytes, schema_of, takes
from ledger.api.services import Services
from ledger.domain.canonical import canonical_json
from ledger.domain.fees import FeePolicy, fee_wei
from ledger.domain.ids import sha256_hex
from ledger.domain.money import PPM_WHOLE
from ledger.errors import (
    ComputeError,
    Conflict,
    Forbidden,
    InvalidEvent,
    NotFound,
    Unavailable,
)
from ledger.ports import ChatDelta, ChatRequest

router = APIRouter(tags=["openai"])

MAX_MESSAGES = 64
MAX_CONTENT_CHARS = 32_000
MAX_CONTENT_PARTS = 64
MAX_STOPS = 4
MIN_TOP_P = 1e-6  # what an event can say: parts per million
MAX_RECORDINGS = 3
FINISHED = ("stop", "length")
CANCELLED = "cancelled"

Text = Annotated[str, Field(max_length=MAX_CONTENT_CHARS)]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="ignore")
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_CONTENT_PARTS)]

    def plain(self) -> dict[str, str]:
        """Role and text; `developer` is OpenAI's newer name for `system`."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class ChatBody(BaseModel):
    """The fields of OpenAI's chat completion that are honoured; others are ignored."""

    model_config = ConfigDict(extra="ignore")
    model: Annotated[str, Field(max_length=200, pattern=r"^[^\x00]+$")]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(ge=MIN_TOP_P, le=1)] = 1.0
    seed: Annotated[int | None, Field(ge=0, le=2**53 - 1)] = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1


@router.get("/v1/models", summary="The published adapters, as OpenAI models")
def models(who: Anyone, box: Box) -> dict[str, Any]:
    names = sorted({a["model"] for a in box.queries.adapters(status="published")})
    resolved = [box.queries.adapter_by_model(name) for name in names]
    return {"object": "list", "data": [_model(a) for a in resolved if a]}


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
async def chat(raw: ChatBytes, response: Response, consumer: Caller, box: Box) -> Any:
    body = _parse(raw)
    answer = await _begin(box, consumer, body)
    headers = {"x-inference-id": answer.inference}
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        stream = _stream(box, answer, include_usage=include_usage)
        # Errors before the first token still get a proper status; later ones become an event.
        first = await anext(stream)  # the generator yields before it ends, or raises
        return _Events(first, stream, headers=headers)
    response.headers.update(headers)
    return await _complete(box, answer)


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
        return _fee_wei(self.adapter, self.prompt_tokens, self.completion_tokens)

    @property
    def openai_finish_reason(self) -> str:
        """OpenAI knows no answer that was cut short but by its length."""
        return self.finish_reason if self.finish_reason in FINISHED else "length"

    def take(self, delta: ChatDelta) -> None:
        self.text += delta.text
        self.completion_tokens = max(self.completion_tokens, delta.completion_tokens)
        self.prompt_tokens = delta.prompt_tokens or self.prompt_tokens
        if delta.finish_reason is not None:
            # An engine may end an answer for reasons of its own, such as a deadline.
            known = delta.finish_reason in FINISHED
            self.finish_reason = delta.finish_reason if known else CANCELLED


async def _begin(box: Services, consumer: str, body: ChatBody) -> Answer:
    """Resolve the model, count the prompt, hold the highest fee."""
    adapter = await anyio.to_thread.run_sync(_terms, box, body.model)
    limit = box.settings.max_tokens_per_answer
    max_tokens = body.max_completion_tokens or body.max_tokens or limit
    if max_tokens > limit:
        raise InvalidEvent(
            f"max_tokens is at most {limit} here (TRIBUTARY_MAX_TOKENS_PER_ANSWER)",
            field="max_tokens",
        )
    messages = [m.plain() for m in body.messages]
    prompt_tokens = await box.engine().count_tokens(messages)
    inference = str(uuid4())
    answer = Answer(
        inference=inference,
        consumer=consumer,
        adapter=adapter,
        created=box.clock() // 1_000_000,
        prompt_tokens=prompt_tokens,
        held_wei=_fee_wei(adapter, prompt_tokens, max_tokens),
        request=ChatRequest(
            request_id=inference,
            adapter=str(adapter["adapter"]),
            messages=messages,
            max_tokens=max_tokens,
            temperature=round(body.temperature, 6),
            top_p=round(body.top_p, 6),
            seed=secrets.randbelow(2**53) if body.seed is None else body.seed,
            stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
        ),
    )
    # The last await before the `try` that releases it: nothing can come between.
    await anyio.to_thread.run_sync(
        box.reservations.hold, consumer, answer.held_wei, lambda: box.prepaid_wei(consumer)
    )
    return answer


async def _complete(box: Services, answer: Answer) -> dict[str, Any]:
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
                "finish_reason": answer.openai_finish_reason,
                "logprobs": None,
            }
        ],
        "usage": _usage(answer),
        "tributary": _receipt(answer, index),
    }


async def _stream(
    box: Services, answer: Answer, *, include_usage: bool
) -> AsyncGenerator[str, None]:
    """The answer as events. Left in the middle (closed or cancelled) it charges what was produced;
    a failure of ours charges nothing."""
    settled = False
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
        settled = True
        index = await anyio.to_thread.run_sync(_record, box, answer)
        last = {"tributary": _receipt(answer, index)}
        yield _chunk(answer, {}, answer.openai_finish_reason, **last)
        if include_usage:
            usage = {**_head(answer, "chat.completion.chunk"), "choices": []}
            yield _event({**usage, "usage": _usage(answer)})
        yield "data: [DONE]\n\n"
    except Exception:  # ours; that the client went away is GeneratorExit or a cancellation
        settled = True
        raise
    finally:
        try:
            if not settled:
                with anyio.CancelScope(shield=True):
                    await _abandon(box, answer)
        finally:
            box.reservations.release(answer.consumer, answer.held_wei)


class _Events(StreamingResponse):
    """A stream of server-sent events. However sending ends, its source is closed before the request
    is over, not when Python happens to collect it: an answer left in the middle is settled there.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: str, rest: AsyncGenerator[str, None], *, headers: Mapping[str, str]
    ) -> None:
        # Proxies (nginx for one) would hold events back to fill a buffer.
        unbuffered = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._joined(first, rest), headers={**headers, **unbuffered})
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._path = str(scope["path"])
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._rest.aclose()

    async def _joined(self, first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
        yield first
        try:
            async for chunk in rest:
                yield chunk
        except Exception as error:
            # The status line is gone already; OpenAI clients raise on an `error` member.
            log_failure(self._path, error)
            problem = problem_document(error)
            yield _event({"error": openai_error(problem), **problem})


async def _abandon(box: Services, answer: Answer) -> None:
    """The client went away: stop the engine and charge what was produced."""
    if answer.finish_reason is None:
        answer.finish_reason = CANCELLED
        with contextlib.suppress(Unavailable):
            await box.engine().cancel(answer.request.request_id)
    if answer.completion_tokens:
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
    inference = {
        "inference": answer.inference,
        "adapter": answer.adapter["adapter"],
        "consumer": answer.consumer,
        "prompt_commitment": sha256_hex(prompt),
        "output_commitment": sha256_hex(output),
        "transcript_sha256": box.blobs.put(transcript),
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "max_tokens": answer.request.max_tokens,
        "seed": answer.request.seed,
        "temperature_ppm": round(answer.request.temperature * PPM_WHOLE),
        "top_p_ppm": round(answer.request.top_p * PPM_WHOLE),
        "finish_reason": answer.finish_reason,
        "fee_wei": str(answer.fee_wei),
    }
    for last in range(MAX_RECORDINGS)[::-1]:
        try:
            return _append(box, answer, inference)
        except Conflict:  # governance set a new fee policy just now: split by that one
            if not last:
                raise
    raise AssertionError("the last recording returns or raises")


def _append(box: Services, answer: Answer, inference: dict[str, Any]) -> int:
    policy = _policy(box)
    charge = {
        "account": answer.consumer,
        "inference": answer.inference,
        "adapter": answer.adapter["adapter"],
        "policy_version": policy.version,
        "amount_wei": inference["fee_wei"],
        "owner": answer.adapter["owner"],
        **{f"{part}_wei": str(wei) for part, wei in policy.split(answer.fee_wei).items()},
    }
    fee_event = fee_event_id(box.settings.log_origin, answer.inference)
    recorded = box.sign("inference.recorded", inference, uuid4())
    charged = box.sign("fee.charged", charge, fee_event)
    return box.ledger.append_all([recorded, charged])[0].index


def _policy(box: Services) -> FeePolicy:
    governance = box.ledger.load(Governance)
    if governance is None or governance.policy is None:
        raise Unavailable("no fee policy is in force; governance sets one with fee_policy.set")
    return governance.policy


def _terms(box: Services, name: str) -> Mapping[str, Any]:
    """The adapter to ask. Without a fee policy there is nothing to charge by: say so first."""
    adapter = _adapter(box, name)
    _policy(box)
    return adapter


def _fee_wei(adapter: Mapping[str, Any], prompt_tokens: int, completion_tokens: int) -> int:
    return fee_wei(
        prompt_tokens,
        completion_tokens,
        input_wei_per_token=int(adapter["input_wei_per_token"]),
        output_wei_per_token=int(adapter["output_wei_per_token"]),
    )


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
