"""Build an attribution index from a trained adapter and the rows it was trained on.

Four walks over the rows, each in bounded memory: two over a seeded sample for curvature
(`curvature.py`), one over a seeded sample for coordinates and principal directions (`sketch.py`),
one over all rows to sketch each. Then clusters of near-duplicates, the placebo level, and the
folder of `index.py`. The walks run on the merged model (`gradients.merged`).

A killed build leaves a `.building-*` folder beside `out_dir` (`workshop.py`); the next build of the
same inputs goes on there, any other sweeps it away. Everything random comes from `config.seed`;
same platform, versions and thread count give the same bytes, killed or not, and the manifest names
all of them.
"""

import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import frexp, isqrt, ldexp
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
from workers.attribution.curvature import Whitener, estimate
from workers.attribution.examples import Examples, encode_all
from workers.attribution.gradients import Site, at_strength, lora_sites, merged
from workers.attribution.index import (
    FORMAT,
    GRADIENT_FLOATS,
    LENS,
    LEVEL_SHIFT,
    METHOD,
    ROWS,
    SCALES,
    VECTORS,
    Index,
    IndexConfig,
    IndexedRow,
    Lens,
    RowMeta,
    file_sha256,
    lens_of,
    load_index,
    row_root_of,
    scores_of,
    whitened_gradients,
)
from workers.attribution.sketch import fit_projection, quantise, select, sketches
from workers.attribution.workshop import RowFiles, Workshop
from workers.training.config import TrainingConfig
from workers.training.data import IGNORED, Example, collate, pad_id

MAX_ROWS = 10_000_000
SCALE_BITS = 24
"""Bits of the largest row scale: with 8-bit entries a score stays below 2^54."""
BATCH = 16
"""Examples a batch, where they fit: larger ones leave the CPU's caches."""
PILOT_FLOATS = 64 * 2**20
"""Floats of the pilot rows' gradients, all of which are in memory at once: 256 MiB."""
MIN_PILOTS = 16
MIN_LEN = 512
"""Tokens of a row that are looked at, where the model reads as many, whatever training took."""
_TINY = 1e-300

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total); phases: curvature, rows, placebo."""


def config_of(training: TrainingConfig, model: Any) -> IndexConfig:
    """The settings of a run's index: they follow from its recipe, and nobody chooses any."""
    window = int(getattr(model.config, "max_position_embeddings", MIN_LEN))
    return IndexConfig(seed=training.seed, max_len=min(window, max(training.max_len, MIN_LEN)))


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
    with at_strength(sites, config.strength_ppm), merged(sites):
        pad = pad_id(tokenizer)
        lensed, files = _lensed(workshop, model, sites, examples, config, pad, report)
        _sketch_rows(lensed, files, examples, config, report)
        exponent, scales = _whole_scales(files.steps)
        clusters = dedup.clusters(
            [(r.prompt, r.completion) for r in rows],
            [r.registered_index for r in rows],
            seed=config.seed,
            threshold_ppm=config.dedup_threshold_ppm,
        )
        own = np.array(clusters) == np.arange(len(rows))
        report("placebo", 0, config.placebo_examples)
        placebo, noise = _levels(lensed, examples, config, files.vectors, scales, own)
    lines = [
        canonical_json(asdict(_meta(row, cluster)))
        for row, cluster in zip(rows, clusters, strict=True)
    ]
    work = workshop.folder
    (work / SCALES).write_bytes(scales.astype(">u4").tobytes())
    (work / ROWS).write_bytes(b"".join(line + b"\n" for line in lines))
    manifest = {
        **inputs,
        "dim": int(lensed.matrix.shape[1]),
        "row_root": row_root_of(files.vectors, scales, lines).hex(),
        "unit_exponent": exponent,
        "placebo_level": str(placebo),
        "noise_level": str(noise),
        "files": {name: _stamp(work / name) for name in (VECTORS, SCALES, ROWS, LENS)},
    }
    workshop.publish(canonical_json(manifest))
    return load_index(out_dir)


@dataclass(frozen=True, kw_only=True)
class _Camera:
    """From examples to whitened gradients, unit rows and their sketches, batch by batch."""

    model: nn.Module
    sites: list[Site]
    whitener: Whitener
    pad: int
    batch: int

    def whitened(self, examples: Sequence[Example]) -> Tensor:
        """(batch, width) of norm 1."""
        found = whitened_gradients(
            self.model, self.sites, self.whitener, collate(examples, self.pad)
        )
        norms = found.double().norm(dim=1, keepdim=True)
        return found.div_(norms.clamp_min(_TINY).float())


@dataclass(frozen=True, kw_only=True)
class _Lensed:
    """A camera and its lens, from examples to what an index holds of them."""

    camera: _Camera
    coordinates: Tensor
    matrix: Tensor

    def sketch(self, examples: Sequence[Example]) -> tuple[NDArray[np.int8], Tensor]:
        """Entries (batch, dim) of unit rows, and the value of one step each."""
        return quantise(self.camera.whitened(examples)[:, self.coordinates] @ self.matrix)


def _lensed(
    workshop: Workshop,
    model: nn.Module,
    sites: list[Site],
    examples: Examples,
    config: IndexConfig,
    pad: int,
    report: Progress,
) -> tuple[_Lensed, RowFiles]:
    """The lens of a killed build, or a new one from seeded samples of the rows."""
    width = sum(s.rows * s.cols for s in sites)
    size = max(1, min(BATCH, GRADIENT_FLOATS // width))
    camera = partial(_Camera, model=model, sites=sites, pad=pad, batch=size)
    kept = workshop.lens()
    if kept is not None:
        lens = lens_of(kept, [s.name for s in sites])
        files = workshop.open_rows(len(examples), lens.projection.dim)
    else:
        sample, fitted = _samples(len(examples), config)
        few = sample[: config.covariance_examples]
        report("curvature", 0, len(sample))
        blocks = estimate(
            model,
            sites,
            _Collated(examples, examples.batches(sample, size), pad),
            seed=config.seed,
            covariances=_Collated(examples, examples.batches(few, size), pad),
        )
        whitener = Whitener(blocks, damping_ppm=config.damping_ppm)
        report("rows", 0, len(examples))
        lens, files = _fitted(workshop, camera(whitener=whitener), examples, config, fitted)
        workshop.keep_lens(lens.tensors())
    whitener = Whitener(lens.blocks, damping_ppm=config.damping_ppm)
    lensed = _Lensed(
        camera=camera(whitener=whitener),
        coordinates=lens.coordinates,
        matrix=lens.projection.matrix(),
    )
    return lensed, files


def _fitted(
    workshop: Workshop, camera: _Camera, examples: Examples, config: IndexConfig, rows: list[int]
) -> tuple[Lens, RowFiles]:
    """Coordinates from the first of `rows`, which stay in memory, and directions from all of them.

    The rows of the fit are sketched on the way. The lens is kept after them: who finds a lens finds
    them too, and they are never sketched in other batches, whose floats differ.
    """
    pilots = min(config.pilot_rows, max(MIN_PILOTS, PILOT_FLOATS // camera.whitener.width))
    parts = examples.batches(rows[:pilots], camera.batch)
    pilot = [camera.whitened([examples[row] for row in part]) for part in parts]
    energies = torch.stack([unit.square().sum(dim=0) for unit in pilot]).sum(dim=0)
    coordinates = select(energies, config.kept)
    units = [unit[:, coordinates] for unit in pilot]
    pilot.clear()
    for part in examples.batches(rows[pilots:], camera.batch):
        units.append(camera.whitened([examples[row] for row in part])[:, coordinates])
        parts.append(part)
    projection = fit_projection(torch.cat(units), dim=config.dim, ridge_ppm=config.ridge_ppm)
    files = workshop.fresh_rows(len(examples), projection.dim)
    matrix = projection.matrix()
    for part, unit in zip(parts, units, strict=True):
        vectors, steps = quantise(unit @ matrix)
        files.put(part, vectors, steps.numpy())
    files.mark()
    blocks = camera.whitener.blocks
    return Lens(blocks=blocks, coordinates=coordinates, projection=projection), files


def _samples(count: int, config: IndexConfig) -> tuple[list[int], list[int]]:
    """The rows for curvature, and those for the lens; the seed draws both."""
    random = Random(config.seed)  # noqa: S311 (sampling, no secret)
    curvature = random.sample(range(count), min(count, config.curvature_examples))
    return curvature, random.sample(range(count), min(count, config.fit_rows))


def _sketch_rows(
    lensed: _Lensed, files: RowFiles, examples: Examples, config: IndexConfig, report: Progress
) -> None:
    """Every row that the fit did not sketch, in batches that do not depend on what is done."""
    count = len(examples)
    fitted = set(_samples(count, config)[1])
    others = [row for row in range(count) if row not in fitted]
    done = len(fitted)
    for part in examples.batches(others, lensed.camera.batch):
        report("rows", done, count)
        if not files.has(part):
            vectors, steps = lensed.sketch([examples[row] for row in part])
            files.put(part, vectors, steps.numpy())
        done += len(part)
    files.mark()
    report("rows", count, count)


def _levels(
    lensed: _Lensed,
    examples: Examples,
    config: IndexConfig,
    vectors: NDArray[np.int8],
    scales: NDArray[np.uint32],
    own: NDArray[np.bool_],
) -> tuple[int, int]:
    """What answers without sense score, per unit of norm (2^-LEVEL_SHIFT).

    The placebo level is a quantile, over placebos, of the best row's score; the noise level the
    median of the score that `noisy_rows` rows reach.
    """
    placebos = _placebos(examples, config.placebo_examples, Random(config.seed))  # noqa: S311
    best: list[int] = []
    noise: list[int] = []
    size, place = lensed.camera.batch, min(noisy_rows(int(own.sum())), int(own.sum()))
    for start in range(0, len(placebos), size):
        entries, steps = lensed.sketch(placebos[start : start + size])
        scores = np.sort(scores_of(vectors, scales, entries)[:, own], axis=1)
        # The norm of a unit vector is 1: its sketch has norm 1/step.
        norms = [max(s.norm, 1) for s in sketches(entries, steps, torch.ones(len(entries)))]
        for norm, row in zip(norms, scores, strict=True):
            best.append((max(int(row[-1]), 0) << LEVEL_SHIFT) // norm)
            noise.append((max(int(row[-place]), 0) << LEVEL_SHIFT) // norm)
    placebo = sorted(best)[(len(best) - 1) * config.placebo_quantile_ppm // PPM_WHOLE]
    return placebo, min(placebo, sorted(noise)[(len(noise) - 1) // 2])


def noisy_rows(count: int) -> int:
    """How many of `count` rows may count by chance: twice the root, so that what chance earns
    shrinks beside what rows earn as an index grows."""
    return max(1, 2 * isqrt(count))


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
