"""The bytes that OpenAI clients read: chat completions, completions, and their streams of events.

What does not change from one piece of a stream to the next is made into bytes once; a piece costs
the JSON of its text and two concatenations.
"""

import json
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any

from ledger.api.answers.answer import Answer
from ledger.ports import TokenChance

LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON does not have; as OpenAI and vLLM write it."""
DONE = b"data: [DONE]\n\n"

Document = dict[str, Any]


def text_json(text: str) -> bytes:
    """A string as JSON in UTF-8."""
    return encode_basestring(text).encode()


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return (
        b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


def whole(answer: Answer, tributary: Mapping[str, Any]) -> Document:
    """The answer in one piece."""
    ending = {"index": 0, "finish_reason": answer.openai_finish_reason}
    if answer.chat:
        said: Document = {"message": {"role": "assistant", "content": answer.text}}
    else:
        said = {"text": answer.text}
    chances = Chances(answer).of(answer.chances) if answer.chances else None
    return {
        **_head(answer, stream=False),
        "choices": [{**ending, **said, "logprobs": chances}],
        "usage": usage(answer),
        "tributary": dict(tributary),
    }


class Pieces:
    """The events of one answer's stream, in order: `opening`, `piece` after `piece`, `closing`."""

    def __init__(self, answer: Answer, *, include_usage: bool) -> None:
        self._answer = answer
        self._include_usage = include_usage
        self._chances = Chances(answer)
        head = json.dumps(_head(answer, stream=True), ensure_ascii=False, separators=(",", ":"))
        self._head = b"data: " + head.encode()[:-1]
        content = b'"delta":{"content":' if answer.chat else b'"text":'
        self._before = self._head + b',"choices":[{"index":0,' + content
        self._after = (b"}" if answer.chat else b"") + b',"logprobs":'
        self._end = b',"finish_reason":null}]' + self._no_usage + b"}\n\n"
        self._plain = self._after + b"null" + self._end

    def opening(self) -> bytes:
        """Who speaks, before the first piece of a chat."""
        if not self._answer.chat:
            return b""
        return self._choice({"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, text: bytes, chances: Sequence[TokenChance] = ()) -> bytes:
        """`text` as `text_json` makes it."""
        if not chances:
            return self._before + text + self._plain
        told = json.dumps(self._chances.of(chances), ensure_ascii=False).encode()
        return self._before + text + self._after + told + self._end

    def closing(self, tributary: Mapping[str, Any]) -> bytes:
        """The ending with the receipt, the counts where they were asked for, and the end."""
        said: Document = {"delta": {}} if self._answer.chat else {"text": ""}
        last = self._choice(said, self._answer.openai_finish_reason, tributary=dict(tributary))
        if self._include_usage:
            counts = {"choices": [], "usage": usage(self._answer)}
            last += event({**_head(self._answer, stream=True), **counts})
        return last + DONE

    @property
    def _no_usage(self) -> bytes:
        return b',"usage":null' if self._include_usage else b""

    def _choice(self, said: Document, finish: str | None, **more: Any) -> bytes:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        if self._include_usage:
            more["usage"] = None
        return event({**_head(self._answer, stream=True), "choices": [choice], **more})


class Chances:
    """Log probabilities as the two routes tell them; for a completion, with places in the text."""

    def __init__(self, answer: Answer) -> None:
        self._chat = answer.chat
        self._likeliest = bool(answer.request.logprobs)
        self._offset = 0

    def of(self, chances: Sequence[TokenChance]) -> Document:
        if self._chat:
            return {"content": [_told(chance) for chance in chances], "refusal": None}
        offsets = []
        for chance in chances:
            offsets.append(self._offset)
            self._offset += len(chance.text)
        top = [_likeliest(chance) for chance in chances] if self._likeliest else None
        return {
            "tokens": [chance.text for chance in chances],
            "token_logprobs": [_finite(chance.logprob) for chance in chances],
            "top_logprobs": top,
            "text_offset": offsets,
        }


def usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def _head(answer: Answer, *, stream: bool) -> Document:
    if answer.chat:
        kind, prefix = "chat.completion.chunk" if stream else "chat.completion", "chatcmpl"
    else:
        kind, prefix = "text_completion", "cmpl"
    return {
        "id": f"{prefix}-{answer.inference}",
        "object": kind,
        "created": answer.created,
        "model": answer.terms.model,
        "system_fingerprint": answer.terms.adapter_sha256[:16],
    }


def _told(chance: TokenChance) -> Document:
    return {
        **_token(chance.text, chance.raw, chance.logprob),
        "top_logprobs": [_token(*likely) for likely in chance.top],
    }


def _token(text: str, raw: bytes, logprob: float) -> Document:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}


def _likeliest(chance: TokenChance) -> dict[str, float]:
    """The n likeliest, and the chosen one where it is not among them."""
    found = {text: _finite(logprob) for text, _, logprob in chance.top}
    return {**found, chance.text: _finite(chance.logprob)}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
