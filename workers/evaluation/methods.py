"""The registry: a name, and how that method scores every row for every answer.

Our own engine comes as it is served (`index`: int8, projected), as it would be without any
compression (`full-rank`), and without what is its own (`full-strength`: plain EK-FAC); and beside
them what a gradient is worth without curvature. The peers
are in `peers.py`, each behind its own import: one that is not installed raises NotInstalled with
the command that installs it.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ledger.domain.money import PPM_WHOLE
from workers.attribution.build import build_index
from workers.attribution.curvature import Whitener, estimate
from workers.attribution.gradients import at_strength, lora_sites
from workers.attribution.index import Index, IndexConfig
from workers.attribution.query import scores_from_sketch, sketch_answer
from workers.attribution.span_index import SpanRow, build_span_index
from workers.attribution.spans import span_scores
from workers.evaluation import peers
from workers.evaluation.scene import BATCH, Scene, gradients, traces_of
from workers.training.data import Example, collate, pad_id

Floats = NDArray[np.float64]
Method = Callable[[Scene], Floats]


def index_of(scene: Scene) -> Index:
    """The scene's attribution index, built once."""
    if "index" not in scene.memo:
        scene.memo["index"] = build_index(
            scene.model,
            scene.tokenizer,
            scene.rows,
            scene.folder / "index",
            adapter_sha256=scene.adapter_sha256,
            base_digest=scene.base_digest,
            config=IndexConfig(max_len=scene.max_len, seed=scene.seed),
        )
    index: Index = scene.memo["index"]
    return index


def ours(scene: Scene) -> Floats:
    """The integer scores that pay, as they are. Their unit differs by query, which ranks ignore."""
    index = index_of(scene)
    rows = []
    for q in scene.queries:
        sketch = sketch_answer(scene.model, scene.tokenizer, index, q.prompt, q.answer)
        rows.append(scores_from_sketch(index, sketch).astype(np.float64))
    return np.stack(rows)


def full_rank(scene: Scene) -> Floats:
    """Our engine without selection, projection and quantisation: what compression may cost."""
    index = index_of(scene)
    config = index.manifest["config"]
    with at_strength(lora_sites(scene.model), config["strength_ppm"]):
        queries, rows = _whitened(scene, index.whitener)
    scores, gram = (queries @ rows.T).double(), (rows @ rows.T).double()
    # The ridge of `sketch.fit_projection`, in the basis of the rows themselves.
    ridge = gram.trace() / len(gram) * (config["ridge_ppm"] / PPM_WHOLE)
    damped = gram + ridge * torch.eye(len(gram), dtype=torch.float64)
    found: Floats = torch.linalg.solve(damped, scores.T).T.numpy()
    return found


def full_strength(scene: Scene) -> Floats:
    """Ablation: EK-FAC as the literature has it, uncompressed, on rows of norm 1: at the adapter's
    full strength, damping 0.1, without the ridge."""
    sites, pad = lora_sites(scene.model), pad_id(scene.tokenizer)
    rows = sorted(scene.row_examples(), key=lambda e: len(e.input_ids))
    batches = [collate(rows[i : i + BATCH], pad) for i in range(0, len(rows), BATCH)]
    blocks = estimate(scene.model, sites, batches, seed=scene.seed)
    queries, units = _whitened(scene, Whitener(blocks, damping_ppm=100_000))
    return (queries @ units.T).double().numpy()


def _whitened(scene: Scene, whitener: Whitener) -> tuple[Tensor, Tensor]:
    """Whitened gradients of the queries, and of the rows over their norm, uncompressed."""

    def walk(examples: list[Example]) -> Tensor:
        parts, order = [], []
        for chosen, traces in traces_of(scene, examples):
            parts.append(whitener(traces))
            order += chosen
        return torch.cat(parts)[torch.tensor(order).argsort()]

    rows = torch.nn.functional.normalize(walk(scene.row_examples()), dim=1)
    return walk(scene.query_examples()), rows


def grad_dot(scene: Scene) -> Floats:
    """Plain gradient dot product: influence with the identity for curvature (TracIn, one step)."""
    queries, rows = gradients(scene)
    return (queries @ rows.T).double().numpy()


def grad_cos(scene: Scene) -> Floats:
    """The same over the row's norm."""
    queries, rows = gradients(scene)
    return (queries @ torch.nn.functional.normalize(rows, dim=1).T).double().numpy()


def spans(scene: Scene) -> Floats:
    """Verbatim matches through our suffix array: OpenLedger's second method, evidence to us."""
    index = build_span_index(
        [
            SpanRow(
                contribution=r.contribution,
                row=r.index,
                contributor=r.contributor,
                licence="",
                registered_index=r.registered_index,
                prompt=r.prompt,
                completion=r.completion,
            )
            for r in scene.rows
        ],
        scene.folder / "spans",
    )
    return np.stack([span_scores(index, q.answer).astype(np.float64) for q in scene.queries])


METHODS: dict[str, Method] = {
    "index": ours,
    "full-rank": full_rank,
    "full-strength": full_strength,
    "grad-dot": grad_dot,
    "grad-cos": grad_cos,
    "kronfluence": peers.kronfluence,
    "kronfluence-1e-8": partial(peers.kronfluence, damping=1e-8),
    "datainf": peers.datainf,
    "spans": spans,
    "bm25": peers.bm25,
}

LABELS = {
    "index": "ours (int8 index)",
    "full-rank": "ours, full rank, float",
    "full-strength": "plain EK-FAC, full rank",
    "kronfluence": "kronfluence EK-FAC",
    "kronfluence-1e-8": "kronfluence, its default damping",
    "datainf": "DataInf (dattri)",
    "grad-dot": "gradient dot product",
    "grad-cos": "gradient cosine",
    "spans": "verbatim spans",
    "bm25": "BM25",
}
"""What people read."""
