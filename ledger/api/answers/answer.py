"""One answer under way: what it was asked, what it said so far, what it costs. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from ledger.domain.canonical import canonical_json
from ledger.domain.fees import fee_wei
from ledger.domain.ids import sha256_hex
from ledger.domain.money import PPM_WHOLE
from ledger.ports import ChatDelta, ChatRequest, TokenChance

FINISHED = ("stop", "length")
CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What does not change of the adapter that answers."""

    adapter: str
    model: str
    owner: str
    adapter_sha256: str
    input_wei_per_token: int
    output_wei_per_token: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        return cls(
            adapter=str(row["adapter"]),
            model=str(row["model"]),
            owner=str(row["owner"]),
            adapter_sha256=str(row["adapter_sha256"]),
            input_wei_per_token=int(row["input_wei_per_token"]),
            output_wei_per_token=int(row["output_wei_per_token"]),
        )

    def fee_wei(self, prompt_tokens: int, completion_tokens: int) -> int:
        return fee_wei(
            prompt_tokens,
            completion_tokens,
            input_wei_per_token=self.input_wei_per_token,
            output_wei_per_token=self.output_wei_per_token,
        )


@dataclass(kw_only=True)
class Answer:
    """`inference` is its id, its event's id and its receipt's. `salts` are of prompt and output;
    `request_sha256` stands where the request may be repeated by its key."""

    inference: str
    consumer: str
    terms: Terms
    request: ChatRequest
    created: int
    prompt_tokens: int
    held_wei: int = 0
    salts: tuple[str, str] = ("", "")
    request_sha256: str | None = None
    text: str = ""
    completion_tokens: int = 0
    finish_reason: str | None = None
    ended_as: str | None = None
    """The engine's own word for the end; `finish_reason` is the catalogue's."""
    chances: list[TokenChance] = field(default_factory=list)

    @property
    def chat(self) -> bool:
        return self.request.prompt is None

    @property
    def fee_wei(self) -> int:
        return self.terms.fee_wei(self.prompt_tokens, self.completion_tokens)

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
            self.ended_as = delta.finish_reason
            known = delta.finish_reason in FINISHED
            self.finish_reason = delta.finish_reason if known else CANCELLED

    # --- what is kept and committed to -------------------------------------------------------

    def transcript(self) -> bytes:
        """The blob that the event names (docs/FORMATS.md, Transcript and commitments)."""
        value = {
            "v": 1,
            **self._prompt(),
            "output": self.text,
            "prompt_salt": self.salts[0],
            "output_salt": self.salts[1],
        }
        if self.request_sha256 is not None:
            value["request_sha256"] = self.request_sha256
        return canonical_json(value)

    def body(self, transcript_sha256: str) -> dict[str, Any]:
        """The fields that `inference.recorded` and `inference.interrupted` share."""
        prompt = canonical_json({**self._prompt(), "salt": self.salts[0]})
        output = canonical_json({"output": self.text, "salt": self.salts[1]})
        return {
            "inference": self.inference,
            "adapter": self.terms.adapter,
            "consumer": self.consumer,
            "prompt_commitment": sha256_hex(prompt),
            "output_commitment": sha256_hex(output),
            "transcript_sha256": transcript_sha256,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "max_tokens": self.request.max_tokens,
            "seed": self.request.seed,
            "temperature_ppm": round(self.request.temperature * PPM_WHOLE),
            "top_p_ppm": round(self.request.top_p * PPM_WHOLE),
        }

    def _prompt(self) -> dict[str, Any]:
        if self.request.prompt is not None:
            return {"prompt": self.request.prompt}
        return {"messages": [dict(message) for message in self.request.messages]}


def merged(deltas: Sequence[ChatDelta]) -> ChatDelta:
    """Pieces that arrived together, as one."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    return replace(
        last,
        text="".join(delta.text for delta in deltas),
        completion_tokens=max(delta.completion_tokens for delta in deltas),
        prompt_tokens=max(delta.prompt_tokens for delta in deltas),
        logprobs=tuple(chance for delta in deltas for chance in delta.logprobs),
    )
