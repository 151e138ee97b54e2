"""Where an adapter lives: disk, host memory, a slot on the device. Registered ones cost a name.

Disk holds every published adapter, checked against its published hashes each time it is read. Host
memory (`host`) holds the recently used ones, bounded in bytes. A slot holds one that batch rows may
run with; a slot in use is pinned, and otherwise the least recently used one that nobody waits for
gives way. Loading is a copy (no module is created and none is walked), so its cost does not grow
with the number of adapters.

Where host and device are one memory, as on a CPU, an adapter *moves* between the two tiers and is
never copied: it takes its own bytes once, whatever the largest rank is.

A retired or replaced adapter takes no new request and is dropped when the last accepted one is
done: answers that were promised are given. Registry calls are thread-safe; `place` belongs to the
engine's step.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ledger.errors import Backpressure, Conflict
from workers.openlora.adapter import (
    WEIGHTS_FILE,
    AdapterFiles,
    AdapterLimits,
    AdapterWeights,
    TargetShape,
    read_adapter,
)
from workers.openlora.errors import UnknownAdapter
from workers.openlora.host import HostTier
from workers.openlora.prefetch import Prefetcher

KEPT_SHARE = 0.5
"""The largest share of the slots, and of host memory, that kept adapters may take: the rest of the
published ones must stay servable."""


class AdapterEntry:
    """One published adapter. Compared by identity: an id may be retired and published again."""

    def __init__(self, adapter_id: str, files: AdapterFiles) -> None:
        self.adapter_id = adapter_id
        self.files = files
        self.requests = 0
        """Accepted requests that are not finished."""
        self.pins = 0
        """Batch rows that run with it now."""
        self.kept = False
        """An operator's wish: it is never evicted."""
        self.retired = False
        self.slot: int | None = None
        self.moved: AdapterWeights | None = None
        """What lies in the slot, where that is host memory's own copy."""
        self.loading = threading.Lock()

    @property
    def wanted(self) -> bool:
        return self.requests > 0 or not self.retired


class SlotTensors:
    """Device memory for `count` adapters of up to `max_rank`, each in one piece of its own size.

    Padding costs nothing: on a GPU the pieces come from torch's caching allocator, on a CPU they
    *are* what was read. (`gather.GroupedSlots` pads, because its kernels need one stride.)
    """

    def __init__(
        self, shapes: Mapping[str, TargetShape], *, count: int, max_rank: int, like: Tensor
    ) -> None:
        self.count = count
        self.max_rank = max_rank
        self._where = like.device
        self._held: list[AdapterWeights | None] = [None] * count

    def write(self, slot: int, weights: AdapterWeights) -> AdapterWeights:
        """Put `weights` into `slot`; returns the device's view, the very object where it is."""
        assert weights.rank <= self.max_rank
        held = self._held[slot] = weights.to(self._where)
        return held

    def read(self, slot: int) -> AdapterWeights:
        view = self._held[slot]
        assert view is not None, "an empty slot is never read"
        return view

    def clear(self, slot: int) -> None:
        """Nobody reads `slot` until it is written again."""
        self._held[slot] = None


@dataclass(kw_only=True)
class TierStats:
    """Counts since start. `slot_hits` + `host_hits` + `disk_loads` = rows that got an adapter, plus
    what was read ahead of its row."""

    slot_hits: int = 0
    host_hits: int = 0
    disk_loads: int = 0
    slot_evictions: int = 0


class AdapterStore:
    """The registry of published adapters and their way through the tiers.

    Two locks: `_lock` guards every field for the time of a dict access; an entry's `loading` is
    held while its file is read, and is taken first.
    """

    def __init__(self, limits: AdapterLimits, slots: SlotTensors, *, host_bytes: int) -> None:
        self._limits = limits
        self._slots = slots
        self._lock = threading.Lock()
        self._entries: dict[str, AdapterEntry] = {}
        self._host = HostTier(host_bytes)
        self._slotted: OrderedDict[AdapterEntry, int] = OrderedDict()  # least recently used first
        self._free = list(range(slots.count - 1, -1, -1))
        self._kept: set[AdapterEntry] = set()
        self._accepted = 0  # requests that are not finished, of all adapters
        self._prefetch: Prefetcher[AdapterEntry] = Prefetcher(self._read_ahead)
        self.stats = TierStats()

    # --- the registry ---

    def register(self, adapter_id: str, files: AdapterFiles, *, check: bool = True) -> None:
        """Publish an adapter. With `check` it is read and validated now, otherwise at first use.

        The same id with the same hashes is accepted again; with others it raises Conflict: what
        an id means changes by `replace` alone. Raises what `read_adapter` raises.
        """
        with self._lock:
            if self._is_known(adapter_id, files):
                return
        entry = AdapterEntry(adapter_id, files)
        weights = read_adapter(files, self._limits) if check else None
        with self._lock:
            if self._is_known(adapter_id, files):  # another thread was faster
                return
            self._entries[adapter_id] = entry
            self._loaded(entry, weights)

    def replace(self, adapter_id: str, files: AdapterFiles) -> None:
        """From now on the id means other weights: new requests get these, accepted ones the old.

        The new ones are read and validated first. Whatever is wrong with them (raises what
        `read_adapter` raises) leaves the old ones published. Raises UnknownAdapter.
        """
        with self._lock:
            if adapter_id not in self._entries:
                raise UnknownAdapter(adapter_id)
        entry = AdapterEntry(adapter_id, files)
        weights = read_adapter(files, self._limits)
        with self._lock:
            old = self._entries.get(adapter_id)
            if old is None:  # retired while we read: it stays retired
                raise UnknownAdapter(adapter_id)
            self._entries[adapter_id] = entry
            self._set_kept(entry, old.kept)
            self._retired(old)
            self._loaded(entry, weights)

    def retire(self, adapter_id: str) -> None:
        """No new request from now on; accepted ones finish. Raises UnknownAdapter."""
        with self._lock:
            entry = self._entries.pop(adapter_id, None)
            if entry is None:
                raise UnknownAdapter(adapter_id)
            self._retired(entry)

    def keep(self, adapter_id: str, *, kept: bool = True) -> None:
        """Read it now and never evict it, or give that up. Raises UnknownAdapter, what
        `read_adapter` raises, and Backpressure when kept adapters would take more than
        `KEPT_SHARE` of the slots or of host memory."""
        entry = self._entry(adapter_id)
        if kept:
            self._check_share(entry, self._weights(entry).nbytes)
        with self._lock:
            self._set_kept(entry, kept and not entry.retired)

    def acquire(self, adapter_id: str) -> AdapterEntry:
        """A hold for one request, until `release`. Raises UnknownAdapter.

        A cold adapter is read ahead of its turn, but for the only request there is: its turn is
        now, and another thread would only be slower."""
        with self._lock:
            entry = self._entries.get(adapter_id)
            if entry is None:
                raise UnknownAdapter(adapter_id)
            ahead = self._accepted > 0 and entry.slot is None and entry not in self._host
            entry.requests += 1
            self._accepted += 1
        if ahead:
            self._prefetch.ask(entry)
        return entry

    def release(self, entry: AdapterEntry) -> None:
        with self._lock:
            entry.requests -= 1
            self._accepted -= 1
            assert entry.requests >= 0
            self._drop_if_done(entry)

    def ids(self) -> list[str]:
        with self._lock:
            return sorted(self._entries)

    def snapshot(self) -> dict[str, int]:
        """Counts and sizes for `stats()`. `resident_bytes` are both tiers', each adapter once."""
        with self._lock:
            slot_bytes = sum(self._slots.read(slot).nbytes for slot in self._slotted.values())
            return {
                "registered": len(self._entries),
                "kept": len(self._kept),
                "in_slots": len(self._slotted),
                "slots": self._slots.count,
                "slot_bytes": slot_bytes,
                "in_host": len(self._host),
                "host_bytes": self._host.used,
                "host_evictions": self._host.evictions,
                "resident_bytes": slot_bytes + self._host.used,
                **asdict(self.stats),
            }

    # --- the tiers ---

    def warm(self, adapter_id: str) -> None:
        """Read an adapter into host memory ahead of its turn. Any thread; raises as `register`."""
        self._weights(self._entry(adapter_id))

    def place(self, entry: AdapterEntry) -> AdapterWeights | None:
        """The adapter in a slot, pinned until `unpin`; None while rows pin every slot.

        Raises CorruptAdapter or UnsupportedAdapter when it has to be read and cannot be.
        """
        with self._lock:
            if entry.slot is not None:
                self.stats.slot_hits += 1
                self._slotted.move_to_end(entry)
                entry.pins += 1
                return self._slots.read(entry.slot)
            if not self._free and self._victim() is None:
                return None
            weights = self._host.get(entry)
            self.stats.host_hits += weights is not None
        if weights is None:
            weights = self._load(entry)  # outside the lock: a slow disk must not stop submits
        with self._lock:
            if not self._free:
                victim = self._victim()
                if victim is None:
                    return None  # the last that could go became kept while we read
                self.stats.slot_evictions += 1
                self._free.append(self._evict(victim))
            slot = self._free[-1]
        view = self._slots.write(slot, weights)  # should this raise, the slot is still free
        with self._lock:
            self._free.remove(slot)
            if view is weights:
                self._host.pop(entry)
                entry.moved = weights
            entry.slot = slot
            entry.pins += 1
            self._slotted[entry] = slot
        return view

    def unpin(self, entry: AdapterEntry) -> None:
        with self._lock:
            entry.pins -= 1
            assert entry.pins >= 0

    def shed(self) -> int:
        """Give back host memory, in bytes: every adapter can be read from disk again."""
        with self._lock:
            return self._host.shed()

    # --- loading ---

    def _weights(self, entry: AdapterEntry) -> AdapterWeights:
        """From the nearest tier."""
        with self._lock:
            if entry.slot is not None:
                return self._slots.read(entry.slot)
            weights = self._host.get(entry)
        return self._load(entry) if weights is None else weights

    def _load(self, entry: AdapterEntry) -> AdapterWeights:
        """Disk to host memory, once however many threads ask at a time."""
        with entry.loading:
            with self._lock:
                weights = self._host.get(entry)
            if weights is not None:
                return weights
            weights = read_adapter(entry.files, self._limits)
            with self._lock:
                self._loaded(entry, weights)
            return weights

    def _read_ahead(self, entry: AdapterEntry) -> None:
        """For a request that waits, unless another waiting one's adapter would have to go."""
        size = (entry.files.path / WEIGHTS_FILE).stat().st_size
        with self._lock:
            needless = entry.requests == 0 or entry.slot is not None
            if needless or self._host.room_ahead() < size:
                return
        self._load(entry)

    def _loaded(self, entry: AdapterEntry, weights: AdapterWeights | None) -> None:
        if weights is not None:
            self.stats.disk_loads += 1
            if entry.wanted and entry.slot is None:
                self._host.put(entry, weights)

    # --- under the lock ---

    def _entry(self, adapter_id: str) -> AdapterEntry:
        with self._lock:
            entry = self._entries.get(adapter_id)
        if entry is None:
            raise UnknownAdapter(adapter_id)
        return entry

    def _is_known(self, adapter_id: str, files: AdapterFiles) -> bool:
        known = self._entries.get(adapter_id)
        if known is None:
            return False
        same = (known.files.weights_sha256.lower(), known.files.config_sha256) == (
            files.weights_sha256.lower(),
            files.config_sha256,
        )
        if not same:
            raise Conflict(
                f"adapter {adapter_id!r} is published with other hashes; replace it, retire it "
                "first, or publish under a new id",
                adapter=adapter_id,
            )
        return True

    def _check_share(self, entry: AdapterEntry, nbytes: int) -> None:
        with self._lock:
            kept = self._kept - {entry}
            held = sum(w.nbytes for e in kept if (w := self._host.get(e)) is not None)
            if len(kept) + 1 > self._slots.count * KEPT_SHARE:
                what = f"{len(kept)} of {self._slots.count} slots"
            elif held + nbytes > self._host.limit * KEPT_SHARE:
                what = f"{held} of {self._host.limit} bytes of host memory"
            else:
                return
        raise Backpressure(
            f"adapters that are kept have {what}; at most {KEPT_SHARE:.0%} may be kept, so let "
            "another one go first",
            adapter=entry.adapter_id,
        )

    def _victim(self) -> AdapterEntry | None:
        """The slot that gives way: least recently used, of those that nobody waits for if any."""
        free = [e for e in self._slotted if not (e.pins or e.kept)]
        return next((e for e in free if not e.requests), free[0] if free else None)

    def _evict(self, entry: AdapterEntry) -> int:
        """Out of its slot, and back to host memory if it came from there."""
        moved = entry.moved
        slot = self._vacate(entry)
        if moved is not None:
            self._host.put(entry, moved)
        return slot

    def _vacate(self, entry: AdapterEntry) -> int:
        slot = self._slotted.pop(entry)
        self._slots.clear(slot)
        entry.slot = entry.moved = None
        return slot

    def _set_kept(self, entry: AdapterEntry, kept: bool) -> None:
        entry.kept = kept
        (self._kept.add if kept else self._kept.discard)(entry)

    def _retired(self, entry: AdapterEntry) -> None:
        entry.retired = True
        self._set_kept(entry, False)
        self._drop_if_done(entry)

    def _drop_if_done(self, entry: AdapterEntry) -> None:
        if not entry.wanted:
            self._host.pop(entry)
            if entry.slot is not None:
                self._free.append(self._vacate(entry))


def storage_like(model_dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor that says where and in which type adapters are kept."""
    return torch.empty(0, dtype=model_dtype, device=device)
