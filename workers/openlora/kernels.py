"""LoRA over slots: what each row of a batch adds, read straight out of the slots by slot number.

A group is the linears of one layer that read the same input (q, k and v, say): their A lie in one
tensor, so that one *shrink* serves them all, and each has an *expand* of its own.

    h[m, row, t] = A[m, index[row]] x[row, t]            (rank numbers, kept in float32)
    y[row, t]   += h[m, row, t] B_m[index[row]]          (one rounding, to y's type)

Nothing is gathered beforehand and no shape depends on which adapters a batch holds: another batch
composition is another `index`, which is what lets a CUDA graph outlive it. Rows with index -1 (the
base model, padding) and slots of rank 0 are left untouched. Memory beyond a slot's own rank is
never read: slots are not zeroed.

Three implementations of one signature: `Reference` (loops in float64: the definition), `Torch`
(gather and batched product, any device) and `kernels_triton.Triton` (decode after Punica's BGMV,
arXiv:2310.18547; several tokens per row as tiles of its SGMV). `for_device` chooses.
"""

import importlib.util
from typing import Protocol

import torch
from torch import Tensor

from ledger.errors import ConfigError
from workers.openlora.logs import get_logger

log = get_logger(__name__)


TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest difference between two implementations, as a share of the largest number: a few units
in the last place of each type. float32 leaves room for another order of summation."""


class Kernels(Protocol):
    """`x` (rows, tokens, in); `a` (members, slots, max_rank, in); `ranks` (members, slots) int32;
    `index` (rows,) int64. Float types: x, a, b and y share one of float32, bfloat16, float16."""

    name: str

    def shrink(self, x: Tensor, a: Tensor, index: Tensor, ranks: Tensor) -> Tensor:
        """`h` (parts, members, rows, tokens, max_rank) float32; the sum over parts is A x.

        Where a row has no adapter, and beyond its rank, `h` holds whatever it held.
        """
        ...

    def expand(self, y: Tensor, h: Tensor, b: Tensor, index: Tensor, ranks: Tensor) -> Tensor:
        """`y` (rows, tokens, out) plus each row's delta, in place where `y` is contiguous.

        `h` (parts, rows, tokens, max_rank) and `ranks` (slots,) are one member's; `b` is
        (slots, max_rank, out).
        """
        ...


class Reference:
    """The definition, one row at a time in float64. For tests and for doubt."""

    name = "reference"

    def shrink(self, x: Tensor, a: Tensor, index: Tensor, ranks: Tensor) -> Tensor:
        members, rank_limit = a.shape[0], a.shape[2]
        h = x.new_full((1, members, *x.shape[:2], rank_limit), torch.nan, dtype=torch.float32)
        for row, slot in enumerate(index.tolist()):
            for m in range(members if slot >= 0 else 0):
                rank = int(ranks[m, slot])
                h[0, m, row, :, :rank] = (x[row].double() @ a[m, slot, :rank].double().t()).float()
        return h

    def expand(self, y: Tensor, h: Tensor, b: Tensor, index: Tensor, ranks: Tensor) -> Tensor:
        for row, slot in enumerate(index.tolist()):
            rank = int(ranks[slot]) if slot >= 0 else 0
            if rank:
                delta = h[:, row, :, :rank].double().sum(0) @ b[slot, :rank].double()
                y[row] = (y[row].double() + delta).to(y.dtype)
        return y


class Torch:
    """Gather, then batched products. No number of the batch is read back to the host."""

    name = "torch"

    def shrink(self, x: Tensor, a: Tensor, index: Tensor, ranks: Tensor) -> Tensor:
        slot = index.clamp(min=0)
        own = self._own(index, ranks[:, slot], a.shape[2])  # (members, rows, max_rank)
        # where, not a product with the mask: what lies beyond the rank may be NaN
        rows = torch.where(own[..., None], a[:, slot], 0.0)  # (members, rows, max_rank, in)
        h = torch.matmul(x[None].float(), rows.float().transpose(-1, -2))
        return h[None]

    def expand(self, y: Tensor, h: Tensor, b: Tensor, index: Tensor, ranks: Tensor) -> Tensor:
        slot = index.clamp(min=0)
        own = self._own(index, ranks[slot], b.shape[1])  # (rows, max_rank)
        rows = torch.where(own[..., None], b[slot], 0.0).float()  # (rows, max_rank, out)
        summed = torch.where(own[:, None], h.sum(0), 0.0)  # (rows, tokens, max_rank)
        return y.copy_(torch.baddbmm(y.float(), summed, rows))

    @staticmethod
    def _own(index: Tensor, ranks: Tensor, rank_limit: int) -> Tensor:
        """Which ranks belong to each row's adapter: ranks' shape plus (max_rank,)."""
        column = torch.arange(rank_limit, device=ranks.device)
        return (column < ranks[..., None]) & (index >= 0)[:, None]


def for_device(device: torch.device, dtype: torch.dtype, wanted: str | None = None) -> Kernels:
    """Triton's on a CUDA device where it works, torch's anywhere else, or where it is `wanted`.

    Raises ConfigError for a name that is neither `torch` nor None.

    "Works" is tried, not assumed: Triton compiles a launcher with the machine's C compiler, and a
    machine without one must serve all the same. The reason is logged once.
    """
    if wanted not in (None, Torch.name):
        raise ConfigError(f"lora_kernels is {Torch.name!r} or None, not {wanted!r}")
    if wanted is None and device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        try:
            from workers.openlora.kernels_triton import Triton

            kernels = Triton()
            self_test(kernels, device, dtype)
        except Exception as e:  # whatever a compiler, a driver or a wrong result can raise
            log.warning("openlora kernels fall back to torch", reason=f"{type(e).__name__}: {e}")
        else:
            return kernels
    return Torch()


def self_test(
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    *,
    width: int = 72,
    out: int = 40,
    rank: int = 8,
    tokens: int = 5,
) -> None:
    """One decode step and one of `tokens` beside `Torch`; ArithmeticError when they differ.

    `rank` is the slots', from 8 on; two of them hold smaller ones.
    """
    make = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(device=device, dtype=dtype)

    index = torch.tensor([2, -1, 0], device=device)
    ranks = torch.tensor([[3, 0, rank], [rank, 0, 5]], dtype=torch.int32, device=device)
    a, b = randn(2, 3, rank, width), randn(3, rank, out)
    for count in (1, tokens):
        x, y = randn(3, count, width), randn(3, count, out)
        want, got = (
            k.expand(y.clone(), k.shrink(x, a, index, ranks)[:, 1], b, index, ranks[1])
            for k in (Torch(), kernels)
        )
        error = float((want.float() - got.float()).abs().max())
        if not error <= float(want.float().abs().max()) * TOLERANCE[dtype]:
            raise ArithmeticError(f"{kernels.name} kernels are off by {error:.3g}")
