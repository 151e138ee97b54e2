"""The engine on a thread of its own, as async streams.

The thread steps while there is work and sleeps otherwise; tokens reach each caller's event loop
once per step. A caller that stops reading (its task is cancelled, its generator closed) cancels
its request, so that its row is free at the next step. Adapters are read and checked on a worker
thread: publishing does not pause running answers. Knows neither Ray nor HTTP.
"""

import asyncio
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ledger.errors import ComputeError, Conflict
from workers.openlora.engine import Delta, Engine, GenerationRequest

IDLE_WAIT_S = 1.0
"""The thread looks around at least this often; submissions wake it at once."""
TICK_S = 1e-6
"""The timeout of a request whose time is over before it is submitted."""


@dataclass(frozen=True, kw_only=True)
class _Reader:
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Delta]


class AsyncEngine:
    """`async with AsyncEngine(engine) as serving: async for delta in serving.generate(request)`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wake = threading.Event()
        self._stopping = False
        self._lock = threading.Lock()
        self._readers: dict[str, _Reader] = {}
        self._thread = threading.Thread(target=self._run, name="openlora-engine", daemon=True)

    @property
    def engine(self) -> Engine:
        return self._engine

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; open streams end with ComputeError. Blocks for one step at most."""
        with self._lock:
            self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._dispatch(self._engine.fail_all(ComputeError("the serving engine stopped; retry")))

    async def __aenter__(self) -> "AsyncEngine":
        self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.stop)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """The answer as it comes; the last delta has `finish`.

        Raises what `Engine.submit` raises before the first delta, and a Finish's error in its
        place. Closing the iterator cancels the request: a reader that may leave early wraps it in
        `contextlib.aclosing`, as Python closes an abandoned iterator only when it collects it.
        """
        request = await self._warmed(request)
        queue: asyncio.Queue[Delta] = asyncio.Queue()
        reader = _Reader(loop=asyncio.get_running_loop(), queue=queue)
        with self._lock:  # one piece with `stop`: what is submitted here is ended there
            if self._stopping:
                raise ComputeError("the serving engine stopped; retry")
            if request.request_id in self._readers:
                raise Conflict(f"request {request.request_id!r} is being answered already")
            self._engine.submit(request)
            self._readers[request.request_id] = reader
        self._wake.set()
        finished = False
        try:
            while not finished:
                delta = await queue.get()
                finished = delta.finish is not None
                if delta.finish is not None and delta.finish.error is not None:
                    raise delta.finish.error
                yield delta
        finally:
            with self._lock:
                self._readers.pop(request.request_id, None)
            if not finished:
                self.cancel(request.request_id)

    async def _warmed(self, request: GenerationRequest) -> GenerationRequest:
        """Read a cold adapter before it takes a turn; the time that takes is the request's own.

        A disk that does not answer in time leaves a request that ends at its deadline, in the
        engine as all do.
        """
        if request.adapter_id is None:
            return request
        began = time.monotonic()
        reading = asyncio.to_thread(self._engine.warm, request.adapter_id)
        if request.timeout_s is None:
            await reading
            return request
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reading, max(request.timeout_s, 0))
        left = request.timeout_s - (time.monotonic() - began)
        # At least a tick, for what is not above 0 was refused when it was asked for.
        return replace(request, timeout_s=left if request.timeout_s <= 0 else max(left, TICK_S))

    def cancel(self, request_id: str) -> bool:
        """End a request at the next step; its stream closes with finish reason `cancelled`."""
        known = self._engine.cancel(request_id)
        self._wake.set()
        return known

    async def load_adapter(
        self, adapter_id: str, path: Path | str, sha256: str, *, config_sha256: str | None = None
    ) -> None:
        """Publish; see `Engine.load_adapter`. Running answers go on meanwhile."""
        await asyncio.to_thread(
            self._engine.load_adapter, adapter_id, path, sha256, config_sha256=config_sha256
        )

    async def keep_adapter(self, adapter_id: str, *, kept: bool = True) -> None:
        """Never evict it, or give that up; see `Engine.keep_adapter`."""
        await asyncio.to_thread(self._engine.keep_adapter, adapter_id, kept=kept)

    async def replace_adapter(
        self, adapter_id: str, path: Path | str, sha256: str, *, config_sha256: str | None = None
    ) -> None:
        """A new version of a published adapter; see `Engine.replace_adapter`."""
        await asyncio.to_thread(
            self._engine.replace_adapter, adapter_id, path, sha256, config_sha256=config_sha256
        )

    def retire(self, adapter_id: str) -> None:
        self._engine.retire(adapter_id)

    def stats(self) -> dict[str, Any]:
        return self._engine.stats()

    # --- the engine's thread ---

    def _run(self) -> None:
        while not self._stopping:
            if not self._engine.has_work():
                self._wake.wait(IDLE_WAIT_S)
                self._wake.clear()
                continue
            self._dispatch(self._engine.step())

    def _dispatch(self, deltas: list[Delta]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Delta], Delta]]]
        by_loop = defaultdict(list)
        with self._lock:
            for delta in deltas:
                reader = self._readers.get(delta.request_id)
                if reader is not None:
                    by_loop[reader.loop].append((reader.queue, delta))
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # that loop is closed: nobody reads, so free the rows
                for _, delta in batch:
                    self._engine.cancel(delta.request_id)


def _put_all(batch: list[tuple[asyncio.Queue[Delta], Delta]]) -> None:
    for queue, delta in batch:
        queue.put_nowait(delta)
