"""The arithmetic: each target linear adds, for every row of a batch, that row's own adapter.

`y[i] = W x[i] + (x[i] A[i]^T) B[i]`. A and B of the rows lie in a *working set*: one copy per
batch row, made when the row is given its adapter and not per token. So a decode step reads them
with two batched products and no gather. Where few distinct adapters share a batch, a second form
is cheaper: their A and B side by side, a dense product, and a mask that leaves each row its own
columns (S-LoRA and Punica gather instead; on a CPU the dense product wins, see `dense_is_cheaper`).

This file knows tensors only: no files, no requests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workers.openlora.adapter import AdapterWeights, TargetShape

STREAM_OVER_FLOP = 4.5
"""Cost of reading one adapter element over one multiply-add with it, both measured on 2 CPU cores
at h=512..1408 (0.065 ns against 0.0143 ns). Only the choice of form depends on it."""


def dense_is_cheaper(*, rows: int, tokens: int, rank: int, dense_rank: int) -> bool:
    """The cost rule. `rank` is the padded rank per row, `dense_rank` the distinct adapters' sum.

    Row form reads every row's own matrices and multiplies them with that row's tokens; dense form
    reads each distinct adapter once and multiplies it with the tokens of all rows.
    """
    row_form = rows * rank * (STREAM_OVER_FLOP + tokens)
    dense_form = dense_rank * (STREAM_OVER_FLOP + rows * tokens)
    return dense_form < row_form


@dataclass(slots=True)
class RowDelta:
    """a_t (rows, in, rank), b (rows, rank, out)."""

    a_t: Tensor
    b: Tensor

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y (rows, tokens, out) += x (rows, tokens, in) through each row's adapter."""
        return y.baddbmm_(torch.bmm(x, self.a_t), self.b)


@dataclass(slots=True)
class DenseDelta:
    """a_t (in, total_rank), b (total_rank, out), mask (rows, 1, total_rank) of zeros and ones."""

    a_t: Tensor
    b: Tensor
    mask: Tensor

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y (rows, tokens, out) += x (rows, tokens, in) through each row's adapter."""
        h = torch.matmul(x, self.a_t).mul_(self.mask)
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), self.b)
        return y


@dataclass(slots=True)
class LoraContext:
    """What every wrapped linear looks at: the deltas of the batch that is being run, by target."""

    deltas: Mapping[str, RowDelta | DenseDelta] = field(default_factory=dict)


class LoraLinear(nn.Module):
    """A linear of the base model plus the current batch's deltas. The base weights stay as is."""

    def __init__(self, base: nn.Module, name: str, context: LoraContext) -> None:
        super().__init__()
        self.base = base
        self.target = name
        self.context = context

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)  # x is (rows, tokens, in): the batch as the engine gave it
        delta = self.context.deltas.get(self.target)
        return y if delta is None else delta.add_to(y, x)


def wrap_targets(
    model: nn.Module, context: LoraContext, leaf_names: Sequence[str] | None = None
) -> dict[str, TargetShape]:
    """Replace the target linears of `model` in place; returns their shapes by module path.

    `leaf_names` are last path segments such as `q_proj`; None means every linear but the output
    head (what peft calls all-linear). `transformers`' Conv1D (GPT-2) counts as a linear.
    """
    output_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = output_head()
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and (path.rpartition(".")[2] in leaf_names if leaf_names else module is not head)
    }
    shapes: dict[str, TargetShape] = {}
    for path, module in found.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraLinear(module, path, context))
        shapes[path] = _shape(module)
    return shapes


def _shape(module: nn.Module) -> TargetShape:
    weight: Any = module.weight
    rows, cols = weight.shape
    if isinstance(module, Conv1D):  # stores (in, out)
        rows, cols = cols, rows
    return TargetShape(in_features=int(cols), out_features=int(rows))


class _TargetRows:
    """The working set of one linear: a (max_rows, capacity, in), b (max_rows, capacity, out).

    Invariant: beyond `dirty[row]` every rank of a row is zero, so that rows of smaller rank, and
    base rows, add nothing.
    """

    def __init__(self, shape: TargetShape, max_rows: int, like: Tensor) -> None:
        self.a = like.new_zeros(max_rows, 0, shape.in_features)
        self.b = like.new_zeros(max_rows, 0, shape.out_features)
        self.dirty = [0] * max_rows

    def fill(self, row: int, a: Tensor | None, b: Tensor | None) -> None:
        rank = 0 if a is None else a.shape[0]
        if rank > self.a.shape[1]:
            self.a = _grow(self.a, rank)
            self.b = _grow(self.b, rank)
        if a is not None and b is not None:
            self.a[row, :rank] = a
            self.b[row, :rank] = b
        if self.dirty[row] > rank:
            self.a[row, rank : self.dirty[row]] = 0
            self.b[row, rank : self.dirty[row]] = 0
        self.dirty[row] = rank

    def move(self, source: int, target: int) -> None:
        rank = self.dirty[source]
        self.fill(target, self.a[source, :rank], self.b[source, :rank])


def _grow(rows: Tensor, capacity: int) -> Tensor:
    bigger = rows.new_zeros(rows.shape[0], capacity, rows.shape[2])
    bigger[:, : rows.shape[1]] = rows
    return bigger


class WorkingSet:
    """Every batch row's adapter, copied out of the slots once per row and not once per token.

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
        self._max_rows = max_rows
        self._like = like
        self._targets: dict[str, _TargetRows] = {}
        self._keys: list[object | None] = [None] * max_rows
        self._bound: dict[tuple[int, int, int], tuple[str, dict[str, RowDelta | DenseDelta]]] = {}
        self.fills = 0
        self.last_form = "none"

    def fill(self, row: int, key: object | None, weights: AdapterWeights | None) -> None:
        """Give `row` the adapter that `key` names; `key` None makes it a row of the base model."""
        self._bound.clear()
        self._keys[row] = key
        if weights is not None:
            self.fills += 1
            for name in weights.a:
                if name not in self._targets:
                    self._targets[name] = _TargetRows(
                        self._shapes[name], self._max_rows, self._like
                    )
        for name, rows in self._targets.items():
            if weights is None or name not in weights.a:
                rows.fill(row, None, None)
            else:
                rows.fill(row, weights.a[name], weights.b[name])

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is; `source` is free to be filled again."""
        self._bound.clear()
        self._keys[target] = self._keys[source]
        for rows in self._targets.values():
            rows.move(source, target)

    def swap(self, one: int, other: int) -> None:
        self._bound.clear()
        keys = self._keys
        keys[one], keys[other] = keys[other], keys[one]
        for t in self._targets.values():
            for half in (t.a, t.b):
                half[[one, other]] = half[[other, one]]
            t.dirty[one], t.dirty[other] = t.dirty[other], t.dirty[one]

    def bind(self, lo: int, hi: int, tokens: int) -> None:
        """Point the context at rows [lo, hi), each with `tokens` positions."""
        bound = self._bound.get((lo, hi, tokens))
        if bound is None:
            bound = self._bound[(lo, hi, tokens)] = self._choose(lo, hi, tokens)
        self.last_form, self.context.deltas = bound

    def _choose(
        self, lo: int, hi: int, tokens: int
    ) -> tuple[str, dict[str, RowDelta | DenseDelta]]:
        leaders: dict[object, int] = {}  # distinct adapter -> the first row that has it
        for row in range(lo, hi):
            key = self._keys[row]
            if key is not None:
                leaders.setdefault(key, row)
        if not leaders:
            return "none", {}
        ranks = [max(t.dirty[row] for t in self._targets.values()) for row in leaders.values()]
        if dense_is_cheaper(rows=hi - lo, tokens=tokens, rank=max(ranks), dense_rank=sum(ranks)):
            return "dense", self._dense(lo, hi, leaders)
        return "row", self._row(lo, hi)

    def unbind(self) -> None:
        """The base model alone."""
        self.context.deltas = {}

    def _row(self, lo: int, hi: int) -> dict[str, RowDelta | DenseDelta]:
        deltas: dict[str, RowDelta | DenseDelta] = {}
        for name, t in self._targets.items():
            rank = max(t.dirty[lo:hi])
            if rank:
                deltas[name] = RowDelta(a_t=t.a[lo:hi, :rank].transpose(1, 2), b=t.b[lo:hi, :rank])
        return deltas

    def _dense(
        self, lo: int, hi: int, leaders: Mapping[object, int]
    ) -> dict[str, RowDelta | DenseDelta]:
        deltas: dict[str, RowDelta | DenseDelta] = {}
        masks: dict[tuple[int, ...], Tensor] = {}  # targets of one rank profile share a mask
        for name, t in self._targets.items():
            ranks = {key: t.dirty[row] for key, row in leaders.items()}
            if not any(ranks.values()):
                continue
            profile = tuple(ranks.values())
            if profile not in masks:
                masks[profile] = self._mask(lo, hi, ranks)
            deltas[name] = DenseDelta(
                a_t=torch.cat([t.a[row, : ranks[key]] for key, row in leaders.items()]).t(),
                b=torch.cat([t.b[row, : ranks[key]] for key, row in leaders.items()]),
                mask=masks[profile],
            )
        return deltas

    def _mask(self, lo: int, hi: int, ranks: Mapping[object, int]) -> Tensor:
        """(hi - lo, 1, total_rank): ones where the column belongs to the row's adapter."""
        owner = [key for key, rank in ranks.items() for _ in range(rank)]
        return self._like.new_tensor(
            [[[float(self._keys[row] == key) for key in owner]] for row in range(lo, hi)]
        )
