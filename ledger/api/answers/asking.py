"""Before the first token: which adapter, at what price, how many tokens, is the money there; and
the intent on disk, without which no answer begins."""

import secrets
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import anyio.to_thread

from ledger.api.answers.answer import Answer, Terms
from ledger.api.answers.bodies import Asked
from ledger.api.answers.journal import Intent
from ledger.api.answers.recording import policy_of
from ledger.api.services import Services
from ledger.errors import Forbidden, InvalidEvent, NotFound
from ledger.ports import ChatRequest


async def begin(
    box: Services, consumer: str, asked: Asked, *, inference: str, request_sha256: str | None
) -> tuple[Answer, Intent]:
    """Resolve the model, count the prompt, hold the highest fee, write the intent.

    Who gets an answer must release what it holds, and close its intent.
    """
    box.answers.check_room()
    terms = await anyio.to_thread.run_sync(_terms, box, asked.model)
    max_tokens = _max_tokens(box, asked)
    prompt_tokens = await box.engine().count_tokens(asked.messages, asked.prompt)
    answer = Answer(
        inference=inference,
        consumer=consumer,
        terms=terms,
        created=box.clock() // 1_000_000,
        prompt_tokens=prompt_tokens,
        held_wei=terms.fee_wei(prompt_tokens, max_tokens),
        salts=(secrets.token_hex(16), secrets.token_hex(16)),
        request_sha256=request_sha256,
        request=ChatRequest(
            request_id=inference,
            adapter=terms.adapter,
            messages=asked.messages,
            prompt=asked.prompt,
            max_tokens=max_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            seed=secrets.randbelow(2**53) if asked.seed is None else asked.seed,
            stop=asked.stop,
            logprobs=asked.logprobs,
            payer=consumer,
            timeout_s=box.settings.answer_timeout_s,
        ),
    )
    # The last await before the `try` that releases it: nothing can come between.
    return answer, await anyio.to_thread.run_sync(_promise, box, answer)


def adapter_row(box: Services, name: str) -> Mapping[str, Any]:
    """A published adapter by model name or id. Ids resolve through the ledger, never to a path."""
    found = box.queries.adapter_by_model(name) or box.queries.adapter(name)
    if found is None:
        raise NotFound(
            f"no model {name[:200]!r} is published here; GET /v1/models lists them",
            field="model",
            code="model_not_found",
        )
    if found["status"] != "published":
        raise Forbidden(f"model {name[:200]!r} is retired", field="model", code="model_retired")
    return found


def _terms(box: Services, name: str) -> Terms:
    """The adapter to ask. Without a fee policy there is nothing to charge by: say so first."""
    terms = Terms.of(adapter_row(box, name))
    policy_of(box)
    return terms


def _max_tokens(box: Services, asked: Asked) -> int:
    limit = box.settings.max_tokens_per_answer
    if asked.max_tokens is not None and asked.max_tokens > limit:
        raise InvalidEvent(
            f"max_tokens is at most {limit} here (TRIBUTARY_MAX_TOKENS_PER_ANSWER)",
            field="max_tokens",
        )
    return asked.max_tokens or limit


def _promise(box: Services, answer: Answer) -> Intent:
    box.reservations.hold(
        answer.consumer, answer.held_wei, lambda: box.prepaid_wei(answer.consumer)
    )
    try:
        return box.answers.journal.begin(to_intent(answer))
    except BaseException:
        box.reservations.release(answer.consumer, answer.held_wei)
        raise


# --- an answer as its intent in the journal -------------------------------------------------------


def to_intent(answer: Answer) -> dict[str, Any]:
    """All that recording the answer will need, but for what it says."""
    request = answer.request
    return {
        "inference": answer.inference,
        "consumer": answer.consumer,
        "terms": {**asdict(answer.terms), **_prices(answer.terms)},
        "created": answer.created,
        "prompt_tokens": answer.prompt_tokens,
        "salts": list(answer.salts),
        "request_sha256": answer.request_sha256,
        "messages": [dict(message) for message in request.messages],
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
    }


def _prices(terms: Terms) -> dict[str, str]:
    """Amounts are decimal strings wherever JSON holds them."""
    return {
        "input_wei_per_token": str(terms.input_wei_per_token),
        "output_wei_per_token": str(terms.output_wei_per_token),
    }


def from_intent(intent: Mapping[str, Any]) -> Answer:
    """Raises KeyError, TypeError or ValueError for an intent of another form."""
    prompt_salt, output_salt = intent["salts"]
    return Answer(
        inference=str(intent["inference"]),
        consumer=str(intent["consumer"]),
        terms=Terms.of(intent["terms"]),
        created=int(intent["created"]),
        prompt_tokens=int(intent["prompt_tokens"]),
        salts=(str(prompt_salt), str(output_salt)),
        request_sha256=intent["request_sha256"],
        request=ChatRequest(
            request_id=str(intent["inference"]),
            adapter=str(intent["terms"]["adapter"]),
            messages=intent["messages"],
            prompt=intent["prompt"],
            max_tokens=int(intent["max_tokens"]),
            temperature=float(intent["temperature"]),
            top_p=float(intent["top_p"]),
            seed=int(intent["seed"]),
        ),
    )
