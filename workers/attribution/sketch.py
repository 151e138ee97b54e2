"""Whitened gradients into short integer vectors: fold, project, one byte per entry.

1. Fold, `width` -> FOLDED: entries get random signs and are summed into FOLDED buckets
   (CountSketch with equally full buckets). Dot products keep their expectation and err
   by about |a||b| / sqrt(FOLDED). It needs no matrix, only a seed.
2. Project, FOLDED -> dim: the principal directions of the training rows themselves. With no more
   rows than `dim` nothing is lost, since scores only ever compare an answer with rows. A random
   projection to that size would bury one row's influence under the noise of a thousand others.
3. Quantise: 8 bits an entry, and one scale a vector.

Everything after this module is integer arithmetic, exact on every machine. Everything before it
is float, and reproducible only on the same platform, libraries and thread count.

Source: Charikar et al., "Finding frequent items in data streams" (2002); LoGra's principal
projection (Choe et al., arXiv:2405.13954), here over whole rows and not per layer.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ledger.errors import ComputeError, InvalidEvent

FOLDED = 16_384
DIM = 1_024
"""Most entries of a sketch: bytes per row in the index."""
MAX_DIM = 65_536
LIMIT = 127
"""Largest absolute entry; -128 stays unused so that negation is exact."""
NORM_UNIT = 256
"""A sketch's norm is counted in 1/NORM_UNIT of its quantisation step."""
_MAX_NORM = 2**62
_RANK_TOLERANCE = 1e-6
_MAGIC = b"tributary/attribution-sketch/v1\n"


class Fold:
    """The seeded map (batch, width) -> (batch, dim); the identity up to `dim` entries.

    The vector is cut into pieces of `dim` entries. Every entry gets a random sign, every piece a
    random rotation, and the pieces are summed: two entries of one piece never meet, two of
    different pieces meet with probability 1/dim, which is all that a CountSketch needs, and memory
    is read in order.
    """

    def __init__(self, *, width: int, seed: int, dim: int = FOLDED) -> None:
        self.width, self.dim = width, min(width, dim)
        random = np.random.Generator(np.random.PCG64(seed))
        pieces = -(-width // self.dim)
        self._turns = [int(turn) for turn in random.integers(0, self.dim, pieces)]
        self._signs = torch.from_numpy(random.integers(0, 2, width) * 2 - 1).float()

    def __call__(self, vectors: Tensor) -> Tensor:
        """Unbiased for dot products: E[fold(a) . fold(b)] = a . b over seeds."""
        if self.dim == self.width:
            return vectors
        signed = vectors * self._signs
        out = vectors.new_zeros(len(vectors), self.dim)
        for piece, turn in enumerate(self._turns):
            part = signed[:, piece * self.dim : (piece + 1) * self.dim]
            before = min(part.shape[1], self.dim - turn)
            out[:, turn : turn + before] += part[:, :before]
            out[:, : part.shape[1] - before] += part[:, before:]
        return out


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Principal directions in one byte an entry: column j is `entries[:, j] * steps[j]`.

    `entries` int8 (folded, dim), `steps` float32 (dim,).
    """

    entries: Tensor
    steps: Tensor

    @property
    def dim(self) -> int:
        """Entries of a projected vector."""
        return int(self.entries.shape[1])

    def matrix(self) -> Tensor:
        """(folded, dim) float32."""
        return self.entries.float() * self.steps


def fit_projection(rows: Tensor, *, dim: int) -> Projection:
    """Up to `dim` principal directions of `rows` (count, folded), strongest first.

    Fewer when the rows span fewer; all-zero rows get one direction of zeros.
    """
    gram = (rows @ rows.T).double()
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = max(1, int((values > values[0].clamp_min(1e-300) * _RANK_TOLERANCE).sum()))
    kept = min(dim, rank)
    scale = values[:kept].clamp_min(1e-300).rsqrt()
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
