"""Reads adapters ahead of their turn, on a few threads, as a hint and never as a promise.

What is asked for when the line is full is dropped, and what cannot be read is left alone: the turn
itself reads it then, and says what was wrong. Threads are started when there is work and end when
there has been none for `IDLE_S`, so nothing has to be closed.
"""

import queue
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from workers.openlora.logs import get_logger

log = get_logger(__name__)

THREADS = 2
"""Reading is hashing and copying, which run beside Python; more would take the model's cores."""
MAX_WAITING = 64
IDLE_S = 2.0

T = TypeVar("T", bound=Hashable)


class Prefetcher(Generic[T]):
    """Calls `read(item)` once for each item that is asked for and not yet in line."""

    def __init__(self, read: Callable[[T], None]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._line: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._waiting: set[T] = set()
        self._threads = 0
        self.dropped = 0

    def ask(self, item: T) -> bool:
        """Put `item` in line; False when the line is full. Never blocks, never raises."""
        with self._lock:
            if item in self._waiting:
                return True
            if len(self._waiting) >= MAX_WAITING:
                self.dropped += 1
                return False
            self._waiting.add(item)
            self._line.put(item)
            if self._threads < min(THREADS, len(self._waiting)):
                self._threads += 1
                threading.Thread(target=self._work, name="openlora-prefetch", daemon=True).start()
        return True

    def _work(self) -> None:
        while True:
            try:
                item = self._line.get(timeout=IDLE_S)
            except queue.Empty:
                with self._lock:  # `ask` counts this thread, or finds it gone: never half
                    if self._line.empty():
                        self._threads -= 1
                        return
                continue
            try:
                self._read(item)
            except Exception as e:
                log.info("openlora read nothing ahead", why=type(e).__name__)
            finally:
                with self._lock:
                    self._waiting.discard(item)
            del item  # an idle thread must not hold on to what it read last
