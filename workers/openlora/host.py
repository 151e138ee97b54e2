"""Host memory for adapters: the middle tier, bounded in bytes and counted exactly.

Least recently used goes first, but what a waiting request needs goes after what nobody waits for,
and what an operator keeps never goes. What does not fit is not held: then the reader has it alone,
and the next one reads the disk. Not thread-safe: the store's lock is around it.
"""

from collections import OrderedDict
from typing import TYPE_CHECKING

from workers.openlora.adapter import AdapterWeights

if TYPE_CHECKING:
    from workers.openlora.slots import AdapterEntry


class HostTier:
    """Adapters by entry. Invariant: `used` is the sum of what is held, and at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        """Bytes."""
        self.used = 0
        self.evictions = 0
        """How many fell out: pushed by others, shed, or larger than all the room there is."""
        self._held: OrderedDict[AdapterEntry, AdapterWeights] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, entry: "AdapterEntry") -> bool:
        return entry in self._held

    def get(self, entry: "AdapterEntry") -> AdapterWeights | None:
        """What is held of it, used just now; None when nothing is."""
        if entry not in self._held:
            return None
        self._held.move_to_end(entry)
        return self._held[entry]

    def put(self, entry: "AdapterEntry", weights: AdapterWeights) -> bool:
        """Hold it, at the cost of others; False when it cannot be held."""
        self.pop(entry)
        if not self._make_room(weights.nbytes):
            self.evictions += 1
            return False
        self._held[entry] = weights
        self.used += weights.nbytes
        return True

    def pop(self, entry: "AdapterEntry") -> AdapterWeights | None:
        weights = self._held.pop(entry, None)
        if weights is not None:
            self.used -= weights.nbytes
        return weights

    def room_ahead(self) -> int:
        """Bytes that can be had without pushing out what somebody waits for."""
        spare = sum(w.nbytes for e, w in self._held.items() if not (e.requests or e.kept))
        return self.limit - self.used + spare

    def shed(self) -> int:
        """Let go of everything, kept adapters too: the disk has it all. Returns the bytes."""
        freed, self.used = self.used, 0
        self.evictions += len(self._held)
        self._held.clear()
        return freed

    def _make_room(self, nbytes: int) -> bool:
        if nbytes > self.limit:
            return False
        for waited_for in (False, True):
            while self.used + nbytes > self.limit:
                goes = (e for e in self._held if not e.kept and (e.requests > 0) == waited_for)
                if (victim := next(goes, None)) is None:
                    break
                self.pop(victim)
                self.evictions += 1
        return self.used + nbytes <= self.limit
