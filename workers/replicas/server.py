"""The replica's end of the data plane: sessions and unary calls over gRPC, on one event loop.

State of a session: its answers under way, each a task that reads the engine's stream into
`Pending`, and one sender. However a session ends (the client closed it, died, does not read, spoke
nonsense), its requests are cancelled: their rows are free at the engine's next step.
"""

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog

from ledger.errors import Backpressure, ComputeError, InvalidEvent, LedgerError
from workers.replicas import errors, protocol
from workers.replicas.backend import EngineBackend
from workers.replicas.pending import Pending
from workers.replicas.protocol import DRAINING, READY, Ended, Failed, Hello, Piece, Submit

log = structlog.get_logger(__name__)

MAX_CALLS = 256
"""RPCs at once, sessions included."""
WRITE_TIMEOUT_S = 60.0
"""A client that takes no message for so long is gone."""
BUSY_RETRY_S = 1


class ReplicaServer:
    """Serves `backend` at `host`, on a port of the system's choice. `name` and `instance` are what
    clients check."""

    def __init__(
        self,
        backend: EngineBackend,
        *,
        name: str,
        instance: str,
        pid: int,
        secret: str,
        host: str,
        max_pending: int = protocol.MAX_PENDING,
    ) -> None:
        self._backend = backend
        self._who: dict[str, Any] = {"name": name, "instance": instance, "pid": pid}
        self._secret = f"Bearer {secret}".encode()
        self._host = host
        self._max_pending = max_pending
        self._sessions: set[Session] = set()
        self._number = 0
        self._server: Any = None

    async def start(self) -> str:
        """Begin to answer; the address."""
        self._server = grpc.aio.server(
            options=protocol.CHANNEL_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        port = self._server.add_insecure_port(f"{self._host}:0")
        await self._server.start()
        return f"{self._host}:{port}"

    async def stop(self) -> None:
        await self._server.stop(grace=None)

    def hello(self) -> Hello:
        return Hello(
            **self._who,
            base_model=self._backend.base_model,
            state=DRAINING if self._backend.draining else READY,
            stuck_s=self._backend.stuck_s(),
        )

    def drain(self) -> None:
        """Refuse what is new, and have every client know; what runs goes on."""
        self._backend.draining = True
        for session in self._sessions:
            session.nudge()

    def _handlers(self) -> Any:
        unary = {
            protocol.COUNT: self._count,
            protocol.STATS: self._stats,
            protocol.HEALTH: self._health,
            protocol.DRAIN: self._drain,
        }
        codec = {"request_deserializer": protocol.unpack, "response_serializer": protocol.pack}
        return grpc.method_handlers_generic_handler(
            protocol.SERVICE,
            {
                **{
                    name: grpc.unary_unary_rpc_method_handler(self._unary(call), **codec)
                    for name, call in unary.items()
                },
                protocol.SESSION: grpc.stream_stream_rpc_method_handler(self._session, **codec),
            },
        )

    async def _authenticate(self, context: Any) -> None:
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        if not hmac.compare_digest(str(given).encode(), self._secret):
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "the secret is not this home's data-plane.secret"
            )

    def _unary(self, call: Callable[[Any], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def handler(request: Any, context: Any) -> Any:
            await self._authenticate(context)
            try:
                return {"ok": await call(request)}
            except LedgerError as error:
                return errors.to_wire(error)
            except Exception as error:
                log.exception("a call failed")
                return errors.to_wire(_mistake(error))

        return handler

    async def _count(self, request: Any) -> int:
        messages = [dict(m) for m in request.get("messages") or ()]
        return await self._backend.count_tokens(messages, request.get("prompt"))

    async def _stats(self, request: Any) -> Any:
        return self._backend.stats()

    async def _health(self, request: Any) -> Any:
        return self.hello().to_wire()

    async def _drain(self, request: Any) -> Any:
        self.drain()
        return self.hello().to_wire()

    async def _session(self, requests: AsyncIterator[Any], context: Any) -> None:
        await self._authenticate(context)
        if len(self._sessions) >= protocol.MAX_SESSIONS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{protocol.MAX_SESSIONS} clients at most (MAX_SESSIONS)",
            )
        self._number += 1
        session = Session(
            self._backend, self.hello(), number=self._number, max_pending=self._max_pending
        )
        self._sessions.add(session)
        both = [
            asyncio.create_task(session.send(context.write)),
            asyncio.create_task(session.receive(requests)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._sessions.discard(session)
            session.close()
            for task in both:
                task.cancel()
            for error in await asyncio.gather(*both, return_exceptions=True):
                if isinstance(error, LedgerError):  # that a client left is no news
                    log.warning("session ended", why=error.message)


class Session:
    """One client's requests. `send` and `receive` run until the client is gone."""

    def __init__(
        self,
        backend: EngineBackend,
        hello: Hello,
        *,
        number: int,
        max_pending: int = protocol.MAX_PENDING,
    ) -> None:
        self._backend = backend
        self._hello = hello
        self._number = number
        self._pending = Pending(max_pending)
        self._answers: dict[int, asyncio.Task[None]] = {}
        self._closed = False

    def nudge(self) -> None:
        self._pending.nudge()

    async def receive(self, messages: AsyncIterator[Any]) -> None:
        async for message in messages:
            if "submit" in message:
                self._submit(message["submit"])
            elif "cancel" in message:
                self._cancel(int(message["cancel"]))

    async def send(self, write: Callable[[Any], Awaitable[None]]) -> None:
        await _within(WRITE_TIMEOUT_S, write({"hello": self._hello.to_wire()}))
        while True:
            await self._pending.wait(protocol.HEARTBEAT_S)
            pieces = self._pending.take()
            await _within(WRITE_TIMEOUT_S, write(self._message(pieces)))
            await self._pending.pause(len(self._answers))

    def close(self) -> None:
        """Cancel what is under way; nothing is sent any more."""
        self._closed = True
        self._pending.drop()
        for task in self._answers.values():
            task.cancel()

    def _message(self, pieces: list[Piece]) -> dict[str, Any]:
        return {
            "pieces": [piece.to_wire() for piece in pieces],
            "state": DRAINING if self._backend.draining else READY,
            "others": max(0, self._backend.live - len(self._answers)),
        }

    def _submit(self, value: Any) -> None:
        submit = Submit.from_wire(value)
        number = submit.number
        if number in self._answers:
            raise InvalidEvent(f"number {number} is in use in this session")
        if len(self._answers) >= protocol.MAX_REQUESTS_PER_SESSION:
            limit = f"{protocol.MAX_REQUESTS_PER_SESSION} requests of one client at once"
            full = Backpressure(f"{limit} (MAX_REQUESTS_PER_SESSION)", retry_after_s=BUSY_RETRY_S)
            self._pending.put(Piece(number=number, end=Failed(error=full)))
            return
        self._answers[number] = asyncio.create_task(self._answer(submit))

    def _cancel(self, number: int) -> None:
        task = self._answers.get(number)
        # Not with the engine yet (its adapter is being fetched): the task itself is all there is.
        if task is not None and not self._backend.cancel(self._id(number)):
            task.cancel()

    def _id(self, number: int) -> str:
        return f"{self._number}:{number}"

    async def _answer(self, submit: Submit) -> None:
        number, begun = submit.number, False
        try:
            pieces = self._backend.generate(submit, self._id(number))
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    if number not in self._answers:
                        break
                    self._pending.put(piece, urgent=not begun)
                    begun = True
                    if self._pending.full:
                        self._too_slow()
        except LedgerError as error:
            self._end(number, Failed(error=error, resumable=isinstance(error, ComputeError)))
        except asyncio.CancelledError:
            self._end(number, Ended(reason="cancelled", prompt_tokens=0, completion_tokens=0))
            raise
        except Exception as error:
            log.exception("an answer failed")
            self._end(number, Failed(error=_mistake(error)))
        finally:
            self._answers.pop(number, None)

    def _end(self, number: int, end: Ended | Failed) -> None:
        if self._answers.pop(number, None) is not None and not self._closed:
            self._pending.put(Piece(number=number, end=end))

    def _too_slow(self) -> None:
        """The client does not read: its answers end here, and the rows are for others."""
        log.warning("a client reads too slowly", answers=len(self._answers))
        why = "the client did not read for too long (MAX_PENDING); its answers were ended"
        tasks, self._answers = self._answers, {}
        for number in self._pending.drop() | tasks.keys():
            self._pending.put(Piece(number=number, end=Failed(error=ComputeError(why))))
        for task in tasks.values():
            task.cancel()


async def _within(limit_s: float, work: Awaitable[None]) -> None:
    async with asyncio.timeout(limit_s):
        await work


def _mistake(error: Exception) -> ComputeError:
    return ComputeError(
        f"a replica made a mistake ({type(error).__name__}: {error!s:.200}); its log says where"
    )
