"""What a method is shown: one trained model, the rows it was trained on, the answers to attribute.

Every method works on the same model, texts and token positions, and returns (queries, rows) floats:
how much each row helped each answer. Signs count: LDS sums scores over a subset.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ledger.errors import ComputeError
from workers.attribution.gradients import (
    Trace,
    backward,
    forward,
    lora_sites,
    loss_sums,
    recording,
)
from workers.attribution.index import IndexedRow
from workers.attribution.query import encode_answer
from workers.evaluation.retrain import Query
from workers.training.data import Example, collate, encode_row, pad_id

BATCH = 16


class NotInstalled(ComputeError):
    """A peer's package is missing: the report says so instead of a number."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """`model` carries the active adapter; `folder` is a method's own place for files."""

    model: Any
    tokenizer: Any
    rows: Sequence[IndexedRow]
    queries: Sequence[Query]
    folder: Path
    max_len: int
    seed: int = 0
    adapter_sha256: str = ""
    base_digest: str = ""
    memo: dict[str, Any] = field(default_factory=dict)
    """What several methods share (raw gradients, the index), made by the first that needs it."""

    def row_examples(self) -> list[Example]:
        """The rows as they were trained on."""
        return [
            encode_row(
                self.tokenizer, r.prompt, r.completion, max_len=self.max_len, row_id=r.row_id
            )
            for r in self.rows
        ]

    def query_examples(self) -> list[Example]:
        """The answers as the index sees them."""
        context = int(self.model.config.max_position_embeddings)
        return [
            encode_answer(self.tokenizer, q.prompt, q.answer, max_len=context) for q in self.queries
        ]


def traces_of(scene: Scene, examples: Sequence[Example]) -> Iterator[tuple[list[int], list[Trace]]]:
    """Positions and traces of each batch, batches of like length."""
    sites, pad = lora_sites(scene.model), pad_id(scene.tokenizer)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = collate([examples[i] for i in chosen], pad)
        with recording(scene.model, sites) as tape:
            losses = loss_sums(forward(scene.model, batch, tape), batch["labels"])
            yield chosen, backward(tape, losses)


def raw_gradients(scene: Scene, examples: Sequence[Example]) -> Tensor:
    """(examples, width) float32: gradients of summed losses over all LoRA matrices."""
    out: list[Tensor | None] = [None] * len(examples)
    for chosen, traces in traces_of(scene, examples):
        flat = torch.cat([t.per_example().flatten(1) for t in traces], dim=1)
        for i, row in zip(chosen, flat, strict=True):
            out[i] = row
    return torch.stack([row for row in out if row is not None])


def gradients(scene: Scene) -> tuple[Tensor, Tensor]:
    """Raw gradients of queries and of rows, computed once for a scene."""
    if "gradients" not in scene.memo:
        scene.memo["gradients"] = (
            raw_gradients(scene, scene.query_examples()),
            raw_gradients(scene, scene.row_examples()),
        )
    found: tuple[Tensor, Tensor] = scene.memo["gradients"]
    return found
