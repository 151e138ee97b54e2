"""Who is next: a bounded queue that takes turns across adapters.

A caller that floods one adapter delays that adapter, not the others: the queue is one line per
adapter, served round-robin. When the adapter at the head cannot be placed (rows pin every slot)
the next one may pass, but only `MAX_PASSES` times: then nobody is admitted until it is, or a
steady stream for resident adapters would starve it.

Thread-safe. Knows no tensor.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ledger.errors import Backpressure

MAX_PASSES = 8


class Waiting(Protocol):
    """What the queue needs to know of a request."""

    @property
    def request_id(self) -> str: ...

    @property
    def turn_key(self) -> object: ...


W = TypeVar("W", bound=Waiting)


@dataclass(slots=True)
class _Line(Generic[W]):
    waiting: deque[W]
    passes: int = 0


class FairQueue(Generic[W]):
    """First in, first out per adapter; adapters take turns."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._lines: OrderedDict[object, _Line[W]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, item: W, *, retry_after_s: int = 1) -> None:
        """Raises Backpressure with `retry_after_s` when `limit` requests wait."""
        with self._lock:
            if self._size >= self._limit:
                raise Backpressure(
                    f"{self._size} requests wait, which is the limit; retry in {retry_after_s} s",
                    retry_after_s=retry_after_s,
                    code="queue_full",
                )
            line = self._lines.setdefault(item.turn_key, _Line(deque()))
            line.waiting.append(item)
            self._size += 1

    def pop(self, place: Callable[[W], bool]) -> W | None:
        """The next request for which `place` says yes; None if there is none that may go now.

        `place` is called on heads of lines in turn order, without the lock, until it says yes.
        """
        with self._lock:
            keys = list(self._lines)
        for key in keys:
            with self._lock:
                line = self._lines.get(key)
                if line is None or not line.waiting:
                    continue
                head = line.waiting[0]
            if not place(head):
                line.passes += 1
                if line.passes > MAX_PASSES:
                    return None
                continue
            with self._lock:
                line.waiting.popleft()
                line.passes = 0
                self._size -= 1
                del self._lines[key]
                if line.waiting:
                    self._lines[key] = line  # to the end: its next turn comes after the others'
            return head
        return None

    def take(self, unwanted: Callable[[W], bool]) -> list[W]:
        """Remove and return every waiting request that is `unwanted` (cancelled, too late)."""
        taken: list[W] = []
        with self._lock:
            for key in list(self._lines):
                line = self._lines[key]
                out = [item for item in line.waiting if unwanted(item)]
                if out:
                    taken += out
                    line.waiting = deque(item for item in line.waiting if not unwanted(item))
                    if not line.waiting:
                        del self._lines[key]
            self._size -= len(taken)
        return taken
