"""What goes into the engine and what comes out of it, with every limit by its name.

Plain values; nothing here knows a tensor, a row or a thread.
"""

from dataclasses import dataclass

from ledger.errors import InvalidEvent, LedgerError
from workers.openlora.errors import PromptTooLong
from workers.openlora.sampling import MAX_SEED, MAX_TEMPERATURE, TokenLogprob

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_PAYER_CHARS = 256

STOP, LENGTH, CANCELLED, DEADLINE, ERROR = "stop", "length", "cancelled", "deadline", "error"
"""Finish reasons. The first two are OpenAI's own; the others end a stream early."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes. `max_len` is prompt plus answer in tokens, at most the model's own window."""

    max_rows: int = 32
    max_len: int = 1024
    max_queue: int = 512
    """Most requests that wait, of all payers; each payer has a share of it (see `scheduler`)."""
    prefill_chunk: int = 256
    """Most prompt tokens of one row per step: bounds how long running rows wait."""
    prefill_tokens: int = 1024
    """Most prompt tokens of all rows per step, padding included (one chunk always fits)."""
    prefix_rows: int = 8
    """Rows of the key-value pool beside the batch's, where sequences are kept for later ones that
    begin alike; 0 leaves those that run at the same time to share."""
    slots: int = 64
    max_rank: int = 64
    host_bytes: int = 1 << 30
    targets: tuple[str, ...] | None = None
    """Last path segments of the linears that adapters may target; None means all linears."""
    lora_form: str | None = None
    """`working_set` or `slot_gather` (see `forms`); None chooses by the model's device."""
    static_decode: bool | None = None
    """Decode in a few fixed shapes, recorded as CUDA graphs where there is CUDA; None: there."""
    lora_kernels: str | None = None
    """`torch` keeps Triton's kernels out where they would be chosen."""
    base_names: frozenset[str] = frozenset()
    """Accepted `base_model_name_or_path` of adapters; empty leaves the check to tensor shapes."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One answer to generate. `adapter_id` None means the base model itself.

    `payer` is whose turn it takes in the queue. `top_k` 0 and `top_p` 1 cut nothing. `seed` None
    draws one, reported in `Finish.seed`. `logprobs` None asks for none, n for the chosen token's
    and the n likeliest. `timeout_s` counts from submission and includes the wait in the queue.

    `resume_ids` are the first tokens of this very answer, produced by an engine that is gone. They
    are read like a prompt and not emitted again, but they count as output (limit, stop strings,
    usage, which random number is next): the answer goes on as if nothing had happened. With a
    temperature it takes the `seed` that they were drawn with.
    """

    request_id: str
    adapter_id: str | None
    prompt_ids: tuple[int, ...]
    max_tokens: int
    payer: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    timeout_s: float | None = None
    ignore_eos: bool = False
    resume_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How an answer ended. Times in seconds; `ttft_s` is None when there was no token."""

    reason: str
    prompt_tokens: int
    completion_tokens: int
    seed: int
    queue_s: float
    ttft_s: float | None
    total_s: float
    error: LedgerError | None = None
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were copied (OpenAI's `cached_tokens`)."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """New tokens of one request. The texts of all deltas, joined, are the answer."""

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


def answer_limit(r: GenerationRequest, max_len: int) -> int:
    """Most tokens of the answer: what was asked for, or what the window leaves."""
    return min(r.max_tokens, max_len - len(r.prompt_ids))


def check_request(r: GenerationRequest, *, max_len: int, vocab: int, text: bool) -> None:
    """Raises InvalidEvent that names the parameter, or PromptTooLong. `text`: is there a tokenizer?

    `max_len` is the engine's window in tokens, `vocab` the number of token ids.
    """

    def need(ok: bool, what: str, got: object) -> None:
        if not ok:
            raise InvalidEvent(f"{what}; got {got!r}", request=r.request_id)

    need(bool(r.prompt_ids), "prompt_ids must hold a token at least", r.prompt_ids)
    if len(r.prompt_ids) >= max_len:
        raise PromptTooLong(
            f"the prompt has {len(r.prompt_ids)} tokens; the window is {max_len} with the "
            "answer, so shorten it",
            prompt_tokens=len(r.prompt_ids),
            limit=max_len - 1,
        )
    low, high = min(r.prompt_ids), max(r.prompt_ids)
    need(low >= 0 and high < vocab, f"token ids are from 0 to {vocab - 1}", (low, high))
    need(r.max_tokens >= 1, "max_tokens must be 1 or more", r.max_tokens)
    need(len(r.payer) <= MAX_PAYER_CHARS, f"payer has at most {MAX_PAYER_CHARS} characters", "more")
    need(
        0 <= r.temperature <= MAX_TEMPERATURE,
        f"temperature must be from 0 to {MAX_TEMPERATURE:g}",
        r.temperature,
    )
    need(0 < r.top_p <= 1, "top_p must be above 0 and at most 1", r.top_p)
    need(r.top_k >= 0, "top_k must be 0 (off) or more", r.top_k)
    need(r.seed is None or 0 <= r.seed <= MAX_SEED, "seed must be from 0 to 2^53 - 1", r.seed)
    need(len(r.stop) <= MAX_STOPS, f"at most {MAX_STOPS} stop strings", len(r.stop))
    for s in r.stop:
        need(0 < len(s) <= MAX_STOP_CHARS, f"a stop has 1 to {MAX_STOP_CHARS} characters", s)
    need(not r.stop or text, "stop strings need a tokenizer", r.stop)
    need(
        r.logprobs is None or 0 <= r.logprobs <= MAX_TOP_LOGPROBS,
        f"logprobs must be from 0 to {MAX_TOP_LOGPROBS}",
        r.logprobs,
    )
    need(r.timeout_s is None or r.timeout_s > 0, "timeout_s must be above 0", r.timeout_s)
    if r.resume_ids:
        low, high = min(r.resume_ids), max(r.resume_ids)
        need(low >= 0 and high < vocab, f"token ids are from 0 to {vocab - 1}", (low, high))
        limit = answer_limit(r, max_len)
        need(len(r.resume_ids) <= limit, f"resume_ids: at most {limit} tokens", len(r.resume_ids))
        need(
            r.temperature == 0 or r.seed is not None,
            "resume_ids with a temperature need the seed that they were drawn with",
            r.seed,
        )
