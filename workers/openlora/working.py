"""Every batch row's adapter, copied out of the slots once per row and not once per token.

A row is one stretch of memory: A and B of all targets, one after the other, in the order in which
`AdapterWeights.flat` holds them. So giving a row an adapter of the usual rank is one copy, moving
a row is one copy, and each target sees its part of all rows as a strided view.

The layout follows what adapters bring: targets that none has used take no memory, and the rank
that rows have room for grows with the largest adapter seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.openlora.adapter import AdapterWeights, TargetShape
from workers.openlora.deltas import DenseDelta, LoraContext, RowDelta, dense_is_cheaper

MAX_VIEWS = 256
"""Sets of row views that are kept: one per slice of rows and mix of profiles in it."""

Deltas = dict[str, RowDelta] | dict[str, DenseDelta]


@dataclass(frozen=True, slots=True)
class _Profile:
    """What a row holds: an adapter of `rank` on `targets`."""

    rank: int
    targets: tuple[str, ...]


_EMPTY = _Profile(0, ())


class _Layout:
    """Rows of `capacity` ranks on `targets`: a[name] (rows, capacity, in), b[name] (..., out).

    One more row, `aside`, is room to swap two others: to move rows takes no memory."""

    def __init__(
        self, shapes: Mapping[str, TargetShape], rows: int, profile: _Profile, like: Tensor
    ) -> None:
        self.profile = profile
        capacity = profile.rank
        widths = [w for n in profile.targets for w in _widths(shapes[n])]
        memory = like.new_zeros(rows + 1, capacity * sum(widths))
        self.memory, self.aside = memory[:rows], memory[rows]
        halves = [
            part.view(rows, capacity, width)
            for part, width in zip(
                self.memory.split([capacity * w for w in widths], dim=1), widths, strict=True
            )
        ]
        self.a = dict(zip(profile.targets, halves[::2], strict=True))
        self.b = dict(zip(profile.targets, halves[1::2], strict=True))

    def parts(self, row: int, profile: _Profile) -> list[Tensor]:
        """The views of `row` that an adapter of `profile` fills, in the order of its tensors."""
        return [
            half[name][row, : profile.rank] for name in profile.targets for half in (self.a, self.b)
        ]


def _widths(shape: TargetShape) -> tuple[int, int]:
    return shape.in_features, shape.out_features


class WorkingSet:
    """The adapters of all batch rows. Invariant: what a row's profile does not cover is zero, so
    that rows of smaller rank, of fewer targets, and of the base model add nothing.

    `bind(lo, hi, tokens)` points the context at rows [lo, hi); what it computes is kept until a row
    changes. Not thread-safe: it belongs to the engine's step.
    """

    def __init__(
        self,
        shapes: Mapping[str, TargetShape],
        max_rows: int,
        context: LoraContext,
        *,
        like: Tensor,
    ) -> None:
        self.context = context
        self._shapes = shapes
        self._like = like
        self._layout = _Layout(shapes, max_rows, _EMPTY, like)
        self._profiles = [_EMPTY] * max_rows
        self._keys: list[object | None] = [None] * max_rows
        self._bound: dict[tuple[int, int, int], tuple[str, Deltas]] = {}
        self._views: dict[tuple[int, int, frozenset[_Profile]], dict[str, RowDelta]] = {}
        self.fills = 0
        self.last_form = "none"

    def fill(self, row: int, key: object | None, weights: AdapterWeights | None) -> None:
        """Give `row` the adapter that `key` names; `key` None makes it a row of the base model."""
        self._bound.clear()
        self._keys[row] = key
        profile = _EMPTY if weights is None else _Profile(weights.rank, tuple(weights.a))
        if profile != self._profiles[row]:
            self._make_room(profile)
            self._wipe(row)
            self._profiles[row] = profile
        if weights is None:
            return
        self.fills += 1
        if weights.flat is not None and profile == self._layout.profile:
            self._layout.memory[row].copy_(weights.flat)
        else:
            halves = [half[name] for name in profile.targets for half in (weights.a, weights.b)]
            torch._foreach_copy_(self._layout.parts(row, profile), halves)

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is; `source` is free to be filled again."""
        self._bound.clear()
        self._keys[target] = self._keys[source]
        profile = self._profiles[source]
        if profile != self._profiles[target]:
            self._wipe(target)
            self._profiles[target] = profile
        if profile == self._layout.profile:
            self._layout.memory[target].copy_(self._layout.memory[source])
        elif profile.rank:
            parts = self._layout.parts
            torch._foreach_copy_(parts(target, profile), parts(source, profile))

    def swap(self, one: int, other: int) -> None:
        self._bound.clear()
        memory = self._layout.memory
        kept = memory[one].clone()  # first: should there be no memory for it, nothing has changed
        keys, profiles = self._keys, self._profiles
        keys[one], keys[other] = keys[other], keys[one]
        profiles[one], profiles[other] = profiles[other], profiles[one]
        memory[one].copy_(memory[other])
        memory[other].copy_(kept)

    def bind(self, lo: int, hi: int, tokens: int) -> None:
        """Point the context at rows [lo, hi), each with `tokens` positions."""
        bound = self._bound.get((lo, hi, tokens))
        if bound is None:
            bound = self._bound[(lo, hi, tokens)] = self._choose(lo, hi, tokens)
        self.last_form, self.context.deltas = bound

    def unbind(self) -> None:
        """The base model alone."""
        self.context.deltas = {}

    # --- memory ---

    def _make_room(self, profile: _Profile) -> None:
        """Lay the rows out anew when `profile` does not fit."""
        now = self._layout.profile
        used = {*now.targets, *profile.targets}
        wanted = _Profile(
            max(now.rank, profile.rank), tuple(name for name in self._shapes if name in used)
        )
        if wanted == now:
            return
        old, rows = self._layout, len(self._profiles)
        self._views.clear()  # they hold on to the old memory
        self.context.deltas = {}
        self._layout = _Layout(self._shapes, rows, wanted, self._like)
        for row, held in enumerate(self._profiles):
            if held.rank:
                torch._foreach_copy_(self._layout.parts(row, held), old.parts(row, held))

    def _wipe(self, row: int) -> None:
        held = self._profiles[row]
        if held.rank:
            torch._foreach_zero_(self._layout.parts(row, held))

    # --- forms ---

    def _choose(self, lo: int, hi: int, tokens: int) -> tuple[str, Deltas]:
        leaders: dict[object, int] = {}  # distinct adapter -> the first row that has it
        for row in range(lo, hi):
            key = self._keys[row]
            if key is not None:
                leaders.setdefault(key, row)
        if not leaders:
            return "none", {}
        ranks = [self._profiles[row].rank for row in leaders.values()]
        if dense_is_cheaper(rows=hi - lo, tokens=tokens, rank=max(ranks), dense_rank=sum(ranks)):
            return "dense", self._dense(lo, hi, leaders)
        return "row", self._row(lo, hi)

    def _row(self, lo: int, hi: int) -> dict[str, RowDelta]:
        """Views: they stay right while rows change, as long as the mix of profiles is the same."""
        mix = frozenset(self._profiles[lo:hi])
        views = self._views.get((lo, hi, mix))
        if views is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            views = self._views[(lo, hi, mix)] = {}
            for name in self._layout.profile.targets:
                rank = max((p.rank for p in mix if name in p.targets), default=0)
                if rank:
                    views[name] = RowDelta(
                        a=self._layout.a[name][lo:hi, :rank], b=self._layout.b[name][lo:hi, :rank]
                    )
        return views

    def _dense(self, lo: int, hi: int, leaders: Mapping[object, int]) -> dict[str, DenseDelta]:
        deltas: dict[str, DenseDelta] = {}
        masks: dict[tuple[int, ...], Tensor] = {}  # targets of one rank profile share a mask
        for name in self._layout.profile.targets:
            ranks = {
                key: self._profiles[row].rank if name in self._profiles[row].targets else 0
                for key, row in leaders.items()
            }
            if not any(ranks.values()):
                continue
            among = tuple(ranks.values())
            if among not in masks:
                masks[among] = self._mask(lo, hi, ranks)
            a, b = self._layout.a[name], self._layout.b[name]
            deltas[name] = DenseDelta(
                a_t=torch.cat([a[row, : ranks[key]] for key, row in leaders.items()]).t(),
                b=torch.cat([b[row, : ranks[key]] for key, row in leaders.items()]),
                mask=masks[among],
            )
        return deltas

    def _mask(self, lo: int, hi: int, ranks: Mapping[object, int]) -> Tensor:
        """(hi - lo, 1, total_rank): ones where the column belongs to the row's adapter."""
        owner = [key for key, rank in ranks.items() for _ in range(rank)]
        return self._like.new_tensor(
            [[[float(self._keys[row] == key) for key in owner]] for row in range(lo, hi)]
        )
