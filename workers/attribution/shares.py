"""From integer scores to integer shares: the rule that pays. Pure: no tensors, no floats.

An auditor holds the committed index (rows with contributor and cluster), the scores (which
`query.scores_from_sketch` recomputes bit for bit from a committed sketch) and the two levels, and
gets the same shares from this module, to the last ppm, on any machine.

The rule, in this order (DESIGN.md, "Attribution"; docs/ATTRIBUTION.md has what was measured):

1. Near-duplicates are one voice: only a cluster's representative (its earliest registration)
   counts; every copy counts 0, whoever sent it. A copy stays silent when its representative was
   withdrawn: else a thief would earn once the author takes the text back.
2. A row weighs what it scores, less what is noise: with the *noise level* n, a score s > n weighs
   s - n⁴/s³, any other nothing. That is 0 at the level and nearly s from twice of it: no cliff to
   climb, and a row that stands out is not shortened. Negative scores are thus clipped *per
   example*. Clipping after summing would let a contributor's harmful rows eat the credit of good
   ones, and reward splitting into two identities.
3. Weights are summed per contributor. Sums are additive in rows, so one person under ten names
   gets what one name gets.
4. The unattributed part follows from the *placebo level* p, which the best row reaches for a text
   of the same words without sense, and the best score b: all of it up to b = p, then (p/b)². An
   answer that no row stands out for is wholly unattributed; one barely above the level is barely
   attributed.
5. What rows weigh that earn nothing any more (withdrawn) is unattributed too, never spread.
6. An event holds `limit` shares at most: the smallest beyond it are unattributed, not spread over
   the others.
7. Largest remainder, ties by contributor id, exactly 1,000,000 ppm with the unattributed part.

Scores have up to 54 bits. Weights are computed from the leading WEIGHT_BITS of them, so that every
step fits into 64 bits: rule 2 for 100,000 rows takes a millisecond.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ledger.domain.events import MAX_SHARES
from ledger.domain.money import PPM_WHOLE, split_exactly
from ledger.errors import InvalidEvent

WEIGHT_BITS = 20
"""Leading bits of the best score that weights are computed from: a millionth of it."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """`contributors`: (id, ppm > 0) by id; with `unattributed_ppm` they sum to PPM_WHOLE."""

    contributors: list[tuple[str, int]]
    unattributed_ppm: int


def shares_from_scores(
    scores: Sequence[int],
    contributors: Sequence[str],
    clusters: Sequence[int],
    placebo: int,
    *,
    noise: int = 0,
    withdrawn: Collection[int] = (),
    limit: int = MAX_SHARES,
) -> Shares:
    """Shares of one answer in ppm. Row i scored `scores[i]` and belongs to `contributors[i]`.

    `clusters[i]` is the row index of i's representative (i itself when it represents). `placebo`
    and `noise` are the levels in the unit of the scores; both 0 attribute everything that is
    positive. Rows in `withdrawn` weigh, and earn nothing. Raises InvalidEvent when the lengths
    differ, a cluster points outside the rows or to a row that represents nobody, or a value is no
    integer.
    """
    _check(scores, contributors, clusters, placebo, noise)
    speaking = [row for row, cluster in enumerate(clusters) if cluster == row]
    best = max((scores[row] for row in speaking), default=0)
    shift = shift_of(best, noise)
    weights = {row: weight_of(scores[row], noise, shift) for row in speaking}
    return shares_from_voices(
        ((contributors[row], weight) for row, weight in weights.items() if row not in withdrawn),
        placebo=placebo,
        best=best,
        lost=sum(weight for row, weight in weights.items() if row in withdrawn),
        limit=limit,
    )


def shift_of(best: int, noise: int) -> int:
    """How many low bits of every score are left out, given the best score that speaks."""
    return max(0, max(best, noise).bit_length() - WEIGHT_BITS)


def weight_of(score: int, noise: int, shift: int) -> int:
    """s - n⁴/s³ in units of 2^shift, rounded as written: (n² / s)² / s, each division down."""
    score, noise = score >> shift, noise >> shift
    if score <= noise:
        return 0
    return score - (noise * noise // score) ** 2 // score


def shares_from_voices(
    voices: Iterable[tuple[str, int]],
    *,
    placebo: int,
    best: int,
    lost: int = 0,
    limit: int = MAX_SHARES,
) -> Shares:
    """Rules 3 to 7 for (contributor, weight >= 0) of the rows that count.

    `best` is the best score among them, `lost` the weight of rows that earn nothing any more.
    """
    weights: dict[str, int] = {}
    for name, weight in voices:
        if weight:
            weights[name] = weights.get(name, 0) + weight
    if not weights or best <= placebo:
        return Shares(contributors=[], unattributed_ppm=PPM_WHOLE)
    kept = dict(sorted(weights.items(), key=lambda item: (-item[1], item[0]))[:limit])
    # Rounded up, twice: a doubtful ppm is nobody's.
    attributed = PPM_WHOLE - -(-PPM_WHOLE * placebo * placebo // (best * best))
    budget = attributed * sum(kept.values()) // (sum(weights.values()) + lost)
    paid = split_exactly(budget, kept)
    lines = sorted((name, ppm) for name, ppm in paid.items() if ppm)
    return Shares(contributors=lines, unattributed_ppm=PPM_WHOLE - budget)


def _check(
    scores: Sequence[int],
    contributors: Sequence[str],
    clusters: Sequence[int],
    placebo: int,
    noise: int,
) -> None:
    count = len(scores)
    if len(contributors) != count or len(clusters) != count:
        raise InvalidEvent(
            f"{count} scores, {len(contributors)} contributors and {len(clusters)} clusters; "
            "expected one of each per row of the index"
        )
    for name, level in (("placebo", placebo), ("noise", noise)):
        if not _whole(level) or level < 0:
            raise InvalidEvent(f"the {name} level is {level!r}; expected an integer of 0 or more")
    for row, (score, cluster) in enumerate(zip(scores, clusters, strict=True)):
        if not _whole(score) or not _whole(cluster):
            raise InvalidEvent(f"row {row}: score and cluster must be integers, not floats")
        if not 0 <= cluster < count or clusters[cluster] != cluster:
            raise InvalidEvent(f"row {row}: cluster {cluster} is not a row that represents itself")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
