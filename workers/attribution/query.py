"""One question to the index: whose rows shaped this answer?

    answer --gradient, whiten, fold, quantise--> sketch --integers--> scores --integers--> shares

Left of the sketch is float work on the model that answered; it is reproducible on the same
platform only. The sketch is committed, and from there on everything is exact: `scores_from_sketch`
and `shares_from_index` give an auditor the same integers on any machine, without model or torch
kernels.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ledger.errors import Inconsistent, InvalidEvent
from workers.attribution.gradients import lora_sites
from workers.attribution.index import Index, scores_of
from workers.attribution.shares import Shares, shares_from_scores
from workers.attribution.sketch import Sketch
from workers.training.data import IGNORED, Example, collate, inert, pad_id, prompt_ids

TOP_ROWS = 10
"""Rows named in a result: enough to explain it; scores of all rows are recomputable."""

DEFAULT_CONTEXT = 4_096
"""Tokens of prompt and answer, for a model that does not say its own limit."""

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class AttributionResult:
    """What attribution.recorded carries, and the evidence behind it.

    `shares` is (contributor, ppm) by contributor id; with `unattributed_ppm` it sums to 1,000,000.
    `top_rows` is (row id, contributor, score), highest score first, representatives only.
    """

    shares: list[tuple[str, int]]
    unattributed_ppm: int
    sketch: bytes
    sketch_sha256: str
    scores_sha256: str
    index_sha256: str
    method: str
    placebo: int
    top_rows: list[tuple[str, str, int]]


def attribute(
    model: nn.Module,
    tokenizer: Any,
    index: Index,
    prompt: str | Messages,
    answer: str,
) -> AttributionResult:
    """Attribute `answer`, which `model` (its active adapter is the index's) gave to `prompt`.

    `prompt` is the user's text or the whole conversation up to the answer. Raises InvalidEvent for
    an answer without tokens or longer than the model's context, Inconsistent when the adapter's
    matrices are not those of the index, ComputeError when a gradient is not finite.
    """
    return conclude(index, sketch_answer(model, tokenizer, index, prompt, answer))


def sketch_answer(
    model: nn.Module, tokenizer: Any, index: Index, prompt: str | Messages, answer: str
) -> Sketch:
    """The float half: one gradient of the answer's tokens given the prompt, as integers."""
    sites = lora_sites(model)
    found = [(s.name, s.rows, s.cols) for s in sites]
    expected = [(s["name"], s["rows"], s["cols"]) for s in index.manifest["sites"]]
    if found != expected:
        raise Inconsistent(
            f"the active adapter has {len(found)} LoRA matrices that are not the index's "
            f"{len(expected)}: load the adapter {index.manifest['adapter_sha256']}"
        )
    context = int(getattr(model.config, "max_position_embeddings", DEFAULT_CONTEXT))  # type: ignore[union-attr,arg-type]
    example = encode_answer(tokenizer, prompt, answer, max_len=context)
    batch = collate([example], pad_id(tokenizer))
    return index.sketch(model, sites, batch)


def conclude(index: Index, sketch: Sketch) -> AttributionResult:
    """The integer half: everything that follows from an index and a sketch."""
    scores = scores_from_sketch(index, sketch)
    shares = shares_from_index(index, sketch, scores)
    ranked = sorted(
        (row for row, meta in enumerate(index.rows) if meta.cluster == row),
        key=lambda row: (-int(scores[row]), row),
    )
    return AttributionResult(
        shares=shares.contributors,
        unattributed_ppm=shares.unattributed_ppm,
        sketch=sketch.to_bytes(),
        sketch_sha256=sketch.sha256().hex(),
        scores_sha256=scores_sha256(scores),
        index_sha256=index.manifest_sha256,
        method=str(index.manifest["method"]),
        placebo=index.placebo(sketch),
        top_rows=[
            (index.rows[r].row_id, index.rows[r].contributor, int(scores[r]))
            for r in ranked[:TOP_ROWS]
        ],
    )


def scores_from_sketch(index: Index, sketch: Sketch) -> NDArray[np.int64]:
    """(rows,) exact integer scores; InvalidEvent when the sketch has another length."""
    if sketch.vector.shape != index.vectors.shape[1:]:
        raise InvalidEvent(
            f"the sketch has {len(sketch.vector)} entries, the index {index.vectors.shape[1]}: "
            "it was made for another index"
        )
    return scores_of(index.vectors, index.scales, sketch.vector)


def shares_from_index(index: Index, sketch: Sketch, scores: NDArray[np.int64]) -> Shares:
    """Shares by the rule of `shares.py` with this index's contributors, clusters and level."""
    return shares_from_scores(
        scores.tolist(),
        [row.contributor for row in index.rows],
        [row.cluster for row in index.rows],
        index.placebo(sketch),
    )


def scores_sha256(scores: NDArray[np.int64]) -> str:
    """Hex SHA-256 over the scores as signed 64-bit big-endian, in row order."""
    return hashlib.sha256(scores.astype(">i8").tobytes()).hexdigest()


def encode_answer(tokenizer: Any, prompt: str | Messages, answer: str, *, max_len: int) -> Example:
    """Prompt and answer as tokens, as training sees a row; the loss is on the answer alone.

    A prompt that does not fit loses its beginning, never the answer.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    tail = [
        int(i) for i in tokenizer(inert(tokenizer, answer), add_special_tokens=False)["input_ids"]
    ]
    if not tail or not answer.strip():
        raise InvalidEvent("the answer has no tokens: there is nothing to attribute")
    tail.append(int(tokenizer.eos_token_id))
    if len(tail) >= max_len:
        raise InvalidEvent(f"the answer has {len(tail)} tokens; the model's context is {max_len}")
    head = prompt_ids(tokenizer, messages)
    if not head:
        raise InvalidEvent("the prompt has no tokens: an answer is attributed given its prompt")
    head = head[len(head) + len(tail) - max_len :] if len(head) + len(tail) > max_len else head
    return Example(row_id="answer", input_ids=head + tail, labels=[IGNORED] * len(head) + tail)
