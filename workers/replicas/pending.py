"""What a client has still to be sent: bounded, and merged when it does not come fast enough.

One event loop. A reader that keeps up gets one message a step. When more than CALM_STREAMS answers
are under way, tokens of one answer travel together for COALESCE_S: each message costs some 0.1 ms
in both processes, and more behind the API, which the model on the same cores would lack. First
tokens and endings never wait.
"""

import asyncio
import contextlib
from collections import deque

from workers.replicas.protocol import MAX_PENDING, Piece

CALM_STREAMS = 2
COALESCE_S = 0.02
MESSAGE_WEIGHT = 8_192
"""Tokens and log probabilities of one message, so that it stays below MAX_MESSAGE_BYTES."""


class Pending:
    """`put` on one side; `wait`, `take`, `pause` on the other."""

    def __init__(self, limit: int = MAX_PENDING) -> None:
        self._limit = limit
        self._pieces: deque[Piece] = deque()
        self._weight = 0
        self._news = asyncio.Event()
        self._urgent = asyncio.Event()

    @property
    def full(self) -> bool:
        return self._weight > self._limit

    def put(self, piece: Piece, *, urgent: bool = False) -> None:
        self._pieces.append(piece)
        self._weight += piece.weight
        self.nudge(urgent=urgent or piece.end is not None)

    def nudge(self, *, urgent: bool = True) -> None:
        """Have a message sent, even without a piece."""
        self._news.set()
        if urgent:
            self._urgent.set()

    def drop(self) -> set[int]:
        """Forget everything; the requests that it was of."""
        numbers = {piece.number for piece in self._pieces}
        self._pieces.clear()
        self._weight = 0
        return numbers

    async def wait(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()

    async def pause(self, streams: int) -> None:
        """Let tokens gather, unless one must go at once."""
        if streams > CALM_STREAMS:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COALESCE_S):
                    await self._urgent.wait()

    def take(self) -> list[Piece]:
        """The next message's pieces, one for each request."""
        merged: dict[int, Piece] = {}
        weight = 0
        while self._pieces and weight < MESSAGE_WEIGHT:
            piece = self._pieces.popleft()
            weight += piece.weight
            before = merged.get(piece.number)
            merged[piece.number] = piece if before is None else before.then(piece)
        self._weight -= weight
        if not self._pieces:
            self._news.clear()
            self._urgent.clear()
        return list(merged.values())
