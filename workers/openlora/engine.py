"""One iteration at a time: requests join and leave the running batch between any two tokens.

`Engine.step()` drops what was cancelled or is too late, gives free batch rows to waiting requests,
runs one chunk of prompts, then one token for every running row (iteration-level scheduling, Orca,
OSDI '22). Rows of different adapters and of the base model share each forward.

Batch rows are kept contiguous: rows [0, decoding) have their whole prompt in the cache, rows
[decoding, len(rows)) are still reading it. So every forward works on a slice of the key-value
pool and of the working set, and nothing is gathered per token. A row that ends is replaced by the
last one of its part.

`submit`, `cancel`, `load_adapter`, `retire` and `stats` may be called from any thread; `step` from
one. Knows neither Ray nor HTTP nor asyncio.
"""

import inspect
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from ledger.errors import ComputeError, ConfigError, Conflict, InvalidEvent, LedgerError
from workers.openlora.adapter import AdapterFiles, AdapterLimits
from workers.openlora.errors import PromptTooLong
from workers.openlora.kv import RowCache
from workers.openlora.layers import LoraContext, WorkingSet, wrap_targets
from workers.openlora.sampling import (
    MAX_SEED,
    MAX_TEMPERATURE,
    Draw,
    TokenLogprob,
    choose,
    logprobs,
)
from workers.openlora.scheduler import FairQueue
from workers.openlora.slots import AdapterEntry, AdapterStore, SlotTensors, storage_like
from workers.openlora.text import TextStream

log = structlog.get_logger(__name__)

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20

STOP, LENGTH, CANCELLED, DEADLINE, ERROR = "stop", "length", "cancelled", "deadline", "error"
"""Finish reasons. The first two are OpenAI's own; the others end a stream early."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes. `max_len` is prompt plus answer in tokens, at most the model's own window."""

    max_rows: int = 32
    max_len: int = 1024
    max_queue: int = 256
    prefill_chunk: int = 256
    """Most prompt tokens of one row per step: bounds how long running rows wait."""
    prefill_tokens: int = 1024
    """Most prompt tokens of all rows per step, padding included (one chunk always fits)."""
    slots: int = 64
    max_rank: int = 64
    host_bytes: int = 1 << 30
    targets: tuple[str, ...] | None = None
    """Last path segments of the linears that adapters may target; None means all linears."""
    base_names: frozenset[str] = frozenset()
    """Accepted `base_model_name_or_path` of adapters; empty leaves the check to tensor shapes."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One answer to generate. `adapter_id` None means the base model itself.

    `top_k` 0 and `top_p` 1 cut nothing. `seed` None draws one, reported in `Finish.seed`.
    `logprobs` None asks for none, n for the chosen token's and the n likeliest. `timeout_s` counts
    from submission and includes the wait in the queue.
    """

    request_id: str
    adapter_id: str | None
    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    timeout_s: float | None = None
    ignore_eos: bool = False


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


@dataclass(frozen=True, kw_only=True)
class Delta:
    """New tokens of one request. The texts of all deltas, joined, are the answer."""

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


@dataclass(kw_only=True, eq=False)
class _Sequence:
    """A request on its way. `cached` counts its positions in the key-value pool."""

    request: GenerationRequest
    entry: AdapterEntry | None
    stream: TextStream | None
    seed: int
    limit: int
    submitted: float
    deadline: float
    started: float | None = None
    first_token: float | None = None
    pinned: bool = False
    cached: int = 0
    output: list[int] = field(default_factory=list)
    failure: LedgerError | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def turn_key(self) -> object:
        return self.entry

    @property
    def prompt_left(self) -> int:
        return len(self.request.prompt_ids) - self.cached


@dataclass(kw_only=True)
class EngineCounters:
    """Counts since start."""

    steps: int = 0
    decode_steps: int = 0
    mixed_steps: int = 0
    """Decode steps whose batch held more than one adapter (the base model counts as one)."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0
    refused: int = 0


class Engine:
    """A base model, its adapters, and the running batch.

    Wraps the target linears of `model` in place. `tokenizer` None serves token ids without text
    (and refuses stop strings). Raises ConfigError for a model that it cannot serve correctly.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any | None = None,
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._clock = clock
        model_config: Any = model.config
        self.max_len = _checked_window(model, config)
        self.vocab_size = int(model_config.vocab_size)
        self._eos = _eos_ids(model, tokenizer)
        weight = next(model.parameters())
        self._dtype = weight.dtype
        like = storage_like(weight.dtype, weight.device)
        context = LoraContext()
        shapes = wrap_targets(model, context, config.targets)
        if not shapes:
            raise ConfigError(f"the model has no linear named {config.targets}; nothing to adapt")
        self._working = WorkingSet(shapes, config.max_rows, context, like=like)
        self.store = AdapterStore(
            AdapterLimits(
                targets=shapes,
                max_rank=config.max_rank,
                dtype=weight.dtype,
                base_names=config.base_names,
            ),
            SlotTensors(shapes, count=config.slots, max_rank=config.max_rank, like=like),
            host_bytes=config.host_bytes,
        )
        self._cache = RowCache(model_config.num_hidden_layers, config.max_rows, self.max_len)
        self._queue: FairQueue[_Sequence] = FairQueue(config.max_queue)
        self._rows: list[_Sequence] = []
        self._decoding = 0
        self._lock = threading.Lock()  # guards _live and _cancelled, for the time of a dict access
        self._live: dict[str, _Sequence] = {}
        self._cancelled: set[str] = set()
        self._recent_s = 1.0  # moving average of a request's time in a row
        self.counters = EngineCounters()

    # --- any thread ---

    def load_adapter(
        self,
        adapter_id: str,
        path: Path | str,
        sha256: str,
        *,
        config_sha256: str | None = None,
        check: bool = True,
    ) -> None:
        """Publish an adapter folder whose `adapter_model.safetensors` hashes to `sha256` (hex).

        Running answers are not disturbed. Raises CorruptAdapter, UnsupportedAdapter, Conflict.
        """
        files = AdapterFiles(path=Path(path), weights_sha256=sha256, config_sha256=config_sha256)
        self.store.register(adapter_id, files, check=check)

    def retire(self, adapter_id: str) -> None:
        """No new request for it; accepted ones finish. Raises UnknownAdapter."""
        self.store.retire(adapter_id)

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises InvalidEvent, PromptTooLong, UnknownAdapter, Conflict,
        Backpressure; then nothing was accepted."""
        self._check(request)
        entry = None if request.adapter_id is None else self.store.acquire(request.adapter_id)
        now = self._clock()
        sequence = _Sequence(
            request=request,
            entry=entry,
            stream=TextStream(self.tokenizer, request.stop) if self.tokenizer else None,
            seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
            limit=min(request.max_tokens, self.max_len - len(request.prompt_ids)),
            submitted=now,
            deadline=now + (math.inf if request.timeout_s is None else request.timeout_s),
        )
        try:
            with self._lock:
                if request.request_id in self._live:
                    raise Conflict(f"request {request.request_id!r} is being answered already")
                self._queue.push(sequence, retry_after_s=self._retry_after_s())
                self._live[request.request_id] = sequence
        except LedgerError:
            self.counters.refused += 1
            if entry is not None:
                self.store.release(entry)
            raise

    def cancel(self, request_id: str) -> bool:
        """End a request at the next step; False when it is not known (it may have finished)."""
        with self._lock:
            if request_id not in self._live:
                return False
            self._cancelled.add(request_id)
            return True

    def has_work(self) -> bool:
        return bool(self._live)

    def stats(self) -> dict[str, Any]:
        """A snapshot for people and metrics; counts since start."""
        return {
            "rows": len(self._rows),
            "max_rows": self.config.max_rows,
            "queued": len(self._queue),
            "max_len": self.max_len,
            "lora_form": self._working.last_form,
            "working_set_fills": self._working.fills,
            "steps": self.counters.steps,
            "decode_steps": self.counters.decode_steps,
            "mixed_steps": self.counters.mixed_steps,
            "prompt_tokens": self.counters.prompt_tokens,
            "completion_tokens": self.counters.completion_tokens,
            "finished": self.counters.finished,
            "refused": self.counters.refused,
            "adapters": self.store.snapshot(),
        }

    # --- the engine's thread ---

    def step(self) -> list[Delta]:
        """Advance one iteration; the new tokens and endings, in no particular order.

        An iteration that fails (out of memory, our own mistake) ends every request with
        ComputeError and leaves an empty engine that goes on serving.
        """
        deltas: list[Delta] = []
        try:
            with torch.inference_mode():
                self._reap(deltas)
                self._admit(deltas)
                if self._decoding < len(self._rows):
                    self._prefill(deltas)
                if self._decoding:
                    self._decode(deltas)
        except Exception as e:
            log.exception("openlora step failed", rows=len(self._rows), queued=len(self._queue))
            deltas += self.fail_all(
                ComputeError(f"the serving engine failed ({type(e).__name__}); retry the request")
            )
        self.counters.steps += 1
        return deltas

    def fail_all(self, error: LedgerError) -> list[Delta]:
        """End everything with `error`. The engine is empty then, and may go on."""
        gone = self._queue.take(lambda s: True) + self._rows
        self._rows, self._decoding = [], 0
        return [self._finish(s, ERROR, error=error) for s in gone]

    def _reap(self, deltas: list[Delta]) -> None:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
        now = self._clock()

        def ended(s: _Sequence) -> bool:
            return s.request_id in cancelled or now >= s.deadline

        def reason(s: _Sequence) -> str:
            return CANCELLED if s.request_id in cancelled else DEADLINE

        deltas += [self._finish(s, reason(s)) for s in self._queue.take(ended)]
        for row in range(len(self._rows) - 1, -1, -1):
            if ended(self._rows[row]):
                deltas.append(self._end_row(row, reason(self._rows[row])))

    def _admit(self, deltas: list[Delta]) -> None:
        while len(self._rows) < self.config.max_rows:
            sequence = self._queue.pop(self._place)
            if sequence is None:
                return
            if sequence.failure is not None:
                deltas.append(self._finish(sequence, ERROR, error=sequence.failure))
                continue
            sequence.started = self._clock()
            self._rows.append(sequence)

    def _place(self, sequence: _Sequence) -> bool:
        """Give the next free row its adapter; False when no slot is free now.

        An adapter that cannot be read ends its own request and no other.
        """
        weights = None
        if sequence.entry is not None:
            try:
                weights = self.store.place(sequence.entry)
            except LedgerError as e:
                sequence.failure = e
                return True
            if weights is None:
                return False
            sequence.pinned = True
        self._working.fill(len(self._rows), sequence.entry, weights)
        return True

    def _prefill(self, deltas: list[Delta]) -> None:
        """One chunk of prompt for the rows that are first in line."""
        lo = self._decoding
        width = max(s.prompt_left for s in self._rows[lo:])
        width = min(width, self.config.prefill_chunk)
        hi = min(len(self._rows), lo + max(1, self.config.prefill_tokens // width))
        rows = self._rows[lo:hi]
        counts = [min(s.prompt_left, width) for s in rows]
        width = max(counts)

        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for i, (s, n) in enumerate(zip(rows, counts, strict=True)):
            ids[i, :n] = torch.tensor(s.request.prompt_ids[s.cached : s.cached + n])
        column = torch.arange(width)[None]
        count = torch.tensor(counts)[:, None]
        start = torch.tensor([s.cached for s in rows])[:, None]
        # Padding repeats the row's last position for the model and writes where nobody reads.
        positions = start + torch.minimum(column, count - 1)
        writes = torch.where(column < count, positions, self.max_len)
        ends = [i for i, (s, n) in enumerate(zip(rows, counts, strict=True)) if s.prompt_left == n]
        wanted = sorted({counts[i] - 1 for i in ends}) or [0]
        logits = self._forward(lo, hi, ids, positions, writes, torch.tensor(wanted))

        for s, n in zip(rows, counts, strict=True):
            s.cached += n
            self.counters.prompt_tokens += n
        if not ends:
            return
        where = [wanted.index(counts[i] - 1) for i in ends]
        finished = self._sample(logits[ends, where], [rows[i] for i in ends], deltas)
        for i in ends:  # ascending: each goes to the end of the decoding part, never past itself
            self._promote(lo + i)
        self._end_rows(finished, deltas)

    def _decode(self, deltas: list[Delta]) -> None:
        """One token for each row whose prompt is in the cache."""
        rows = self._rows[: self._decoding]
        ids = torch.tensor([[s.output[-1]] for s in rows])
        positions = torch.tensor([[s.cached] for s in rows])
        logits = self._forward(0, len(rows), ids, positions, positions, 1)
        for s in rows:
            s.cached += 1
        self.counters.decode_steps += 1
        self.counters.mixed_steps += len({s.request.adapter_id for s in rows}) > 1
        self._end_rows(self._sample(logits[:, -1], rows, deltas), deltas)

    def _forward(
        self,
        lo: int,
        hi: int,
        ids: Tensor,
        positions: Tensor,
        writes: Tensor,
        keep: Tensor | int,
    ) -> Tensor:
        """Logits (hi - lo, kept, vocab) of rows [lo, hi); ids, positions, writes (rows, tokens)."""
        device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        length = int(positions.max()) + 1
        seen = torch.arange(length)[None, None, None] <= positions[:, None, :, None]
        mask = torch.zeros(seen.shape, dtype=torch.float32).masked_fill_(~seen, -math.inf)
        positions = positions.to(device)
        self._cache.aim(lo, hi, writes.to(device), length)
        self._working.bind(lo, hi, ids.shape[1])
        try:
            out = self.model(
                input_ids=ids.to(device),
                position_ids=positions,
                attention_mask=mask.to(device=device, dtype=self._dtype),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep if isinstance(keep, int) else keep.to(device),
            )
        finally:
            self._working.unbind()
        logits: Tensor = out.logits
        return logits

    def _sample(
        self, logits: Tensor, rows: Sequence[_Sequence], deltas: list[Delta]
    ) -> list[tuple[_Sequence, str, Delta]]:
        """Draw a token for each row; returns (sequence, finish reason, last delta) of the ended."""
        draws = [
            Draw(
                temperature=s.request.temperature,
                top_p=s.request.top_p,
                top_k=s.request.top_k,
                seed=s.seed,
                step=len(s.output),
            )
            for s in rows
        ]
        tokens = choose(logits, draws)
        now = self._clock()
        ended: list[tuple[_Sequence, str, Delta]] = []
        for i, (s, token) in enumerate(zip(rows, tokens, strict=True)):
            s.output.append(token)
            s.first_token = now if s.first_token is None else s.first_token
            self.counters.completion_tokens += 1
            at_end = token in self._eos and not s.request.ignore_eos
            text = s.stream.push(token) if s.stream and not at_end else ""
            reason = None
            if at_end or (s.stream is not None and s.stream.stopped):
                reason = STOP
            elif len(s.output) >= s.limit:
                reason = LENGTH
            if reason is not None and s.stream is not None:
                text += s.stream.finish()
            logs: tuple[TokenLogprob, ...] = ()
            if s.request.logprobs is not None:
                logs = (logprobs(logits[i], token, s.request.logprobs),)
            delta = Delta(request_id=s.request_id, text=text, token_ids=(token,), logprobs=logs)
            if reason is None:
                deltas.append(delta)
            else:
                ended.append((s, reason, delta))
        return ended

    # --- rows ---

    def _end_rows(self, ended: Sequence[tuple[_Sequence, str, Delta]], deltas: list[Delta]) -> None:
        at = {id(s): row for row, s in enumerate(self._rows)}
        # Highest first: the row that replaces an ended one is never one that ended too.
        for s, reason, last in sorted(ended, key=lambda e: -at[id(e[0])]):
            deltas.append(self._end_row(at[id(s)], reason, last))

    def _end_row(self, row: int, reason: str, last: Delta | None = None) -> Delta:
        """Free `row`: the last decoding row takes its place, the last of all takes that one's."""
        sequence = self._rows[row]
        if row < self._decoding:
            self._decoding -= 1
            self._move(self._decoding, row)
            row = self._decoding
        self._move(len(self._rows) - 1, row)
        self._rows.pop()
        return self._finish(sequence, reason, last)

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._rows[target] = self._rows[source]
            self._cache.move(source, target, self._rows[source].cached)
            self._working.move(source, target)

    def _promote(self, row: int) -> None:
        """A row whose prompt is read joins the decoding part."""
        first = self._decoding
        if row != first:
            one, other = self._rows[row], self._rows[first]
            self._rows[row], self._rows[first] = other, one
            self._cache.swap(row, first, max(one.cached, other.cached))
            self._working.swap(row, first)
        self._decoding += 1

    def _finish(
        self,
        s: _Sequence,
        reason: str,
        last: Delta | None = None,
        *,
        error: LedgerError | None = None,
    ) -> Delta:
        """Let go of what the request held; the delta that closes its stream."""
        now = self._clock()
        with self._lock:
            self._live.pop(s.request_id, None)
            self._cancelled.discard(s.request_id)
        if s.entry is not None:
            if s.pinned:
                self.store.unpin(s.entry)
            self.store.release(s.entry)
        if s.started is not None:
            self._recent_s += 0.1 * ((now - s.started) - self._recent_s)
        self.counters.finished += 1
        if last is None:
            text = s.stream.finish() if s.stream is not None else ""
            last = Delta(request_id=s.request_id, text=text)
        finish = Finish(
            reason=reason,
            prompt_tokens=len(s.request.prompt_ids),
            completion_tokens=len(s.output),
            seed=s.seed,
            queue_s=(now if s.started is None else s.started) - s.submitted,
            ttft_s=None if s.first_token is None else s.first_token - s.submitted,
            total_s=now - s.submitted,
            error=error,
        )
        return Delta(
            request_id=last.request_id,
            text=last.text,
            token_ids=last.token_ids,
            logprobs=last.logprobs,
            finish=finish,
        )

    def _retry_after_s(self) -> int:
        """How long the queue would take at the present pace, rounded up to whole seconds."""
        waves = len(self._queue) / self.config.max_rows
        return max(1, min(60, math.ceil(waves * self._recent_s)))

    def _check(self, r: GenerationRequest) -> None:
        def need(ok: bool, what: str, got: object) -> None:
            if not ok:
                raise InvalidEvent(f"{what}; got {got!r}", request=r.request_id)

        need(bool(r.prompt_ids), "prompt_ids must hold a token at least", r.prompt_ids)
        if len(r.prompt_ids) >= self.max_len:
            raise PromptTooLong(
                f"the prompt has {len(r.prompt_ids)} tokens; the window is {self.max_len} with the "
                "answer, so shorten it",
                prompt_tokens=len(r.prompt_ids),
                limit=self.max_len - 1,
            )
        low, high = min(r.prompt_ids), max(r.prompt_ids)
        need(low >= 0 and high < self.vocab_size, f"token ids are below {self.vocab_size}", high)
        need(r.max_tokens >= 1, "max_tokens must be 1 or more", r.max_tokens)
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
        need(not r.stop or self.tokenizer is not None, "stop strings need a tokenizer", r.stop)
        need(
            r.logprobs is None or 0 <= r.logprobs <= MAX_TOP_LOGPROBS,
            f"logprobs must be from 0 to {MAX_TOP_LOGPROBS}",
            r.logprobs,
        )
        need(r.timeout_s is None or r.timeout_s > 0, "timeout_s must be above 0", r.timeout_s)


def _checked_window(model: nn.Module, config: EngineConfig) -> int:
    """The usable window in tokens, or ConfigError for models that this engine would serve wrongly.

    One 4D mask goes to all layers. A sliding window that is shorter than ours, or a layer that
    keeps a recurrent state, would need more than that.
    """
    c: Any = model.config
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"{type(model).__name__} is not a causal language model of transformers 5"
        )
    if getattr(c, "_attn_implementation", "sdpa") not in ("sdpa", "eager"):
        raise ConfigError(
            f"attention {c._attn_implementation!r} takes no 4D mask; load the model with 'sdpa'"
        )
    window = min(config.max_len, int(getattr(c, "max_position_embeddings", config.max_len)))
    kinds = set(getattr(c, "layer_types", None) or ["full_attention"])
    sliding = getattr(c, "sliding_window", None)
    if kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"layers of kind {sorted(kinds)} are not supported; attention only")
    if sliding and int(sliding) < window and getattr(c, "use_sliding_window", True):
        raise ConfigError(
            f"the model's sliding window is {sliding} tokens, below max_len {window}; lower max_len"
        )
    return window


def _eos_ids(model: nn.Module, tokenizer: Any | None) -> frozenset[int]:
    generation: Any = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    ids = set(eos) if isinstance(eos, list | tuple) else {eos}
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return frozenset(int(i) for i in ids if i is not None)
