"""OpenLoRA behind the API: `ledger.ports.ServingEngine` over the replicas of a home.

Lives in the API's process, which loads no engine and joins no Ray: replicas are found by their
files in the home and reached over gRPC (`workers.replicas`). A request goes to its adapter's home
replica, or the next one when that is crowded (`routing`).

A replica that dies, is stopped or fails in the middle of an answer costs time, not the answer: the
router keeps the tokens that it passed on, and another replica, or the same one once it is up again,
continues after the last of them. The caller notices a pause. Only where none comes within
`answering.RESUME_WITHIN_S`, or after `answering.MAX_RESUMES` of these, does the stream raise
ComputeError; it never just ends.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from ledger.errors import Backpressure, ComputeError, Conflict, LedgerError
from ledger.ports import ChatDelta, ChatRequest
from workers.replicas import protocol
from workers.replicas.answering import READY_WITHIN_S, Answering
from workers.replicas.fleet import Fleet, Member
from workers.replicas.protocol import Failed, Lost
from workers.replicas.routing import choose, order
from workers.replicas.session import Inbox, Session

log = structlog.get_logger(__name__)

CALL_TIMEOUT_S = 10.0
STATS_TIMEOUT_S = 2.0
MAX_ANSWERS = 4_096
"""Under way in this process, those that wait for a replica too."""
LOOK_S = 1.0
"""A waiting request looks around at least this often; changes wake it at once."""


class ServingRouter:
    """`home` is the workers' folder. One per process; it follows the event loop that uses it."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._fleet: Fleet | None = None
        self._closed: asyncio.AbstractEventLoop | None = None
        self._answers: dict[str, tuple[Answering, Session | None, Inbox | None]] = {}
        self.counts: Counter[str] = Counter()

    async def count_tokens(
        self, messages: Sequence[Mapping[str, str]], prompt: str | None = None
    ) -> int:
        value = {"messages": [dict(m) for m in messages], "prompt": prompt}
        deadline = self._clock() + READY_WITHIN_S
        while True:
            fleet = self._fleet_now()
            ready = fleet.ready()
            name = choose(None, {n: s.load for n, s in ready.items()})
            if name is None:
                await self._wait(fleet, deadline - self._clock())
                continue
            try:
                return int(await ready[name].call(protocol.COUNT, value, timeout_s=CALL_TIMEOUT_S))
            except Lost:
                if self._clock() > deadline:
                    raise
                await fleet.change(LOOK_S)

    async def cancel(self, request_id: str) -> None:
        """End an answer early: its stream closes with finish reason `cancelled`."""
        found = self._answers.get(request_id)
        if found is not None:
            answering, session, inbox = found
            answering.cancelled = True
            if session is not None and inbox is not None:
                session.cancel(inbox)

    async def stats(self) -> Mapping[str, Any]:
        """`{"replicas": [{"name", "state", "address", "stats"}], "router": {counts}}`."""
        members = self._fleet_now().members.values()
        replicas = await asyncio.gather(*map(_stats, members))
        router = {**self.counts, "answering": len(self._answers)}
        return {"replicas": list(replicas), "router": router}

    async def aclose(self) -> None:
        """Leave all replicas, for good in this event loop; answers under way raise ComputeError."""
        self._closed = asyncio.get_running_loop()
        if self._fleet is not None and self._fleet.usable:
            await self._fleet.close()
        self._fleet = None

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta]:
        """Pieces of the answer; closing the generator cancels the request.

        Raises NotFound for an adapter that is not published, InvalidEvent for what cannot be
        answered, Backpressure when every replica's queue is full or MAX_ANSWERS are under way,
        Conflict for a request id that is being answered, ComputeError when no replica could begin
        or continue it.
        """
        if request.request_id in self._answers:
            raise Conflict(f"request {request.request_id!r} is being answered already")
        if len(self._answers) >= MAX_ANSWERS:
            raise Backpressure(f"{MAX_ANSWERS} answers at once (MAX_ANSWERS)", retry_after_s=1)
        answering = Answering(request=request, clock=self._clock, submitted=self._clock())
        self._answers[request.request_id] = answering, None, None
        self.counts["requests"] += 1
        try:
            while True:
                session = await self._place(answering)
                if session is None:
                    yield answering.cut("cancelled" if answering.cancelled else "deadline")
                    return
                inbox = session.submit(
                    request, resume_ids=tuple(answering.ids), timeout_s=answering.timeout_s()
                )
                self._answers[request.request_id] = answering, session, inbox
                try:
                    first = True
                    while True:
                        piece = await _next(inbox, answering.piece_timeout_s(first))
                        first = False
                        if isinstance(piece.end, Failed):
                            self._failed(answering, session, piece.end)
                            break
                        yield answering.take(piece)
                        if piece.end is not None:
                            self.counts["finished"] += 1
                            return
                finally:
                    session.leave(inbox)
                    self._answers[request.request_id] = answering, None, None
        except LedgerError:
            self.counts["failed"] += 1
            raise
        finally:
            del self._answers[request.request_id]

    # --- where to ---

    async def _place(self, answering: Answering) -> Session | None:
        """The replica to ask, once there is one; None when the caller's own time is over, or it
        cancelled meanwhile. Raises Backpressure or ComputeError when it must not wait longer."""
        adapter = answering.request.adapter
        while True:
            left_s = answering.left_s()
            if answering.cancelled or (left_s is not None and left_s <= 0):
                return None
            fleet = self._fleet_now()
            ready = fleet.ready()
            loads = {n: s.load for n, s in ready.items() if n not in answering.full}
            name = choose(adapter, loads)
            if name is not None:
                if adapter is not None and name != order(adapter, ready)[0]:
                    self.counts["away_from_home"] += 1
                return ready[name]
            if ready and not answering.begun:
                raise min(answering.full.values(), key=lambda full: full.retry_after_s)
            answering.full.clear()
            at_most = LOOK_S if left_s is None else left_s
            await self._wait(fleet, answering.wait_s(), begun=answering.begun, at_most=at_most)

    async def _wait(
        self, fleet: Fleet, left_s: float, *, begun: bool = False, at_most: float = LOOK_S
    ) -> None:
        """For a change among the replicas. Raises ComputeError when it should not wait."""
        if not fleet.members and not begun:
            raise ComputeError("no replica runs for this home; start the worker service and retry")
        if left_s <= 0:
            why = "; ".join(f"{n}: {m.session.why}" for n, m in fleet.members.items())
            raise ComputeError(f"no replica was ready in time; retry ({why or 'none is known'})")
        self.counts["waits"] += 1
        await fleet.change(min(LOOK_S, left_s, at_most))

    def _failed(self, answering: Answering, session: Session, failed: Failed) -> None:
        """Have the answer continued elsewhere, or raise."""
        error, name = failed.error, session.registration.name
        if isinstance(error, Backpressure):
            self.counts["refused"] += 1
            answering.full[name] = error
            return
        if not failed.resumable:
            if not answering.ids or isinstance(error, ComputeError):
                raise error
            # Such as an adapter that was retired meanwhile. The caller has text already: what it
            # needs to know is that no more comes.
            raise ComputeError(f"the answer cannot be continued: {error.message}") from error
        log.warning("answer broke off", replica=name, tokens=len(answering.ids), why=error.message)
        answering.broken(error)
        self.counts["resumed"] += 1

    def _fleet_now(self) -> Fleet:
        """The sessions of this event loop; a loop that ended took its own with it."""
        if self._closed is asyncio.get_running_loop():
            raise ComputeError("the API is stopping; retry")
        if self._fleet is None or not self._fleet.usable:
            self._fleet = Fleet(self._home)
        return self._fleet

    def _clock(self) -> float:
        return asyncio.get_running_loop().time()


async def _next(inbox: Inbox, timeout_s: float) -> protocol.Piece:
    try:
        return await inbox.get(timeout_s)
    except TimeoutError:
        raise ComputeError(f"the replica brought nothing for {timeout_s:g} s; retry") from None


async def _stats(member: Member) -> dict[str, Any]:
    session = member.session
    found: Any = {}
    if session.state in (protocol.READY, protocol.DRAINING):
        try:
            found = await session.call(protocol.STATS, {}, timeout_s=STATS_TIMEOUT_S)
        except LedgerError:
            found = {}
    state = session.state if session.state in (protocol.READY, protocol.DRAINING) else "down"
    return {
        "name": member.registration.name,
        "state": state,
        "address": member.registration.address,
        "stats": found,
    }
