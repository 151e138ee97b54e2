"""One question to the index: whose rows shaped this answer?

    answer --gradient, whiten, select, project, round--> sketch --integers--> scores --> shares

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

from ledger.domain.transcript import PLAIN
from ledger.errors import Inconsistent, InvalidEvent
from workers.attribution.gradients import Site, lora_sites
from workers.attribution.index import GRADIENT_FLOATS, Index, scores_of
from workers.attribution.shares import Shares, shares_from_voices, shift_of
from workers.attribution.sketch import Sketch
from workers.attribution.terms import NO_TERMS, Terms
from workers.training.data import IGNORED, Example, collate, inert, pad_id, prompt_ids

TOP_ROWS = 10
"""Rows named for and against in a result: enough to explain it; all scores are recomputable."""
QUERY_BATCH = 16
"""Answers of one forward and backward pass, fewer of a wide adapter."""

DEFAULT_CONTEXT = 4_096
"""Tokens of prompt and answer, for a model that does not say its own limit."""

Messages = Sequence[Mapping[str, str]]
Scores = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class AttributionResult:
    """What attribution.recorded carries, and the evidence behind it.

    `shares` is (contributor, ppm) by contributor id; with `unattributed_ppm` it sums to 1,000,000.
    `top_rows` is (row id, contributor, score), highest score first, representatives only;
    `against` the rows that worked against the answer, the most negative first, for people to
    review: they cost their contributor nothing.
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
    against: list[tuple[str, str, int]]
    terms: Terms


def attribute(
    model: nn.Module,
    tokenizer: Any,
    index: Index,
    prompt: str | Messages,
    answer: str,
    *,
    terms: Terms = NO_TERMS,
) -> AttributionResult:
    """Attribute `answer`, which `model` (its active adapter is the index's) gave to `prompt`.

    `prompt` is the user's text or the whole conversation up to the answer. Raises InvalidEvent for
    an answer without tokens or longer than the model's context, Inconsistent when the adapter's
    matrices are not those of the index, ComputeError when a gradient is not finite.
    """
    return conclude(index, sketch_answer(model, tokenizer, index, prompt, answer), terms=terms)


def sketch_answer(
    model: nn.Module, tokenizer: Any, index: Index, prompt: str | Messages, answer: str
) -> Sketch:
    """The float half: one gradient of the answer's tokens given the prompt, as integers."""
    example = encode_answer(tokenizer, prompt, answer, max_len=context_of(model))
    return sketch_examples(model, index, [example], pad_id(tokenizer))[0]


def sketch_examples(
    model: nn.Module, index: Index, examples: Sequence[Example], pad: int
) -> list[Sketch]:
    """One sketch an example, in batches of at most QUERY_BATCH examples of like length.

    Floats depend on what shares a batch, by about a quantisation step here and there
    (`audit.py` has the tolerances).
    """
    sites = _sites_of(model, index)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    found: dict[int, Sketch] = {}
    size = max(1, min(QUERY_BATCH, GRADIENT_FLOATS // index.whitener.width))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        batch = collate([examples[i] for i in part], pad)
        found |= zip(part, index.sketches(model, sites, batch), strict=True)
    return [found[i] for i in range(len(examples))]


def context_of(model: nn.Module) -> int:
    """Tokens of prompt and answer together that `model` reads."""
    return int(getattr(model.config, "max_position_embeddings", DEFAULT_CONTEXT))  # type: ignore[union-attr,arg-type]


def conclude(index: Index, sketch: Sketch, *, terms: Terms = NO_TERMS) -> AttributionResult:
    """The integer half: everything that follows from an index, a sketch and the terms."""
    return conclude_from_scores(index, sketch, scores_from_sketch(index, sketch), terms=terms)


def conclude_from_scores(
    index: Index, sketch: Sketch, scores: Scores, *, terms: Terms = NO_TERMS
) -> AttributionResult:
    """`conclude` for scores that were computed already, several answers at once."""
    speaking = _speaking(index, terms)
    shares = _shares(index, sketch, scores, speaking, terms)
    return AttributionResult(
        shares=shares.contributors,
        unattributed_ppm=shares.unattributed_ppm,
        sketch=sketch.to_bytes(),
        sketch_sha256=sketch.sha256().hex(),
        scores_sha256=scores_sha256(scores),
        index_sha256=index.manifest_sha256,
        method=str(index.manifest["method"]),
        placebo=index.placebo(sketch),
        top_rows=_named(index, scores, _largest(scores, speaking)),
        against=_named(index, scores, [r for r in _largest(-scores, speaking) if scores[r] < 0]),
        terms=terms,
    )


def scores_from_sketch(index: Index, sketch: Sketch) -> Scores:
    """(rows,) exact integer scores; InvalidEvent when the sketch has another length."""
    scores: Scores = scores_from_sketches(index, [sketch])[0]
    return scores


def scores_from_sketches(index: Index, asked: Sequence[Sketch]) -> Scores:
    """(answers, rows) in one scan; InvalidEvent when a sketch has another length."""
    for sketch in asked:
        if sketch.vector.shape != index.vectors.shape[1:]:
            raise InvalidEvent(
                f"the sketch has {len(sketch.vector)} entries, the index "
                f"{index.vectors.shape[1]}: it was made for another index"
            )
    return scores_of(index.vectors, index.scales, np.stack([s.vector for s in asked]))


def shares_from_index(
    index: Index, sketch: Sketch, scores: Scores, *, terms: Terms = NO_TERMS
) -> Shares:
    """Shares by the rule of `shares.py` with this index's contributors, clusters and level."""
    return _shares(index, sketch, scores, _speaking(index, terms), terms)


def _shares(index: Index, sketch: Sketch, scores: Scores, speaking: Flags, terms: Terms) -> Shares:
    noise = index.noise(sketch)
    rows = np.flatnonzero(speaking & (scores > noise))
    best = int(scores[rows].max()) if len(rows) else 0
    weights = _weights(scores[rows], noise, shift_of(best, noise))
    gone = np.zeros(len(rows), dtype=np.bool_)
    if terms.withdrawn:
        gone[:] = [index.rows[row].contribution in terms.withdrawn for row in rows.tolist()]
    earned = np.zeros(len(index.names), dtype=np.int64)
    np.add.at(earned, index.codes[rows[~gone]], weights[~gone])
    return shares_from_voices(
        zip(index.names, earned.tolist(), strict=True),
        placebo=index.placebo(sketch),
        best=best,
        lost=int(weights[gone].sum()),
    )


def _weights(scores: Scores, noise: int, shift: int) -> Scores:
    """`shares.weight_of` of every score, all above `noise`: no step passes 2^41."""
    kept, level = scores >> shift, noise >> shift
    divisor = np.maximum(kept, 1)
    weights: Scores = kept - (level * level // divisor) ** 2 // divisor
    return np.where(kept > level, weights, 0)


def scores_sha256(scores: Scores) -> str:
    """Hex SHA-256 over the scores as signed 64-bit big-endian, in row order."""
    return hashlib.sha256(scores.astype(">i8").data).hexdigest()


def _speaking(index: Index, terms: Terms) -> Flags:
    """Rows that represent their cluster, and those that an appeal gave a voice of their own."""
    speaking: Flags = index.clusters == np.arange(len(index.clusters))
    if terms.splits:
        for row, meta in enumerate(index.rows):
            if (meta.contribution, meta.index) in terms.splits:
                speaking[row] = True
    return speaking


def _largest(scores: Scores, among: Flags) -> list[int]:
    """Up to TOP_ROWS rows of `among` by score, ties by row."""
    rows = np.flatnonzero(among)
    if len(rows) > TOP_ROWS:
        floor = -np.partition(-scores[rows], TOP_ROWS - 1)[TOP_ROWS - 1]
        rows = rows[scores[rows] >= floor]
    ranked = sorted(rows.tolist(), key=lambda row: (-int(scores[row]), row))
    return ranked[:TOP_ROWS]


def _named(index: Index, scores: Scores, rows: Sequence[int]) -> list[tuple[str, str, int]]:
    return [(index.rows[r].row_id, index.rows[r].contributor, int(scores[r])) for r in rows]


def _sites_of(model: nn.Module, index: Index) -> list[Site]:
    sites = lora_sites(model)
    found = [(s.name, s.rows, s.cols) for s in sites]
    expected = [(s["name"], s["rows"], s["cols"]) for s in index.manifest["sites"]]
    if found != expected:
        raise Inconsistent(
            f"the active adapter has {len(found)} LoRA matrices that are not the index's "
            f"{len(expected)}: load the adapter {index.manifest['adapter_sha256']}"
        )
    return sites


def encode_answer(tokenizer: Any, prompt: str | Messages, answer: str, *, max_len: int) -> Example:
    """Prompt and answer as tokens, as training sees a row; the loss is on the answer alone.

    A prompt that does not fit loses its beginning, never the answer. That of a completion is one
    message of the role PLAIN, which no template is laid around.
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
    if [m["role"] for m in messages] == [PLAIN]:
        told = tokenizer(inert(tokenizer, messages[0]["content"]))["input_ids"]
        head = [int(i) for i in told]
    else:
        head = prompt_ids(tokenizer, messages)
    if not head:
        raise InvalidEvent("the prompt has no tokens: an answer is attributed given its prompt")
    head = head[len(head) + len(tail) - max_len :] if len(head) + len(tail) > max_len else head
    return Example(row_id="answer", input_ids=head + tail, labels=[IGNORED] * len(head) + tail)
