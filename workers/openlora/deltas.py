"""What a batch's adapters add to one linear, in two forms, and the rule that chooses between them.

Row form: every row's own A and B, two batched products, nothing gathered. Dense form: the distinct
adapters' A and B side by side, a dense product, and a mask that leaves each row its own columns;
cheaper where few adapters share a batch (S-LoRA and Punica gather instead; on a CPU the dense
product wins). Tensors only: no files, no requests.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

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


class Delta(Protocol):
    """What a target linear is given for the batch that is being run."""

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y (rows, tokens, out) plus each row's adapter of x (rows, tokens, in); y is reused."""
        ...


@dataclass(slots=True)
class RowDelta:
    """a (rows, rank, in), b (rows, rank, out)."""

    a: Tensor
    b: Tensor

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            # The large factor on the left: read from memory in 0.65 of the other order's time.
            h = torch.bmm(self.a, x.transpose(1, 2)).transpose(1, 2)
        else:
            h = torch.bmm(x, self.a.transpose(1, 2))
        return y.baddbmm_(h, self.b)


@dataclass(slots=True)
class DenseDelta:
    """a_t (in, total_rank), b (total_rank, out), mask (rows, 1, total_rank) of zeros and ones."""

    a_t: Tensor
    b: Tensor
    mask: Tensor

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        h = torch.matmul(x, self.a_t).mul_(self.mask)
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), self.b)
        return y


@dataclass(slots=True)
class LoraContext:
    """What every wrapped linear looks at: the deltas of the batch that is being run, by target.

    A target without one is, for this batch, the base model's alone."""

    deltas: Mapping[str, Delta] = field(default_factory=dict)
    rows: int = 1
    """How many batch rows run: some models lay all tokens of all rows in one line."""
