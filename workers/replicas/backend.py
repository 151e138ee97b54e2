"""The engine as a replica's clients see it: requests of the API in, pieces of answers out.

Knows the engine, its tokenizer and who loads adapters; neither gRPC nor Ray.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from ledger.errors import ComputeError, InvalidEvent, StorageError
from ledger.ports import ChatRequest, TokenChance
from workers.openlora.chat import MAX_CHARS, encode_chat
from workers.openlora.driver import AsyncEngine
from workers.openlora.engine import Delta, GenerationRequest
from workers.openlora.sampling import TokenLogprob
from workers.replicas.adapters import Adapters
from workers.replicas.protocol import Ended, Piece, Submit
from workers.replicas.tokens import TokenTexts
from workers.training.data import inert

INLINE_CHARS = 20_000
"""A longer prompt is cut into tokens on a thread, so that other answers go on meanwhile."""


class EngineBackend:
    """One engine; `generate` and the rest from one event loop."""

    def __init__(
        self,
        serving: AsyncEngine,
        adapters: Adapters,
        base_model: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serving = serving
        self._adapters = adapters
        self.base_model = base_model
        self._tokenizer = serving.engine.tokenizer
        self._texts = TokenTexts(self._tokenizer)
        self._clock = clock
        self._steps = (-1, clock())
        self.draining = False
        self.live = 0

    async def count_tokens(self, messages: Sequence[Mapping[str, str]], prompt: str | None) -> int:
        return len(await self._encode(messages, prompt))

    async def generate(self, submit: Submit, request_id: str) -> AsyncGenerator[Piece]:
        """Pieces of an answer. Raises what `LedgerAdapters.ensure` and `Engine.submit` raise, and
        ComputeError when the engine failed or the replica takes nothing new."""
        if self.draining:
            raise ComputeError("this replica is being stopped; another one takes the request")
        self.live += 1
        try:
            prompt_ids = await self._encode(submit.request.messages, submit.request.prompt)
            generation = _generation(submit, request_id, prompt_ids)
            async with contextlib.aclosing(self._healed(generation)) as deltas:
                async for delta in deltas:
                    yield self._piece(submit.number, delta)
        finally:
            self.live -= 1

    def cancel(self, request_id: str) -> bool:
        return self._serving.cancel(request_id)

    def stats(self) -> dict[str, Any]:
        return {**self._serving.stats(), "base_model": self.base_model, "streams": self.live}

    def stuck_s(self) -> float:
        """For how long the engine has had work and made no step, as far as calls of this saw."""
        now, steps = self._clock(), self._serving.engine.counters.steps
        if steps != self._steps[0] or not self._serving.engine.has_work():
            self._steps = (steps, now)
        return now - self._steps[1]

    async def _healed(self, generation: GenerationRequest) -> AsyncGenerator[Delta]:
        """The engine's deltas; an adapter whose files are damaged is fetched again, once."""
        adapter = generation.adapter_id
        for last in (False, True):
            if adapter is not None:
                await self._adapters.ensure(adapter)
            begun = False
            try:
                async with contextlib.aclosing(self._serving.generate(generation)) as deltas:
                    async for delta in deltas:
                        begun = True
                        yield delta
                return
            except StorageError:
                if begun or last or adapter is None:
                    raise
                await self._adapters.renew(adapter)

    async def _encode(
        self, messages: Sequence[Mapping[str, str]], prompt: str | None
    ) -> tuple[int, ...]:
        def encoded() -> tuple[int, ...]:
            if prompt is not None:
                return encode_prompt(self._tokenizer, prompt)
            return encode_chat(self._tokenizer, messages)

        size = len(prompt or "") + sum(len(str(m.get("content", ""))) for m in messages)
        return await asyncio.to_thread(encoded) if size > INLINE_CHARS else encoded()

    def _piece(self, number: int, delta: Delta) -> Piece:
        end = None
        if delta.finish is not None:
            end = Ended(
                reason=delta.finish.reason,
                prompt_tokens=delta.finish.prompt_tokens,
                completion_tokens=delta.finish.completion_tokens,
            )
        return Piece(
            number=number,
            text=delta.text,
            token_ids=delta.token_ids,
            chances=tuple(map(self._chance, delta.logprobs)),
            end=end,
        )

    def _chance(self, found: TokenLogprob) -> TokenChance:
        text, raw = self._texts.of(found.token_id)
        top = tuple((*self._texts.of(token_id), logprob) for token_id, logprob in found.top)
        return TokenChance(text=text, raw=raw, logprob=found.logprob, top=top)


def encode_prompt(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """Token ids of a plain prompt, special tokens in it made inert, as the tokenizer begins one."""
    if not prompt or len(prompt) > MAX_CHARS:
        raise InvalidEvent(f"prompt: expected 1 to {MAX_CHARS} characters, got {len(prompt)}")
    ids = tokenizer(inert(tokenizer, prompt))["input_ids"]
    return tuple(int(i) for i in ids)


def _generation(submit: Submit, request_id: str, prompt_ids: tuple[int, ...]) -> GenerationRequest:
    request: ChatRequest = submit.request
    return GenerationRequest(
        request_id=request_id,
        adapter_id=request.adapter,
        prompt_ids=prompt_ids,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        stop=tuple(request.stop),
        logprobs=request.logprobs,
        payer=request.payer,
        timeout_s=submit.timeout_s,
        resume_ids=submit.resume_ids,
    )
