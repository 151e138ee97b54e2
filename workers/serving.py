"""OpenLoRA behind the API: `ledger.ports.ServingEngine` over the handle of a Ray actor.

Lives in the API's process and loads no engine there. It joins the cluster that the worker service
uses at the first call, and again when the service brought up a new one: the address stands in
`<home>/ray/cluster.json`. A dead actor or cluster is ComputeError (retry), never the end of this
process; an answer that breaks off in the middle is for the caller to ask again, since its tokens
cannot be continued elsewhere.

A call to the actor costs about 1 ms, a piece of a stream about 0.3 ms.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import structlog

from ledger.errors import ComputeError, LedgerError
from ledger.ports import ChatDelta, ChatRequest
from workers import ray_cluster

log = structlog.get_logger(__name__)

CALL_TIMEOUT_S = 30.0
FIRST_PIECE_TIMEOUT_S = 120.0
"""Until the first piece: the queue, a cold adapter, an actor that is being restarted."""
PIECE_TIMEOUT_S = 60.0
LOOK_S = 1.0

T = TypeVar("T")


class RayServingEngine:
    """`home` is the workers' folder. One instance per process and event loop."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._actor: Any = None
        self._address: str | None = None
        self._resolving = asyncio.Lock()

    async def count_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        return int(await self._call(lambda actor: actor.count_tokens.remote(list(messages))))

    async def cancel(self, request_id: str) -> None:
        await self._call(lambda actor: actor.cancel.remote(request_id))

    async def stats(self) -> Mapping[str, Any]:
        return dict(await self._call(lambda actor: actor.stats.remote()))

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta]:
        """Pieces of the answer; closing the generator cancels the request.

        Raises NotFound for an adapter that is not published, InvalidEvent for what cannot be
        answered, Backpressure when the queue is full, ComputeError when the actor died.
        """
        actor = await self._resolve()
        finished = False
        try:
            pieces = actor.stream.options(num_returns="streaming").remote(request)
            timeout_s = FIRST_PIECE_TIMEOUT_S
            while not finished:
                delta = await self._within(_next(pieces), timeout_s)
                if delta is None:
                    raise ComputeError("the engine's stream ended without its last piece; retry")
                finished = delta.finish_reason is not None
                timeout_s = PIECE_TIMEOUT_S
                yield delta
        except Exception as error:
            finished = True  # nothing is left to cancel but what hangs
            if isinstance(error, TimeoutError):
                _forget(actor, request.request_id)
            raise self._designed(error) from error
        finally:
            if not finished:  # the reader went away
                _forget(actor, request.request_id)

    async def _call(self, method: Callable[[Any], Awaitable[Any]]) -> Any:
        actor = await self._resolve()
        try:
            return await self._within(_result(method(actor)), CALL_TIMEOUT_S)
        except Exception as error:
            raise self._designed(error) from error

    async def _within(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Await, but no longer than the cluster lives: a call may stay open for ever after."""
        task = asyncio.ensure_future(work)
        deadline = time.monotonic() + timeout_s
        try:
            while not (await asyncio.wait({task}, timeout=LOOK_S))[0]:
                if time.monotonic() > deadline:
                    raise TimeoutError
                info = ray_cluster.find(self._home)
                if info is None or info.address != self._address:
                    raise ComputeError("Ray died; another one is being started, retry")
            return task.result()
        finally:
            task.cancel()

    def _designed(self, error: Exception) -> LedgerError:
        from workers.ray_errors import designed

        found = designed(error)
        if isinstance(found, ComputeError):
            # Ray restarts the process under the same handle; a new cluster needs a new one.
            log.warning("serving failed", why=found.message)
            self._actor = None
        return found

    async def _resolve(self) -> Any:
        """The actor's handle, in the cluster that is up now."""
        info = ray_cluster.find(self._home)
        if info is None:
            raise ComputeError("no Ray runs for this home; start the worker service and retry")
        if self._actor is None or info.address != self._address:
            async with self._resolving:
                self._actor = await asyncio.to_thread(_find, info)
                self._address = info.address
        return self._actor


def _find(info: ray_cluster.ClusterInfo) -> Any:
    ray_cluster.connect(info)
    from workers.actors import find_serving_actor

    return find_serving_actor()


async def _result(reference: Awaitable[Any]) -> Any:
    return await reference


async def _next(pieces: Any) -> ChatDelta | None:
    try:
        reference = await anext(pieces)
    except StopAsyncIteration:
        return None
    delta = await reference
    assert isinstance(delta, ChatDelta)
    return delta


def _forget(actor: Any, request_id: str) -> None:
    """Cancel without waiting: this also runs where nothing may be awaited any more."""
    with contextlib.suppress(Exception):
        actor.cancel.remote(request_id)
