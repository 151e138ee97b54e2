"""The base model's own linears on a CPU: weights laid out once for oneDNN's kernels.

torch multiplies float32 by MKL, which takes its narrow path on processors that are not Intel's, and
reorders nothing ahead. The same product through oneDNN, with the weight in the kernel's own block
layout, costs 0.4 of that at 32 rows (AMD, AVX-512; on Intel they are near each other). The numbers
differ by the order of summation alone. The packed weight *replaces* the plain one, so no memory is
added; `weight` gives the plain one back, bit for bit, for who asks.

What packs: `nn.Linear` in float32 on a CPU, from `MIN_ELEMENTS` up (below, a call costs more than
it saves). Everything else stays as it is. The product is the operator that torch's own compiler
emits for a frozen linear; where a build of torch lacks it, nothing is packed.
"""

from typing import Any

import torch
from torch import Tensor, nn

MIN_ELEMENTS = 1 << 17
"""Of a weight. Measured: 512 x 512 gains 2.2x at 32 rows and loses 6 us at one; 128 x 384 loses."""

PACKED_FOR_ROWS = 32
"""The row count that the layout is chosen for; the others are served from the same one."""


class PackedLinear(nn.Module):
    """`y = W x + bias` as `nn.Linear` says it, from a packed W."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        pack: Any = torch.ops.mkldnn._reorder_linear_weight
        self._packed: Tensor = pack(linear.weight.detach(), PACKED_FOR_ROWS)
        self._product: Any = torch.ops.mkldnn._linear_pointwise.default

    @property
    def weight(self) -> Tensor:
        """The plain weight (out, in): a copy, made at each call."""
        return self._packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._product(x, self._packed, self.bias, "none", [], "")
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def pack_linears(model: nn.Module, *, min_elements: int | None = None) -> int:
    """Replace the linears of `model` that pack, in place; returns how many."""
    if not _available():
        return 0
    least = MIN_ELEMENTS if min_elements is None else min_elements
    found = {p: m for p, m in model.named_modules() if _packs(m, least)}
    for path, module in found.items():
        parent, _, leaf = path.rpartition(".")
        assert isinstance(module, nn.Linear)
        setattr(model.get_submodule(parent), leaf, PackedLinear(module))
    return len(found)


def _packs(module: nn.Module, min_elements: int) -> bool:
    if type(module) is not nn.Linear:  # a subclass may compute something else
        return False
    w = module.weight
    return w.device.type == "cpu" and w.dtype == torch.float32 and w.numel() >= min_elements


def _available() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    ops: Any = torch.ops.mkldnn
    return hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
