"""The kernels of `workers.openlora.kernels` in Triton, for a GPU.

Decode (one token per row) is bound by reading A and B once, so each program streams a tile of one
row's own matrices and multiplies in float32 without tensor cores (Punica's BGMV). Prompts (many
tokens per row) take tiles of tokens through `tl.dot` (its SGMV, with rows as segments, since the
engine's batch is padded). Shrink splits its long sum over programs and writes the parts side by
side; expand adds them up. Atomics would save that memory and cost the fixed order of summation:
equal inputs give equal bits here.

Written to what Triton has kept since 3.0: no descriptors, no autotuning, no inline assembly. This
file needs `triton` at import; `TRITON_INTERPRET=1`, set before, runs it on CPU tensors.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
# (kernels have no Python types: their arguments are pointers and numbers of the device)

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_DOT = 16
"""Smallest side of a `tl.dot` tile."""
SPLIT_WIDTH = 1024
MAX_SPLITS = 8
"""A shrink of `in` numbers is cut into at most 8 parts of 1,024 or more: enough programs to fill a
large GPU from 64 rows, few enough that the parts stay in its cache."""
TILE = 4096
"""Elements of A or B that a decode program holds at once (32 per thread of 4 warps)."""


@triton.jit
def _shrink_row(
    x, a, h, index, ranks, width, slots,
    x_row, a_member, a_slot, h_part, h_member, h_row,
    STEP: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Program (row, member, part): h = A[row's slot] x over `STEP` of the input's numbers."""
    row = tl.program_id(0)
    member = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    slot = tl.load(index + row).to(tl.int64)
    if slot < 0:
        return
    rank = tl.load(ranks + member * slots + slot)
    if rank == 0:
        return
    r = tl.arange(0, R)
    a_at = a + member * a_member + slot * a_slot + r[:, None].to(tl.int64) * width
    acc = tl.zeros((R, K), dtype=tl.float32)
    for first in range(0, STEP, K):
        k = part * STEP + first + tl.arange(0, K)
        x_k = tl.load(x + row * x_row + k, mask=k < width, other=0.0).to(tl.float32)
        mine = (r[:, None] < rank) & (k[None, :] < width)
        acc += tl.load(a_at + k[None, :], mask=mine, other=0.0).to(tl.float32) * x_k[None, :]
    out = h + part * h_part + member * h_member + row * h_row + r
    tl.store(out, tl.sum(acc, axis=1), mask=r < rank)


@triton.jit
def _expand_row(
    y, h, b, index, ranks, out, y_row, b_slot, h_part, h_row,
    PARTS: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (row, block of outputs): y += h B[row's slot]."""
    row = tl.program_id(0)
    slot = tl.load(index + row).to(tl.int64)
    if slot < 0:
        return
    rank = tl.load(ranks + slot)
    if rank == 0:
        return
    r = tl.arange(0, R)
    h_r = tl.zeros((R,), dtype=tl.float32)
    for part in range(PARTS):
        h_r += tl.load(h + part * h_part + row * h_row + r, mask=r < rank, other=0.0)
    n = tl.program_id(1) * N + tl.arange(0, N)
    b_at = b + slot * b_slot + r[:, None].to(tl.int64) * out + n[None, :]
    mine = (r[:, None] < rank) & (n[None, :] < out)
    b_rn = tl.load(b_at, mask=mine, other=0.0).to(tl.float32)
    y_at = y + row * y_row + n
    y_n = tl.load(y_at, mask=n < out, other=0.0).to(tl.float32)
    y_n += tl.sum(b_rn * h_r[:, None], axis=0)
    tl.store(y_at, y_n.to(y.dtype.element_ty), mask=n < out)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _shrink_tile(
    x, a, h, index, ranks, width, slots, tokens, blocks,
    x_row, x_token, a_member, a_slot, h_part, h_member, h_row, h_token,
    STEP: tl.constexpr, M: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Program (row and block of its tokens, member, part)."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * M + tl.arange(0, M)
    member = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    slot = tl.load(index + row).to(tl.int64)
    if slot < 0:
        return
    rank = tl.load(ranks + member * slots + slot)
    if rank == 0:
        return
    r = tl.arange(0, R)
    x_at = x + row * x_row + t[:, None].to(tl.int64) * x_token
    a_at = a + member * a_member + slot * a_slot + r[None, :].to(tl.int64) * width
    acc = tl.zeros((M, R), dtype=tl.float32)
    for first in range(0, STEP, K):
        k = part * STEP + first + tl.arange(0, K)
        x_mask = (t[:, None] < tokens) & (k[None, :] < width)
        x_mk = tl.load(x_at + k[None, :], mask=x_mask, other=0.0)
        a_mask = (r[None, :] < rank) & (k[:, None] < width)
        a_kr = tl.load(a_at + k[:, None], mask=a_mask, other=0.0)
        acc += tl.dot(x_mk, a_kr, input_precision="ieee")
    out = h + part * h_part + member * h_member + row * h_row + t[:, None] * h_token + r[None, :]
    tl.store(out, acc, mask=(t[:, None] < tokens) & (r[None, :] < rank))


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _expand_tile(
    y, h, b, index, ranks, out, tokens, blocks,
    y_row, y_token, b_slot, h_part, h_row, h_token,
    PARTS: tl.constexpr, M: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (row and block of its tokens, block of outputs)."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * M + tl.arange(0, M)
    slot = tl.load(index + row).to(tl.int64)
    if slot < 0:
        return
    rank = tl.load(ranks + slot)
    if rank == 0:
        return
    r = tl.arange(0, R)
    h_at = h + row * h_row + t[:, None] * h_token + r[None, :]
    h_mask = (t[:, None] < tokens) & (r[None, :] < rank)
    h_mr = tl.zeros((M, R), dtype=tl.float32)
    for part in range(PARTS):
        h_mr += tl.load(h_at + part * h_part, mask=h_mask, other=0.0)
    n = tl.program_id(1) * N + tl.arange(0, N)
    b_at = b + slot * b_slot + r[:, None].to(tl.int64) * out + n[None, :]
    mine = (r[:, None] < rank) & (n[None, :] < out)
    b_rn = tl.load(b_at, mask=mine, other=0.0)
    delta = tl.dot(h_mr.to(b.dtype.element_ty), b_rn, input_precision="ieee")
    y_at = y + row * y_row + t[:, None].to(tl.int64) * y_token + n[None, :]
    y_mask = (t[:, None] < tokens) & (n[None, :] < out)
    y_mn = tl.load(y_at, mask=y_mask, other=0.0).to(tl.float32) + delta
    tl.store(y_at, y_mn.to(y.dtype.element_ty), mask=y_mask)


def _pow2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _on(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def _token_block(tokens: int) -> int:
    return min(64, max(MIN_DOT, _pow2(tokens)))


class Triton:
    """See `workers.openlora.kernels.Kernels`."""

    name = "triton"

    def shrink(self, x: Tensor, a: Tensor, index: Tensor, ranks: Tensor) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        rows, tokens, width = x.shape
        members, slots, rank_limit, _ = a.shape
        decode = tokens == 1
        r = _pow2(rank_limit) if decode else max(MIN_DOT, _pow2(rank_limit))
        k = min(_pow2(width), max(MIN_DOT, TILE // r)) if decode else 64
        parts = min(MAX_SPLITS, max(1, width // SPLIT_WIDTH))
        step = triton.cdiv(triton.cdiv(width, parts), k) * k
        h = torch.empty(
            (parts, members, rows, tokens, rank_limit), dtype=torch.float32, device=x.device
        )
        with _on(x):
            if decode:
                _shrink_row[(rows, members, parts)](
                    x, a, h, index, ranks, width, slots,
                    x.stride(0), a.stride(0), a.stride(1), h.stride(0), h.stride(1), h.stride(2),
                    STEP=step, R=r, K=k, num_warps=4,
                )  # fmt: skip
            else:
                m = _token_block(tokens)
                blocks = triton.cdiv(tokens, m)
                _shrink_tile[(rows * blocks, members, parts)](
                    x, a, h, index, ranks, width, slots, tokens, blocks,
                    x.stride(0), x.stride(1), a.stride(0), a.stride(1),
                    h.stride(0), h.stride(1), h.stride(2), h.stride(3),
                    STEP=step, M=m, R=r, K=k, num_warps=4,
                )  # fmt: skip
        return h

    def expand(self, y: Tensor, h: Tensor, b: Tensor, index: Tensor, ranks: Tensor) -> Tensor:
        y = y.contiguous()
        rows, tokens, out = y.shape
        parts, rank_limit = h.shape[0], b.shape[1]
        with _on(y):
            if tokens == 1:
                r = _pow2(rank_limit)
                n = min(_pow2(out), max(MIN_DOT, TILE // r))
                _expand_row[(rows, triton.cdiv(out, n))](
                    y, h, b, index, ranks, out,
                    y.stride(0), b.stride(0), h.stride(0), h.stride(1),
                    PARTS=parts, R=r, N=n, num_warps=4,
                )  # fmt: skip
            else:
                r = max(MIN_DOT, _pow2(rank_limit))
                m, n = _token_block(tokens), 64
                blocks = triton.cdiv(tokens, m)
                _expand_tile[(rows * blocks, triton.cdiv(out, n))](
                    y, h, b, index, ranks, out, tokens, blocks,
                    y.stride(0), y.stride(1), b.stride(0), h.stride(0), h.stride(1), h.stride(2),
                    PARTS=parts, M=m, R=r, N=n, num_warps=4,
                )  # fmt: skip
        return y
