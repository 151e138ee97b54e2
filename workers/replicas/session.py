"""One stream to one replica process, from the client's side. It ends once, for good; the fleet
makes the next one.

State: CONNECTING, then READY or DRAINING as the replica says, then DOWN with the reason. Requests
that were open when it ended get a `Failed` that is resumable. Nothing waits without a limit: the
hello for CONNECT_TIMEOUT_S, any later message for SILENCE_S.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc

from ledger.errors import ComputeError, TooLarge
from ledger.ports import ChatRequest
from workers.replicas import errors, protocol
from workers.replicas.protocol import DRAINING, READY, Failed, Hello, Lost, Piece, Submit
from workers.replicas.registry import Registration

CONNECT_TIMEOUT_S = 5.0
CONNECTING, DOWN = "connecting", "down"


class Inbox:
    """What came for one request and was not read yet. Pieces merge while nobody reads."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._piece: Piece | None = None
        self._news = asyncio.Event()
        self.ended = False
        """The last piece is here, read or not."""

    def put(self, piece: Piece) -> None:
        if self.ended:
            return
        self._piece = piece if self._piece is None else self._piece.then(piece)
        self.ended = piece.end is not None
        self._news.set()

    @property
    def unread(self) -> int:
        return 0 if self._piece is None else len(self._piece.token_ids)

    async def get(self, timeout_s: float) -> Piece:
        """The next piece. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            await self._news.wait()
        piece, self._piece = self._piece, None
        assert piece is not None
        self._news.clear()
        return piece


class Session:
    """`run` it as a task; `submit` and `call` while `state` is READY."""

    def __init__(
        self, registration: Registration, secret: str, changed: Callable[[], None] = lambda: None
    ) -> None:
        self.registration = registration
        self.state = CONNECTING
        self.why = ""
        self.greeted = False
        self._metadata = protocol.credentials(secret)
        self._changed = changed
        self._channel: Any = None
        self._inboxes: dict[int, Inbox] = {}
        self._others = 0
        self._number = 0
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()

    @property
    def load(self) -> int:
        """Requests that the replica is answering, as far as is known here."""
        return len(self._inboxes) + self._others

    async def run(self) -> None:
        """Until the stream ends; `why` says how. Raises nothing but CancelledError."""
        address = self.registration.address
        try:
            async with grpc.aio.insecure_channel(address, protocol.CLIENT_OPTIONS) as channel:
                self._channel = channel
                await self._talk(channel)
        except grpc.aio.AioRpcError as error:
            self.why = f"{error.code().name}: {error.details()}"
        except TimeoutError:
            self.why = "it says nothing"
        except ComputeError as error:
            self.why = error.message
        except Exception as error:  # what it says is no message of this version: tried again later
            self.why = f"it speaks otherwise ({type(error).__name__}: {error!s:.200})"
        finally:
            self._end()

    def submit(
        self,
        request: ChatRequest,
        *,
        resume_ids: tuple[int, ...] = (),
        timeout_s: float | None = None,
    ) -> Inbox:
        """Send a request; its pieces come into the inbox. Raises TooLarge."""
        self._number += 1
        submit = Submit(
            number=self._number, request=request, resume_ids=resume_ids, timeout_s=timeout_s
        )
        data = protocol.pack({"submit": submit.to_wire()})
        if len(data) > protocol.MAX_MESSAGE_BYTES:
            # gRPC would end the stream over it, and with it everybody's answers.
            raise TooLarge(
                f"the request has {len(data)} bytes; at most {protocol.MAX_MESSAGE_BYTES} "
                "(MAX_MESSAGE_BYTES)"
            )
        inbox = self._inboxes[self._number] = Inbox(self._number)
        if self.state == DOWN:
            inbox.put(self._lost(inbox.number))
        self._outgoing.put_nowait(data)
        return inbox

    def cancel(self, inbox: Inbox) -> None:
        """Ask for an early end; the last piece still comes."""
        if not inbox.ended:
            self._outgoing.put_nowait(protocol.pack({"cancel": inbox.number}))

    def leave(self, inbox: Inbox) -> None:
        """Nobody reads it any more: cancelled if need be, and forgotten."""
        self.cancel(inbox)
        self._inboxes.pop(inbox.number, None)

    async def call(self, method: str, value: Any, *, timeout_s: float) -> Any:
        """A unary call. Raises the designed error that came back; Lost when nothing did."""
        unary = self._channel.unary_unary(
            protocol.path(method),
            request_serializer=protocol.pack,
            response_deserializer=protocol.unpack,
        )
        try:
            found = await unary(value, metadata=self._metadata, timeout=timeout_s)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
            raise Lost(f"replica {self.registration.name} did not answer {method}") from error
        if "ok" in found:
            return found["ok"]
        raise errors.from_wire(found)

    # --- the stream ---

    async def _talk(self, channel: Any) -> None:
        stream = channel.stream_stream(
            protocol.path(protocol.SESSION),
            request_serializer=_as_it_is,
            response_deserializer=protocol.unpack,
        )(metadata=self._metadata)
        writer = asyncio.create_task(self._write(stream))
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                first = await stream.read()
            if first is grpc.aio.EOF:
                raise ComputeError("it ended the session at once")
            self._greet(Hello.from_wire(first["hello"]))
            while True:
                async with asyncio.timeout(protocol.SILENCE_S):
                    message = await stream.read()
                if message is grpc.aio.EOF:
                    raise ComputeError("it ended the session")
                self._take(message)
        finally:
            writer.cancel()
            stream.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, stream: Any) -> None:
        # A stream that broke raises here too; the reader is the one to say so.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await stream.write(await self._outgoing.get())

    def _greet(self, hello: Hello) -> None:
        known = self.registration
        if (hello.name, hello.instance) != (known.name, known.instance):
            raise ComputeError(
                f"{known.address} is replica {hello.name} {hello.instance} now, and not "
                f"{known.name} {known.instance}"
            )
        self.greeted = True
        self._set(READY if hello.state == READY else DRAINING)

    def _take(self, message: Any) -> None:
        self._others = int(message["others"])
        self._set(READY if message["state"] == READY else DRAINING)
        for value in message["pieces"]:
            piece = Piece.from_wire(value)
            inbox = self._inboxes.get(piece.number)
            if inbox is not None:
                inbox.put(piece)
                if inbox.unread > protocol.MAX_UNREAD_TOKENS and not inbox.ended:
                    self._too_slow(inbox)

    def _too_slow(self, inbox: Inbox) -> None:
        self.cancel(inbox)
        why = "nobody read the answer for too long (MAX_UNREAD_TOKENS); it was ended"
        inbox.put(Piece(number=inbox.number, end=Failed(error=ComputeError(why))))

    def _end(self) -> None:
        self._set(DOWN)
        for inbox in self._inboxes.values():
            inbox.put(self._lost(inbox.number))

    def _lost(self, number: int) -> Piece:
        why = f"replica {self.registration.name} is gone ({self.why or 'closed'})"
        return Piece(number=number, end=Failed(error=Lost(why), resumable=True))

    def _set(self, state: str) -> None:
        if state != self.state:
            self.state = state
            self._changed()


def _as_it_is(data: bytes) -> bytes:
    return data
