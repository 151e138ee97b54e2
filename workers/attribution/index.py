"""The attribution index: one int8 row per training row, and what is needed to question it.

Built once, at the end of training, and never changed: a folder.

    manifest.json           canonical JSON without floats; its SHA-256 is the index's identity
    vectors.i8              (rows, dim) int8, row-major: sketches of the rows' whitened gradients
    scales.u32              (rows,) u32 big-endian: times entries = a row of norm 1
    rows.jsonl              one canonical JSON object a line: whose row it is, and its cluster
    lens.safetensors        eigenvectors, eigenvalues and directions: from a gradient to a sketch

The manifest carries size and SHA-256 of every other file, every seed and version, and the root of
an RFC 9162 tree whose leaf i is `vector || scale || metadata line`, so that one row can be shown
with its proof and without the rest. `load_index` re-hashes everything and refuses a folder that is
not exactly what the manifest says.

This module opens and questions an index; `build.py` makes one.

Gradients are taken with the adapter at `strength_ppm` of its strength, rows' and answers' alike:
at full strength a row that was learnt has next to no gradient left, and attribution would credit
what was learnt badly. Rows have norm 1 (before selection), so a score is the cosine of row and
answer in the whitened space, times the answer's norm: RelatIF (Barshan et al., arXiv:2003.11630).
Nobody can buy influence with outlandish rows of large loss. Both were decided by measurement, as
docs/ATTRIBUTION.md shows.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ledger.domain.canonical import parse_canonical
from ledger.domain.envelope import leaf_hash
from ledger.domain.rows import tree_root
from ledger.errors import Inconsistent, InvalidEvent, NotFound
from workers.attribution import dedup
from workers.attribution.curvature import DAMPING_PPM, Block, Whitener
from workers.attribution.gradients import (
    Site,
    at_strength,
    backward,
    recording,
)
from workers.attribution.losses import batch_losses
from workers.attribution.scan import dots
from workers.attribution.sketch import DIM, KEPT, Projection, Sketch, quantise, sketches

FORMAT = "tributary/attribution-index/v2"
METHOD = "ekfac-lora/v2"
MANIFEST, VECTORS, SCALES, ROWS, LENS = (
    "manifest.json",
    "vectors.i8",
    "scales.u32",
    "rows.jsonl",
    "lens.safetensors",
)
MAX_MANIFEST_BYTES = 4 * 2**20
GRADIENT_FLOATS = 32 * 2**20
"""Floats that the per-example gradients of one batch may take, rows' or answers': 128 MiB."""
LEVEL_SHIFT = 32
"""Both levels are score per unit of sketch norm, in 2^-LEVEL_SHIFT."""


@dataclass(frozen=True, kw_only=True)
class IndexedRow:
    """One training row and where it comes from. `registered_index` is its place in the ledger."""

    contribution: str
    index: int
    row_hash: str
    contributor: str
    prompt: str
    completion: str
    registered_index: int

    @property
    def row_id(self) -> str:
        """Names the row in messages and results."""
        return f"{self.contribution}/{self.index}"


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """What shapes an index, all of it in the manifest.

    METHOD stands for these defaults but seed and length, which are the run's: an auditor refuses an
    index with others (`audit_index.py`), since a worker could choose among them whom to pay. To
    change one is to name another METHOD.
    """

    seed: int = 0
    max_len: int = 512
    dim: int = DIM
    kept: int = KEPT
    strength_ppm: int = 500_000
    damping_ppm: int = DAMPING_PPM
    ridge_ppm: int = 1_000_000
    curvature_examples: int = 256
    covariance_examples: int = 128
    pilot_rows: int = 256
    fit_rows: int = 2_048
    placebo_examples: int = 64
    placebo_quantile_ppm: int = 950_000
    dedup_threshold_ppm: int = dedup.THRESHOLD_PPM


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMeta:
    """A row of the index without its text. `cluster` is the index row that represents it."""

    contribution: str
    index: int
    row_hash: str
    contributor: str
    registered_index: int
    cluster: int

    @property
    def row_id(self) -> str:
        """As IndexedRow.row_id."""
        return f"{self.contribution}/{self.index}"


@dataclass(frozen=True, kw_only=True)
class Index:
    """A verified index, memory-mapped. `manifest_sha256` is what events commit to."""

    path: Path
    manifest: dict[str, Any]
    manifest_sha256: str
    rows: list[RowMeta]
    clusters: NDArray[np.int64]
    names: list[str]
    """Contributors, sorted; `codes` (rows,) says which of them gave a row."""
    codes: NDArray[np.int64]
    vectors: NDArray[np.int8]
    scales: NDArray[np.uint32]
    whitener: Whitener = field(repr=False)
    coordinates: Tensor = field(repr=False)
    matrix: Tensor = field(repr=False)

    @property
    def row_root(self) -> str:
        """Hex root of the row tree: `index_root` of run.completed."""
        return str(self.manifest["row_root"])

    def placebo(self, sketch: Sketch) -> int:
        """The score that the best row reaches by chance, for an answer of this norm."""
        return int(self.manifest["placebo_level"]) * sketch.norm >> LEVEL_SHIFT

    def noise(self, sketch: Sketch) -> int:
        """The score up to which a row's say is noise, for an answer of this norm."""
        return int(self.manifest["noise_level"]) * sketch.norm >> LEVEL_SHIFT

    def sketches(
        self, model: nn.Module, sites: Sequence[Site], batch: dict[str, Tensor]
    ) -> list[Sketch]:
        """One sketch for each example in `batch`."""
        with at_strength(sites, self.manifest["config"]["strength_ppm"]):
            whitened = whitened_gradients(model, sites, self.whitener, batch)
        entries, steps = quantise(whitened[:, self.coordinates] @ self.matrix)
        return sketches(entries, steps, whitened.double().norm(dim=1))


def load_index(path: Path, *, manifest_sha256: str | None = None) -> Index:
    """Open an index after checking every byte of it; pass the hash that an event committed to.

    Raises NotFound when there is none, Inconsistent when any file is not what the manifest says
    (or the manifest not what the caller expects): restore the folder from the blob store.
    """
    try:
        raw = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise NotFound(f"{path} holds no attribution index ({MANIFEST} is missing)") from error
    digest = hashlib.sha256(raw).hexdigest()
    if manifest_sha256 is not None and digest != manifest_sha256:
        raise Inconsistent(
            f"{path}: the manifest hashes to {digest}, expected {manifest_sha256}; "
            "fetch the index again"
        )
    manifest = _read_manifest(path, raw)
    try:
        for name in (VECTORS, SCALES, ROWS, LENS):
            _check_file(path / name, manifest["files"][name])
        count, dim = manifest["rows"], manifest["dim"]
        # Copy on write: torch wants memory that it may write to, and nobody does.
        vectors = np.memmap(path / VECTORS, np.int8, "c", shape=(count, dim))
        scales = np.fromfile(path / SCALES, dtype=">u4").astype(np.uint32)
        with (path / ROWS).open("rb") as lines:
            rows = [RowMeta(**json.loads(line)) for line in lines]
        clusters = np.array([row.cluster for row in rows], dtype=np.int64)
        lens = lens_of(load_file(path / LENS), [site["name"] for site in manifest["sites"]])
        whitener = Whitener(lens.blocks, damping_ppm=manifest["config"]["damping_ppm"])
    except (
        ValueError, TypeError, KeyError, IndexError, OSError, SafetensorError, InvalidEvent,
    ) as error:  # fmt: skip
        raise Inconsistent(f"{path}: files and manifest contradict each other: {error}") from error
    if len(rows) != count or len(scales) != count:
        raise Inconsistent(f"{path}: {len(rows)} rows and {len(scales)} scales, expected {count}")
    names = sorted({row.contributor for row in rows})
    code_of = {name: code for code, name in enumerate(names)}
    if not _represented(clusters):
        raise Inconsistent(f"{path}: a row's cluster is not a row that represents itself")
    return Index(
        path=path,
        manifest=manifest,
        manifest_sha256=digest,
        rows=rows,
        clusters=clusters,
        names=names,
        codes=np.array([code_of[row.contributor] for row in rows], dtype=np.int64),
        vectors=vectors,
        scales=scales,
        whitener=whitener,
        coordinates=lens.coordinates,
        matrix=lens.projection.matrix(),
    )


@dataclass(frozen=True, kw_only=True)
class Lens:
    """From a gradient to a sketch: curvature of each site, the coordinates kept, directions."""

    blocks: list[Block]
    coordinates: Tensor
    projection: Projection

    def tensors(self) -> dict[str, Tensor]:
        """As they lie in the lens file."""
        tensors = {
            "coordinates": self.coordinates.to(torch.int32),
            "directions": self.projection.entries,
            "direction_steps": self.projection.steps,
        }
        for block in self.blocks:
            tensors[f"{block.name}/in"] = block.basis_in.contiguous()
            tensors[f"{block.name}/out"] = block.basis_out.contiguous()
            tensors[f"{block.name}/eigenvalues"] = block.eigenvalues.contiguous()
        return tensors


def lens_of(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Lens:
    """The lens of the sites in `names`; KeyError for a tensor that is missing."""
    blocks = [
        Block(
            name=name,
            basis_in=tensors[f"{name}/in"],
            basis_out=tensors[f"{name}/out"],
            eigenvalues=tensors[f"{name}/eigenvalues"],
        )
        for name in names
    ]
    return Lens(
        blocks=blocks,
        coordinates=tensors["coordinates"].long(),
        projection=Projection(entries=tensors["directions"], steps=tensors["direction_steps"]),
    )


def whitened_gradients(
    model: nn.Module, sites: Sequence[Site], whitener: Whitener, batch: dict[str, Tensor]
) -> Tensor:
    """(batch, width) float32: the gradient of each example, whitened."""
    with recording(model, sites) as tape:
        traces = backward(tape, batch_losses(model, batch, tape))
    return whitener(traces)


def scores_of(
    vectors: NDArray[np.int8], scales: NDArray[np.uint32], queries: NDArray[np.int8]
) -> NDArray[np.int64]:
    """Influence of every row on sketched answers: positive helped, negative hurt.

    `queries` (dim,) gives (rows,), `queries` (count, dim) gives (count, rows): exact integers.
    """
    if queries.ndim == 1:
        one: NDArray[np.int64] = scores_of(vectors, scales, queries[None])[0]
        return one
    scores: NDArray[np.int64] = dots(vectors, queries) * scales.astype(np.int64)
    return scores


def row_root_of(
    vectors: NDArray[np.int8], scales: NDArray[np.uint32], lines: Sequence[bytes]
) -> bytes:
    return tree_root(
        [
            leaf_hash(vectors[i].tobytes() + int(scales[i]).to_bytes(4, "big") + line)
            for i, line in enumerate(lines)
        ]
    )


def _represented(clusters: NDArray[np.int64]) -> bool:
    inside = bool(((clusters >= 0) & (clusters < len(clusters))).all())
    return inside and bool((clusters[clusters] == clusters).all())


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path, raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_MANIFEST_BYTES:
        raise Inconsistent(f"{path}: the manifest is over MAX_MANIFEST_BYTES")
    try:
        manifest = parse_canonical(raw)
    except InvalidEvent as error:
        raise Inconsistent(f"{path}: the manifest is damaged: {error.message}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise Inconsistent(f"{path}: expected an index of format {FORMAT}")
    return cast(dict[str, Any], manifest)


def _check_file(path: Path, stamp: dict[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else -1
    if size != stamp["bytes"]:
        raise Inconsistent(
            f"{path}: {'missing' if size < 0 else f'{size} bytes'}, expected {stamp['bytes']} "
            "bytes; fetch the index again"
        )
    if (found := file_sha256(path)) != stamp["sha256"]:
        raise Inconsistent(
            f"{path}: hashes to {found}, expected {stamp['sha256']}; the file was changed or "
            "damaged: fetch the index again"
        )
