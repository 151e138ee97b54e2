"""Conversations to prompts, and endings to what an OpenAI client expects.

The prompt's tokens come from `workers.training.data.prompt_ids`, where training gets them too:
an adapter must be served on the sequences that it was trained on. Knows no HTTP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ledger.errors import InvalidEvent
from workers.openlora.engine import CANCELLED, DEADLINE, LENGTH, STOP, Finish
from workers.training.data import prompt_ids

ROLES = ("system", "user", "assistant")
MAX_MESSAGES = 1_000
MAX_CHARS = 1_000_000

_OPENAI_REASON = {STOP: "stop", LENGTH: "length", DEADLINE: "length", CANCELLED: "stop"}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts as OpenAI names them. An end token that was generated counts."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Token ids of a conversation up to where the assistant speaks.

    `messages` are `{"role", "content"}` with text content, or a list of OpenAI text parts. Raises
    InvalidEvent that names the message at fault.
    """
    if not messages or len(messages) > MAX_MESSAGES:
        raise InvalidEvent(f"messages: expected 1 to {MAX_MESSAGES}, got {len(messages)}")
    plain = [_plain(i, message) for i, message in enumerate(messages)]
    size = sum(len(m["content"]) for m in plain)
    if size > MAX_CHARS:
        raise InvalidEvent(f"messages: {size} characters in all; the limit is {MAX_CHARS}")
    return tuple(prompt_ids(tokenizer, plain))


def _plain(index: int, message: Mapping[str, Any]) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if role == "developer":  # OpenAI's newer name for it
        role = "system"
    if role not in ROLES:
        raise InvalidEvent(f"messages[{index}].role is {role!r}; expected one of {ROLES}")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, Mapping) else None for p in content]
        if not all(isinstance(p, str) for p in parts):
            raise InvalidEvent(f"messages[{index}].content holds a part that is not text")
        content = "".join(str(p) for p in parts)
    if not isinstance(content, str):
        raise InvalidEvent(f"messages[{index}].content must be text, got {type(content).__name__}")
    return {"role": str(role), "content": content}


def usage(finish: Finish) -> Usage:
    return Usage(prompt_tokens=finish.prompt_tokens, completion_tokens=finish.completion_tokens)


def openai_finish_reason(reason: str) -> str:
    """'stop' or 'length'. An answer cut by its deadline reads as one cut by its length."""
    return _OPENAI_REASON[reason]
