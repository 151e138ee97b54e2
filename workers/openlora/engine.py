"""One iteration at a time: requests join and leave the running batch between any two tokens.

`Engine.step()` drops what was cancelled or is too late, gives free batch rows to waiting requests,
runs one chunk of prompts, then one token for every running row (iteration-level scheduling, Orca,
OSDI '22). Rows of different adapters and of the base model share each forward.

`requests` says what comes in and goes out, `rows` how the batch is kept, `forward` how the model is
called, `models` which ones may be. `submit`, `cancel`, `load_adapter`, `retire` and `stats` may be
called from any thread; `step` from one. Knows neither Ray nor HTTP nor asyncio.
"""

import gc
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ledger.errors import ComputeError, ConfigError, Conflict, LedgerError
from workers.openlora.adapter import AdapterFiles, AdapterLimits
from workers.openlora.batch import Batch, Made
from workers.openlora.forms import build, plan
from workers.openlora.forward import Forward, decoder
from workers.openlora.kv import RowCache
from workers.openlora.layers import LoraContext, wrap_targets
from workers.openlora.logs import get_logger
from workers.openlora.memory import with_memory
from workers.openlora.meter import Meter
from workers.openlora.models import checked_window, eos_ids
from workers.openlora.prefixes import PrefixReuse, leaders_first
from workers.openlora.requests import (
    CANCELLED,
    DEADLINE,
    ERROR,
    LENGTH,
    MAX_PAYER_CHARS,
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
    STOP,
    Delta,
    EngineConfig,
    Finish,
    GenerationRequest,
    answer_limit,
    check_request,
)
from workers.openlora.rows import Row, Rows
from workers.openlora.sampling import MAX_SEED
from workers.openlora.scheduler import FairQueue, Pace
from workers.openlora.selfcheck import self_check
from workers.openlora.slots import AdapterStore, storage_like
from workers.openlora.text import TextStream

__all__ = [
    "CANCELLED",
    "DEADLINE",
    "ERROR",
    "LENGTH",
    "MAX_PAYER_CHARS",
    "MAX_STOPS",
    "MAX_STOP_CHARS",
    "MAX_TOP_LOGPROBS",
    "STOP",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineCounters",
    "Finish",
    "GenerationRequest",
]

log = get_logger(__name__)

FIRST_GUESS_TOKENS = 64.0
"""How long an answer is taken to be while none has ended."""

Ended = tuple[Row, str, Delta | None, LedgerError | None]
"""A row that is over, its finish reason, the delta of its last token, and what went wrong."""


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
    sheds: int = 0
    """Times that memory ran out and was given back."""


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
        self.max_len = checked_window(model, config.max_len)
        self.vocab_size = int(model_config.vocab_size)
        self._eos = eos_ids(model, tokenizer)
        weight = next(model.parameters())
        like = storage_like(weight.dtype, weight.device)
        context = LoraContext()
        shapes = wrap_targets(model, context, config.targets)
        if not shapes:
            raise ConfigError(f"the model has no linear named {config.targets}; nothing to adapt")
        planned = plan(config.lora_form, config.static_decode, weight.device)
        self._working, slots = build(
            planned.form,
            shapes,
            context,
            max_rows=config.max_rows,
            slots=config.slots,
            max_rank=config.max_rank,
            like=like,
            lora_kernels=config.lora_kernels,
        )
        pool_rows = config.max_rows + config.prefix_rows
        self._cache = RowCache(model_config.num_hidden_layers, pool_rows, self.max_len)
        self._prefixes = PrefixReuse(self._cache, range(config.max_rows, pool_rows))
        self._rows = Rows(cache=self._cache, working=self._working)
        forward = Forward(model, self._cache, self._working)
        self._decoder = decoder(forward, planned, config.max_rows)
        served = self_check(forward, self._decoder, config.max_rows, self.vocab_size)
        self.store = AdapterStore(
            AdapterLimits(
                targets={name: shapes[name] for name in shapes if name in served},
                max_rank=config.max_rank,
                dtype=weight.dtype,
                base_names=config.base_names,
            ),
            slots,
            host_bytes=config.host_bytes,
        )
        self._batch = Batch(forward, self._decoder, self._rows, self._prefixes, config, self._shed)
        self._queue: FairQueue[Row] = FairQueue(config.max_queue)
        self._lock = threading.Lock()  # guards _live, _cancelled and _over: a dict access each
        self._live: dict[str, Row] = {}
        self._cancelled: set[str] = set()
        self._over: list[tuple[Row, str]] = []  # resumed answers that were whole already
        self._pace = Pace()
        self._stepping = 0  # the thread that steps: recordings are its own
        self._busy_s = 0.0  # time spent in `step`
        self._typical = FIRST_GUESS_TOKENS  # moving average of an answer's length
        self._fresh: list[Row] = []  # have had their turn, and no row yet
        self.counters = EngineCounters()
        self.meter = Meter(clock)

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

        Running answers are not disturbed. Raises CorruptAdapter, UnsupportedAdapter, Conflict,
        ComputeError when there is no memory for it.
        """
        files = AdapterFiles(path=Path(path), weights_sha256=sha256, config_sha256=config_sha256)
        register = partial(self.store.register, adapter_id, files, check=check)
        with_memory(register, self._shed, f"adapter {adapter_id!r}")

    def warm(self, adapter_id: str) -> None:
        """Read an adapter ahead of its turn; raises as `load_adapter`, or UnknownAdapter."""
        with_memory(partial(self.store.warm, adapter_id), self._shed, f"adapter {adapter_id!r}")

    def replace_adapter(
        self, adapter_id: str, path: Path | str, sha256: str, *, config_sha256: str | None = None
    ) -> None:
        """Publish a new version under a known id: accepted requests finish on the old weights,
        later ones get the new. Raises UnknownAdapter and what `load_adapter` raises; then nothing
        has changed."""
        files = AdapterFiles(path=Path(path), weights_sha256=sha256, config_sha256=config_sha256)
        replace_with = partial(self.store.replace, adapter_id, files)
        with_memory(replace_with, self._shed, f"adapter {adapter_id!r}")

    def keep_adapter(self, adapter_id: str, *, kept: bool = True) -> None:
        """Never evict it, or give that up. Raises what `AdapterStore.keep` raises."""
        keep = partial(self.store.keep, adapter_id, kept=kept)
        with_memory(keep, self._shed, f"adapter {adapter_id!r}")

    def retire(self, adapter_id: str) -> None:
        """No new request for it; accepted ones finish. Raises UnknownAdapter."""
        self.store.retire(adapter_id)

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Raises InvalidEvent, PromptTooLong, UnknownAdapter, Conflict,
        Backpressure; then nothing was accepted."""
        try:
            self._accept(request)
        except LedgerError as error:
            self.meter.refused(error.slug)
            raise

    def _accept(self, request: GenerationRequest) -> None:
        check_request(
            request,
            max_len=self.max_len,
            vocab=self.vocab_size,
            text=self.tokenizer is not None,
        )
        stream = TextStream(self.tokenizer, request.stop) if self.tokenizer else None
        row = self._row_of(request, stream)
        try:
            over = self._replay(row)
            with self._lock:
                if request.request_id in self._live:
                    raise Conflict(f"request {request.request_id!r} is being answered already")
                if over is None:
                    self._queue.push(row, retry_after_s=self._retry_after_s)
                else:
                    self._over.append((row, over))
                self._live[request.request_id] = row
        except BaseException:  # whatever it is, the adapter must not stay held
            self.counters.refused += 1
            if row.entry is not None:
                self.store.release(row.entry)
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
            "decoder": self._decoder.stats(),
            "steps": self.counters.steps,
            "decode_steps": self.counters.decode_steps,
            "mixed_steps": self.counters.mixed_steps,
            "prompt_tokens": self.counters.prompt_tokens,
            "prefix_hits": self._prefixes.hits,
            "prefix_hit_tokens": self._prefixes.hit_tokens,
            "completion_tokens": self.counters.completion_tokens,
            "finished": self.counters.finished,
            "refused": self.counters.refused,
            "sheds": self.counters.sheds,
            "prefill_tokens_allowed": self._batch.prefill_tokens.now,
            "decode_rows_allowed": self._batch.decode_rows.now,
            "adapters": self.store.snapshot(),
            "metrics": self.meter.snapshot(),
        }

    # --- the engine's thread ---

    def step(self) -> list[Delta]:
        """Advance one iteration; the new tokens and endings, in no particular order.

        Out of memory, it gives back what it can, works in smaller parts, and ends those requests
        alone for which even that is too much. An iteration that fails otherwise (our own mistake)
        ends every request with ComputeError and leaves an empty engine that goes on serving.
        """
        began = self._clock()
        self._stepping = threading.get_ident()
        deltas: list[Delta] = []
        try:
            with torch.inference_mode():
                self._reap(deltas)
                self._admit(deltas)
                if self._rows.decoding < len(self._rows):
                    self._prefill(deltas)
                if self._rows.decoding:
                    self._decode(deltas)
        except Exception as e:
            log.exception("openlora step failed", rows=len(self._rows), queued=len(self._queue))
            deltas += self.fail_all(
                ComputeError(f"the serving engine failed ({type(e).__name__}); retry the request")
            )
        self.counters.steps += 1
        self._busy_s += self._clock() - began
        return deltas

    def _shed(self) -> int:
        """Give back what can be spared: adapters in host memory, recordings, torch's own reserve.
        Returns the bytes that are known of. Any thread."""
        freed = self.store.shed()
        if threading.get_ident() == self._stepping:
            self._decoder.shed()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.counters.sheds += 1
        log.warning("openlora is out of memory", freed_bytes=freed, rows=len(self._rows))
        return freed

    def fail_all(self, error: LedgerError) -> list[Delta]:
        """End everything with `error`. The engine is empty then, and may go on."""
        gone = self._queue.take(lambda r: True) + self._fresh + self._rows.clear()
        self._prefixes.forget()
        self._fresh = []
        with self._lock:
            over, self._over = self._over, []
        return [self._finish(r, ERROR, error=error) for r in [*gone, *(r for r, _ in over)]]

    def _reap(self, deltas: list[Delta]) -> None:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            over, self._over = self._over, []
        now = self._clock()

        def ended(r: Row) -> bool:
            return r.request_id in cancelled or now >= r.deadline

        def reason(r: Row) -> str:
            return CANCELLED if r.request_id in cancelled else DEADLINE

        deltas += [self._finish(r, why) for r, why in over]
        if cancelled or self._queue.overdue(now):
            deltas += [self._finish(r, reason(r)) for r in self._queue.take(ended)]
        for at in range(len(self._rows) - 1, -1, -1):
            if ended(self._rows.all[at]):
                r = self._free(at)
                deltas.append(self._finish(r, reason(r)))

    def _admit(self, deltas: list[Delta]) -> None:
        """Give free rows to whose turn it is; first to those whose prompts others begin with."""
        while len(self._rows) + len(self._fresh) < self.config.max_rows:
            row = self._queue.pop(self._place)
            if row is None:
                break
            if row.failure is not None:
                self._queue.settle(row, 0)
                deltas.append(self._finish(row, ERROR, error=row.failure))
                continue
            row.started = self._clock()
            self.meter.started(row.started - row.submitted)
            self._fresh.append(row)
        self._fresh = leaders_first(self._fresh)
        while self._fresh:
            row = self._fresh[0]
            try:
                with_memory(partial(self._rows.add, row), self._shed, "a row with its adapter")
            except ComputeError as e:
                deltas.append(self._finish(row, ERROR, error=e))
            self._fresh.pop(0)

    def _place(self, row: Row) -> bool:
        """Put the request's adapter into a slot; False when none is free now.

        An adapter that cannot be read ends its own request and no other.
        """
        if row.entry is not None:
            try:
                row.weights = with_memory(
                    partial(self.store.place, row.entry), self._shed, "the adapter"
                )
            except LedgerError as e:
                row.failure = e
                return True
            if row.weights is None:
                return False
            row.pinned = True
        return True

    def _prefill(self, deltas: list[Delta]) -> None:
        """One chunk of prompt for the rows that are first in line."""
        began = self._clock()
        counts, made = self._batch.read()
        self.counters.prompt_tokens += sum(counts)
        self.meter.prefill(rows=len(counts), tokens=sum(counts), seconds=self._clock() - began)
        self._emit(made, deltas)

    def _decode(self, deltas: list[Delta]) -> None:
        """One token for each row whose prompt is in the cache."""
        began = self._clock()
        adapters = [r.request.adapter_id for r in self._rows.all[: self._rows.decoding]]
        self._emit(self._batch.write(), deltas)
        self.counters.decode_steps += 1
        self.counters.mixed_steps += len(set(adapters)) > 1
        form, seconds = self._working.last_form, self._clock() - began
        self.meter.decode(adapters, form=form, seconds=seconds)

    def _emit(self, made: Sequence[Made], deltas: list[Delta]) -> None:
        """New tokens become text, and rows that end with theirs leave."""
        now = self._clock()
        self._meter_tokens([m.row for m in made if m.failure is None], now)
        ended: list[Ended] = []
        for m in made:
            if m.failure is not None:
                ended.append((m.row, ERROR, None, m.failure))
                continue
            r = m.row
            r.output.append(m.token)
            r.first_token = now if r.first_token is None else r.first_token
            self.counters.completion_tokens += 1
            text, reason = self._take(r, m.token, len(r.output))
            if reason is None and now >= r.deadline:
                reason = DEADLINE
            if reason is not None and r.stream is not None:
                text += r.stream.finish()
            delta = Delta(
                request_id=r.request_id,
                text=text,
                token_ids=(m.token,),
                logprobs=(m.logprob,) if m.logprob is not None else (),
            )
            if reason is None:
                deltas.append(delta)
            else:
                ended.append((r, reason, delta, None))
        self._end_rows(ended, deltas)

    def _meter_tokens(self, rows: Sequence[Row], now: float) -> None:
        gaps = [now - r.last_token for r in rows if r.last_token is not None]
        firsts = [now - r.submitted for r in rows if r.last_token is None]
        for r in rows:
            r.last_token = now
        self.meter.tokens(now, gaps, firsts)

    def _take(self, r: Row, token: int, count: int) -> tuple[str, str | None]:
        """The text that `token`, the answer's `count`-th, makes certain, and why the answer ends
        with it (None: it goes on)."""
        at_end = token in self._eos and not r.request.ignore_eos
        text = r.stream.push(token) if r.stream and not at_end else ""
        if at_end or (r.stream is not None and r.stream.stopped):
            return text, STOP
        return text, LENGTH if count >= r.limit else None

    # --- requests ---

    def _row_of(self, request: GenerationRequest, stream: TextStream | None) -> Row:
        """Holds the adapter from here on. Raises UnknownAdapter."""
        entry = None if request.adapter_id is None else self.store.acquire(request.adapter_id)
        now = self._clock()
        limit = answer_limit(request, self.max_len)
        prefill = request.prompt_ids + request.resume_ids
        answer = min(limit - len(request.resume_ids), self._typical)
        return Row(
            request=request,
            entry=entry,
            stream=stream,
            seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
            limit=limit,
            submitted=now,
            deadline=now + (math.inf if request.timeout_s is None else request.timeout_s),
            prefill=prefill,
            output=list(request.resume_ids),
            cost=len(prefill) + answer,
        )

    def _replay(self, row: Row) -> str | None:
        """Bring the text to where the tokens of `resume_ids` left it; why the answer is over, if
        it is: the engine that made them died before it could say so."""
        for count, token in enumerate(row.request.resume_ids, start=1):
            _, reason = self._take(row, token, count)
            if reason is not None:
                return reason
        return None

    def _free(self, at: int) -> Row:
        """A row is over; what it read may serve the next one that begins alike."""
        self._prefixes.keep(at, self._rows.all[at])
        return self._rows.end(at)

    def _end_rows(self, ended: Sequence[Ended], deltas: list[Delta]) -> None:
        at = {id(r): i for i, r in enumerate(self._rows.all)}
        # Highest first: the row that replaces an ended one is never one that ended too.
        for r, reason, last, error in sorted(ended, key=lambda e: -at[id(e[0])]):
            self._free(at[id(r)])
            deltas.append(self._finish(r, reason, last, error=error))

    def _finish(
        self,
        r: Row,
        reason: str,
        last: Delta | None = None,
        *,
        error: LedgerError | None = None,
    ) -> Delta:
        """Let go of what the request held; the delta that closes its stream."""
        now = self._clock()
        with self._lock:
            self._live.pop(r.request_id, None)
            self._cancelled.discard(r.request_id)
        if r.entry is not None:
            if r.pinned:
                self.store.unpin(r.entry)
            self.store.release(r.entry)
        if r.started is not None:
            self._settle(r)
        self.counters.finished += 1
        if last is None:
            text = r.stream.finish() if r.stream is not None else ""
            last = Delta(request_id=r.request_id, text=text)
        finish = Finish(
            reason=reason,
            prompt_tokens=len(r.request.prompt_ids),
            completion_tokens=len(r.output),
            seed=r.seed,
            queue_s=(now if r.started is None else r.started) - r.submitted,
            ttft_s=None if r.first_token is None else r.first_token - r.submitted,
            total_s=now - r.submitted,
            error=error,
            reused_tokens=min(r.reused, len(r.request.prompt_ids)),
        )
        self.meter.finished(
            r.request.adapter_id,
            reason,
            prompt_tokens=finish.prompt_tokens,
            completion_tokens=len(r.output) - len(r.request.resume_ids),
            ttft_s=finish.ttft_s,
            total_s=finish.total_s,
        )
        return replace(last, finish=finish)

    def _settle(self, r: Row) -> None:
        """A row is over: what it really took goes to its payer's account and into the pace."""
        made = len(r.output) - len(r.request.resume_ids)
        self._queue.settle(r, r.cached - r.reused + made)
        self._typical += 0.1 * (made - self._typical)
        self._pace.ended(self._busy_s)

    def _retry_after_s(self, requests: int) -> int:
        """How long so many requests take to get their turn, at the measured pace."""
        return self._pace.wait_s(requests, self._busy_s)
