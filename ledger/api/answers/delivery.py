"""Whole answers and streams: piece, journal, client, in this order.

A client that goes away mid-stream is charged for the tokens that were produced until we noticed;
the event says `cancelled`, as it does for an answer that the engine cut short. An answer that fails
by our fault costs nothing, however much of it was delivered, and is recorded as interrupted. Who
stays and does not read counts as gone GRACE_S after the answer's deadline: an answer that never
ended would keep its file of the journal from being emptied. An answer in one piece is made to its
end though its client has left: he may ask for it again.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ledger.api.answers.answer import CANCELLED, Answer, merged
from ledger.api.answers.flow import Flow
from ledger.api.answers.sitting import Sitting
from ledger.api.answers.wire import Pieces, event, text_json, whole
from ledger.api.problems import (
    CLIENT_CLOSED_REQUEST,
    log_failure,
    openai_error,
    problem_document,
    respond,
)
from ledger.errors import ComputeError
from ledger.ports import ChatDelta

FAILED = "failed"
# Proxies (nginx for one) would hold events back to fill a buffer.
UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def names(answer: Answer) -> dict[str, str]:
    """Headers by which a client finds its answer again."""
    return {
        "x-receipt-id": answer.inference,
        "x-inference-id": answer.inference,
        "x-request-id": answer.inference,
    }


class Journalled(Protocol):
    delivered: bool

    def deliver(self, tokens: int, text_json: bytes) -> None: ...


class Seat(Protocol):
    """What a stream needs of its `Sitting`."""

    answer: Answer

    @property
    def intent(self) -> Journalled: ...

    async def finish(self) -> Mapping[str, Any]: ...

    async def break_off(self, reason: str) -> Mapping[str, Any] | None: ...

    def delivered(self) -> None: ...

    def leave(self) -> None: ...


class WholeAnswer(JSONResponse):
    """Tells the sitting whether it was sent to somebody who was still there."""

    def __init__(self, content: Any, sitting: Sitting, flow: Flow) -> None:
        super().__init__(content, headers=names(sitting.answer))
        self._sitting, self._flow = sitting, flow

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
            if not self._flow.gone:
                self._sitting.delivered()
        finally:
            await self._flow.stop()


async def in_one_piece(sitting: Sitting, receive: Receive) -> Response:
    """Raises what the engine raises; then nothing of the answer has left, and nothing is owed."""
    answer = sitting.answer
    flow = Flow(sitting.box.engine(), answer.request, receive, until_gone=False).start()
    try:
        while deltas := await flow.next():
            delta = merged(deltas)
            answer.take(delta)
            answer.chances += delta.logprobs
        must_be_finished(answer)
        receipt = await sitting.finish()
    except BaseException:
        await flow.stop()
        raise
    finally:
        sitting.leave()
    return WholeAnswer(whole(answer, receipt), sitting, flow)


async def streamed(sitting: Sitting, receive: Receive, *, include_usage: bool) -> Response:
    """Waits for the first piece: what fails before it is answered with a status of its own."""
    flow = Flow(sitting.box.engine(), sitting.answer.request, receive).start()
    try:
        first = await flow.next()
        if not first and not flow.gone:
            must_be_finished(sitting.answer)
    except BaseException:
        sitting.leave()
        await flow.stop()
        raise
    if not first:  # nobody listens any more, and nothing was said
        sitting.leave()
        await flow.stop()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return AnswerStream(sitting, flow, first, include_usage=include_usage)


class AnswerStream(Response):
    """A stream of server-sent events. `first` are the pieces that have come already."""

    media_type = "text/event-stream"

    def __init__(
        self, sitting: Seat, flow: Flow, first: list[ChatDelta], *, include_usage: bool
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({**names(sitting.answer), **UNBUFFERED})
        del self.headers["content-length"]
        self._sitting, self._flow, self._first = sitting, flow, first
        self._pieces = Pieces(sitting.answer, include_usage=include_usage)
        self._sending: asyncio.Task[Any] | None = None
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._flow.on_gone, self._flow.on_late = self._hang_up, self._lose_patience
        try:
            await self._deliver()
        finally:
            self._sitting.leave()
            await self._flow.stop()

    async def _deliver(self) -> None:
        # Cancelled (the server stops), we leave it all as it is: the journal tells the rest.
        try:
            await self._stream()
            if self._flow.gone and self._sitting.answer.finish_reason is None:
                # Nobody listens: charge what was produced until now.
                self._sitting.answer.finish_reason = CANCELLED
                await self._flow.stop()
            must_be_finished(self._sitting.answer)
            receipt = await self._sitting.finish()
        except Exception as error:
            told = await self._sitting.break_off(FAILED)
            await (self._failed(error, told) if self._begun else self._refused(error))
        else:
            await self._write(self._pieces.closing(receipt))
            await self._write(b"", more=False)

    async def _stream(self) -> None:
        answer, intent = self._sitting.answer, self._sitting.intent
        deltas = self._first
        while deltas:
            delta = merged(deltas)
            answer.take(delta)
            text = text_json(delta.text)
            intent.deliver(answer.completion_tokens, text)
            told = self._pieces.piece(text, delta.logprobs) if delta.text or delta.logprobs else b""
            if not self._begun:
                self._begun = True
                await self._start()
                told = self._pieces.opening() + told
            if told:
                await self._write(told)
            deltas = await self._flow.next()

    async def _refused(self, error: Exception) -> None:
        """Nothing has left, for the journal could not take it: an error with its own status."""
        response = respond(Request(self._scope), error)
        self.status_code = response.status_code
        await response(self._scope, self._receive, self._send)

    async def _failed(self, error: Exception, told: Mapping[str, Any] | None) -> None:
        """The status line is gone already; OpenAI clients raise on an `error` member."""
        log_failure(str(self._scope["path"]), error, self._sitting.answer.inference)
        problem = problem_document(error)
        last = {"error": openai_error(problem), **problem}
        await self._write(event({**last, "tributary": told} if told else last))
        await self._write(b"", more=False)

    # --- the wire ------------------------------------------------------------------------------

    async def _start(self) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._guarded(head)
        self._sitting.delivered()

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        await self._guarded({"type": "http.response.body", "body": data, "more_body": more})

    async def _guarded(self, message: dict[str, Any]) -> None:
        """A client that goes away ends a `send` that waits for him, as one that fails does."""
        if self._flow.gone:
            return
        self._sending = task = asyncio.current_task()
        try:
            await self._send(message)
        except OSError:
            self._flow.gone = True
        except asyncio.CancelledError:
            if not self._flow.gone or task is None:
                raise
            task.uncancel()
        finally:
            self._sending = None

    def _lose_patience(self) -> None:
        """`_sending` is seen here only while it waits for the client."""
        if self._sending is not None:
            self._flow.gone = True
            self._hang_up()

    def _hang_up(self) -> None:
        if self._sending is not None:
            self._sending.cancel()


def must_be_finished(answer: Answer) -> None:
    if answer.finish_reason is None:
        raise ComputeError("the engine stopped in the middle of the answer; nothing was charged")
