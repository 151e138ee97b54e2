"""LoRA without a copy per row: every row says which slot it has, and kernels read the slots.

The other form of `layers.WorkingSet`, for a GPU: there a gathered read costs what a plain one does,
memory is too dear for a second copy of each running adapter, and what a step reads must lie at
addresses that never change (a CUDA graph has them baked in). A change of adapters changes numbers
in `index`, nothing else; only a slot tensor that is allocated anew (`generation` counts that)
makes captured work void.

Slots of linears that read the same input are one tensor, so that they share one shrink. They are
padded to `max_rank` and, on a GPU, resident: an adapter of smaller rank costs as much as the
largest. Choose `max_rank` by the adapters that there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ledger.errors import ComputeError
from workers.openlora.adapter import AdapterWeights, TargetShape
from workers.openlora.kernels import Kernels
from workers.openlora.layers import LoraContext
from workers.openlora.slots import AdapterEntry, SlotTensors

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one module that are given the same tensor, by last path segment. Only a hint: whether
two calls share an input is checked at each call, by identity."""


@dataclass(kw_only=True)
class Group:
    """Targets that share an input. `members` are those that an adapter has used so far.

    `a` (members, slots, max_rank, in); `b` each (slots, max_rank, out); `ranks` (members, slots).
    """

    targets: tuple[str, ...]
    members: list[str] = field(default_factory=list)
    a: Tensor
    b: dict[str, Tensor] = field(default_factory=dict)
    ranks: Tensor


def group_targets(shapes: Mapping[str, TargetShape]) -> list[tuple[str, ...]]:
    """The targets of `shapes` in groups that share an input."""
    groups: dict[tuple[str, object, int], list[str]] = {}
    for name, shape in shapes.items():
        parent, _, leaf = name.rpartition(".")
        family = next((i for i, leaves in enumerate(SHARED_INPUT) if leaf in leaves), leaf)
        groups.setdefault((parent, family, shape.in_features), []).append(name)
    return [tuple(names) for names in groups.values()]


class GroupedSlots(SlotTensors):
    """Slot tensors laid out for the kernels, allocated as adapters bring new targets."""

    def __init__(
        self, shapes: Mapping[str, TargetShape], *, count: int, max_rank: int, like: Tensor
    ) -> None:
        super().__init__(shapes, count=count, max_rank=max_rank, like=like)
        self.shapes = shapes
        self.like = like
        self.groups = [self._empty_group(names) for names in group_targets(shapes)]
        self.generation = 0
        """Grows whenever a tensor that kernels read has moved."""
        self._group_of = {name: g for g in self.groups for name in g.targets}
        self._host_ranks: dict[str, Tensor] = {}  # (slots,) each, allocated targets only
        self._ranks = torch.empty(0, dtype=torch.int32, device=like.device)
        self._views: list[AdapterWeights | None] = [None] * count

    def _empty_group(self, names: tuple[str, ...]) -> Group:
        return Group(
            targets=names,
            a=self.like.new_empty(0, self.count, self.max_rank, self.shapes[names[0]].in_features),
            ranks=torch.empty(0, self.count, dtype=torch.int32, device=self.like.device),
        )

    def write(self, slot: int, weights: AdapterWeights) -> AdapterWeights:
        """Copy `weights` into `slot`; returns the device's view of it.

        Raises ComputeError when the device has no memory for targets that are new: the slots that
        there are stay as they are, and adapters without those targets are still served.
        """
        if new := [name for name in weights.a if name not in self._host_ranks]:
            try:
                self._grow(new)
            except torch.OutOfMemoryError as e:
                raise ComputeError(
                    f"no device memory for {self.count} slots of {len(new)} more linears; serve "
                    "with fewer slots or a smaller max_rank",
                    code="out_of_memory",
                ) from e
        a: dict[str, Tensor] = {}
        b: dict[str, Tensor] = {}
        for name in weights.a:
            group = self._group_of[name]
            a[name] = group.a[group.members.index(name), slot, : weights.rank]
            b[name] = group.b[name][slot, : weights.rank]
            a[name].copy_(weights.a[name])
            b[name].copy_(weights.b[name])
        for name, ranks in self._host_ranks.items():
            ranks[slot] = weights.rank if name in weights.a else 0
        column = torch.stack([ranks[slot] for ranks in self._host_ranks.values()])
        self._ranks[:, slot].copy_(column)
        view = AdapterWeights(rank=weights.rank, a=a, b=b)
        self._views[slot] = view
        return view

    def read(self, slot: int) -> AdapterWeights:
        view = self._views[slot]
        assert view is not None, "an empty slot is never read"
        return view

    def clear(self, slot: int) -> None:
        """Nobody reads `slot` until it is written again."""
        self._views[slot] = None

    @property
    def allocated_bytes(self) -> int:
        """What the slots take, padding to `max_rank` included."""
        return sum(g.a.nbytes + sum(b.nbytes for b in g.b.values()) for g in self.groups)

    def free(self) -> list[int]:
        """Slots that hold no adapter."""
        return [slot for slot, view in enumerate(self._views) if view is None]

    def _grow(self, names: Sequence[str]) -> None:
        """Allocate first, change afterwards: running out of memory leaves what was."""
        bigger: list[tuple[Group, list[str], Tensor, dict[str, Tensor]]] = []
        for group in {id(g): g for g in map(self._group_of.__getitem__, names)}.values():
            new = [name for name in names if name in group.targets]
            a = group.a.new_empty(len(group.members) + len(new), *group.a.shape[1:])
            b = {
                name: a.new_empty(self.count, self.max_rank, self.shapes[name].out_features)
                for name in new
            }
            bigger.append((group, new, a, b))
        for group, new, a, b in bigger:
            a[: len(group.members)] = group.a
            group.a = a
            group.members += new
            group.b |= b
            for name in new:
                self._host_ranks[name] = torch.zeros(self.count, dtype=torch.int32)
        self._refresh()

    def _refresh(self) -> None:
        """Ranks of all targets are one table, so that filling a slot is one small copy."""
        order = [name for group in self.groups for name in group.members]
        self._host_ranks = {name: self._host_ranks[name] for name in order}
        self._ranks = torch.stack(list(self._host_ranks.values())).to(self.like.device)
        first = 0
        for group in self.groups:
            group.ranks = self._ranks[first : first + len(group.members)]
            first += len(group.members)
        for slot, view in enumerate(self._views):
            if view is not None:
                self._views[slot] = self._viewed(slot, view)
        self.generation += 1

    def _viewed(self, slot: int, view: AdapterWeights) -> AdapterWeights:
        """The same adapter after its group's A has moved."""
        a = {}
        for name in view.a:
            group = self._group_of[name]
            a[name] = group.a[group.members.index(name), slot, : view.rank]
        return AdapterWeights(rank=view.rank, a=a, b=view.b)


@dataclass(slots=True)
class _MemberDelta:
    """One target's share of its group."""

    form: "SlotGather"
    group: Group
    member: int
    b: Tensor

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y (rows, tokens, out) += x (rows, tokens, in) through each row's slot."""
        h = self.form.shrunk(self.group, x)
        return self.form.kernels.expand(
            y, h[:, self.member], self.b, self.form.now, self.group.ranks[self.member]
        )


class SlotGather:
    """What `layers.WorkingSet` is, by slot number. Belongs to the engine's step."""

    def __init__(
        self, slots: GroupedSlots, max_rows: int, context: LoraContext, kernels: Kernels
    ) -> None:
        self.slots = slots
        self.context = context
        self.kernels = kernels
        self.fills = 0
        self.last_form = "none"
        self._slot_of = [-1] * max_rows
        self._index = torch.full((max_rows,), -1, dtype=torch.int64, device=slots.like.device)
        self._stale = False  # does the device's index differ from `_slot_of`?
        self.now = self._index
        """(rows,) the slots of the rows that are being run; where it lies may be captured."""
        self._deltas: dict[str, Any] = {}
        self._deltas_of = -1  # the generation that they were made for
        self._shared: tuple[Group, Tensor, Tensor] | None = None

    @property
    def generation(self) -> int:
        return self.slots.generation

    def fill(self, row: int, key: AdapterEntry | None, weights: AdapterWeights | None) -> None:
        """Give `row` the adapter that lies in its entry's slot; None: a row of the base model."""
        slot = -1
        if key is not None and weights is not None:
            assert key.slot is not None, "a row's adapter was placed, and is pinned"
            slot = key.slot
            self.fills += 1
        self._slot_of[row] = slot
        self._stale = True

    def move(self, source: int, target: int) -> None:
        self._slot_of[target] = self._slot_of[source]
        self._stale = True

    def swap(self, one: int, other: int) -> None:
        s = self._slot_of
        s[one], s[other] = s[other], s[one]
        self._stale = True

    def slots_of(self, rows: int) -> list[int]:
        """Slot numbers of rows [0, rows), -1 for the base model."""
        return self._slot_of[:rows]

    def bind(self, lo: int, hi: int, tokens: int) -> None:
        """Point the context at rows [lo, hi)."""
        if self._stale:
            self._index.copy_(torch.tensor(self._slot_of))
            self._stale = False
        lora = any(slot >= 0 for slot in self._slot_of[lo:hi])
        self.bind_index(self._index[lo:hi], lora=lora)

    def bind_index(self, index: Tensor, *, lora: bool) -> None:
        """Point the context at rows whose slots are `index` (rows,), wherever it comes from."""
        self.now = index
        self.last_form = "gather" if lora else "none"
        if self._deltas_of != self.generation:
            self._deltas = {
                name: _MemberDelta(form=self, group=g, member=m, b=g.b[name])
                for g in self.slots.groups
                for m, name in enumerate(g.members)
            }
            self._deltas_of = self.generation
        self.context.deltas = self._deltas if lora else {}

    def unbind(self) -> None:
        """The base model alone. Lets go of the last shrink, whose input may be reused."""
        self.context.deltas = {}
        self._shared = None

    def shrunk(self, group: Group, x: Tensor) -> Tensor:
        """`h` of all members, computed when the first of them asks. The input is held meanwhile,
        so that the same object is the same input."""
        if self._shared is not None and self._shared[0] is group and self._shared[1] is x:
            return self._shared[2]
        h = self.kernels.shrink(x, group.a, self.now, group.ranks)
        self._shared = (group, x, h)
        return h
