"""Build an attribution index from a trained adapter and the rows it was trained on.

Four walks over the rows, each in bounded memory: two over a seeded sample for curvature
(`curvature.py`), one over a seeded sample for the principal directions (`sketch.py`), one over the
rest to sketch every row. Then clusters of near-duplicates, the placebo level, and the folder of
`index.py`.

A crash while building leaves a `.building-*` folder beside `out_dir` and nothing else; the next
build sweeps it away. Everything random comes from `config.seed`; same platform, versions and
thread count give the same bytes, and the manifest names all of them.
"""

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import frexp, ldexp
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from ledger.domain.canonical import canonical_json
from ledger.domain.money import PPM_WHOLE
from ledger.errors import Conflict, InvalidEvent, TooLarge
from workers.attribution import dedup
from workers.attribution.curvature import Block, Whitener, estimate
from workers.attribution.gradients import Site, lora_sites
from workers.attribution.index import (
    FORMAT,
    LENS,
    LEVEL_SHIFT,
    MANIFEST,
    METHOD,
    ROWS,
    SCALES,
    VECTORS,
    Index,
    IndexConfig,
    IndexedRow,
    RowMeta,
    file_sha256,
    folded_gradients,
    load_index,
    row_root_of,
    scores_of,
)
from workers.attribution.sketch import Fold, Projection, fit_projection, quantise, sketches
from workers.training.data import IGNORED, Example, collate, encode_row, pad_id

MAX_ROWS = 10_000_000
FIT_ROWS = 2_048
"""Rows, drawn by the seed, whose principal directions the index is projected on."""
SCALE_BITS = 24
"""Bits of the largest row scale: with 8-bit entries a score stays below 2^54."""
GRADIENT_FLOATS = 32 * 2**20
"""Floats that the per-example gradients of one batch may take: 128 MiB."""
BATCH = 32
_TINY = 1e-300

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total); phases: curvature, rows, placebo."""


def build_index(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[IndexedRow],
    out_dir: Path,
    *,
    adapter_sha256: str,
    base_digest: str,
    config: IndexConfig | None = None,
    progress: Progress | None = None,
) -> Index:
    """Index the rows that `model`'s active LoRA adapter was trained on; the folder appears whole.

    `adapter_sha256` and `base_digest` are the hex hashes recorded for the weights in `model`.
    Raises InvalidEvent for no rows, an empty row or two rows of one id, TooLarge beyond MAX_ROWS,
    Conflict when `out_dir` exists, ComputeError when a gradient is not finite.
    """
    config = config or IndexConfig()
    report = progress or (lambda phase, done, total: None)
    _check_rows(rows, out_dir)
    examples = [
        encode_row(tokenizer, r.prompt, r.completion, max_len=config.max_len, row_id=r.row_id)
        for r in rows
    ]
    random = Random(config.seed)  # noqa: S311 (sampling, no secret)

    sites = lora_sites(model)
    width = sum(s.rows * s.cols for s in sites)
    size = max(1, min(BATCH, GRADIENT_FLOATS // width))
    pad = pad_id(tokenizer)
    sample = sorted(random.sample(range(len(rows)), min(len(rows), config.curvature_examples)))
    report("curvature", 0, len(sample))
    batches = [collate(part, pad) for _, part in _batches(examples, sample, size)]
    blocks = estimate(model, sites, batches, seed=config.seed)
    camera = _Camera(
        model=model,
        sites=sites,
        whitener=Whitener(blocks, damping_ppm=config.damping_ppm),
        fold=Fold(width=width, seed=config.seed),
        pad=pad,
        batch=size,
    )

    fitted = sorted(random.sample(range(len(rows)), min(len(rows), FIT_ROWS)))
    units = torch.zeros(len(fitted), camera.fold.dim)
    for chosen, unit in camera.shoot(examples, fitted):
        units[np.searchsorted(fitted, chosen)] = unit
        report("rows", 0, len(rows))
    projection = fit_projection(units, dim=config.dim)
    matrix = projection.matrix()

    work = _fresh_workplace(out_dir)
    vectors = np.memmap(work / VECTORS, np.int8, "w+", shape=(len(rows), projection.dim))
    steps = np.zeros(len(rows))
    for start in range(0, len(fitted), size):
        chosen = fitted[start : start + size]
        vectors[chosen], steps[chosen] = quantise(units[start : start + size] @ matrix)
    done = len(fitted)
    report("rows", done, len(rows))
    others = sorted(set(range(len(rows))) - set(fitted))
    for chosen, unit in camera.shoot(examples, others):
        vectors[chosen], steps[chosen] = quantise(unit @ matrix)
        done += len(chosen)
        report("rows", done, len(rows))
    vectors.flush()
    exponent, scales = _whole_scales(steps)

    clusters = dedup.clusters(
        [(r.prompt, r.completion) for r in rows],
        [r.registered_index for r in rows],
        seed=config.seed,
        threshold_ppm=config.dedup_threshold_ppm,
    )
    metas = [_meta(row, cluster) for row, cluster in zip(rows, clusters, strict=True)]
    report("placebo", 0, config.placebo_examples)
    placebos = _placebos(examples, config.placebo_examples, random)
    own = np.array([meta.cluster == row for row, meta in enumerate(metas)])
    levels: list[int] = []
    for _, unit in camera.shoot(placebos, range(len(placebos))):
        entries, placebo_steps = quantise(unit @ matrix)
        # The norm of a unit vector is 1: its sketch has norm 1/step.
        for sketch in sketches(entries, placebo_steps, torch.ones(len(unit))):
            best = int(scores_of(vectors, scales, sketch.vector)[own].max())
            levels.append((max(best, 0) << LEVEL_SHIFT) // max(sketch.norm, 1))
    level = sorted(levels)[(len(levels) - 1) * config.placebo_quantile_ppm // PPM_WHOLE]

    lines = [canonical_json(asdict(meta)) for meta in metas]
    (work / SCALES).write_bytes(scales.astype(">u4").tobytes())
    (work / ROWS).write_bytes(b"".join(line + b"\n" for line in lines))
    save_file(_tensors(blocks, projection), work / LENS)
    manifest = {
        "format": FORMAT,
        "method": METHOD,
        "adapter_sha256": adapter_sha256,
        "base_digest": base_digest,
        "config": asdict(config),
        "rows": len(rows),
        "dim": projection.dim,
        "width": width,
        "row_root": row_root_of(vectors, scales, lines).hex(),
        "unit_exponent": exponent,
        "placebo_level": str(level),
        "curvature_examples": len(sample),
        "fitted_rows": len(fitted),
        "sites": [{"name": s.name, "rows": s.rows, "cols": s.cols} for s in sites],
        "versions": _versions(),
        "threads": torch.get_num_threads(),
        "files": {name: _stamp(work / name) for name in (VECTORS, SCALES, ROWS, LENS)},
    }
    _publish(work, out_dir, canonical_json(manifest))
    return load_index(out_dir)


@dataclass(frozen=True, kw_only=True)
class _Camera:
    """From examples to unit rows, batch by batch."""

    model: nn.Module
    sites: list[Site]
    whitener: Whitener
    fold: Fold
    pad: int
    batch: int

    def shoot(
        self, examples: Sequence[Example], chosen: Sequence[int]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Positions and folded gradients over their norm (batch, folded)."""
        for positions, part in _batches(examples, chosen, self.batch):
            folded, norms = folded_gradients(
                self.model, self.sites, self.whitener, self.fold, collate(part, self.pad)
            )
            yield positions, folded / norms.clamp_min(_TINY).unsqueeze(1).float()


def _check_rows(rows: Sequence[IndexedRow], out_dir: Path) -> None:
    if not rows:
        raise InvalidEvent("an index needs at least one row; the run trained on none")
    if len(rows) > MAX_ROWS:
        raise TooLarge(f"{len(rows)} rows; an index holds at most MAX_ROWS = {MAX_ROWS}")
    if len({row.row_id for row in rows}) != len(rows):
        raise InvalidEvent("two rows have the same contribution and index; list each row once")
    if out_dir.exists():
        raise Conflict(f"{out_dir} exists; an index is written once: choose another folder")


def _batches(
    examples: Sequence[Example], chosen: Sequence[int], size: int
) -> Iterator[tuple[list[int], list[Example]]]:
    """Batches of like length, so that little is padded: positions and examples."""
    order = sorted(chosen, key=lambda i: (len(examples[i].input_ids), i))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        yield part, [examples[i] for i in part]


def _placebos(examples: Sequence[Example], count: int, random: Random) -> list[Example]:
    """Texts with the corpus's words and none of its sense: shuffled prompts, drawn answers.

    What such an answer scores is what any answer scores. The first and last two tokens of a prompt
    stay: they are the template's. The end token stays too.
    """
    pool = [token for e in examples for token in e.labels if token != IGNORED]
    placebos = []
    for _ in range(count):
        source = random.choice(examples)
        cut = sum(label == IGNORED for label in source.labels)
        inside = source.input_ids[2 : cut - 2]
        random.shuffle(inside)
        head = source.input_ids[:2] + inside + source.input_ids[max(2, cut - 2) : cut]
        tail = [random.choice(pool) for _ in source.input_ids[cut:-1]] + source.input_ids[-1:]
        labels = [IGNORED] * len(head) + tail
        placebos.append(Example(row_id="placebo", input_ids=head + tail, labels=labels))
    return placebos


def _whole_scales(steps: NDArray[np.float64]) -> tuple[int, NDArray[np.uint32]]:
    """Steps as integers times one power of two: (exponent, scales)."""
    exponent = frexp(float(steps.max(initial=0.0)))[1] - SCALE_BITS
    return exponent, np.array([round(ldexp(float(s), -exponent)) for s in steps], dtype=np.uint32)


def _meta(row: IndexedRow, cluster: int) -> RowMeta:
    return RowMeta(
        contribution=row.contribution,
        index=row.index,
        row_hash=row.row_hash,
        contributor=row.contributor,
        registered_index=row.registered_index,
        cluster=cluster,
    )


def _tensors(blocks: Sequence[Block], projection: Projection) -> dict[str, Tensor]:
    tensors = {"directions": projection.entries, "direction_steps": projection.steps}
    for block in blocks:
        tensors[f"{block.name}/in"] = block.basis_in.contiguous()
        tensors[f"{block.name}/out"] = block.basis_out.contiguous()
        tensors[f"{block.name}/eigenvalues"] = block.eigenvalues.contiguous()
    return tensors


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "numpy": np.__version__,
        "platform": f"{platform.system()}-{platform.machine()}",
    }


def _stamp(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _fresh_workplace(out_dir: Path) -> Path:
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    work = out_dir.parent / f".building-{out_dir.name}"
    if work.exists():  # what a crashed build left
        shutil.rmtree(work)
    work.mkdir()
    return work


def _publish(work: Path, out_dir: Path, manifest: bytes) -> None:
    """The manifest last, everything on disk, then one rename: a crash before it leaves no index."""
    (work / MANIFEST).write_bytes(manifest)
    for path in sorted(work.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    work.rename(out_dir)
    folder = os.open(out_dir.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
