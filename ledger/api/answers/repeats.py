"""The same request again: the recorded answer, not a second one.

`Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header) names an answer: its id is a function
of consumer, key and attempt, so the store itself keeps it from being recorded twice. The same key
with the same bytes gives what is recorded; with other bytes it is a Conflict. An answer that broke
off by our fault does not count: the same key gives a new one, of the next attempt.

OpenAI's Python client sends no such key by default, and repeats a request whose answer did not
reach it (`x-stainless-retry-count`). Such a repetition is matched by its bytes with the newest
answer to this consumer that was not delivered, as long as this process lives.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from uuid import uuid4

import anyio
import anyio.to_thread

from ledger.aggregates.inferences import inference_id
from ledger.api.answers.answer import Answer, Terms
from ledger.api.answers.recording import Recorded, entry_of, recorded_as
from ledger.api.services import Services
from ledger.domain.envelope import Entry
from ledger.errors import Conflict, InvalidEvent, Unavailable
from ledger.ports import ChatRequest

KEY_HEADER, RETRY_HEADER = "idempotency-key", "x-stainless-retry-count"
MAX_ATTEMPTS = 16
"""Answers under one key that broke off by our fault, before we ask for another key."""
WAIT_RUNNING_S = 5.0
"""How long a repeated request waits for the answer that is under way."""
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True, kw_only=True)
class New:
    """An answer yet to be given."""

    inference: str
    sha256: str
    """Of the request."""
    keyed: bool


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """An answer that was given. `recorded` is None while the ledger still owes its event."""

    answer: Answer
    recorded: Recorded | None


async def find(
    box: Services, consumer: str, path: str, raw: bytes, headers: Mapping[str, str]
) -> New | Repeated:
    """Raises Conflict for a key that was used for another request, or whose answer is under way."""
    digest = sha256(path.encode() + b"\n" + raw).hexdigest()
    key = headers.get(KEY_HEADER)
    if key is not None:
        return await _by_key(box, consumer, _checked(key), digest)
    if headers.get(RETRY_HEADER, "0") != "0":
        known = box.answers.undelivered(consumer, digest)
        found = await _look(box, known, digest, keyed=False) if known else None
        if isinstance(found, Repeated):
            return found
    fresh = inference_id(box.settings.log_origin, consumer, uuid4().hex)
    return New(inference=str(fresh), sha256=digest, keyed=False)


async def _by_key(box: Services, consumer: str, key: str, digest: str) -> New | Repeated:
    if not box.answers.looked:
        raise Unavailable("answers of an earlier process are being settled; retry in a second")
    for attempt in range(MAX_ATTEMPTS):
        id = str(inference_id(box.settings.log_origin, consumer, "key", key, attempt))
        found = await _look(box, id, digest, keyed=True)
        while found is None and id in box.answers.running:
            # The same request, a moment earlier, began while we looked.
            found = await _look(box, id, digest, keyed=True)
        if isinstance(found, Repeated):
            return found
        if found is None:
            return New(inference=id, sha256=digest, keyed=True)
    raise Conflict(
        f"{MAX_ATTEMPTS} answers under this key broke off, MAX_ATTEMPTS: choose another key",
        field="Idempotency-Key",
        code="idempotency_key_spent",
    )


async def _look(
    box: Services, inference: str, digest: str, *, keyed: bool
) -> Repeated | Entry | None:
    """The answer of that id; its entry where it broke off; None where there is none."""
    running = box.answers.running.get(inference)
    if running is not None:
        _same(running.request_sha256, digest)
        with anyio.move_on_after(WAIT_RUNNING_S):
            await running.over.wait()
        if not running.over.is_set():
            raise _under_way("the answer to this request is under way")
    owed = box.answers.owed.get(inference)
    if owed is not None and owed.reason is None:
        if keyed:
            _same(owed.answer.request_sha256, digest)
        return Repeated(answer=owed.answer, recorded=None)
    if owed is not None or inference in box.answers.unsettled:
        raise _under_way("an answer to this request broke off and is being recorded")
    return await anyio.to_thread.run_sync(_recorded, box, inference, digest if keyed else None)


def _recorded(box: Services, inference: str, digest: str | None) -> Repeated | Entry | None:
    found = entry_of(box, inference)
    if found is None:
        return None
    entry, raw = found
    if entry.envelope.type != "inference.recorded":
        if digest is not None:
            transcript = box.read_json(entry.envelope.body["transcript_sha256"])
            _same(transcript.get("request_sha256"), digest)
        return entry
    answer = _again(box, entry)
    if digest is not None:
        _same(answer.request_sha256, digest)
    return Repeated(answer=answer, recorded=recorded_as(box, entry, raw))


def _again(box: Services, entry: Entry) -> Answer:
    """The answer as it was given, from its event and its transcript. Log probabilities are not
    kept."""
    body = entry.envelope.body
    transcript: dict[str, Any] = box.read_json(body["transcript_sha256"])
    adapter = box.queries.adapter(body["adapter"])
    if adapter is None:
        raise Unavailable(f"adapter {body['adapter']} is not projected yet; retry shortly")
    return Answer(
        inference=str(body["inference"]),
        consumer=str(body["consumer"]),
        terms=Terms.of(adapter),
        created=entry.recorded_at // 1_000_000,
        prompt_tokens=int(body["prompt_tokens"]),
        completion_tokens=int(body["completion_tokens"]),
        finish_reason=str(body["finish_reason"]),
        text=str(transcript["output"]),
        request_sha256=transcript.get("request_sha256"),
        request=ChatRequest(
            request_id=str(body["inference"]),
            adapter=str(body["adapter"]),
            messages=transcript.get("messages", ()),
            prompt=transcript.get("prompt"),
            max_tokens=int(body["max_tokens"]),
        ),
    )


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise InvalidEvent(
            "Idempotency-Key must be 1 to 255 visible ASCII characters, such as a UUID",
            field="Idempotency-Key",
        )
    return key


def _same(before: str | None, now: str) -> None:
    if before != now:
        raise Conflict(
            "this Idempotency-Key was used for another request; take a new key for a new request",
            field="Idempotency-Key",
            code="idempotency_key_reused",
            retry=False,
        )


def _under_way(what: str) -> Conflict:
    return Conflict(
        f"{what}; retry in a second",
        field="Idempotency-Key",
        code="answer_in_progress",
        retry_after_s=1,
    )
