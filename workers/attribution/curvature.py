"""EK-FAC curvature over LoRA matrices, and the rotation and scaling it gives to gradients.

Influence of a training example on an answer is g_answerᵀ (F + damping)⁻¹ g_example, with F the
Fisher information of the adapter. F is block diagonal over the LoRA matrices; in each block it is
diagonal in the Kronecker basis of two small covariances:

    A = E[x xᵀ] over positions (cols, cols)      G = E[g gᵀ] over positions (rows, rows)
    gradient in the basis: Q_Gᵀ W' Q_A           eigenvalue: E[(Q_Gᵀ W' Q_A)²] per entry

so that "whitening" (rotate, then divide by the root of eigenvalue + damping) turns influence into
a plain dot product of two vectors. Fisher, not empirical Fisher: g is taken with labels *sampled
from the model*. True labels would weigh a memorised example by zero.

Source: George et al., EK-FAC (arXiv:1806.03884); Grosse et al., influence functions for large
language models (arXiv:2308.03296), section 3; damping as a fraction of the mean eigenvalue as
there and in kronfluence. Memory: the covariances of one model, whatever the number of rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ledger.domain.money import PPM_WHOLE
from ledger.errors import ComputeError, InvalidEvent
from workers.attribution.gradients import (
    Predictions,
    Site,
    Trace,
    backward,
    forward,
    loss_sums,
    recording,
)
from workers.training.data import IGNORED

DAMPING_PPM = 10_000
"""Damping as millionths of a block's mean eigenvalue: 0.01. Grosse et al. take 0.1; from 0.0001 to
0.1 it makes no difference to fidelity here, since the ridge of `sketch.py` damps too."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Curvature of one site.

    `basis_in` (cols, cols) and `basis_out` (rows, rows) hold eigenvectors as columns;
    `eigenvalues` (rows, cols) is the second moment of a gradient entry in that basis.
    """

    name: str
    basis_in: Tensor
    basis_out: Tensor
    eigenvalues: Tensor

    def scaling(self, damping_ppm: int) -> Tensor:
        """(rows, cols): (eigenvalue + damping)^-1/2, or 0 for a block that never saw a gradient."""
        damping = float(self.eigenvalues.mean()) * damping_ppm / PPM_WHOLE
        if damping <= 0.0:
            return torch.zeros_like(self.eigenvalues)
        return (self.eigenvalues + damping).rsqrt()


class Whitener:
    """Turns the traces of one backward pass into whitened vectors, one per example."""

    def __init__(self, blocks: Sequence[Block], *, damping_ppm: int = DAMPING_PPM) -> None:
        if damping_ppm <= 0:
            raise InvalidEvent(f"damping is {damping_ppm} ppm; expected a positive integer")
        self.blocks = list(blocks)
        self.damping_ppm = damping_ppm
        self.width = sum(b.eigenvalues.numel() for b in self.blocks)
        self._scaling = [b.scaling(damping_ppm) for b in self.blocks]

    def __call__(self, traces: Sequence[Trace]) -> Tensor:
        """(batch, width): per-example gradients, rotated and scaled, sites one after another."""
        out = torch.empty(len(traces[0].x) if traces else 0, self.width)
        start = 0
        for trace, block, scale in zip(traces, self.blocks, self._scaling, strict=True):
            part = out[:, start : start + scale.numel()]
            torch.mul(_rotate(trace, block), scale, out=part.view(-1, *scale.shape))
            start += scale.numel()
        return out


def estimate(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[dict[str, Tensor]],
    *,
    seed: int,
    covariances: Iterable[dict[str, Tensor]] | None = None,
) -> list[Block]:
    """EK-FAC blocks: covariances from `covariances` (else `batches`), eigenvalues from `batches`.

    Both must be re-iterable. Covariances are means over positions, of which an example has many,
    and cost most: fewer examples will do. Labels are drawn from the model by a generator of
    `seed`; the second walk draws afresh, so that the eigenvalues are not fitted to the first
    draw's noise.
    Raises InvalidEvent when there is no batch, ComputeError when a gradient is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    inner = [torch.zeros(s.cols, s.cols) for s in sites]
    outer = [torch.zeros(s.rows, s.rows) for s in sites]
    positions = 0
    with recording(model, sites) as tape:
        for batch in batches if covariances is None else covariances:
            losses = _sampled_losses(forward(model, batch, tape), batch["labels"], generator)
            mask = batch["attention_mask"].float()
            positions += int(mask.sum())
            moments_of: dict[int, Tensor] = {}  # query, key and value layers share their input
            for i, trace in enumerate(backward(tape, losses)):
                if id(trace.x) not in moments_of:
                    masked = trace.x * _over_calls(mask, trace.x)
                    moments_of[id(trace.x)] = _second_moment(masked)
                inner[i] += moments_of[id(trace.x)]
                outer[i] += _second_moment(trace.g)
    if not positions:
        raise InvalidEvent("curvature needs at least one example; the run has no rows")
    bases = [
        (_eigenvectors(a / positions), _eigenvectors(g / positions))
        for a, g in zip(inner, outer, strict=True)
    ]

    moments = [torch.zeros(s.rows, s.cols) for s in sites]
    examples = 0
    frames = [
        Block(name=s.name, basis_in=a, basis_out=g, eigenvalues=m)
        for s, (a, g), m in zip(sites, bases, moments, strict=True)
    ]
    with recording(model, sites) as tape:
        for batch in batches:
            losses = _sampled_losses(forward(model, batch, tape), batch["labels"], generator)
            examples += len(batch["labels"])
            for trace, frame in zip(backward(tape, losses), frames, strict=True):
                frame.eigenvalues.add_(_rotate(trace, frame).square().sum(dim=0))
    for frame in frames:
        frame.eigenvalues.div_(examples)
    return frames


def _sampled_losses(predictions: Predictions, labels: Tensor, generator: torch.Generator) -> Tensor:
    """(batch,): summed loss against labels drawn from the model where real labels stand."""
    with torch.no_grad():
        probabilities = predictions.logits.softmax(dim=-1)
        if not bool(torch.isfinite(probabilities).all()):
            raise ComputeError("the model's logits hold NaN or infinity; check the weights")
        drawn = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        sampled = torch.full_like(labels, IGNORED)
        sampled[predictions.example, predictions.position + 1] = drawn
    return loss_sums(predictions, sampled)


def _rotate(trace: Trace, block: Block) -> Tensor:
    """(batch, rows, cols): per-example gradients in the block's eigenbasis, Q_Gᵀ W' Q_A.

    The product with the longer side is one matrix product over the whole batch, so the gradient
    is laid out with that side last; a tall one comes back as a transposed view.
    """
    if len(block.basis_in) >= len(block.basis_out):
        wide = torch.bmm(trace.g.transpose(1, 2), trace.x) @ block.basis_in
        return block.basis_out.T @ wide
    tall = torch.bmm(trace.x.transpose(1, 2), trace.g) @ block.basis_out
    return (block.basis_in.T @ tall).transpose(1, 2)


def _second_moment(values: Tensor) -> Tensor:
    flat = values.reshape(-1, values.shape[-1])
    return flat.T @ flat


def _over_calls(mask: Tensor, x: Tensor) -> Tensor:
    """The attention mask (batch, seq) repeated for a layer that ran several times, with a tail."""
    return mask.repeat(1, x.shape[1] // mask.shape[1]).unsqueeze(-1)


def _eigenvectors(covariance: Tensor) -> Tensor:
    """Eigenvectors as columns, each with its largest entry positive: one basis, not two."""
    vectors = torch.linalg.eigh(covariance.double()).eigenvectors
    peak = vectors.abs().argmax(dim=0)
    signs = vectors[peak, torch.arange(vectors.shape[1])].sign()
    oriented: Tensor = (vectors * signs).float()
    return oriented
