"""What may be asked, in OpenAI's words (https://platform.openai.com/docs/api-reference), with
`top_k` as vLLM takes it.

Three kinds of fields: those that are honoured; those that would change the answer and are not
supported, which are refused by name unless they hold the value that changes nothing; and the rest,
which do not touch the answer (`user`, `metadata`, `store`, ...) and are ignored.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ledger.errors import InvalidEvent

MAX_MESSAGES = 64
MAX_CONTENT_CHARS = 32_000
MAX_CONTENT_PARTS = 64
MAX_STOPS = 4
MAX_TOP_K = 1_000_000
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
"""OpenAI's limits: `top_logprobs` of a chat, `logprobs` of a completion."""
COMPLETION_TOKENS = 16
"""What /v1/completions makes where nobody says how much: OpenAI's own default there."""
MIN_TOP_P = 1e-6  # what an event can say: parts per million

NEUTRAL: Mapping[str, Sequence[object]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"), "logit_bias": ({},), "presence_penalty": (0,),
    "frequency_penalty": (0,), "modalities": (["text"],), "audio": (), "web_search_options": (),
    "reasoning_effort": ("none",), "verbosity": ("medium",), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "min_p": (0,), "repetition_penalty": (1,), "length_penalty": (1,),
    "min_tokens": (0,), "ignore_eos": (False,), "use_beam_search": (False,),
    "stop_token_ids": ([],), "bad_words": ([],), "allowed_token_ids": (), "prompt_logprobs": (),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
    "structured_outputs": (), "chat_template": (), "chat_template_kwargs": ({},),
    "continue_final_message": (False,), "add_generation_prompt": (True,),
    "truncate_prompt_tokens": (), "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,), "response_format": ({"type": "text"},),
}  # fmt: skip
"""Fields of OpenAI and vLLM that would change the answer and are not supported, with the values
that ask for nothing. `null` always asks for nothing."""

Text = Annotated[str, Field(max_length=MAX_CONTENT_CHARS)]
_NAME = re.compile(r"[a-z][a-z_]*")


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
    include_usage: bool | None = None


class _Body(BaseModel):
    """What both routes take."""

    model_config = ConfigDict(extra="allow")
    model: Annotated[str, Field(max_length=200, pattern=r"^[^\x00]+$")]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=MIN_TOP_P, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=MAX_TOP_K)] = None
    seed: Annotated[int | None, Field(ge=0, le=2**53 - 1)] = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None

    def common(self) -> dict[str, Any]:
        """The fields of `Asked` that do not depend on the route."""
        return {
            "model": self.model,
            "temperature": round(self.temperature or 0.0, 6),
            "top_p": round(1.0 if self.top_p is None else self.top_p, 6),
            "top_k": max(0, self.top_k or 0),
            "seed": self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "stream": bool(self.stream),
            "include_usage": bool(self.stream_options and self.stream_options.include_usage),
        }


class ChatBody(_Body):
    """The fields of OpenAI's chat completion that are honoured."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None

    def asked(self) -> "Asked":
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidEvent("top_logprobs: needs logprobs = true", field="top_logprobs")
        return Asked(
            chat=True,
            messages=tuple(message.plain() for message in self.messages),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **self.common(),
        )


class CompletionBody(_Body):
    """The fields of OpenAI's older completion that are honoured: one prompt, taken as it is."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] = None

    @field_validator("prompt", mode="before")
    @classmethod
    def one_text(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if len(value) == 1 and isinstance(value[0], str):
            return value[0]
        if value and all(isinstance(item, str) for item in value):
            raise ValueError(f"{len(value)} prompts in one request; send one request for each")
        raise ValueError("lists of token ids are not supported; send the prompt as text")

    def asked(self) -> "Asked":
        assert isinstance(self.prompt, str)
        return Asked(
            chat=False,
            prompt=self.prompt,
            max_tokens=self.max_tokens or COMPLETION_TOKENS,
            logprobs=self.logprobs,
            **self.common(),
        )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request as its client meant it. `max_tokens` None: as much as is allowed. `seed` None: any.
    `logprobs` None for none, n for the chosen token's and the n likeliest."""

    chat: bool
    model: str
    messages: tuple[dict[str, str], ...] = ()
    prompt: str | None = None
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: int | None


def parse(raw: bytes, body: type[ChatBody] | type[CompletionBody]) -> Asked:
    """Raises InvalidEvent that names the field at fault.

    Pydantic's own parser bounds nesting. The standard library's does not where a library has
    raised the interpreter's recursion limit (py_ecc, under eth-account, does): it would crash.
    """
    try:
        found = body.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidEvent(f"{where}: {message}", field=_parameter(first["loc"])) from error
    for name, value in (found.model_extra or {}).items():
        _refuse(name, value)
    return found.asked()


def _refuse(name: str, value: object) -> None:
    neutral = NEUTRAL.get(name)
    if neutral is None or value is None or value in neutral:
        return
    harmless = ", ".join(map(repr, neutral)) or "nothing"
    raise InvalidEvent(
        f"{name}: not supported here, and it would change the answer; leave it out "
        f"(or send what changes nothing: {harmless})",
        field=name,
    )


def _parameter(where: Sequence[int | str]) -> str | None:
    """The field as OpenAI names it, without the parts that say which variant of it was tried."""
    named = [part for part in where if isinstance(part, int) or _NAME.fullmatch(part)]
    kept = named[:1] if named and named[0] != "messages" else [p for p in named if p != "str"]
    return ".".join(map(str, kept)) or None
