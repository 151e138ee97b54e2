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
CANDIDATES = 256
"""Likeliest tokens that a draw is first looked for among. Changes no draw."""
MAX_SEED = 2**53 - 1
"""A seed is recorded in canonical JSON, whose integers end here."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Natural logs of the model's own probabilities: before temperature and cuts, as OpenAI and
    vLLM (`logprobs_mode="raw_logprobs"`, its default) report them. So they say the same of a token
    whatever it was drawn with."""

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
    """Temperature, then top-k, then top-p of what is left (transformers' order), then the draw.

    To sort a vocabulary costs more than all the rest, and nearly every draw falls among the
    likeliest: those are looked at first, and only rows for which they do not decide are sorted.
    """
    if logits.shape[-1] <= CANDIDATES:
        return _among_all(logits, draws)
    tokens = _among_likeliest(logits, draws)
    undecided = (tokens == LOST).nonzero()[:, 0].tolist()
    if undecided:
        tokens[undecided] = _among_all(logits[undecided], [draws[i] for i in undecided])
    return tokens


def _among_likeliest(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The token of each row; LOST where the likeliest `CANDIDATES` do not decide."""
    vocab = logits.shape[-1]
    heat = _column(logits, [d.temperature for d in draws])
    top_k = _column(logits, [d.top_k or vocab for d in draws])
    top_p = _column(logits, [d.top_p for d in draws])
    best, ids = _in_order(*logits.topk(CANDIDATES, dim=-1))
    rank = torch.arange(CANDIDATES, device=logits.device)[None]
    weights = ((best.double() - best[:, :1]) / heat).exp().masked_fill(rank >= top_k, 0.0)
    by_k = top_k <= CANDIDATES
    whole = ((logits.double() - best[:, :1]).div_(heat)).exp_().sum(dim=-1, keepdim=True)
    probs = weights / torch.where(by_k, weights.sum(dim=-1, keepdim=True), whole)
    kept = _kept(probs, rank, top_p) & (rank < top_k)
    cumulative = probs.masked_fill(~kept, 0.0).cumsum(dim=-1)
    # How much there is to draw from: what was kept, if a cut came in sight, or all there is.
    cut = by_k | ~kept[:, -1:]
    uncut = top_p >= 1
    total = cumulative[:, -1:].where(cut, torch.ones_like(heat))
    chosen = _draw(cumulative, total, draws)
    chosen = torch.where(cut, chosen.minimum(kept.sum(dim=-1, keepdim=True) - 1), chosen)
    # The mass that a top_k beyond the candidates leaves is not known; and a candidate as likely as
    # the last one may have an equal outside with a smaller id.
    inside = (best > best[:, -1:]).sum(dim=-1, keepdim=True)
    sure = (cut | uncut) & (by_k | (top_k >= vocab)) & (chosen < inside)
    found = ids.gather(1, chosen.clamp(max=CANDIDATES - 1))
    return torch.where(sure, found, LOST)[:, 0]


def _among_all(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The same over the whole vocabulary, sorted."""
    vocab = logits.shape[-1]
    heat = _column(logits, [d.temperature for d in draws])
    probs = torch.softmax(logits.double() / heat, dim=-1)
    probs, ids = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=logits.device)[None]
    probs = probs.masked_fill(rank >= _column(logits, [d.top_k or vocab for d in draws]), 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    probs = probs.masked_fill(~_kept(probs, rank, _column(logits, [d.top_p for d in draws])), 0.0)
    cumulative = probs.cumsum(dim=-1)
    chosen = _draw(cumulative, cumulative[:, -1:], draws)
    last = (probs > 0).sum(dim=-1, keepdim=True) - 1  # rounding may put the point past the end
    return ids.gather(1, chosen.minimum(last))[:, 0]


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _in_order(best: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """By falling score, ties by id: by id first, then stably by score."""
    ids, order = ids.sort(dim=-1)
    best, order = best.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return best, ids.gather(1, order)


def _kept(probs: Tensor, rank: Tensor, top_p: Tensor) -> Tensor:
    """Those before which less than top_p lies; always the first."""
    return (probs.cumsum(dim=-1) - probs < top_p) | (rank == 0)


def _draw(cumulative: Tensor, total: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The first place per row whose cumulative probability exceeds the random number."""
    point = _column(cumulative, [uniform(d.seed, d.step) for d in draws]) * total
    return torch.searchsorted(cumulative, point, right=True)


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
