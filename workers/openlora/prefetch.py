"""Reads adapters ahead of their turn, on a few threads, as a hint and never as a promise.

What is asked for when the line is full is dropped, and what cannot be read is left alone: the turn
itself reads it then, and says what was wrong. Threads are started when there is work and end when
there has been none for `IDLE_S`, so nothing has to be closed. When the interpreter ends it waits
for the read at hand: a thread that is stopped inside torch takes the process down with an abort.
"""

import atexit
import queue
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from workers.openlora.logs import get_logger

log = get_logger(__name__)

THREADS = 2
"""Reading is hashing and copying, which run beside Python; more would take the model's cores."""
MAX_WAITING = 64
IDLE_S = 2.0
CLOSE_S = 10.0
"""Longest wait for a read at hand when the interpreter ends."""

_LOOK_S = 0.1

T = TypeVar("T", bound=Hashable)
_open: "weakref.WeakSet[Prefetcher[Any]]" = weakref.WeakSet()


class Prefetcher(Generic[T]):
    """Calls `read(item)` once for each item that is asked for and not yet in line."""

    def __init__(self, read: Callable[[T], None]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._line: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._waiting: set[T] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = False
        self.dropped = 0
        _open.add(self)

    def ask(self, item: T) -> bool:
        """Put `item` in line; False when the line is full. Never blocks, never raises."""
        with self._lock:
            if item in self._waiting:
                return True
            if self._closed or len(self._waiting) >= MAX_WAITING:
                self.dropped += 1
                return False
            self._waiting.add(item)
            self._line.put(item)
            if len(self._threads) < min(THREADS, len(self._waiting)):
                thread = threading.Thread(target=self._work, name="openlora-ahead", daemon=True)
                self._threads.add(thread)
                thread.start()
        return True

    def close(self) -> None:
        """Read nothing more; waits for what is being read, `CLOSE_S` at most."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        for thread in threads:
            thread.join(CLOSE_S)

    def _work(self) -> None:
        idle = 0.0
        while True:
            try:
                item = self._line.get(timeout=min(IDLE_S, _LOOK_S))
                idle = 0.0
            except queue.Empty:
                idle += _LOOK_S
                with self._lock:  # `ask` counts this thread, or finds it gone: never half
                    if self._closed or (idle >= IDLE_S and self._line.empty()):
                        self._threads.discard(threading.current_thread())
                        return
                continue
            try:
                if not self._closed:
                    self._read(item)
            except Exception as e:
                log.info("openlora read nothing ahead", why=type(e).__name__)
            finally:
                with self._lock:
                    self._waiting.discard(item)
            del item  # an idle thread must not hold on to what it read last


@atexit.register
def _close_all() -> None:
    for prefetcher in list(_open):
        prefetcher.close()
