"""The pieces of an answer as they come from the engine, and whether anybody still listens.

A task of its own reads the engine, so that pieces which arrive while the last one is being sent are
sent as one: the further we fall behind, the less there is to do for each token. It holds no more
than an answer's tokens. Whatever ends the reading (an end, a failure, a client that went away) is
found by the one who waits in `next`.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

from ledger.errors import ComputeError
from ledger.ports import ChatDelta, ChatRequest, ServingEngine

GRACE_S = 30.0
"""How long after an answer's deadline an engine may still be silent before we give it up, and a
client may leave what was sent unread before he counts as gone."""
STOP_S = 5.0

Receive = Callable[[], Awaitable[Mapping[str, Any]]]


class Flow:
    """Belongs to one request. Who starts it stops it."""

    def __init__(
        self,
        engine: ServingEngine,
        request: ChatRequest,
        receive: Receive | None = None,
        *,
        until_gone: bool = True,
    ) -> None:
        """`receive` is ASGI's, after the whole body was read: then it tells of the end alone. With
        `until_gone`, `next` ends when the client goes away."""
        self.gone = False
        """The client went away."""
        self.on_gone: Callable[[], None] | None = None
        self.on_late: Callable[[], None] | None = None
        """Called GRACE_S after the deadline, and every GRACE_S from then on until `stop`."""
        self._engine, self._request, self._receive = engine, request, receive
        self._until_gone = until_gone
        self._deltas: list[ChatDelta] = []
        self._error: Exception | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._guard: asyncio.TimerHandle | None = None

    def start(self) -> Self:
        self._tasks.append(asyncio.create_task(self._read()))
        if self._receive is not None:
            self._tasks.append(asyncio.create_task(self._listen(self._receive)))
        if self._request.timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._guard = loop.call_later(self._request.timeout_s + GRACE_S, self._late)
        return self

    async def stop(self) -> None:
        """Cancels what still runs, in the engine too. May be called again."""
        if self._guard is not None:
            self._guard.cancel()
        running = [task for task in self._tasks if not task.done()]
        for task in running:
            task.cancel()
        if running:
            # Closing the engine's stream is what cancels the request there.
            await asyncio.wait(running, timeout=STOP_S)

    async def next(self) -> list[ChatDelta]:
        """All that has arrived since the last call, at least one; nothing once the answer is over,
        or nobody listens. Raises the engine's error after what came before it."""
        while not self._deltas and not self._ended and not self._stops:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._stops:
            return []
        if not self._deltas and self._error is not None:
            raise self._error
        found, self._deltas = self._deltas, []
        return found

    @property
    def _stops(self) -> bool:
        return self.gone and self._until_gone

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _late(self) -> None:
        if not self._ended:
            self._error = ComputeError("the engine did not answer in time; retry")
            self._ended = True
            self._wake()
        if self.on_late is not None:
            self.on_late()
        self._guard = asyncio.get_running_loop().call_later(GRACE_S, self._late)

    async def _read(self) -> None:
        try:
            stream: Any = self._engine.stream(self._request)
            try:
                async for delta in stream:
                    self._deltas.append(delta)
                    self._wake()
            finally:
                with contextlib.suppress(AttributeError):
                    await stream.aclose()
        except Exception as error:
            self._error = error
        finally:
            self._ended = True
            self._wake()

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._wake()
        if self.on_gone is not None:
            self.on_gone()
