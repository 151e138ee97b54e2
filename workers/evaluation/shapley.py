"""What each contributor is worth to an answer, by retraining: sampled Shapley values, and how far
our shares are from them.

Pure numpy. The game: players are contributors, and a coalition is worth the log-likelihood that a
model trained on its rows gives the answer, over what the bare base model gives it (nats). A
player's Shapley value is what he adds, averaged over all orders of joining: the one division that
sums to the whole, pays equals equally and nobody for nothing (Shapley 1953; Ghorbani & Zou,
arXiv:1904.02868).

2^players retrainings are out of reach, so coalitions are sampled (`subsets.coalitions`) with the
Shapley kernel, in pairs of a coalition and its complement, and the values are those of the linear
game that fits best and sums to the whole (KernelSHAP: Lundberg & Lee, arXiv:1705.07874; pairs:
Covert & Lee, arXiv:2012.01536). With every coalition, each at its kernel weight, that fit *is* the
Shapley value. The error of the draw is the bootstrap's over pairs.

Shares are positive parts over their sum: a contributor who made the answer less likely owes
nothing. The payout error is the total variation distance between two divisions: the part of the
money that goes to the wrong people.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from ledger.errors import InvalidEvent

DRAWS = 400
_RIDGE = 1e-9

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Values:
    """`values` (queries, players) in nats; `errors` their standard errors by bootstrap; `draws`
    (DRAWS, queries, players) the resampled values themselves."""

    values: Floats
    errors: Floats
    draws: Floats


def kernel_weight(players: int, size: int) -> float:
    """The weight of one coalition of `size` in the fit; the empty and the full one bind instead."""
    return (players - 1) / (comb(players, size) * size * (players - size))


def fit(
    members: NDArray[np.bool_], worth: Floats, whole: Floats, weights: Floats | None = None
) -> Floats:
    """(queries, players): the linear game nearest to the sampled one.

    `members` (coalitions, players), `worth` (queries, coalitions) over the empty coalition's,
    `whole` (queries,) the grand coalition's. `weights` (coalitions,) is for an enumeration; a
    sample drawn with the kernel has equal weights.
    """
    count, players = members.shape
    if worth.shape != (len(whole), count):
        raise InvalidEvent(
            f"{worth.shape} outputs of {count} coalitions and {len(whole)} queries; "
            "expected (queries, coalitions)"
        )
    if players == 1:
        return whole[:, None].copy()
    # The sum is bound by leaving the last player out: value = whole - the others' values.
    inside = members.astype(np.float64)
    design = inside[:, :-1] - inside[:, -1:]
    target = worth - whole[:, None] * inside[:, -1]
    weight = np.ones(count) if weights is None else weights
    gram = design.T @ (design * weight[:, None])
    gram += _RIDGE * max(1.0, float(np.trace(gram))) * np.eye(players - 1)
    others = np.linalg.solve(gram, design.T @ (target * weight).T).T
    return np.concatenate([others, (whole - others.sum(axis=1))[:, None]], axis=1)


def sampled(
    members: NDArray[np.bool_], worth: Floats, whole: Floats, *, seed: int = 0, draws: int = DRAWS
) -> Values:
    """Shapley values with the Monte-Carlo error of the draw.

    Coalitions stand in pairs, each beside its complement, and pairs are what is resampled.
    """
    count = len(members)
    if count % 2 or not (members[0::2] ^ members[1::2]).all():
        raise InvalidEvent("coalitions stand in pairs, each beside its complement")
    random = np.random.default_rng(seed)
    values = fit(members, worth, whole)
    out = np.zeros((draws, *values.shape))
    for draw in range(draws):
        first = 2 * random.integers(0, count // 2, count // 2)
        chosen = np.concatenate([first, first + 1])
        out[draw] = fit(members[chosen], worth[:, chosen], whole)
    return Values(values=values, errors=out.std(axis=0), draws=out)


def exact(worth: Mapping[frozenset[int], float], players: int) -> Floats:
    """(players,): Shapley values of a game given whole, by enumeration. For small games."""
    values = np.zeros(players)
    for coalition, value in worth.items():
        size = len(coalition)
        for player in range(players):
            if player in coalition:
                values[player] += value / (players * comb(players - 1, size - 1))
            else:
                values[player] -= value / (players * comb(players - 1, size))
    return values


def shares(values: Floats) -> Floats | None:
    """(players,) non-negative, summing to 1; None when nobody is worth anything."""
    positive = values.clip(min=0.0)
    total = float(positive.sum())
    return positive / total if total > 0 else None


def total_variation(left: Floats, right: Floats) -> float:
    """Half the summed differences of two divisions: 0 the same, 1 nothing in common."""
    return float(np.abs(left - right).sum()) / 2


@dataclass(frozen=True, kw_only=True)
class PayoutError:
    """Total variation to the Shapley shares, means over answers where those exist.

    `attributed`: our shares over what was attributed, renormalised. `paid`: the unattributed part
    counted as a payee that Shapley gives nothing. `uniform`: everybody alike. `period`: shares
    summed over all answers first, as a period's payout does. `noise`: between two Shapley
    estimates of the same answers, resampled: what an error of 0 would show.
    """

    answers: int
    skipped: int
    attributed: float
    paid: float
    uniform: float
    period: float
    period_uniform: float
    noise: float
    each: list[float]
    each_uniform: list[float]


def payout_error(
    truth: Values, ours: Sequence[Mapping[str, int]], names: Sequence[str]
) -> PayoutError:
    """How far `ours`, one {contributor: ppm} per answer, is from the Shapley shares.

    An answer that no contributor made likelier has no shares to be compared with: skipped. One
    that we attribute to nobody is compared as if all were paid alike, which is what is known.
    """
    even = np.full(len(names), 1 / len(names))
    fair, got, paid, noise = [], [], [], []
    for n, answer in enumerate(ours):
        right = shares(truth.values[n])
        if right is None:
            continue
        ppm = np.array([answer.get(name, 0) for name in names], dtype=np.float64)
        given = ppm.sum()
        fair.append(right)
        got.append(ppm / given if given else even)
        paid.append(total_variation(ppm / 1e6, right) + (1 - given / 1e6) / 2)
        resampled = [shares(draw[n]) for draw in truth.draws]
        noise += [total_variation(r, right) for r in resampled if r is not None]
    if not fair:
        raise InvalidEvent(
            "no contributor made any of the answers likelier: there is no payout to compare with"
        )
    each = [total_variation(g, f) for g, f in zip(got, fair, strict=True)]
    each_uniform = [total_variation(even, f) for f in fair]
    pooled = np.mean(fair, axis=0)
    return PayoutError(
        answers=len(fair),
        skipped=len(ours) - len(fair),
        attributed=float(np.mean(each)),
        paid=float(np.mean(paid)),
        uniform=float(np.mean(each_uniform)),
        period=total_variation(np.mean(got, axis=0), pooled),
        period_uniform=total_variation(even, pooled),
        noise=float(np.mean(noise)),
        each=each,
        each_uniform=each_uniform,
    )
