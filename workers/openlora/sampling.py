"""Logits to token ids, so that anyone who has the logits can draw the same token again.

The random number of a request's n-th token is SHA-256 of its seed and n: no state, no library
version, and no other row of the batch has a part in it. The token is the first one whose
cumulative probability, in descending order with ties by id, exceeds that number. (Logits
themselves differ in the last bits between batch shapes, so equal draws are as equal as those.)
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DOMAIN = b"tributary/sample/v1\n"
MAX_TEMPERATURE = 2.0
LOST = -1
"""In place of a token id: the logits are not numbers that one could be drawn from."""
MAX_SEED = 2**53 - 1
"""A seed is recorded in canonical JSON, whose integers end here."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Natural logs of the model's own probabilities (before temperature and cuts)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What to draw for one row: its request's parameters and which of its tokens this is."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    step: int


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1) that decides token `step` of a request with `seed`."""
    digest = hashlib.sha256(DOMAIN + seed.to_bytes(8, "big") + step.to_bytes(8, "big")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token id per row of `logits` (rows, vocab). Temperature 0 takes the largest logit.

    LOST for a row whose largest logit is no finite number.
    """
    best, ids = logits.max(dim=-1)
    tokens: list[int] = torch.where(best.isfinite(), ids, LOST).tolist()
    drawn = [i for i, draw in enumerate(draws) if draw.temperature > 0 and tokens[i] != LOST]
    if drawn:
        for i, token in zip(
            drawn, _sample(logits[drawn], [draws[i] for i in drawn]).tolist(), strict=True
        ):
            tokens[i] = token
    return tokens


def _sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Temperature, then top-k, then top-p of what is left (transformers' order), then the draw."""
    vocab = logits.shape[-1]

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    heat = column([d.temperature for d in draws])
    probs = torch.softmax(logits.double() / heat, dim=-1)
    probs, ids = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=logits.device)[None]
    top_k = column([d.top_k or vocab for d in draws])
    probs = probs.masked_fill(rank >= top_k, 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    before = probs.cumsum(dim=-1) - probs  # the first is always kept: nothing comes before it
    probs = probs.masked_fill((before >= column([d.top_p for d in draws])) & (rank > 0), 0.0)
    cumulative = probs.cumsum(dim=-1)
    point = column([uniform(d.seed, d.step) for d in draws]) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, point, right=True)
    last = (probs > 0).sum(dim=-1, keepdim=True) - 1  # rounding may put the point past the end
    return ids.gather(1, chosen.minimum(last))[:, 0]


def logprobs(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """Per row of `logits` (rows, vocab): the log probability of its token, and of the likeliest."""
    logs = torch.log_softmax(logits.float(), dim=-1)
    own = logs.gather(1, torch.tensor(tokens, device=logs.device)[:, None])[:, 0].tolist()
    values, ids = logs.topk(min(max(tops), logs.shape[1]), dim=-1)
    likeliest = [
        tuple(zip(i[:top], v[:top], strict=True))
        for i, v, top in zip(ids.tolist(), values.tolist(), tops, strict=True)
    ]
    return [
        TokenLogprob(token_id=token, logprob=log, top=top)
        for token, log, top in zip(tokens, own, likeliest, strict=True)
    ]
