"""Who is next: a bounded queue that takes turns across payers, and across each payer's adapters.

Turns are counted in tokens, not in requests (start-time fair queueing, Goyal et al., SIGCOMM '96;
for language models VTC, Sheng et al., OSDI '24). Every payer has a meter that runs on by what its
requests are expected to cost; the lowest meter is next. Who comes back after a pause starts where
the others are now: idleness saves nothing up. So a payer with five hundred waiting requests delays
another payer's single one by a turn, over however many adapters they are spread. The same rule
chooses among the adapters of a payer.

When the request whose turn it is cannot be placed (rows pin every slot) others may pass, but only
`MAX_PASSES` of them: then nobody is admitted until it is, or a steady stream for resident adapters
would starve it.

Each named payer may hold an equal share of the queue, counting one payer that is yet to come: a
flood never closes the door to the next one. The payer "" is nobody in particular (an engine
without accounts) and has the whole queue.

Thread-safe. Knows no tensor.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ledger.errors import Backpressure

MAX_PASSES = 8
MAX_TRIES = 64
"""Most requests that are tried for one free row: with every slot pinned, each try is in vain."""
MAX_RETRY_AFTER_S = 60
UNMEASURED_RETRY_S = 2
"""What a refused caller is told while no request has ended yet, so that no pace is known."""
PACE_WINDOW = 64


class Waiting(Protocol):
    """What the queue needs to know of a request. `cost` is in expected tokens, at least 1."""

    @property
    def payer(self) -> str: ...

    @property
    def turn_key(self) -> Hashable: ...

    @property
    def cost(self) -> float: ...

    deadline: float


W = TypeVar("W", bound=Waiting)
V = TypeVar("V")


class Turns(Generic[V]):
    """Members that take turns by what they have spent. Idle ones are kept only while they owe."""

    def __init__(self, make: Callable[[], V]) -> None:
        self._make = make
        self._now = 0.0  # the meter of who was served last: where a newcomer starts
        self._spent: dict[Hashable, float] = {}
        self.members: dict[Hashable, V] = {}

    def join(self, key: Hashable) -> V:
        """The member, waiting from now on if it was not."""
        if key not in self.members:
            self._spent[key] = max(self._spent.get(key, 0.0), self._now)
            self.members[key] = self._make()
        return self.members[key]

    def leave(self, key: Hashable) -> None:
        """It waits for nothing more."""
        del self.members[key]
        if len(self._spent) > 2 * len(self.members) + PACE_WINDOW:
            self._spent = {
                k: v for k, v in self._spent.items() if k in self.members or v > self._now
            }

    def in_order(self) -> list[Hashable]:
        """Who is next first; among equals who joined first."""
        return sorted(self.members, key=self._spent.__getitem__)

    def charge(self, key: Hashable, cost: float) -> None:
        """It had a turn."""
        self._now = max(self._now, self._spent[key])
        self._spent[key] += cost

    def correct(self, key: Hashable, difference: float) -> None:
        """Its turn cost more, or less, than expected."""
        if key in self._spent:
            self._spent[key] += difference


@dataclass(slots=True)
class _Line(Generic[W]):
    """The requests of one payer for one adapter: first in, first out."""

    waiting: deque[W] = field(default_factory=deque)
    passes: int = 0


class _Payer(Generic[W]):
    def __init__(self) -> None:
        self.adapters: Turns[_Line[W]] = Turns(_Line)
        self.held = 0


class FairQueue(Generic[W]):
    """A place for `limit` requests; payers take turns, and in each turn its adapters do."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._payers: Turns[_Payer[W]] = Turns(_Payer)
        self._size = 0
        self._earliest = math.inf

    def __len__(self) -> int:
        return self._size

    @property
    def payers(self) -> int:
        """How many payers wait."""
        return len(self._payers.members)

    def push(self, item: W, *, retry_after_s: Callable[[int], int]) -> None:
        """Raises Backpressure when the queue, or the payer's share of it, is full.

        `retry_after_s(n)` says how long n requests take to get their turn.
        """
        with self._lock:
            self._check_room(item.payer, retry_after_s)
            payer = self._payers.join(item.payer)
            payer.adapters.join(item.turn_key).waiting.append(item)
            payer.held += 1
            self._size += 1
            self._earliest = min(self._earliest, item.deadline)

    def _check_room(self, name: str, retry_after_s: Callable[[int], int]) -> None:
        if self._size >= self._limit:
            after = retry_after_s(self._size)
            raise Backpressure(
                f"{self._size} requests wait, which is the limit; retry in {after} s",
                retry_after_s=after,
                code="queue_full",
            )
        known = self._payers.members.get(name)
        if known is None or not name:
            return
        share = max(1, self._limit // (self.payers + 1))
        if known.held >= share:
            after = retry_after_s(min(self._size, known.held * self.payers))
            raise Backpressure(
                f"{known.held} requests of this payer wait, its share of the queue among "
                f"{self.payers} payers is {share}; retry in {after} s",
                retry_after_s=after,
                code="payer_queue_full",
            )

    def pop(self, place: Callable[[W], bool]) -> W | None:
        """The next request for which `place` says yes; None if there is none that may go now.

        `place` is called without the lock on the heads of lines, in turn order, until it says yes.
        The thread that pops is the one that takes: no other removes what waits.
        """
        with self._lock:
            heads = list(self._heads())
        passed: list[_Line[W]] = []
        for line, head in heads:
            if place(head):
                with self._lock:
                    self._remove(line, head)
                    for other in passed:
                        other.passes += 1
                return head
            if line.passes >= MAX_PASSES:
                return None
            passed.append(line)
        return None

    def _heads(self) -> Iterator[tuple[_Line[W], W]]:
        """First requests of their lines in turn order, `MAX_TRIES` of them."""
        left = MAX_TRIES
        for name in self._payers.in_order():
            adapters = self._payers.members[name].adapters
            for key in adapters.in_order()[:left]:
                line = adapters.members[key]
                yield line, line.waiting[0]
                left -= 1
            if not left:
                return

    def _remove(self, line: _Line[W], head: W) -> None:
        payer = self._payers.members[head.payer]
        self._payers.charge(head.payer, head.cost)
        payer.adapters.charge(head.turn_key, head.cost)
        line.waiting.popleft()
        line.passes = 0
        self._drop(head.payer, head.turn_key, 1)

    def _drop(self, name: Hashable, key: Hashable, count: int) -> None:
        """`count` requests left the line; lines and payers that are empty go with them."""
        payer = self._payers.members[name]
        payer.held -= count
        self._size -= count
        if not payer.adapters.members[key].waiting:
            payer.adapters.leave(key)
        if not payer.held:
            self._payers.leave(name)

    def settle(self, item: W, actual: float) -> None:
        """A popped request has ended, and cost `actual` tokens instead of what was expected."""
        with self._lock:
            self._payers.correct(item.payer, actual - item.cost)
            payer = self._payers.members.get(item.payer)
            if payer is not None:
                payer.adapters.correct(item.turn_key, actual - item.cost)

    def take(self, unwanted: Callable[[W], bool]) -> list[W]:
        """Remove and return every waiting request that is `unwanted` (cancelled, too late)."""
        taken: list[W] = []
        with self._lock:
            self._earliest = math.inf
            for name, payer in list(self._payers.members.items()):
                for key, line in list(payer.adapters.members.items()):
                    out: list[W] = []
                    stay: deque[W] = deque()
                    for item in line.waiting:
                        (out if unwanted(item) else stay).append(item)
                    line.waiting = stay
                    self._earliest = min([self._earliest, *(item.deadline for item in stay)])
                    if out:
                        taken += out
                        self._drop(name, key, len(out))
        return taken

    def overdue(self, now: float) -> bool:
        """Whether some waiting request may be past its deadline: else `take` need not look."""
        return now >= self._earliest


class Pace:
    """How fast requests end, per second of the engine's own work (its idle time says nothing)."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque([0.0], maxlen=PACE_WINDOW + 1)

    def ended(self, busy_s: float) -> None:
        """A request ended when the engine had worked for `busy_s` seconds."""
        self._ends.append(busy_s)

    def wait_s(self, requests: int, busy_s: float) -> int:
        """Seconds in which `requests` of them end, rounded up, from 1 to MAX_RETRY_AFTER_S."""
        if len(self._ends) == 1:
            return UNMEASURED_RETRY_S
        each = (busy_s - self._ends[0]) / (len(self._ends) - 1)
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(requests * each)))
