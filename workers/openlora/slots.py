"""Where an adapter lives: disk, host memory, a slot on the device. Registered ones cost a name.

Disk holds every published adapter, checked against its published hashes each time it is read. Host
memory holds the recently used ones, bounded in bytes. Slots are preallocated tensors on the
device, a fixed number of adapters of up to `max_rank`; a slot in use by a batch row is pinned,
and otherwise the least recently used one gives way. Loading is a copy (no module is created and
none is walked), so its cost does not grow with the number of adapters.

A retired adapter takes no new request and is dropped when the last accepted one is done: answers
that were promised are given. Registry calls are thread-safe; `place` belongs to the engine's step.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ledger.errors import Conflict
from workers.openlora.adapter import (
    AdapterFiles,
    AdapterLimits,
    AdapterWeights,
    TargetShape,
    read_adapter,
)
from workers.openlora.errors import UnknownAdapter


class AdapterEntry:
    """One published adapter. Compared by identity: an id may be retired and published again."""

    def __init__(self, adapter_id: str, files: AdapterFiles) -> None:
        self.adapter_id = adapter_id
        self.files = files
        self.requests = 0
        """Accepted requests that are not finished."""
        self.pins = 0
        """Batch rows that run with it now."""
        self.retired = False
        self.host: AdapterWeights | None = None
        self.slot: int | None = None
        self.loading = threading.Lock()


class SlotTensors:
    """Device memory for `count` adapters: per target a (count, max_rank, in), b (count, max_rank,
    out), allocated when the first adapter with that target arrives.

    The memory is not zeroed and read only up to each adapter's own rank. On a CPU untouched pages
    are not resident, so padding to `max_rank` costs address space; on a GPU it will cost memory.
    """

    def __init__(
        self, shapes: Mapping[str, TargetShape], *, count: int, max_rank: int, like: Tensor
    ) -> None:
        self.count = count
        self.max_rank = max_rank
        self._shapes = shapes
        self._like = like
        self._a: dict[str, Tensor] = {}
        self._b: dict[str, Tensor] = {}
        self._held: list[AdapterWeights | None] = [None] * count

    def write(self, slot: int, weights: AdapterWeights) -> AdapterWeights:
        """Copy `weights` into `slot`; returns the device's view of it."""
        rank = weights.rank
        a: dict[str, Tensor] = {}
        b: dict[str, Tensor] = {}
        for name in weights.a:
            if name not in self._a:
                shape = self._shapes[name]
                size = (self.count, self.max_rank)
                self._a[name] = self._like.new_empty(*size, shape.in_features)
                self._b[name] = self._like.new_empty(*size, shape.out_features)
            a[name] = self._a[name][slot, :rank]
            b[name] = self._b[name][slot, :rank]
            a[name].copy_(weights.a[name])
            b[name].copy_(weights.b[name])
        view = AdapterWeights(rank=rank, a=a, b=b)
        self._held[slot] = view
        return view

    def read(self, slot: int) -> AdapterWeights:
        view = self._held[slot]
        assert view is not None, "an empty slot is never read"
        return view


@dataclass(kw_only=True)
class TierStats:
    """Counts since start. `slot_hits` + `host_hits` + `disk_loads` = rows that got an adapter, plus
    what was read ahead of its row."""

    slot_hits: int = 0
    host_hits: int = 0
    disk_loads: int = 0
    slot_evictions: int = 0
    host_evictions: int = 0


class AdapterStore:
    """The registry and its three tiers."""

    def __init__(self, limits: AdapterLimits, slots: SlotTensors, *, host_bytes: int) -> None:
        self._limits = limits
        self._slots = slots
        self._host_bytes = host_bytes
        self._lock = threading.RLock()
        self._entries: dict[str, AdapterEntry] = {}
        self._host: OrderedDict[AdapterEntry, int] = OrderedDict()  # oldest first, value in bytes
        self._host_used = 0
        self._slotted: OrderedDict[AdapterEntry, int] = OrderedDict()  # oldest first
        self._free = list(range(slots.count - 1, -1, -1))
        self.stats = TierStats()

    # --- the registry ---

    def register(self, adapter_id: str, files: AdapterFiles, *, check: bool = True) -> None:
        """Publish an adapter. With `check` it is read and validated now, otherwise at first use.

        The same id with the same hashes is accepted again; with others it raises Conflict: what
        an id means does not change. Raises what `read_adapter` raises.
        """
        with self._lock:
            known = self._entries.get(adapter_id)
        if known is not None:
            same = (known.files.weights_sha256.lower(), known.files.config_sha256) == (
                files.weights_sha256.lower(),
                files.config_sha256,
            )
            if not same:
                raise Conflict(
                    f"adapter {adapter_id!r} is published with other hashes; retire it first, or "
                    "publish under a new id",
                    adapter=adapter_id,
                )
            return
        entry = AdapterEntry(adapter_id, files)
        if check:
            self._load(entry)
        with self._lock:
            self._entries[adapter_id] = entry

    def retire(self, adapter_id: str) -> None:
        """No new request from now on; accepted ones finish. Raises UnknownAdapter."""
        with self._lock:
            entry = self._entries.pop(adapter_id, None)
            if entry is None:
                raise UnknownAdapter(adapter_id)
            entry.retired = True
            self._drop_if_done(entry)

    def acquire(self, adapter_id: str) -> AdapterEntry:
        """A hold for one request, until `release`. Raises UnknownAdapter."""
        with self._lock:
            entry = self._entries.get(adapter_id)
            if entry is None:
                raise UnknownAdapter(adapter_id)
            entry.requests += 1
            return entry

    def release(self, entry: AdapterEntry) -> None:
        with self._lock:
            entry.requests -= 1
            assert entry.requests >= 0
            self._drop_if_done(entry)

    def ids(self) -> list[str]:
        with self._lock:
            return sorted(self._entries)

    def snapshot(self) -> dict[str, int]:
        """Counts and sizes for `stats()`."""
        with self._lock:
            return {
                "registered": len(self._entries),
                "in_slots": len(self._slotted),
                "slots": self._slots.count,
                "in_host": len(self._host),
                "host_bytes": self._host_used,
                **asdict(self.stats),
            }

    # --- the tiers ---

    def warm(self, adapter_id: str) -> None:
        """Read an adapter into host memory ahead of its turn. Any thread; raises as `register`."""
        with self._lock:
            entry = self._entries.get(adapter_id)
        if entry is None:
            raise UnknownAdapter(adapter_id)
        if entry.slot is None and entry.host is None:
            self._load(entry)

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
            if not self._free and all(e.pins for e in self._slotted):
                return None
            weights = entry.host
            if weights is not None:
                self.stats.host_hits += 1
                self._host.move_to_end(entry)
        if weights is None:
            weights = self._load(entry)  # outside the lock: a slow disk must not stop submits
        with self._lock:
            self._free.append(self._free.pop() if self._free else self._evict_slot())
            slot = self._free[-1]
        view = self._slots.write(slot, weights)  # should this raise, the slot is still free
        with self._lock:
            self._free.remove(slot)
            entry.slot = slot
            entry.pins += 1
            self._slotted[entry] = slot
        return view

    def unpin(self, entry: AdapterEntry) -> None:
        with self._lock:
            entry.pins -= 1
            assert entry.pins >= 0

    def _load(self, entry: AdapterEntry) -> AdapterWeights:
        """Disk to host memory, once however many threads ask."""
        with entry.loading:
            if entry.host is not None:
                return entry.host
            weights = read_adapter(entry.files, self._limits)
            with self._lock:
                self.stats.disk_loads += 1
                entry.host = weights
                self._host[entry] = weights.nbytes
                self._host_used += weights.nbytes
                while self._host_used > self._host_bytes and len(self._host) > 1:
                    oldest = next(iter(self._host))
                    self._drop_host(oldest)
                    self.stats.host_evictions += 1
            return weights

    def _evict_slot(self) -> int:
        victim = next(e for e in self._slotted if not e.pins)
        self.stats.slot_evictions += 1
        return self._drop_slot(victim)

    def _drop_slot(self, entry: AdapterEntry) -> int:
        slot = self._slotted.pop(entry)
        entry.slot = None
        return slot

    def _drop_host(self, entry: AdapterEntry) -> None:
        self._host_used -= self._host.pop(entry)
        entry.host = None

    def _drop_if_done(self, entry: AdapterEntry) -> None:
        if entry.retired and not entry.requests:
            if entry in self._host:
                self._drop_host(entry)
            if entry.slot is not None:
                self._free.append(self._drop_slot(entry))


def storage_like(model_dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor that says where and in which type adapters are kept."""
    return torch.empty(0, dtype=model_dtype, device=device)
