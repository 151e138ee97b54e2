"""Whitened gradients into short integer vectors: select, project, one byte per entry.

1. Select, `width` -> KEPT coordinates: those in which a sample of the rows has most energy. The
   others are left out, not folded in: folding buries what is small under the noise of what is
   not. Half as many cost another 3 to 6 % of LDS (docs/ATTRIBUTION.md).
2. Project, KEPT -> dim: the principal directions of the training rows themselves, each scaled by
   (s² + ridge)^-1/2 with s² the rows' energy along it. What all rows share says little about any
   of them: the ridge is TRAK's (Φᵀ Φ)^-1, which in this basis is one number a direction. With no
   more rows than `dim` no direction is lost. A random projection to that size would bury one
   row's influence under the noise of a thousand others.
3. Quantise: 8 bits an entry, and one scale a vector.

Everything after this module is integer arithmetic, exact on every machine. Everything before it
is float, and reproducible only on the same platform, libraries and thread count.

Source: Park et al., TRAK (arXiv:2303.14186), section 3; LoGra's principal projection (Choe et al.,
arXiv:2405.13954), here over whole rows and not per layer.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ledger.domain.money import PPM_WHOLE
from ledger.errors import ComputeError, InvalidEvent

KEPT = 32_768
"""Most coordinates of a whitened gradient that are looked at."""
DIM = 960
"""Most entries of a sketch: bytes per row in the index, with its scale below 1,000. A multiple of
64, which the scan's byte product wants (`scan.WHOLE_WIDTH`)."""
MAX_DIM = 65_536
LIMIT = 127
"""Largest absolute entry; -128 stays unused so that negation is exact."""
NORM_UNIT = 256
"""A sketch's norm is counted in 1/NORM_UNIT of its quantisation step."""
_MAX_NORM = 2**62
_RANK_TOLERANCE = 1e-6
_MAGIC = b"tributary/attribution-sketch/v1\n"


def select(energies: Tensor, kept: int) -> Tensor:
    """(min(width, kept),) the coordinates of most energy, in ascending order; ties by number."""
    order = torch.sort(energies, descending=True, stable=True).indices
    return order[:kept].sort().values


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Principal directions in one byte an entry: column j is `entries[:, j] * steps[j]`.

    `entries` int8 (kept, dim), `steps` float32 (dim,).
    """

    entries: Tensor
    steps: Tensor

    @property
    def dim(self) -> int:
        """Entries of a projected vector."""
        return int(self.entries.shape[1])

    def matrix(self) -> Tensor:
        """(kept, dim) float32."""
        return self.entries.float() * self.steps


def fit_projection(rows: Tensor, *, dim: int, ridge_ppm: int = 0) -> Projection:
    """Up to `dim` principal directions of `rows` (count, kept), strongest first.

    Direction j is divided by the root of s_j² / mean(s²) + ridge, over the directions kept; no
    ridge leaves them of length 1. Fewer directions when the rows span fewer; all-zero rows get one
    direction of zeros.
    """
    gram = (rows @ rows.T).double()
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = max(1, int((values > values[0].clamp_min(1e-300) * _RANK_TOLERANCE).sum()))
    kept = min(dim, rank)
    values = values[:kept].clamp_min(1e-300)
    scale = values.rsqrt()
    if ridge_ppm:
        scale = scale * (values / values.mean() + ridge_ppm / PPM_WHOLE).rsqrt()
    columns = rows.T @ (vectors[:, :kept] * scale).float()
    columns = columns if bool(torch.isfinite(columns).all()) else torch.zeros_like(columns)
    peak = columns.abs().argmax(dim=0)
    columns = columns * columns[peak, torch.arange(kept)].sign()
    steps = columns.abs().amax(dim=0) / LIMIT
    entries = (columns / steps.clamp_min(1e-30)).round().to(torch.int8)
    return Projection(entries=entries.contiguous(), steps=steps)


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """One answer's gradient: `vector` int8 (dim,), `norm` of the whole gradient.

    `norm` is in 1/NORM_UNIT of the vector's quantisation step, and is taken *before* projection:
    it says how much of the answer the rows do not span, which the placebo level needs. The step
    itself is left out: shares do not depend on it.
    """

    vector: NDArray[np.int8]
    norm: int

    def to_bytes(self) -> bytes:
        """A magic line, norm as u64 and dim as u32 big-endian, the entries as signed bytes."""
        numbers = self.norm.to_bytes(8, "big") + len(self.vector).to_bytes(4, "big")
        return _MAGIC + numbers + self.vector.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Sketch":
        """Raises InvalidEvent for anything that `to_bytes` does not write."""
        start = len(_MAGIC) + 12
        body, norm = data[start:], int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 8], "big")
        if (
            data[: len(_MAGIC)] != _MAGIC
            or data[start - 4 : start] != len(body).to_bytes(4, "big")
            or not 1 <= len(body) <= MAX_DIM
            or norm > _MAX_NORM
        ):
            raise InvalidEvent("not a sketch: expected its magic line, norm, length and entries")
        vector = np.frombuffer(body, dtype=np.int8)
        if vector.min() < -LIMIT:
            raise InvalidEvent(f"a sketch entry is -128; expected -{LIMIT} to {LIMIT}")
        return cls(vector=vector, norm=norm)

    def sha256(self) -> bytes:
        """32 bytes over `to_bytes`: what an attribution event commits to."""
        return hashlib.sha256(self.to_bytes()).digest()


def sketches(entries: NDArray[np.int8], steps: Tensor, norms: Tensor) -> list[Sketch]:
    """Quantised vectors (batch, dim) with their steps and full norms (batch,) as sketches."""
    out = []
    for vector, step, norm in zip(entries, steps.tolist(), norms.tolist(), strict=True):
        whole = round(norm / step * NORM_UNIT) if step > 0 else 0
        out.append(Sketch(vector=vector, norm=min(whole, _MAX_NORM)))
    return out


def quantise(vectors: Tensor) -> tuple[NDArray[np.int8], Tensor]:
    """(batch, dim) floats -> int8 of the same shape, and per vector the value of one step.

    A zero vector becomes zeros with step 0. Raises ComputeError for NaN or infinity.
    """
    if not bool(torch.isfinite(vectors).all()):
        raise ComputeError("a whitened gradient is NaN or infinite; check the adapter's weights")
    steps = vectors.double().abs().amax(dim=1) / LIMIT
    scaled = vectors.double() / steps.clamp_min(1e-300).unsqueeze(1)
    return scaled.round().to(torch.int8).numpy(), steps
