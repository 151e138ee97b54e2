"""Build an attribution index from a trained adapter and the rows it was trained on.

Four walks over the rows, each in bounded memory: two over a seeded sample for curvature
(`curvature.py`), one over a seeded sample for the principal directions (`sketch.py`), one over all
rows to sketch each. Then clusters of near-duplicates, the placebo level, and the folder of
`index.py`. The walks run on the merged model (`gradients.merged`).

A killed build leaves a `.building-*` folder beside `out_dir` (`workshop.py`); the next build of the
same inputs goes on there, any other sweeps it away. Everything random comes from `config.seed`;
same platform, versions and thread count give the same bytes, killed or not, and the manifest names
all of them.
"""

import hashlib
import platform
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
from torch import Tensor, nn

from ledger.domain.canonical import canonical_json
from ledger.domain.money import PPM_WHOLE
from ledger.errors import Conflict, InvalidEvent, TooLarge
from workers.attribution import dedup
from workers.attribution.curvature import Block, Whitener, estimate
from workers.attribution.examples import Examples, encode_all
from workers.attribution.gradients import Site, lora_sites, merged
from workers.attribution.index import (
    FORMAT,
    LENS,
    LEVEL_SHIFT,
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
    lens_of,
    load_index,
    row_root_of,
    scores_of,
)
from workers.attribution.sketch import Fold, Projection, fit_projection, quantise, sketches
from workers.attribution.workshop import RowFiles, Workshop
from workers.training.data import IGNORED, Example, collate, pad_id

MAX_ROWS = 10_000_000
SCALE_BITS = 24
"""Bits of the largest row scale: with 8-bit entries a score stays below 2^54."""
GRADIENT_FLOATS = 32 * 2**20
"""Floats that the per-example gradients of one batch may take: 128 MiB."""
BATCH = 16
"""Examples a batch, where they fit: larger ones leave the CPU's caches."""
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
    texts = ((row.row_id, row.prompt, row.completion) for row in rows)
    examples = Examples(encode_all(tokenizer, texts, max_len=config.max_len))
    sites = lora_sites(model)
    inputs = _inputs(rows, sites, config, adapter_sha256, base_digest)
    workshop = Workshop(out_dir, inputs)
    with merged(sites):
        camera = _camera(workshop, model, sites, examples, config, pad_id(tokenizer), report)
        files = _sketch_rows(workshop, camera, examples, report)
        exponent, scales = _whole_scales(files.steps)
        clusters = dedup.clusters(
            [(r.prompt, r.completion) for r in rows],
            [r.registered_index for r in rows],
            seed=config.seed,
            threshold_ppm=config.dedup_threshold_ppm,
        )
        own = np.array(clusters) == np.arange(len(rows))
        report("placebo", 0, config.placebo_examples)
        level = _placebo_level(camera, examples, config, files.vectors, scales, own)
    lines = [
        canonical_json(asdict(_meta(row, cluster)))
        for row, cluster in zip(rows, clusters, strict=True)
    ]
    work = workshop.folder
    (work / SCALES).write_bytes(scales.astype(">u4").tobytes())
    (work / ROWS).write_bytes(b"".join(line + b"\n" for line in lines))
    manifest = {
        **inputs,
        "dim": camera.projection.dim,
        "row_root": row_root_of(files.vectors, scales, lines).hex(),
        "unit_exponent": exponent,
        "placebo_level": str(level),
        "files": {name: _stamp(work / name) for name in (VECTORS, SCALES, ROWS, LENS)},
    }
    workshop.publish(canonical_json(manifest))
    return load_index(out_dir)


@dataclass(frozen=True, kw_only=True)
class _Camera:
    """From examples to unit rows and their sketches, batch by batch."""

    model: nn.Module
    sites: list[Site]
    whitener: Whitener
    fold: Fold
    projection: Projection
    pad: int
    batch: int

    def units(self, examples: Sequence[Example]) -> Tensor:
        """(batch, folded): folded gradients over their norm before folding."""
        folded, norms = folded_gradients(
            self.model, self.sites, self.whitener, self.fold, collate(examples, self.pad)
        )
        return folded / norms.clamp_min(_TINY).unsqueeze(1).float()


def _camera(
    workshop: Workshop,
    model: nn.Module,
    sites: list[Site],
    examples: Examples,
    config: IndexConfig,
    pad: int,
    report: Progress,
) -> _Camera:
    """The lens: curvature and principal directions, from seeded samples of the rows."""
    width = sum(s.rows * s.cols for s in sites)
    size = max(1, min(BATCH, GRADIENT_FLOATS // width))
    fold = Fold(width=width, seed=config.seed, dim=config.folded)
    tensors = workshop.lens()
    if tensors is not None:
        blocks, projection = lens_of(tensors, [s.name for s in sites])
        whitener = Whitener(blocks, damping_ppm=config.damping_ppm)
    else:
        random = Random(config.seed)  # noqa: S311 (sampling, no secret)
        count = len(examples)
        sample = random.sample(range(count), min(count, config.curvature_examples))
        report("curvature", 0, len(sample))
        blocks = estimate(
            model,
            sites,
            _batches(examples, sample, size, pad),
            seed=config.seed,
            covariances=_batches(examples, sample[: config.covariance_examples], size, pad),
        )
        whitener = Whitener(blocks, damping_ppm=config.damping_ppm)
        nothing = Projection(entries=torch.zeros(fold.dim, 0), steps=torch.zeros(0))
        bare = _Camera(
            model=model, sites=sites, whitener=whitener, fold=fold, projection=nothing,
            pad=pad, batch=size,
        )  # fmt: skip
        fitted = random.sample(range(count), min(count, config.fit_rows))
        report("rows", 0, count)
        units = [
            bare.units([examples[row] for row in part]) for part in examples.batches(fitted, size)
        ]
        projection = fit_projection(torch.cat(units), dim=config.dim)
        workshop.keep_lens(_tensors(blocks, projection))
    return _Camera(
        model=model, sites=sites, whitener=whitener, fold=fold, projection=projection,
        pad=pad, batch=size,
    )  # fmt: skip


def _sketch_rows(
    workshop: Workshop, camera: _Camera, examples: Examples, report: Progress
) -> RowFiles:
    files = workshop.open_rows(len(examples), camera.projection.dim)
    matrix = camera.projection.matrix()
    done = 0
    for part in examples.batches(range(len(examples)), camera.batch):
        if not files.has(part):
            vectors, steps = quantise(camera.units([examples[row] for row in part]) @ matrix)
            files.put(part, vectors, steps.numpy())
        done += len(part)
        report("rows", done, len(examples))
    files.mark()
    return files


def _placebo_level(
    camera: _Camera,
    examples: Examples,
    config: IndexConfig,
    vectors: NDArray[np.int8],
    scales: NDArray[np.uint32],
    own: NDArray[np.bool_],
) -> int:
    """The quantile, over placebos, of the best score per unit of norm (2^-LEVEL_SHIFT)."""
    placebos = _placebos(examples, config.placebo_examples, Random(config.seed))  # noqa: S311
    matrix = camera.projection.matrix()
    levels: list[int] = []
    for start in range(0, len(placebos), camera.batch):
        units = camera.units(placebos[start : start + camera.batch])
        entries, steps = quantise(units @ matrix)
        best = scores_of(vectors, scales, entries)[:, own].max(axis=1)
        # The norm of a unit vector is 1: its sketch has norm 1/step.
        for sketch, score in zip(
            sketches(entries, steps, torch.ones(len(units))), best.tolist(), strict=True
        ):
            levels.append((max(score, 0) << LEVEL_SHIFT) // max(sketch.norm, 1))
    return sorted(levels)[(len(levels) - 1) * config.placebo_quantile_ppm // PPM_WHOLE]


def _placebos(examples: Examples, count: int, random: Random) -> list[Example]:
    """Texts with the corpus's words and none of its sense: shuffled prompts, drawn answers.

    What such an answer scores is what any answer scores. The first and last two tokens of a prompt
    stay: they are the template's. The end token stays too.
    """
    placebos = []
    for _ in range(count):
        source = examples[random.randrange(len(examples))]
        cut = sum(label == IGNORED for label in source.labels)
        inside = source.input_ids[2 : cut - 2]
        random.shuffle(inside)
        head = source.input_ids[:2] + inside + source.input_ids[max(2, cut - 2) : cut]
        drawn = [
            random.choice(examples.answer_tokens(random.randrange(len(examples))))
            for _ in source.input_ids[cut:-1]
        ]
        tail = drawn + source.input_ids[-1:]
        labels = [IGNORED] * len(head) + tail
        placebos.append(Example(row_id="placebo", input_ids=head + tail, labels=labels))
    return placebos


def _batches(examples: Examples, chosen: Sequence[int], size: int, pad: int) -> "_Collated":
    return _Collated(examples, examples.batches(chosen, size), pad)


@dataclass(frozen=True)
class _Collated:
    """Batches of tensors, made at each walk: a list of them would hold the sample's padding."""

    examples: Examples
    parts: list[list[int]]
    pad: int

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for part in self.parts:
            yield collate([self.examples[row] for row in part], self.pad)


def _check_rows(rows: Sequence[IndexedRow], out_dir: Path) -> None:
    if not rows:
        raise InvalidEvent("an index needs at least one row; the run trained on none")
    if len(rows) > MAX_ROWS:
        raise TooLarge(f"{len(rows)} rows; an index holds at most MAX_ROWS = {MAX_ROWS}")
    if len({row.row_id for row in rows}) != len(rows):
        raise InvalidEvent("two rows have the same contribution and index; list each row once")
    if out_dir.exists():
        raise Conflict(f"{out_dir} exists; an index is written once: choose another folder")


def _inputs(
    rows: Sequence[IndexedRow],
    sites: Sequence[Site],
    config: IndexConfig,
    adapter_sha256: str,
    base_digest: str,
) -> dict[str, Any]:
    """All that the bytes depend on: the manifest's first part, and the name of a killed build."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_json(asdict(row)) + b"\n")
    return {
        "format": FORMAT,
        "method": METHOD,
        "adapter_sha256": adapter_sha256,
        "base_digest": base_digest,
        "config": asdict(config),
        "rows": len(rows),
        "rows_sha256": digest.hexdigest(),
        "width": sum(s.rows * s.cols for s in sites),
        "sites": [{"name": s.name, "rows": s.rows, "cols": s.cols} for s in sites],
        "versions": _versions(),
        "threads": torch.get_num_threads(),
    }


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
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _stamp(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
