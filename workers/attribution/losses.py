"""Summed losses of a batch in bounded memory, however large the vocabulary.

Logits are positions x vocabulary, several times over (the head's output, float32, softmax, its
gradient): an answer of 4,000 tokens over 128,000 words takes 2 GB each time. Where they would pass
LOGIT_FLOATS they are made a chunk of positions at a time from the head's input, and made again in
the backward pass (`torch.utils.checkpoint`); the layers below run once, as ever.

Below that it is `loss_sums(forward(...))` itself, to the bit: whatever the bundled model is asked.
Above it a matrix product of other shape may round otherwise, within the tolerances of `audit.py`.

Not covered: labels that are sampled for the curvature (`curvature.py`), which needs whole
probabilities, of at most `build.BATCH` rows; and models that do something to logits behind the head
(a cap, a scale): they are found out by trying one position, and compute their logits whole.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from workers.attribution.gradients import (
    Tape,
    forward,
    head_is_target,
    inner_of,
    keeps_positions,
    loss_sums,
)
from workers.training.data import IGNORED

LOGIT_FLOATS = 32 * 2**20
"""Logits that are computed at once: 128 MiB in float32. A full batch of the bundled model has a
quarter of it."""


def batch_losses(model: nn.Module, batch: dict[str, Tensor], tape: Tape) -> Tensor:
    """(batch,): cross entropy summed over each example's labelled positions, as `loss_sums` of a
    `forward`. The tape is emptied first."""
    wanted = batch["labels"][:, 1:] != IGNORED
    kept = wanted.any(dim=0).nonzero().squeeze(1)
    head = inner_of(model).get_output_embeddings()
    words = getattr(head, "out_features", 0)
    if len(wanted) * len(kept) * words > LOGIT_FLOATS:
        chunk = max(1, LOGIT_FLOATS // words)
        if keeps_positions(model) and not head_is_target(model, tape):
            hidden = _below_head(model, head, batch, kept, tape)
            if hidden is not None:
                return _chunked(head, hidden, wanted, kept, batch["labels"], chunk)
    return loss_sums(forward(model, batch, tape), batch["labels"])


def _below_head(
    model: nn.Module, head: Any, batch: dict[str, Tensor], kept: Tensor, tape: Tape
) -> Tensor | None:
    """(batch, kept, width): what the head is given at the kept positions; the head itself sees one.

    None where the model's logits are not simply the head's output there.
    """
    seen: list[Tensor] = []

    def first_only(_head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0][:, :1], *args[1:])

    for calls in (*tape.inputs, *tape.outputs):
        calls.clear()
    handle = head.register_forward_pre_hook(first_only)
    try:
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            logits_to_keep=kept,
        )
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].shape[:2] != (len(batch["labels"]), len(kept)):
        return None
    with torch.no_grad():
        plain = torch.equal(out.logits, head(seen[0][:, :1]))
    return seen[0] if plain else None


def _chunked(
    head: Any, hidden: Tensor, wanted: Tensor, kept: Tensor, labels: Tensor, chunk: int
) -> Tensor:
    example, position = wanted.nonzero(as_tuple=True)
    rows = hidden[example, torch.searchsorted(kept, position)]  # (n, width)
    targets = labels[example, position + 1]
    parts = [
        checkpoint(_losses, head, some, of, use_reentrant=False, preserve_rng_state=False)
        for some, of in zip(rows.split(chunk), targets.split(chunk), strict=True)
    ]
    losses = torch.cat(parts)
    return losses.new_zeros(len(labels)).index_add(0, example, losses)


def _losses(head: Any, rows: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(rows).float(), targets, reduction="none")
