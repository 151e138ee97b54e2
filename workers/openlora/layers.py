"""Target linears: the base model's own product, and on top what each row's adapter adds.

`y[i] = W x[i] + (x[i] A[i]^T) B[i]`. A and B of the rows lie in a *working set* (`working`), in
one of two forms (`deltas`), and a linear finds them by its own name in the `LoraContext` that the
engine points at the batch before each forward.

This file knows tensors only: no files, no requests.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workers.openlora.adapter import TargetShape
from workers.openlora.deltas import LoraContext, dense_is_cheaper
from workers.openlora.packed import pack_linears
from workers.openlora.working import WorkingSet

__all__ = ["LoraContext", "LoraLinear", "WorkingSet", "dense_is_cheaper", "wrap_targets"]


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
        if delta is None:
            return y
        if x.dim() == 2:  # OPT: (rows * tokens, in); `selfcheck` saw that nothing is left out
            lines = (self.context.rows, -1)
            return delta.add_to(y.view(*lines, y.shape[1]), x.view(*lines, x.shape[1])).view_as(y)
        return delta.add_to(y, x)


def wrap_targets(
    model: nn.Module, context: LoraContext, leaf_names: Sequence[str] | None = None
) -> dict[str, TargetShape]:
    """Replace the target linears of `model` in place; returns their shapes by module path.

    `leaf_names` are last path segments such as `q_proj`; None means every linear but the output
    head (what peft calls all-linear). `transformers`' Conv1D (GPT-2) counts as a linear. Base
    linears, wrapped or not, are packed where `packed` says that they gain by it.
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
    pack_linears(model)
    return shapes


def _shape(module: nn.Module) -> TargetShape:
    weight: Any = module.weight
    rows, cols = weight.shape
    if isinstance(module, Conv1D):  # stores (in, out)
        rows, cols = cols, rows
    return TargetShape(in_features=int(cols), out_features=int(rows))
