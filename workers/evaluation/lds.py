"""The linear datamodeling score: do an attribution's scores foretell what retrained models say?

Pure numpy. For a query q, scores s (one per training row) and measured outputs f_1..f_m of models
trained on subsets S_1..S_m, the score is

    LDS(q) = Spearman( [sum of s_i over i in S_j] over j,  [f_j] over j )

and a method's LDS is the mean over queries. 1 is a perfect forecast of the order of outputs, 0 no
forecast. Outputs carry the noise of training, so that even the truth would not reach 1: `ceiling`
says how far it could come, from outputs of the same subsets under another training seed.

Intervals are percentile bootstraps over both things that were drawn: queries and subsets. All
methods are resampled with the same draws, so that the interval of a *difference* is a paired one.

Source: Ilyas et al., "Datamodels" (arXiv:2202.00622); Park et al., TRAK (arXiv:2303.14186),
section 2. Spearman with mean ranks for ties, as scipy's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ledger.errors import InvalidEvent

MIN_SUBSETS = 3
DRAWS = 1_000
LEVEL = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its interval of confidence LEVEL."""

    mean: float
    low: float
    high: float


def predictions(scores: Floats, members: NDArray[np.bool_]) -> Floats:
    """(queries, subsets): summed scores of each subset's rows.

    `scores` is (queries, rows), `members` (subsets, rows): whether the row was trained on.
    """
    if scores.ndim != 2 or members.ndim != 2 or scores.shape[1] != members.shape[1]:
        raise InvalidEvent(
            f"scores {scores.shape} and subsets {members.shape} do not speak of the same rows; "
            "expected (queries, rows) and (subsets, rows)"
        )
    if not np.isfinite(scores).all():
        raise InvalidEvent("a score is NaN or infinite; the method did not attribute this answer")
    return scores.astype(np.float64) @ members.T.astype(np.float64)


def members_of(subsets: list[tuple[int, ...]], rows: int) -> NDArray[np.bool_]:
    """(subsets, rows) membership."""
    out = np.zeros((len(subsets), rows), dtype=np.bool_)
    for i, subset in enumerate(subsets):
        out[i, list(subset)] = True
    return out


def spearman(left: Floats, right: Floats) -> Floats:
    """(n,): rank correlation of each row of two (n, m) arrays; 0 where one of them is constant."""
    return _correlation(_ranks(left), _ranks(right))


def lds(predicted: Floats, measured: Floats) -> Floats:
    """(queries,): Spearman over subsets. Both (queries, subsets), MIN_SUBSETS or more."""
    if predicted.shape != measured.shape or measured.ndim != 2:
        raise InvalidEvent(
            f"{predicted.shape} predictions of {measured.shape} outputs; expected the same shape"
        )
    if measured.shape[1] < MIN_SUBSETS:
        raise InvalidEvent(f"{measured.shape[1]} subsets; a rank correlation needs {MIN_SUBSETS}")
    return spearman(predicted, measured)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """LDS of several methods on one set of outputs."""

    scores: dict[str, Estimate]
    against: dict[tuple[str, str], Estimate]
    """(a, b) -> LDS of a minus LDS of b, paired."""
    draws: dict[str, Floats]
    """Bootstrap means (DRAWS,), aligned over methods, for pooling several comparisons."""


def compare(
    predicted: Mapping[str, Floats], measured: Floats, *, seed: int = 0, draws: int = DRAWS
) -> Comparison:
    """LDS of each method's predictions (queries, subsets) of `measured`, and all differences."""
    random = np.random.default_rng(seed)
    queries, subsets = measured.shape
    means: dict[str, float] = {n: float(lds(p, measured).mean()) for n, p in predicted.items()}
    drawn = {name: np.zeros(draws) for name in predicted}
    for draw in range(draws):
        chosen = random.integers(0, queries, queries)
        held = random.integers(0, subsets, subsets)
        truth = _ranks(measured[np.ix_(chosen, held)])
        for name, values in predicted.items():
            drawn[name][draw] = _correlation(_ranks(values[np.ix_(chosen, held)]), truth).mean()
    return pooled([(means, drawn)])


def pooled(parts: Sequence[tuple[Mapping[str, float], Mapping[str, Floats]]]) -> Comparison:
    """The mean over several comparisons (models, seeds, corpora) that name the same methods."""
    names = [n for n in parts[0][0] if all(n in means for means, _ in parts)]
    means = {n: float(np.mean([m[n] for m, _ in parts])) for n in names}
    drawn: dict[str, Floats] = {n: np.mean([d[n] for _, d in parts], axis=0) for n in names}
    return Comparison(
        scores={n: _interval(means[n], drawn[n], bound=1) for n in names},
        against={
            (a, b): _interval(means[a] - means[b], drawn[a] - drawn[b], bound=2)
            for a in names
            for b in names
            if a != b
        },
        draws=drawn,
    )


def agreement(measured: Floats, again: Floats) -> Estimate:
    """How well one training seed's outputs foretell another's, (queries, subsets) each."""
    return compare({"again": again}, measured).scores["again"]


def ceiling(agreement: float, seeds: int) -> float:
    """The LDS that the best forecast can expect of outputs averaged over `seeds` trainings.

    Their reliability is n c / (1 + (n - 1) c) for an agreement of c (Spearman and Brown), and a
    perfect forecast of the expected output correlates with them by its root.
    """
    c = max(agreement, 0.0)
    return float((seeds * c / (1 + (seeds - 1) * c)) ** 0.5)


def _interval(mean: float, drawn: Floats, *, bound: float) -> Estimate:
    # Centred on the estimate: resampling subsets makes ties, which lower every correlation a
    # little; the spread of the draws is what is wanted, not their mean (a basic correction).
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn - drawn.mean(), [tail, 1 - tail])
    return Estimate(
        mean=mean, low=max(-bound, mean + float(low)), high=min(bound, mean + float(high))
    )


def _ranks(values: Floats) -> Floats:
    """Ranks along the last axis, ties sharing their mean."""
    smaller = (values[..., None, :] < values[..., :, None]).sum(axis=-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(axis=-1)
    ranks: Floats = smaller + (equal + 1) / 2.0
    return ranks


def _correlation(left: Floats, right: Floats) -> Floats:
    left = left - left.mean(axis=-1, keepdims=True)
    right = right - right.mean(axis=-1, keepdims=True)
    size = np.sqrt((left**2).sum(axis=-1) * (right**2).sum(axis=-1))
    dots = (left * right).sum(axis=-1)
    out: Floats = np.divide(dots, size, out=np.zeros_like(dots), where=size > 0)
    return out
